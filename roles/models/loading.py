"""Which implementation plays a model, and its loading: what `rolecall.roles.models.load` does."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rolecall.protocols.errors import ModelError
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.models.families import FAMILIES, Family
from rolecall.roles.models.families.common import stops_of
from rolecall.roles.models.folder import LOST, check_model, is_gguf, log, source_of
from rolecall.roles.models.huggingface import load_huggingface
from rolecall.roles.models.native import NativeModel
from rolecall.roles.models.reading import read_gguf, read_into, weight_files
from rolecall.roles.models.spec import ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_causal(path: str, *, dtype: str = "float32", device: str = "cpu", native: bool | None = None, pad_vocab: int = 64) -> CausalModel:
    """What `rolecall.roles.models.load` does."""
    check_device(dtype, device)
    if pad_vocab < 1:
        raise ModelError("The vocabulary is padded to a multiple of at least 1.", ask=f"pad_vocab={pad_vocab}", remedy="give 64, or 1")
    check_model(path, tokenizer=False)
    if native is False:
        return _fallback(path, "as asked", dtype=DTYPES[dtype], device=device)
    config = read_config(path)
    try:
        family, spec = family_of(config)
    except ModelError as reason:
        if native:
            raise
        return _fallback(path, str(reason), dtype=DTYPES[dtype], device=device)
    return _load_native(path, family, spec, config, dtype=DTYPES[dtype], device=device, pad_vocab=pad_vocab)


def read_config(path: str) -> Any:
    """The transformers config of a model. Raises ModelError if it can't be read."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    name, options = source_of(path)
    try:
        return AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"The model {path} can't be loaded: {reason}", remedy=_remedy(name)) from error


def _remedy(name: str) -> str:
    """What to do about a config that transformers does not take: a family that nobody here knows is no damaged folder."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig, __version__

    try:
        kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    except (OSError, ValueError):
        kind = None
    if kind is None or kind in CONFIG_MAPPING:
        return "check that the folder is whole; for a hub name, that it is spelt right and the hub can be reached"
    return f"use a model of a family that transformers {__version__} knows, best of {', '.join(FAMILIES)}; {kind!r} is none of them"


def family_of(config: Any) -> tuple[Family, ModelSpec]:
    """The family of a config, and its spec.

    Raises:
        ModelError: the family, or a setting of the config, is not among those that our decoder has.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(f"there is no family {config.model_type!r} here.", have=", ".join(FAMILIES))
    if getattr(config, "quantization_config", None):
        raise ModelError("its weights are quantised.", remedy="use a float32 or bfloat16 copy of the model")
    return family, family.spec(config)


def check_device(dtype: str, device: str) -> None:
    """Raise ModelError for a dtype that is unknown, a device that is not there, or one that lacks the dtype."""
    if dtype not in DTYPES:
        raise ModelError(f"There is no dtype {dtype!r}.", have=", ".join(DTYPES), remedy="choose one of these")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"There is no device {device!r}.", have="cpu, cuda:0, …", remedy="choose one of these") from error
    if where.type == "cuda":
        count = torch.cuda.device_count()
        if (where.index or 0) >= count:
            raise ModelError(
                f"There is no device {device!r}.",
                have=f"{count} CUDA devices",
                remedy='give this pool GPUs, or use device="cpu"',
            )
        if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ModelError(
                f"{torch.cuda.get_device_name(where)} does not compute in bfloat16.",
                remedy='use dtype="float16" to sample and dtype="float32" to train',
            )
    elif where.type == "mps" and dtype == "float64":
        raise ModelError("An Apple GPU has no float64.", remedy='use dtype="float32", or device="cpu"')


def check_sense(path: str, spec: ModelSpec) -> None:
    """Raise ModelError for a config whose numbers can't be true together."""
    sizes = ("layers", "heads", "kv_heads", "head_dim", "hidden", "intermediate", "vocab", "max_positions")
    small = [f"{name}={getattr(spec, name)}" for name in sizes if getattr(spec, name) < 1]
    wrong = [f"sizes are at least 1, not {', '.join(small)}"] if small else []
    if not small and spec.heads % spec.kv_heads:
        wrong.append(f"{spec.heads} query heads are no multiple of {spec.kv_heads} key heads")
    if spec.head_dim % 2:
        wrong.append(f"heads of {spec.head_dim} numbers can't be rotated in pairs")
    if len(spec.windows) != spec.layers:
        wrong.append(f"layer_types names {len(spec.windows)} layers of {spec.layers}")
    if wrong:
        raise ModelError(f"The config of {path} makes no sense: {'; '.join(wrong)}.", remedy="use the config.json that came with the model")


def _fallback(path: str, reason: str, *, dtype: torch.dtype, device: str) -> CausalModel:
    """A Hugging Face class, with what can't be had said in the log."""
    model = load_huggingface(path, dtype=dtype, device=device)
    model.notes = (f"{path} runs as its Hugging Face class: {reason}", f"so there is {LOST}", *model.notes)
    log.warning("%s", "; ".join(model.notes))
    return model


def _load_native(
    path: str, family: Family, spec: ModelSpec, config: Any, *, dtype: torch.dtype, device: str, pad_vocab: int
) -> NativeModel:
    check_sense(path, spec)
    generation = None if is_gguf(path) else _generation(path)
    spec = dataclasses.replace(spec, stops=stops_of(generation, config))
    try:
        files = [] if is_gguf(path) else weight_files(path)
    except OSError as error:
        raise ModelError(
            f"The model {path} can't be loaded: {str(error).strip().splitlines()[0]}",
            remedy="check that the name is spelt right and the hub can be reached",
        ) from error
    model = NativeModel(family, spec, config, generation, dtype=dtype, device=device, pad_vocab=pad_vocab)
    if is_gguf(path):
        read_gguf(path, model.named_tensors())
        return model
    read_into(path, files, model.named_tensors(), ignored=("lm_head.weight",) if spec.tied else ())
    return model


def _generation(path: str) -> Any:
    """The generation config, or None where there is none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source_of(path)[0])
    except (OSError, ValueError):
        return None

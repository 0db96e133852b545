"""Checkpoints of a policy: a Hugging Face model folder with the optimiser's state beside the model.

```
config.json, model.safetensors, tokenizer.json, …   plain transformers loads the folder as it is, or, with LoRA,
adapter_config.json, adapter_model.safetensors, …   peft does
optimiser.tensors                                   moments of the gradient, master weights
policy.json                                         version, updates applied
digests.json                                        sha256 of every other file
```
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rolecall.protocols.errors import ModelError
from rolecall.roles.folders import new_folder
from rolecall.roles.models import load
from rolecall.roles.models.adapters import Adapters, read_tensors
from rolecall.roles.models.heads import Head, read_heads, write_heads
from rolecall.roles.models.lora import read_lora
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from rolecall.roles.policy.training import Training

# The first is in safetensors' format; it is not named so because vLLM reads every *.safetensors of a folder as a part of the model.
OPTIMISER, FACTS, DIGESTS = "optimiser.tensors", "policy.json", "digests.json"


class Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint says besides tensors."""

    version: int  # of the weights
    steps: int  # updates applied by this optimiser
    dtype: str  # of the parameters
    base: str = ""  # digest of the frozen weights that adapters are for; "" where all weights are in the checkpoint


def write(folder: str | Path, training: Training, facts: Facts) -> None:
    """Write a new checkpoint folder, whole or not at all. Raises ModelError if the folder exists already."""
    with new_folder(folder, ModelError) as aside:
        if training.adapters is None:
            training.model.write(aside, training.tokenizer)
        else:
            training.adapters.save(aside, training.source)
            training.tokenizer.save_pretrained(str(aside))
            facts = msgspec.structs.replace(facts, base=training.base)
        write_heads(aside, training.model.heads)
        save_file(training.optimiser.tensors(), aside / OPTIMISER)
        (aside / FACTS).write_bytes(msgspec.json.encode(facts))
        digests = {path.name: _digest(path) for path in sorted(aside.iterdir())}
        (aside / DIGESTS).write_bytes(msgspec.json.format(msgspec.json.encode(digests)))


def read(folder: str | Path, device: str) -> tuple[Facts, dict[str, Tensor]]:
    """The facts and the optimiser's state of a checkpoint, after every file in it has been verified.

    Raises:
        ModelError: it is no checkpoint of ours, or a file in it is missing or has changed.
    """
    path = Path(folder)
    try:
        digests = msgspec.json.decode((path / DIGESTS).read_bytes(), type=dict[str, str])
        for name, digest in digests.items():
            if Path(name).name != name or not (path / name).is_file():
                raise ModelError(f"The checkpoint {path} lacks {name}.", remedy="restore from another checkpoint")
            if _digest(path / name) != digest:
                raise ModelError(f"{path / name} has changed since it was saved.", remedy="restore from another checkpoint")
        if not {OPTIMISER, FACTS} <= digests.keys():
            raise ModelError(f"The checkpoint {path} has no state of the optimiser.", remedy="restore from a folder that policy.save wrote")
        facts = msgspec.json.decode((path / FACTS).read_bytes(), type=Facts)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is no checkpoint: {error}", have=_listing(path), remedy="give a folder that policy.save wrote") from error
    return facts, load_file(path / OPTIMISER, device=device)


def restore(folder: str | Path, training: Training, dtype: str) -> Facts:
    """Give a model and its optimiser the state of a checkpoint.

    Raises:
        ModelError: as `read`, or the checkpoint is of another dtype or model; nothing has changed then.
    """
    model = training.model
    facts, state = read(folder, str(model.device))
    if facts.dtype != dtype:
        raise ModelError(f"The checkpoint {folder} is in {facts.dtype}.", ask=dtype, remedy=f"set dtype={facts.dtype!r}")
    if bool(facts.base) != (training.adapters is not None):
        have = "adapters for frozen weights" if facts.base else "all weights of a model, without adapters"
        remedy = "set lora as in the run it is of" if facts.base else "leave lora out, or start the policy with this folder as its model"
        raise ModelError(f"The checkpoint {folder} is of another kind of training.", have=have, remedy=remedy)
    if training.adapters is not None:
        _restore_adapters(folder, training, training.adapters, facts, state)
        return facts
    saved = load(str(folder), dtype=dtype, device=str(model.device)).named_tensors()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_tensors().items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in saved.items()}:
        raise ModelError(f"The checkpoint {folder} is of another model.", remedy="start the policy with the model it was saved from")
    heads = _saved_heads(folder, training)
    _restore_optimiser(folder, training, facts, state)
    model.load_tensors(saved)
    _take_heads(heads, training)
    training.gradients.clear()
    return facts


def _restore_adapters(folder: str | Path, training: Training, adapters: Adapters, facts: Facts, state: dict[str, Tensor]) -> None:
    """Give adapters and their optimiser the state of a checkpoint. Raises ModelError if it is for other weights or other adapters."""
    if facts.base != training.base:
        raise ModelError(f"The checkpoint {folder} is of another model.", remedy="start the policy with the model it was saved from")
    there, _ = read_lora(folder)
    if there.scale != adapters.lora.scale:
        raise ModelError(
            f"The adapters in {folder} are scaled otherwise.",
            ask=f"{adapters.lora.scale:g}",
            have=f"{there.scale:g}",
            remedy=f"set r={there.r}, alpha={there.alpha:g}",
        )
    tensors = read_tensors(folder)
    adapters.check(tensors, str(folder))
    heads = _saved_heads(folder, training)
    _restore_optimiser(folder, training, facts, state)
    adapters.take(tensors)
    _take_heads(heads, training)
    training.gradients.clear()


def _restore_optimiser(folder: str | Path, training: Training, facts: Facts, state: dict[str, Tensor]) -> None:
    try:
        training.optimiser.restore(state, facts.steps)
    except KeyError as error:
        raise ModelError(
            f"The optimiser in {folder} trained other parameters: it has no {error}.", remedy="freeze and adapt as in the run it is of"
        ) from error


def _saved_heads(folder: str | Path, training: Training) -> dict[str, Head]:
    """The heads in a checkpoint. Raises ModelError unless they are the policy's."""
    model = training.model
    saved = read_heads(folder, hidden=model.spec.hidden, dtype=model.dtype, device=model.device)
    if {name: head.spec for name, head in saved.items()} != {name: head.spec for name, head in model.heads.items()}:
        raise ModelError(
            f"The checkpoint {folder} has other heads.",
            ask=", ".join(sorted(model.heads)) or "none",
            have=", ".join(sorted(saved)) or "none",
            remedy="start the policy with the heads it was saved with",
        )
    return saved


def _take_heads(saved: dict[str, Head], training: Training) -> None:
    for name, head in saved.items():
        training.model.heads[name].load_state_dict(head.state_dict())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listing(path: Path) -> str:
    return ", ".join(sorted(entry.name for entry in path.iterdir())[:20]) or "an empty folder" if path.is_dir() else "no such folder"

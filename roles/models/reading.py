"""Weights from disk into a model, one tensor at a time, each looked at before it is believed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from rolecall.protocols.errors import ModelError
from torch import Tensor

SHOWN = 6  # names listed in an error
BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")  # constants that old checkpoints carry along


def weight_files(path: str) -> list[Path]:
    """The safetensors files of a local folder or of a hub name, which are downloaded.

    Raises:
        ModelError: there are none, the index is damaged, or one that it names is missing.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return _downloaded(path)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    files = [folder / name for name in _named_files(index)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"The weights of {path} are not whole: its index names files that are missing.",
            ask=_some(missing),
            have=_some(sorted(file.name for file in folder.glob("*.safetensors"))) or "no safetensors file",
            remedy="finish the download",
        )
    return files


def read_into(path: str, files: Iterable[Path], wanted: Mapping[str, Tensor], *, ignored: Iterable[str] = ()) -> None:
    """Copy every tensor of a checkpoint into its place.

    Only one tensor at a time is held beside the model; dtype and device follow the model's.

    Args:
        path: what messages call the model.
        wanted: name → tensor to be overwritten.
        ignored: names that may be there and are left aside, such as a head that is tied.

    Raises:
        ModelError: a file is damaged, tensors are missing, unknown or of another shape (all are listed), or a number in one
            is not finite, or not in the model's dtype.
    """
    places, faulty, large = _inventory(path, files), [], []
    there = {name for name in places if name not in set(ignored) and not name.endswith(BUFFERS)}
    check_names(path, wanted.keys(), there)
    shapes = {name: shape for name, (_, shape) in places.items()}
    check_shapes(path, {name: (shapes[name], tuple(place.shape)) for name, place in wanted.items()})
    by_file: dict[Path, list[str]] = {}
    for name in wanted:
        by_file.setdefault(places[name][0], []).append(name)
    for file, names in by_file.items():
        with _opened(path, file) as source:
            for name in names:
                tensor, place = source.get_tensor(name), wanted[name]
                if not torch.isfinite(tensor).all():
                    faulty.append(name)
                elif place.dtype == torch.float16 != tensor.dtype and tensor.abs().max() > torch.finfo(torch.float16).max:
                    large.append(name)
                place.copy_(tensor)
    check_finite(path, faulty)
    if large:
        raise ModelError(
            f"{len(large)} tensors of {path} hold numbers too large for float16: {_some(large)}.",
            remedy='load it with dtype="bfloat16" or "float32"',
        )


@torch.no_grad()
def read_gguf(path: str, wanted: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a GGUF file into their places. transformers dequantises them, all at once: the model is held twice.

    Raises:
        ModelError: the file can't be read, holds another model than its own description says, or numbers that are not finite.
    """
    from rolecall.roles.models.huggingface import from_transformers

    theirs = dict(from_transformers(path, dtype=torch.float32).named_parameters())
    check_names(path, wanted.keys(), set(theirs))
    check_shapes(path, {name: (tuple(theirs[name].shape), tuple(place.shape)) for name, place in wanted.items()})
    for name, tensor in wanted.items():
        tensor.copy_(theirs[name])


def check_names(path: str, wanted: Iterable[str], there: set[str]) -> None:
    """Raise ModelError for names that are missing, each with the nearest of those that are there for nothing, or unknown."""
    missing, unknown = sorted(set(wanted) - there), sorted(there - set(wanted))
    if missing:
        pairs = [f"{name}{_nearest(name, unknown)}" for name in missing[:SHOWN]]
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise ModelError(
            f"The weights of {path} are not whole.",
            ask=f"{len(missing)} more tensors: {', '.join(pairs)}{more}",
            have=f"{len(unknown)} tensors that the model does not have: {_some(unknown)}" if unknown else "",
            remedy="download or save the model again, or use the config.json that belongs to these weights",
        )
    if unknown:
        raise ModelError(
            f"The weights of {path} hold {len(unknown)} tensors that a model of its config does not have: {_some(unknown)}.",
            remedy="use the config.json that belongs to these weights, or load with native=False, where transformers leaves them aside",
        )


def check_shapes(path: str, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Raise ModelError unless each tensor's own shape, the first, is that of its place, the second; all that differ are told."""
    odd = [f"{name} is {own}, its place {place}" for name, (own, place) in shapes.items() if own != place]
    if odd:
        raise ModelError(
            f"{len(odd)} tensors of {path} have another shape than its config says: {_some(odd)}.",
            remedy="use the config.json that belongs to these weights",
        )


def check_finite(path: str, faulty: list[str]) -> None:
    """Raise ModelError if there are tensors, named here, with numbers that are not finite."""
    if faulty:
        raise ModelError(
            f"{len(faulty)} tensors of {path} hold numbers that are not finite (NaN or infinity): {_some(faulty)}.",
            remedy="use an earlier checkpoint; training that wrote this one has diverged",
        )


def _inventory(path: str, files: Iterable[Path]) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Tensor name → its file and shape."""
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        with _opened(path, file) as source:
            found |= {name: (file, tuple(source.get_slice(name).get_shape())) for name in source.keys()}  # noqa: SIM118
    return found


def _opened(path: str, file: Path):  # type: ignore[no-untyped-def]  # noqa: ANN202
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"The model {path} can't be loaded: {file.name} ({file.stat().st_size} bytes) is damaged or cut short: {error}",
            remedy="download or copy this file again",
        ) from error


def _named_files(index: Path) -> list[str]:
    """File names of an index."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({Path(str(name)).name for name in names})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} is no index of weights: {error!r}", remedy="download it again") from error


def _downloaded(name: str) -> list[Path]:
    """The files of a hub name."""
    from transformers.utils.hub import cached_file

    single = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return [Path(single)]
    index = cached_file(name, "model.safetensors.index.json")
    return [Path(str(cached_file(name, file))) for file in _named_files(Path(str(index)))]


def _nearest(name: str, others: Iterable[str]) -> str:
    """Which of the others a name may have been meant for, in brackets; empty if none is like it."""
    found = difflib.get_close_matches(name, list(others), n=1, cutoff=0.8)
    return f" (nearest: {found[0]})" if found else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")

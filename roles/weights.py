"""Weights on their way from the policy to whoever samples with them: shards with digests, checked whole before any is used.

E tensors, B bytes of a shard.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import xxhash
from rolecall.protocols.errors import WeightsError
from rolecall.protocols.messages import Tensor as Entry
from rolecall.protocols.messages import Weights
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
ALIGN = 64  # bytes; tensors start at multiples of it


def divide(sizes: Mapping[str, int], shards: int) -> list[list[str]]:
    """Names for each shard, so that the shards are about equally large; every member computes the same."""
    loads = [0] * shards
    names: list[list[str]] = [[] for _ in range(shards)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        shard = loads.index(min(loads))
        loads[shard] += sizes[name]
        names[shard].append(name)
    return [sorted(part) for part in names]


def export(
    tensors: Mapping[str, Tensor],
    version: int,
    shard: int = 0,
    shards: int = 1,
    dtype: str | None = None,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> Weights:
    """Copy one shard of a model's tensors into a message.

    Args:
        tensors: name → tensor of the whole model, on any device.
        version: of these weights.
        shard, shards: which part this member sends, of how many.
        dtype: to send floating-point tensors in; their own without it.
        change: from a name and its tensor to what is sent, of the same shape and dtype; asked for one tensor at a time.
    """
    names = divide({name: tensor.numel() for name, tensor in tensors.items()}, shards)[shard]
    manifest: list[Entry] = []
    offset = 0
    for name in names:
        tensor = tensors[name]
        kind = DTYPES[dtype] if dtype and tensor.is_floating_point() else tensor.dtype
        nbytes = tensor.numel() * kind.itemsize
        manifest.append(Entry(name=name, dtype=str(kind)[6:], shape=tuple(tensor.shape), offset=offset, nbytes=nbytes, digest=""))
        offset += -(-nbytes // ALIGN) * ALIGN
    data = np.zeros(offset, dtype=np.uint8)
    for number, entry in enumerate(manifest):
        piece = data[entry.offset : entry.offset + entry.nbytes]
        tensor = tensors[entry.name]
        _as_tensor(piece, entry).copy_(tensor if change is None else change(entry.name, tensor))
        manifest[number] = Entry(
            name=entry.name,
            dtype=entry.dtype,
            shape=entry.shape,
            offset=entry.offset,
            nbytes=entry.nbytes,
            digest=xxhash.xxh3_128_hexdigest(piece.data),
        )
    return Weights(version=version, shard=shard, shards=shards, names=tuple(sorted(tensors)), manifest=tuple(manifest), data=data)


def assemble(parts: Sequence[Weights], expected: Mapping[str, Tensor | Sequence[int]] | None = None) -> dict[str, Tensor]:
    """The tensors of all shards, after every one has been verified.

    Args:
        parts: one message a shard, in any order.
        expected: name → tensor or shape of the model that will take them; dtypes may differ.

    Returns:
        Name → tensor: views of the messages' data, to be copied from and never written to.

    Raises:
        WeightsError: shards are missing, doubled or of several versions; a tensor is missing, unknown, of another shape, or
            its bytes are not those that were sent. Says which shard and tensor. Nothing of the receiver was touched.
    """
    _check_shards(parts)
    found: dict[str, Tensor] = {}
    for part in sorted(parts, key=lambda part: part.shard):
        for entry in part.manifest:
            if entry.name in found:
                raise _error(part, entry, "comes twice")
            if entry.name not in part.names:
                raise _error(part, entry, "is not among the names of this version")
            found[entry.name] = _verified(part, entry)
    missing = sorted(set(parts[0].names) - found.keys())
    if missing:
        raise WeightsError(
            f"Weights of version {parts[0].version}: {len(missing)} tensors are in no shard, such as {missing[0]}. Publish them again.",
            shard=-1,
            tensor=missing[0],
        )
    if expected is not None:
        _check_expected(parts, found, expected)
    return found


def version_digest(parts: Sequence[Weights]) -> str:
    """Digest (32 hexadecimal digits) of all tensors of a version, however they were sharded."""
    lines = sorted(f"{entry.name} {entry.dtype} {list(entry.shape)} {entry.digest}" for part in parts for entry in part.manifest)
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest (32 hexadecimal digits) of a model's tensors, the one that `version_digest` tells of them when they are published."""
    lines = []
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        lines.append(f"{name} {str(tensor.dtype)[6:]} {list(tensor.shape)} {xxhash.xxh3_128_hexdigest(data.data)}")
    return xxhash.xxh3_128_hexdigest("\n".join(sorted(lines)).encode())


def _check_shards(parts: Sequence[Weights]) -> None:
    """One version, each shard once, all agreeing on what there is."""
    if not parts:
        raise WeightsError("No weights came: not one shard. Publish them again.", shard=-1, tensor="")
    first = parts[0]
    for part in parts:
        if part.version != first.version:
            raise WeightsError(
                f"Shard {part.shard} holds version {part.version}, shard {first.shard} version {first.version}. "
                "Publish again, from all members between the same updates.",
                shard=part.shard,
                tensor="",
            )
        if (part.shards, part.names) != (first.shards, first.names):
            raise WeightsError(f"Shard {part.shard} was cut from another model than shard {first.shard}.", shard=part.shard, tensor="")
    counts = Counter(part.shard for part in parts)
    doubled = sorted(shard for shard, count in counts.items() if count > 1)
    absent = sorted(set(range(first.shards)) - counts.keys())
    if doubled or absent or len(parts) != first.shards:
        raise WeightsError(
            f"Weights of version {first.version} are {first.shards} shards: missing {absent or 'none'}, doubled {doubled or 'none'}, "
            f"{len(parts)} came. Hand over what every member published, once.",
            shard=(absent or doubled or [-1])[0],
            tensor="",
        )


def _verified(part: Weights, entry: Entry) -> Tensor:
    """A view of one tensor's bytes, which are those that were sent."""
    if entry.dtype not in DTYPES and not isinstance(getattr(torch, entry.dtype, None), torch.dtype):
        raise _error(part, entry, f"has the unknown dtype {entry.dtype!r}")
    size = math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize
    if min(entry.shape, default=0) < 0 or entry.nbytes != size:
        raise _error(part, entry, f"says {entry.nbytes} bytes, its shape and dtype make {size}")
    if entry.offset < 0 or entry.offset + entry.nbytes > len(part.data):
        raise _error(part, entry, f"reaches beyond the {len(part.data)} bytes that came")
    piece = part.data[entry.offset : entry.offset + entry.nbytes]
    if xxhash.xxh3_128_hexdigest(piece.data) != entry.digest:
        raise _error(part, entry, "was damaged on the way: its digest is not the one it was sent with")
    return _as_tensor(piece, entry)


def _check_expected(parts: Sequence[Weights], found: Mapping[str, Tensor], expected: Mapping[str, Tensor | Sequence[int]]) -> None:
    """Names and shapes are those of the receiver's model."""
    entries = {entry.name: (part, entry) for part in parts for entry in part.manifest}
    for name in sorted(expected.keys() - found.keys()):
        raise WeightsError(f"Weights of version {parts[0].version} lack tensor {name}: they are of another model.", shard=-1, tensor=name)
    for name, tensor in found.items():
        if name not in expected:
            raise _error(*entries[name], "is unknown to the receiving model")
        shape = tuple(getattr(expected[name], "shape", expected[name]))
        if tuple(tensor.shape) != shape:
            raise _error(*entries[name], f"has shape {tuple(tensor.shape)}, the receiving model's is {shape}")
        if not tensor.is_floating_point() and getattr(expected[name], "dtype", tensor.dtype) != tensor.dtype:
            raise _error(*entries[name], f"has dtype {tensor.dtype}, the receiving model's is another")


def _error(part: Weights, entry: Entry, what: str) -> WeightsError:
    return WeightsError(
        f"Weights of version {part.version}, shard {part.shard} of {part.shards}: tensor {entry.name} {what}. The old weights are kept.",
        shard=part.shard,
        tensor=entry.name,
    )


def _as_tensor(piece: np.ndarray, entry: Entry) -> Tensor:
    """Bytes as a tensor, without a copy. numpy has no bfloat16, so the dtype is put on by torch."""
    if not len(piece):
        return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the object store's pages are read-only; so is our use of them
        whole: Tensor = torch.from_numpy(piece)
    return whole.view(getattr(torch, entry.dtype)).view(entry.shape)

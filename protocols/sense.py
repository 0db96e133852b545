"""What a message must obey beyond its Specs; each function yields (field, what is wrong with it).

They are asked only once dtypes, shapes and the rules of the Specs hold, so lengths agree and offsets never fall.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rolecall.protocols.messages import Logprobs, Metrics, Prompts, Samples, Scores, Weights
    from rolecall.protocols.packed import PackedBatch

Array = np.ndarray
Faults = Iterator[tuple[str, str]]

ALIGNMENT = 64  # bytes: gaps below this between the tensors of a shard are padding
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


def prompts(message: Prompts) -> Faults:
    """Unique keys, offsets that end with the tokens, token ids from 0."""
    yield from _keys(message.keys)
    yield from _sequences(message.cu_seqlens, len(message.tokens))
    yield from _token_ids("tokens", message.tokens)


def samples(message: Samples) -> Faults:
    """Samples of a prompt together and in order, lengths, codes, version spans."""
    yield from _keys(message.keys)
    yield from _counts(message.counts, len(message.siblings))
    yield from _sequences(message.cu_seqlens, len(message.tokens))
    yield from _token_ids("tokens", message.tokens)
    begins = message.counts.cumsum() - message.counts
    if (message.siblings + begins.repeat(message.counts) != np.arange(len(message.siblings))).any():
        yield "siblings", "do not run from 0 to counts - 1 within each prompt"
    if message.prompt_lengths.min(initial=0) < 0 or (message.cu_seqlens[:-1] + message.prompt_lengths > message.cu_seqlens[1:]).any():
        yield "prompt_lengths", "are below 0 or longer than the sample"
    yield from _codes("finish", message.finish, message.FINISH)
    yield from _spans(message.span_starts, len(message.tokens))
    if message.span_versions.min(initial=0) < 0:
        yield "span_versions", "are below 0"
    yield from _temperature(message.temperature)


def scores(message: Scores) -> Faults:
    """Status codes, values of 0 where nothing was scored, a reason for every failure and for nothing else."""
    yield from _keys(message.keys)
    yield from _counts(message.counts, len(message.status))
    yield from _codes("status", message.status, message.STATUS)
    if np.any(message.values[message.status != 0]):
        yield "values", "are not 0 where a sample was not scored"
    failed = set(np.flatnonzero(message.status == 1).tolist())
    if message.reasons.keys() != failed:
        yield "reasons", f"must be given for the failed samples {_few(failed)}, and are for {_few(message.reasons.keys())}"
    for name, values in message.parts.items():
        if not np.isfinite(np.asarray(values)[message.status == 0]).all():
            yield "parts", f"{name!r} is not finite at a scored sample"


def logprobs(message: Logprobs) -> Faults:
    """Counts, offsets, version."""
    yield from _keys(message.keys)
    yield from _counts(message.counts, len(message.cu_seqlens) - 1)
    yield from _sequences(message.cu_seqlens, len(message.logprobs))
    if message.version < 0:
        yield "version", "is below 0"


def packed(message: PackedBatch) -> Faults:
    """Whole rows; each segment one run of slots in one row, its positions going on from its parent's; trained tokens in range."""
    slots, parents = len(message.tokens), message.parents
    if message.capacity < 1 or slots % message.capacity:
        yield "capacity", f"is {message.capacity}, and {slots} slots are no whole rows of it"
        return
    yield from _keys(message.keys)
    if len(message.keys) * message.capacity != slots:
        yield "keys", f"are those of {len(message.keys)} rows of {message.capacity}, but there are {slots} slots"
    if message.costs.min(initial=0) < 0:
        yield "costs", "are below 0"
    yield from _token_ids("tokens", message.tokens)
    yield from _token_ids("targets", message.targets)
    if np.any(message.samples < 0):
        yield "samples", "are below 0"
    yield from _temperature(message.temperature)
    if np.any(parents < -1) or np.any(parents >= np.arange(len(parents))):
        yield "parents", "are below -1, or not below their own number"
        return
    fault = _segments(message.segments, message.positions, parents, message.capacity)
    if fault is not None:
        yield fault
    elif len(message.sources) and (message.sources.min() < 0 or message.sources.max() >= slots):
        yield "sources", f"are not within the {slots} slots"
    elif np.any(message.segments[message.sources] < 0):
        yield "sources", "point at unused slots"
    elif np.any(np.diff(message.sources // message.capacity) < 0):
        yield "sources", "are not ordered by row"
    else:
        own = message.samples[np.flatnonzero(np.diff(message.samples, prepend=-1))]
        if len(np.unique(own)) != len(own):
            yield "samples", "come in pieces: the tokens of one sample must stand together"


def weights(message: Weights) -> Faults:
    """One shard of some; tensors known, well-sized, and laid end to end over the data, padding aside."""
    if not 0 <= message.shard < message.shards or message.version < 0:
        yield "shard", f"is {message.shard} of {message.shards}, version {message.version}"
    if any(first >= second for first, second in zip(message.names, message.names[1:], strict=False)):
        yield "names", "are not sorted, or one is there twice"
    own = [tensor.name for tensor in message.manifest]
    if len(set(own)) != len(own) or not set(own) <= set(message.names):
        yield "manifest", "has a tensor twice, or one that `names` lacks"
    end = 0
    for tensor in sorted(message.manifest, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.dtype not in ITEM_BYTES or any(size < 0 for size in tensor.shape):
            yield "manifest", f"{tensor.name!r}: no such dtype or shape: {tensor.dtype!r} {tensor.shape}"
        elif math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype] != tensor.nbytes:
            yield "manifest", f"{tensor.name!r}: {tensor.shape} {tensor.dtype} is not {tensor.nbytes} bytes"
        elif len(tensor.digest) != 32 or not set(tensor.digest) <= set("0123456789abcdef"):
            yield "manifest", f"{tensor.name!r}: {tensor.digest!r} is no xxh3-128 in hexadecimal"
        elif not end <= tensor.offset < end + ALIGNMENT:
            yield "manifest", f"{tensor.name!r} begins at byte {tensor.offset}; the tensor before it ends at {end}"
        else:
            end = tensor.offset + tensor.nbytes
            continue
        return
    if not end <= len(message.data) < end + ALIGNMENT:
        yield "data", f"is {len(message.data)} bytes; its tensors end at {end}"


def metrics(message: Metrics) -> Faults:
    """Weights from 0; a value that isn't finite may pass, because a diverging loss is what one wants to hear of."""
    for name, (_, weight) in message.sums.items():
        if not 0 <= weight < math.inf:
            yield "sums", f"{name!r} has weight {weight}"


def _keys(keys: Array) -> Faults:
    if len(set(keys.tolist())) != len(keys):
        yield "keys", "has a key twice"


def _counts(counts: Array, count: int) -> Faults:
    if counts.min(initial=0) < 0 or int(counts.sum(dtype=np.int64)) != count:
        yield "counts", f"are below 0, or add up to {int(counts.sum(dtype=np.int64))} instead of {count}"


def _sequences(cu_seqlens: Array, count: int) -> Faults:
    if cu_seqlens[-1] != count:
        yield "cu_seqlens", f"ends at {int(cu_seqlens[-1])}, but there are {count} tokens"


def _token_ids(name: str, tokens: Array) -> Faults:
    if tokens.min(initial=0) < 0:
        yield name, "has ids below 0"


def _codes(name: str, codes: Array, words: tuple[str, ...]) -> Faults:
    if codes.max(initial=0) >= len(words):
        yield name, f"has code {int(codes.max())}; known are 0 to {len(words) - 1} ({', '.join(words)})"


def _temperature(value: float) -> Faults:
    if not 0 <= value < math.inf:
        yield "temperature", f"is {value}"


def _spans(starts: Array, count: int) -> Faults:
    if not count:
        if len(starts):
            yield "span_starts", "are given for no tokens"
    elif not len(starts) or starts[0] != 0 or starts[-1] >= count or (starts[1:] <= starts[:-1]).any():
        yield "span_starts", f"do not rise from 0 within the {count} tokens"


def _segments(segments: Array, positions: Array, parents: Array, capacity: int) -> tuple[str, str] | None:
    """A fault of how segments lie, or None."""
    number = len(parents)
    if segments.min(initial=0) < -1 or segments.max(initial=-1) >= number:
        return "segments", f"are not -1 or a number below {number}"
    fresh = np.diff(segments, prepend=-2) != 0
    fresh[::capacity] = True
    begins = np.flatnonzero(fresh & (segments >= 0))  # slot where each run of a segment begins
    own = segments[begins]
    if not np.array_equal(own, np.arange(number)):
        return "segments", f"lie in {len(own)} runs of slots; each of the {number} must be one, within one row, numbered as they lie"
    first = begins
    sizes = np.bincount(segments[segments >= 0], minlength=number)
    parent = np.flatnonzero(parents >= 0)
    of = parents[parent]
    if np.any(first[parent] // capacity != first[of] // capacity) or np.any(first[parent] < first[of]):
        return "parents", "lie in another row, or after the segment that goes on from them"
    starts = np.zeros(number, np.int64)
    starts[parent] = positions[first[of] + sizes[of] - 1].astype(np.int64) + 1
    used = np.flatnonzero(segments >= 0)
    if not np.array_equal(positions[used], starts[segments[used]] + used - first[segments[used]]):
        return "positions", "do not count up within each segment, from 0 or from where its parent ends"
    if np.any(positions[segments < 0]):
        return "positions", "are not 0 in unused slots"
    return None


def _few(numbers: object) -> str:
    listed = sorted(numbers)  # type: ignore[call-overload]
    return str(listed[:5])[:-1] + (", …]" if len(listed) > 5 else "]")

"""Random but sensible messages of every kind, for tests: hypothesis draws sizes and words, a seeded generator the numbers."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from hypothesis import strategies as st
from rolecall.protocols import Divisible, Logprobs, Message, Metrics, PackedBatch, Prompts, Samples, Scores, Tensor, Weights

WORDS = st.text(max_size=6)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | WORDS
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=4)
FLOATS = st.floats(-100, 100, width=32)


def offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


@st.composite
def prompts(draw: Any, most: int = 5) -> Prompts:
    count, random = draw(st.integers(0, most)), np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = random.integers(0, 5, count)
    return Prompts(
        keys=random.permutation(1000)[:count],
        ids=words(draw, count),
        tokens=random.integers(0, 2**31, lengths.sum(), dtype=np.int32),
        cu_seqlens=offsets(lengths),
        texts=words(draw, count),
        columns=columns(draw, count),
        tokenizer=draw(WORDS),
    )


@st.composite
def samples(draw: Any, most: int = 5) -> Samples:
    count, random = draw(st.integers(0, most)), np.random.default_rng(draw(st.integers(0, 2**32)))
    counts = random.integers(0, 4, count, dtype=np.int32)
    number = int(counts.sum())
    prompt = np.repeat(random.integers(0, 4, count, dtype=np.int32), counts)
    lengths = prompt + random.integers(0, 5, number)
    total = int(lengths.sum())
    starts = np.unique(np.concatenate(([0], random.integers(0, max(total, 1), 3)))) if total else np.zeros(0, np.int64)
    versions = random.integers(0, 3) + np.arange(len(starts))  # neighbours differ, as take and join leave them
    return Samples(
        keys=random.permutation(1000)[:count],
        ids=words(draw, count),
        texts=words(draw, count),
        columns=columns(draw, count),
        counts=counts,
        tokens=random.integers(0, 2**31, total, dtype=np.int32),
        logprobs=-random.random(total, dtype=np.float32),
        cu_seqlens=offsets(lengths),
        prompt_lengths=prompt,
        siblings=np.concatenate([np.arange(many, dtype=np.int32) for many in counts] or [np.zeros(0, np.int32)]),
        finish=random.integers(0, 3, number, dtype=np.uint8),
        completions=words(draw, number),
        span_starts=starts,
        span_versions=versions,
        temperature=draw(st.floats(0, 2)),
    )


@st.composite
def scores(draw: Any, most: int = 5) -> Scores:
    count, random = draw(st.integers(0, most)), np.random.default_rng(draw(st.integers(0, 2**32)))
    counts = random.integers(0, 4, count, dtype=np.int32)
    number = int(counts.sum())
    status = random.integers(0, 3, number, dtype=np.uint8)
    return Scores(
        keys=random.permutation(1000)[:count],
        counts=counts,
        values=np.where(status == 0, random.normal(size=number), 0).astype(np.float32),
        status=status,
        reasons={int(at): draw(WORDS) for at in np.flatnonzero(status == 1)},
        parts={name: tuple(random.normal(size=number).tolist()) for name in draw(st.lists(WORDS, unique=True, max_size=2))},
    )


@st.composite
def logprobs(draw: Any, most: int = 5) -> Logprobs:
    count, random = draw(st.integers(0, most)), np.random.default_rng(draw(st.integers(0, 2**32)))
    counts = random.integers(0, 4, count, dtype=np.int32)
    lengths = random.integers(0, 6, counts.sum())
    return Logprobs(
        keys=random.permutation(1000)[:count],
        counts=counts,
        logprobs=-random.random(lengths.sum(), dtype=np.float32),
        cu_seqlens=offsets(lengths),
        version=draw(st.integers(0, 9)),
    )


@st.composite
def packed(draw: Any) -> PackedBatch:
    """Rows of a prompt with two completions each, an unused slot at the end."""
    rows, random = draw(st.integers(0, 3)), np.random.default_rng(draw(st.integers(0, 2**32)))
    prompt, first, second = (draw(st.integers(1, 3)) for _ in range(3))
    capacity = prompt + first + second + 1
    row = np.concatenate([np.full(prompt, 0), np.full(first, 1), np.full(second, 2)])
    place = np.concatenate([np.arange(prompt), prompt + np.arange(first), prompt + np.arange(second)])
    segments = np.concatenate([np.append(row + 3 * number, -1) for number in range(rows)] or [row[:0]]).astype(np.int32)
    trained = np.flatnonzero((segments >= 0) & (segments % 3 > 0))
    many = len(trained)
    return PackedBatch(
        capacity=capacity,
        keys=random.permutation(1000)[:rows],
        costs=random.integers(0, 9, rows),
        tokens=random.integers(0, 2**31, rows * capacity, dtype=np.int32),
        positions=np.tile(np.append(place, 0), rows).astype(np.int32),
        segments=segments,
        parents=np.concatenate([np.array([-1, 3 * number, 3 * number]) for number in range(rows)] or [row[:0]]).astype(np.int32),
        sources=trained,
        targets=random.integers(0, 2**31, many, dtype=np.int32),
        weights=random.random(many, dtype=np.float32),
        samples=np.arange(many, dtype=np.int32),
        old=draw(st.sampled_from([None, -random.random(many, dtype=np.float32)])),
        advantages=draw(st.sampled_from([None, random.normal(size=many).astype(np.float32)])),
        reference=draw(st.sampled_from([None, -random.random(many, dtype=np.float32)])),
        temperature=draw(st.floats(0, 2)),
        tokenizer=draw(WORDS),
    )


@st.composite
def weights(draw: Any) -> Weights:
    manifest, end = [], 0
    for name in sorted(draw(st.sets(st.text(min_size=1, max_size=4), max_size=4))):
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        nbytes = int(np.prod(shape, dtype=np.int64)) * 2
        start = end + draw(st.integers(0, 63))  # padding
        manifest.append(Tensor(name=name, dtype="bfloat16", shape=shape, offset=start, nbytes=nbytes, digest="0123456789abcdef" * 2))
        end = start + nbytes
    shards = draw(st.integers(1, 4))
    return Weights(
        version=draw(st.integers(0, 9)),
        shard=draw(st.integers(0, shards - 1)),
        shards=shards,
        names=tuple(tensor.name for tensor in manifest),
        manifest=tuple(manifest),
        data=np.arange(end, dtype=np.uint8),
    )


@st.composite
def metrics(draw: Any) -> Metrics:
    return Metrics(sums=draw(st.dictionaries(WORDS, st.tuples(FLOATS, st.floats(0, 100)), max_size=4)))


KINDS = {
    Prompts: prompts(), Samples: samples(), Scores: scores(), Logprobs: logprobs(), PackedBatch: packed(), Weights: weights(),
    Metrics: metrics(),
}  # fmt: skip
ANY = st.one_of(*KINDS.values())
DIVISIBLE = st.one_of(*(made for kind, made in KINDS.items() if issubclass(kind, Divisible)))


def words(draw: Any, count: int) -> tuple[str, ...]:
    return tuple(draw(st.lists(WORDS, min_size=count, max_size=count)))


def columns(draw: Any, count: int) -> dict[str, tuple[Any, ...]]:
    names = draw(st.lists(WORDS, unique=True, max_size=2))
    return {name: tuple(draw(st.lists(VALUES, min_size=count, max_size=count))) for name in names}


def differences(one: Message, other: Message) -> list[str]:
    """Fields in which two messages differ, dtypes included; empty when they are the same."""
    if type(one) is not type(other):
        return ["type"]
    found = []
    for name in (field.name for field in msgspec.structs.fields(type(one))):
        mine, yours = getattr(one, name), getattr(other, name)
        if isinstance(mine, np.ndarray) and isinstance(yours, np.ndarray):
            same = mine.dtype == yours.dtype and np.array_equal(mine, yours)
        else:
            same = type(mine) is type(yours) and mine == yours
        found += [] if same else [name]
    return found

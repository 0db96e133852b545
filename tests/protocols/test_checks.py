"""Messages that make no sense are refused, and the error names message and field."""

from __future__ import annotations

from typing import Annotated, Any

import mail
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from rolecall.protocols import (
    Logprobs,
    Message,
    MessageError,
    Metrics,
    PackedBatch,
    Prompts,
    Samples,
    Scores,
    Spec,
    Tensor,
    Weights,
    check,
    decode,
    encode,
)

I32, F32 = np.int32, np.float32


def prompts(**changes: Any) -> Prompts:
    fields = {
        "keys": np.array([4, 7]), "ids": ("a", "b"), "tokens": np.array([1, 2, 3], I32), "cu_seqlens": np.array([0, 1, 3]),
        "texts": ("x", "y"), "columns": {"answer": (1, 2)},
    }  # fmt: skip
    return Prompts(**{**fields, **changes})


def scores(**changes: Any) -> Scores:
    fields = {
        "keys": np.array([4, 7]), "counts": np.array([1, 2], I32), "values": np.array([0.5, 0, 0], F32),
        "status": np.array([0, 1, 2], np.uint8), "reasons": {1: "timed out"}, "parts": {"format": (1.0, np.nan, 0.0)},
    }  # fmt: skip
    return Scores(**{**fields, **changes})


def logprobs(**changes: Any) -> Logprobs:
    fields = {
        "keys": np.array([4, 7]), "counts": np.array([1, 1], I32), "logprobs": np.array([0, -1, -2], F32),
        "cu_seqlens": np.array([0, 1, 3]),
    }  # fmt: skip
    return Logprobs(**{**fields, **changes})


def packed(**changes: Any) -> PackedBatch:
    """Two rows of six: a prompt of two tokens with completions of two and one slots; a sequence of three, three unused."""
    fields = {
        "capacity": 6,
        "keys": np.array([3, 9]),
        "costs": np.array([5, 3]),
        "tokens": np.arange(12, dtype=I32),
        "positions": np.array([0, 1, 2, 3, 2, 0, 0, 1, 2, 0, 0, 0], I32),
        "segments": np.array([0, 0, 1, 1, 2, -1, 3, 3, 3, -1, -1, -1], I32),
        "parents": np.array([-1, 0, 0, -1], I32),
        "sources": np.array([1, 2, 4, 7]),
        "targets": np.array([2, 3, 9, 8], I32),
        "weights": np.full(4, 0.25, F32),
        "samples": np.array([0, 0, 1, 2], I32),
        "old": np.full(4, -1, F32),
        "advantages": np.array([1, 1, -1, 0], F32),
    }
    return PackedBatch(**{**fields, **changes})


def tensor(**changes: Any) -> Tensor:
    fields = {"name": "a", "dtype": "float32", "shape": (2, 2), "offset": 0, "nbytes": 16, "digest": "0f" * 16}
    return Tensor(**{**fields, **changes})


def weights(**changes: Any) -> Weights:
    manifest = (tensor(), tensor(name="b", dtype="bfloat16", shape=(3,), offset=64, nbytes=6))
    fields = {"version": 1, "shard": 0, "shards": 2, "names": ("a", "b", "c"), "manifest": manifest, "data": np.zeros(70, np.uint8)}
    return Weights(**{**fields, **changes})


def row(*numbers: int) -> np.ndarray:
    return np.array(numbers, I32)


NONSENSE = [
    (prompts, "ids", ("a",), "has 1 entries, but keys says that there are 2"),
    (prompts, "columns", {"answer": (1, 2), "level": (1, 2, 3)}, r"columns\['level'\] has 3 entries, but keys says that there are 2"),
    (prompts, "keys", np.array([4, 4]), "has a key twice"),
    (prompts, "tokens", row(1, -2, 3), "ids below 0"),
    (prompts, "tokens", row(1, 2), "ends at 3, but there are 2 tokens"),
    (prompts, "cu_seqlens", np.array([1, 2, 3]), "must start at 0"),
    (prompts, "cu_seqlens", np.array([0, 4, 3]), "never fall"),
    (prompts, "cu_seqlens", np.zeros(0, np.int64), "has 0 entries, but keys says that there are 3"),
    (scores, "counts", row(1, 1), "add up to 2 instead of 3"),
    (scores, "counts", row(-1, 4), "below 0"),
    (scores, "status", np.array([0, 1, 3], np.uint8), "has code 3; known are 0 to 2"),
    (scores, "values", np.array([0, 0.5, 0], F32), "not 0 where a sample was not scored"),
    (scores, "values", np.array([np.nan, 0, 0], F32), "not finite"),
    (scores, "reasons", {}, r"failed samples \[1\], and are for \[\]"),
    (scores, "reasons", {0: "x", 1: "y"}, r"and are for \[0, 1\]"),
    (scores, "parts", {"format": (1.0, 2.0)}, "has 2 entries, but values"),
    (scores, "parts", {"format": (np.inf, 0.0, 0.0)}, "not finite at a scored sample"),
    (logprobs, "logprobs", np.array([0, 0.5, 0], F32), "above 0"),
    (logprobs, "counts", row(1, 2), "add up to 3 instead of 2"),
    (logprobs, "cu_seqlens", np.array([0, 1, 2]), "ends at 2"),
    (logprobs, "version", -1, "below 0"),
    (packed, "capacity", 5, "12 slots are no whole rows"),
    (packed, "capacity", 0, "no whole rows"),
    (packed, "keys", np.array([3, 3]), "a key twice"),
    (packed, "keys", np.array([3]), "has 2 entries, but keys says that there are 1"),
    (packed, "costs", np.array([5, -3]), "below 0"),
    (packed, "sources", np.array([7, 1, 2, 4]), "not ordered by row"),
    (packed, "samples", row(0, 1, 0, 2), "come in pieces"),
    (packed, "segments", row(1, 1, 0, 0, 2, -1, 3, 3, 3, -1, -1, -1), "numbered as they lie"),
    (packed, "positions", row(0, 1, 2, 3, 3, 0, 0, 1, 2, 0, 0, 0), "do not count up"),
    (packed, "positions", row(0, 1, 2, 3, 2, 1, 0, 1, 2, 0, 0, 0), "not 0 in unused"),
    (packed, "segments", row(0, 0, 1, 1, 2, -1, 3, 3, 3, 4, -1, -1), "not -1 or a number below 4"),
    (packed, "segments", row(0, 0, 1, 1, 2, -2, 3, 3, 3, -1, -1, -1), "not -1 or a number below 4"),
    (packed, "segments", row(0, 0, 1, 1, 2, 3, 3, 3, 3, -1, -1, -1), "lie in 5 runs"),
    (packed, "segments", row(0, 1, 0, 1, 2, -1, 3, 3, 3, -1, -1, -1), "runs of slots"),
    (packed, "segments", row(0, 0, 1, 1, 1, -1, 3, 3, 3, -1, -1, -1), "lie in 3 runs"),
    (packed, "parents", row(-1, 0, 0, 3), "not below their own number"),
    (packed, "parents", row(-1, 0, 0, -2), "below -1"),
    (packed, "parents", row(-1, 0, 0, 0), "lie in another row"),
    (packed, "parents", row(-1, 0, 1, -1), "do not count up"),
    (packed, "parents", row(-1, 0, 0), "below 3"),
    (packed, "sources", np.array([1, 2, 4, 12]), "not within the 12 slots"),
    (packed, "sources", np.array([-1, 2, 4, 7]), "not within"),
    (packed, "sources", np.array([1, 2, 5, 7]), "unused"),
    (packed, "targets", row(2, 3, -9, 8), "ids below 0"),
    (packed, "samples", row(0, 0, -1, 2), "below 0"),
    (packed, "reference", np.zeros(3, F32), "has 3 entries, but sources says that there are 4"),
    (packed, "reference", np.full(4, 2, F32), "above 0"),
    (packed, "advantages", np.array([1, np.inf, 0, 0], F32), "not finite"),
    (packed, "temperature", float("nan"), "is nan"),
    (weights, "shard", 2, "is 2 of 2"),
    (weights, "names", ("b", "a", "c"), "not sorted"),
    (weights, "names", ("a", "a", "b"), "twice"),
    (weights, "names", ("a", "c"), "that `names` lacks"),
    (weights, "manifest", (tensor(), tensor(offset=16)), "twice"),
    (weights, "manifest", (tensor(dtype="int7"),), "no such dtype"),
    (weights, "manifest", (tensor(shape=(-2, -2)),), "no such dtype or shape"),
    (weights, "manifest", (tensor(nbytes=12),), "is not 12 bytes"),
    (weights, "manifest", (tensor(digest="0F" * 16),), "no xxh3-128"),
    (weights, "manifest", (tensor(), tensor(name="b", offset=8)), "before it ends at 16"),
    (weights, "manifest", (tensor(), tensor(name="b", offset=80)), "before it ends at 16"),
    (weights, "data", np.zeros(69, np.uint8), "is 69 bytes; its tensors end at 70"),
    (weights, "data", np.zeros(200, np.uint8), "is 200 bytes; its tensors end at 70"),
]


def test_these_make_sense() -> None:
    for message in (prompts(), scores(), logprobs(), packed(), packed(reference=np.full(4, -1, F32)), weights(), Metrics()):
        check(message)
        assert mail.differences(decode(encode(message)), message) in ([], ["parts"])  # NaN of an unscored part differs from itself


@pytest.mark.parametrize(("made", "field", "value", "said"), NONSENSE)
def test_nonsense_is_refused_by_name(made: Any, field: str, value: Any, said: str) -> None:
    message = made(**{field: value})
    with pytest.raises(MessageError, match=said) as caught:
        check(message)
    assert str(caught.value).startswith(f"{made.__name__.capitalize() if made is not packed else 'PackedBatch'}.")
    assert caught.value.field in str(caught.value)
    with pytest.raises(MessageError, match=said):
        encode(message)


SAMPLE_NONSENSE = [
    ("counts", row(2, 1), "siblings do not run"),
    ("siblings", row(0, 1, 0), "do not run from 0"),
    ("prompt_lengths", row(1, 3, 1), "longer than the sample"),
    ("prompt_lengths", row(1, -1, 1), "below 0"),
    ("finish", np.array([0, 1, 3], np.uint8), "has code 3; known are 0 to 2 .stop, length, aborted"),
    ("span_starts", np.array([1, 3]), "do not rise from 0"),
    ("span_starts", np.array([0, 6]), "within the 6 tokens"),
    ("span_starts", np.array([0, 0]), "do not rise"),
    ("span_starts", np.array([0]), "span_versions has 2 entries, but span_starts"),
    ("span_versions", np.array([1, -2]), "below 0"),
    ("logprobs", np.array([0, 0.9, 0, 0, 0, 0], F32), "above 0 .up to 0.9"),
    ("temperature", -1.0, "is -1.0"),
    ("temperature", float("inf"), "is inf"),
    ("columns", {"answer": (1, 2, 3)}, "has 3 entries, but keys"),
    ("completions", ("a", "b"), "has 2 entries, but cu_seqlens says that there are 3"),
]


@pytest.mark.parametrize(("field", "value", "said"), SAMPLE_NONSENSE)
def test_samples_that_make_no_sense(batch: Samples, field: str, value: Any, said: str) -> None:
    check(batch)
    with pytest.raises(MessageError, match=said):
        check(msgspec.structs.replace(batch, **{field: value}))


def test_no_tokens_no_spans(batch: Samples) -> None:
    empty = batch.take([])
    check(empty)
    with pytest.raises(MessageError, match="given for no tokens"):
        check(msgspec.structs.replace(empty, span_starts=np.array([0]), span_versions=np.array([0])))
    with pytest.raises(MessageError, match="do not rise"):
        check(msgspec.structs.replace(batch, span_starts=np.zeros(0, np.int64), span_versions=np.zeros(0, np.int64)))


def test_metrics_may_diverge_but_not_weigh_less_than_nothing() -> None:
    check(Metrics(sums={"loss": (float("nan"), 1.0)}))
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(MessageError, match="'loss' has weight"):
            check(Metrics(sums={"loss": (1.0, weight)}))


@given(message=mail.ANY)
@settings(deadline=None, max_examples=100)
def test_sensible_messages_pass(message: Message) -> None:
    check(message)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 499, 999])
def test_each_odd_number_is_seen_and_large_ones_are_forgiven(odd: float, place: int) -> None:
    huge = np.where(np.arange(1000) % 2, 1, -1).astype(F32) * np.finfo(F32).max
    table = Table(cells=np.zeros((0, 0), np.float16), corner=np.zeros(2, bool), titles=(), huge=huge)
    check(table)
    huge[place] = odd
    with pytest.raises(MessageError, match=r"Table\.huge has 1 entries that are not finite"):
        check(table)


class Table(Message, frozen=True, kw_only=True, eq=False):
    """A third party's message: two dimensions, a fixed size."""

    cells: Annotated[np.ndarray, Spec("float16", "A B")]
    corner: Annotated[np.ndarray, Spec("bool", "2")]
    titles: Annotated[tuple[str, ...], Spec("", "B")]
    huge: Annotated[np.ndarray, Spec("float32", "C", "finite")]


def test_third_parties_messages_work_alike() -> None:
    table = Table(cells=np.zeros((2, 3), np.float16), corner=np.array([True, False]), titles=("x", "y", "z"), huge=np.zeros(0, F32))
    assert mail.differences(decode(encode(table)), table) == []
    for field, value, said in (
        ("titles", ("x",), "has 1 entries, but cells says that there are 3"),
        ("corner", np.array([True]), "has 1 entries, but its Spec says that there are 2"),
        ("cells", np.zeros(6, np.float16), "has 1 dimensions, must have 2"),
    ):
        with pytest.raises(MessageError, match=f"Table.{field} {said}"):
            encode(msgspec.structs.replace(table, **{field: value}))

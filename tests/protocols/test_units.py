"""Laws of outline, take and join."""

from __future__ import annotations

from itertools import pairwise

import mail
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.protocols import Abstained, Divisible, Failed, Logprobs, MessageError, Prompts, Samples, Scored, Scores, check

MANY = settings(deadline=None, max_examples=200)


def size(message: Divisible) -> int:
    return len(message.outline().keys)


@given(message=mail.DIVISIBLE, data=st.data())
@MANY
def test_parts_joined_are_the_whole(message: Divisible, data: st.DataObject) -> None:
    count = size(message)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, count), max_size=3))), count]
    parts = [message.take(range(start, stop)) for start, stop in pairwise(cuts)]
    for part in parts:
        check(part)
    assert mail.differences(type(message).join(parts), message) == []


@given(message=mail.DIVISIBLE, data=st.data())
@MANY
def test_parts_in_any_order_are_put_back(message: Divisible, data: st.DataObject) -> None:
    order = np.array(data.draw(st.permutations(range(size(message)))), np.int64)
    cut = data.draw(st.integers(0, len(order)))
    parts = [message.take(order[:cut]), message.take(order[cut:])]
    for part in parts:
        check(part)
    back = type(message).join(parts).take(np.argsort(order))
    assert mail.differences(back, message) == []


@given(message=mail.DIVISIBLE, data=st.data())
@MANY
def test_take_of_take_is_take(message: Divisible, data: st.DataObject) -> None:
    count = size(message)
    first = data.draw(st.lists(st.integers(0, count - 1), unique=True)) if count else []
    second = data.draw(st.lists(st.integers(0, len(first) - 1), unique=True)) if first else []
    assert mail.differences(message.take(first).take(second), message.take([first[number] for number in second])) == []


@given(message=mail.DIVISIBLE)
@MANY
def test_outline_is_that_of_the_units_one_by_one(message: Divisible) -> None:
    whole = message.outline()
    for number in range(size(message)):
        own = message.take([number]).outline()
        assert own.keys.tolist() == [whole.keys[number]]
        assert own.sizes.tolist() == [whole.sizes[number]]
        assert own.counts.tolist() == [whole.counts[number]]
        begin = int(whole.counts[:number].sum())
        assert own.lengths.tolist() == whole.lengths[begin : begin + int(own.counts[0])].tolist()
    assert [array.dtype.name for array in (whole.keys, whole.sizes, whole.counts, whole.lengths)] == ["int64", "int64", "int32", "int32"]


@given(message=mail.samples(most=6), data=st.data())
@MANY
def test_each_token_keeps_its_version(message: Samples, data: st.DataObject) -> None:
    order = np.array(data.draw(st.permutations(range(size(message)))), np.int64)
    part = message.take(order)
    versions = message.token_versions()
    begins = np.concatenate(([0], np.cumsum(message.counts)))
    own = [np.arange(message.cu_seqlens[begins[unit]], message.cu_seqlens[begins[unit + 1]]) for unit in order]
    assert part.token_versions().tolist() == [int(versions[token]) for tokens in own for token in tokens]
    assert np.all(np.diff(part.span_versions) != 0)
    assert part.oldest_version == (versions.min() if len(versions) else 0)


def test_neighbouring_units_are_views(batch: Samples) -> None:
    for units in (range(2), [0, 1], [1], np.array([False, True])):
        part = batch.take(units)
        for field in ("tokens", "logprobs", "prompt_lengths", "keys"):
            assert np.shares_memory(getattr(part, field), getattr(batch, field))
    turned = batch.take([1, 0])
    assert not np.shares_memory(turned.tokens, batch.tokens)
    assert turned.tokens.tolist() == [7, 8, 7, 9, 5, 6]
    assert turned.completions == ("y", "z", "x")
    assert turned.columns == {"answer": ("two", 1)}
    assert (turned.span_starts.tolist(), turned.span_versions.tolist()) == ([0, 1, 4], [1, 2, 1])


@pytest.mark.parametrize("units", [[2], [-1], [0.5], [[0]], ["a"], np.array([True])])
def test_units_that_are_not_there(batch: Samples, units: object) -> None:
    with pytest.raises(MessageError, match=r"Samples\.take"):
        batch.take(units)  # type: ignore[arg-type]


def test_parts_of_different_batches_are_not_joined(batch: Samples) -> None:
    warmer = msgspec.structs.replace(batch, temperature=1.5)
    with pytest.raises(MessageError, match=r"temperature is 0\.75 in one part and 1.5 in another"):
        Samples.join([batch, warmer])
    other = msgspec.structs.replace(batch, columns={"level": (1, 2)})
    with pytest.raises(MessageError, match=r"columns are \['answer'\] in one part and \['level'\] in another"):
        Samples.join([batch, other])
    for kind in (Prompts, Samples, Scores, Logprobs):
        with pytest.raises(MessageError, match="at least one part"):
            kind.join([])


def test_what_samples_say_of_themselves(batch: Samples) -> None:
    assert batch.lengths.tolist() == [2, 2, 2]
    assert batch.completion_lengths.tolist() == [1, 1, 1]
    assert batch.prompt_numbers.tolist() == [0, 1, 1]
    assert batch.token_versions().tolist() == [1, 1, 1, 2, 2, 2]
    assert batch.oldest_version == 1
    outline = batch.outline()
    assert (outline.sizes.tolist(), outline.counts.tolist(), outline.lengths.tolist()) == ([2, 4], [1, 2], [1, 1, 1])


def test_verdicts_tell_a_failure_from_a_zero() -> None:
    scores = Scores(
        keys=np.array([1]),
        counts=np.array([4], np.int32),
        values=np.array([0, 0, 0, 2], np.float32),
        status=np.array([0, 1, 2, 0], np.uint8),
        reasons={1: "ZeroDivisionError"},
    )
    assert list(scores.verdicts()) == [Scored(0.0), Failed("ZeroDivisionError"), Abstained(), Scored(2.0)]
    assert scores.scored.tolist() == [True, False, False, True]

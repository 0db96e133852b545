"""Packing of samples: nothing lost, nothing seen that should not be, and the way back."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels.attention import packed_mask
from rolecall.protocols import check
from rolecall.protocols.errors import DataError, MessageError
from rolecall.protocols.messages import Logprobs, Samples
from rolecall.roles.packing import pack_samples, scatter, take_rows, weigh


def make_samples(groups, seed=0):
    """Samples of [(prompt length, [completion lengths])]; every token and logprob of the batch is another number."""
    rng = np.random.default_rng(seed)
    spans, prompts = [], []
    for length, completions in groups:
        prompt = rng.integers(0, 1000, length)
        for number in completions:
            spans.append(np.concatenate([prompt, rng.integers(1000, 2**30, number)]))
            prompts.append(length)
    lengths = [len(span) for span in spans]
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int64)
    within = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    trained = within >= np.repeat(np.array(prompts, np.int64), lengths)
    counts = np.array([len(completions) for _, completions in groups], np.int32)
    return Samples(
        keys=np.arange(len(groups), dtype=np.int64),
        ids=tuple(f"p{number}" for number in range(len(groups))),
        texts=("",) * len(groups),
        counts=counts,
        tokens=np.concatenate([*spans, []]).astype(np.int32),
        logprobs=np.where(trained, -1.0 - np.arange(len(trained)), 0).astype(np.float32),
        cu_seqlens=cu_seqlens,
        prompt_lengths=np.array(prompts, np.int32),
        siblings=np.concatenate([np.arange(count) for count in counts] + [[]]).astype(np.int32),
        finish=np.zeros(len(spans), np.uint8),
        completions=("",) * len(spans),
        span_starts=np.zeros(1, np.int64),
        span_versions=np.zeros(1, np.int64),
        temperature=0.7,
    )


def reference_of(samples, shift=-0.5):
    values = np.where(samples.logprobs != 0, samples.logprobs + shift, 0).astype(np.float32)
    return Logprobs(keys=samples.keys, counts=samples.counts, logprobs=values, cu_seqlens=samples.cu_seqlens)


def context(packed, mask, k):
    """Tokens and positions that the prediction of trained token k may look at, in the order of positions."""
    row, slot = divmod(int(packed.sources[k]), packed.capacity)
    seen = row * packed.capacity + np.flatnonzero(mask[row, 0, slot])
    return packed.tokens[seen], packed.positions[seen]


def check_against_samples(packed, samples, kept, capacity):
    """Each trained token of each kept sample exactly once and in order, predicted from just its own prefix."""
    assert packed.capacity == capacity
    assert len(packed.tokens) % capacity == 0
    rows = packed.segments.reshape(-1, capacity)
    assert (rows >= 0).any(axis=1).all(), "no empty rows"
    mask = packed_mask(torch.tensor(rows), torch.tensor(packed.parents)).numpy()
    k = 0
    expected = {n: samples.tokens[samples.cu_seqlens[n] : samples.cu_seqlens[n + 1]] for n in kept}
    for n in packed.samples[np.flatnonzero(np.diff(packed.samples, prepend=-1))].tolist():
        whole = expected.pop(n)  # a KeyError: trained twice, or not to be trained
        for place in range(samples.prompt_lengths[n], len(whole)):
            assert packed.samples[k] == n
            assert packed.targets[k] == whole[place]
            assert packed.old[k] == samples.logprobs[samples.cu_seqlens[n] + place]
            tokens, positions = context(packed, mask, k)
            np.testing.assert_array_equal(tokens, whole[:place])
            np.testing.assert_array_equal(positions, np.arange(place))
            k += 1
    assert k == len(packed.targets)
    assert all(len(whole) == samples.prompt_lengths[n] for n, whole in expected.items()), "only empty completions are left out"
    assert (np.diff(packed.sources // capacity) >= 0).all(), "ordered by row"


groups_of = st.lists(st.tuples(st.integers(1, 8), st.lists(st.integers(0, 9), min_size=1, max_size=6)), max_size=6)


@settings(deadline=None, max_examples=60)
@given(groups_of, st.integers(16, 60), st.data())
def test_laws_of_packing(groups, capacity, data):
    samples = make_samples(groups)
    number = len(samples.prompt_lengths)
    weights = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=number, max_size=number)), np.float32)
    advantages = np.arange(number, dtype=np.float32) - 3
    packed = pack_samples(samples, advantages, weights, reference_of(samples), capacity=capacity)
    check_against_samples(packed, samples, np.flatnonzero(weights), capacity)
    np.testing.assert_array_equal(packed.weights, weights[packed.samples])
    np.testing.assert_array_equal(packed.advantages, advantages[packed.samples])
    np.testing.assert_allclose(packed.reference, packed.old - 0.5)
    assert packed.temperature == 0.7
    flat = scatter(packed, packed.old, samples)
    np.testing.assert_array_equal(flat, np.where(np.repeat(weights != 0, np.diff(samples.cu_seqlens)), samples.logprobs, 0))


@settings(deadline=None, max_examples=30)
@given(groups_of, st.integers(16, 60), st.integers(1, 3))
def test_passes_are_the_batch_in_parts(groups, capacity, rows_per_pass):
    """Cut to the slots in use, each trained token has the same context as in the whole batch."""
    samples = make_samples(groups)
    packed = pack_samples(samples, capacity=capacity)
    rows = len(packed.tokens) // capacity
    parts = [take_rows(packed, start, min(rows, start + rows_per_pass)) for start in range(0, rows, rows_per_pass)]
    for name in ("targets", "weights", "samples", "old", "advantages"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts] + [[]]), getattr(packed, name))
    whole = packed_mask(torch.tensor(packed.segments.reshape(-1, capacity)), torch.tensor(packed.parents)).numpy()
    k = 0
    for part in parts:
        assert part.capacity <= capacity
        mask = packed_mask(torch.tensor(part.segments.reshape(-1, part.capacity)), torch.tensor(part.parents)).numpy()
        for own in range(len(part.targets)):
            for one, other in zip(context(part, mask, own), context(packed, whole, k), strict=True):
                np.testing.assert_array_equal(one, other)
            k += 1


def test_a_prompt_is_computed_once():
    """A prompt of 5 and completions of 4, 1 and 3: 5 + 3 + 0 + 2 slots, as nothing is predicted from last tokens."""
    packed = pack_samples(make_samples([(5, [4, 1, 3])]), capacity=10)
    assert packed.segments.tolist() == [0] * 5 + [1] * 3 + [2] * 2
    assert packed.parents.tolist() == [-1, 0, 0]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6]
    assert packed.sources.tolist() == [4, 5, 6, 7, 4, 4, 8, 9]
    assert packed.samples.tolist() == [0] * 4 + [1] + [2] * 3


def test_a_group_larger_than_a_row_takes_its_prompt_along():
    packed = pack_samples(make_samples([(6, [5] * 5)]), capacity=16)
    assert len(packed.tokens) == 3 * 16
    assert (packed.parents == -1).sum() == 3
    assert len(packed.targets) == 25


def test_prompt_of_one_token():
    packed = pack_samples(make_samples([(1, [1]), (1, [2])]), capacity=16)
    assert packed.sources.tolist() == [0, 1, 2] or packed.sources.tolist() == [0, 1, 2][::-1]
    assert len(packed.targets) == 3


def test_nothing_to_train():
    samples = make_samples([(3, [4, 2]), (2, [0])])
    for packed in (
        pack_samples(samples, None, np.zeros(3), reference_of(samples), capacity=16),
        pack_samples(make_samples([(3, [0])]), capacity=16),
        pack_samples(make_samples([]), capacity=16),
    ):
        assert len(packed.tokens) == len(packed.sources) == len(packed.targets) == len(packed.parents) == 0
        assert packed.sources.dtype == np.int64
        assert packed.tokens.dtype == packed.parents.dtype == packed.targets.dtype == np.int32
    assert not scatter(pack_samples(samples, None, np.zeros(3), capacity=16), [], samples).any()


def test_a_batch_passes_the_protocol_s_check():
    samples = make_samples([(5, [4, 1, 3]), (2, [7, 7])])
    packed = pack_samples(samples, np.ones(5), np.full(5, 0.1), reference_of(samples), capacity=16)
    for message in (samples, packed, take_rows(packed, 0, 1), pack_samples(samples, None, np.zeros(5), capacity=16)):
        check(message)


def test_too_long_for_a_row():
    samples = make_samples([(3, [4, 20]), (2, [9])])
    with pytest.raises(DataError, match=r"sample 1: a prompt of 3 tokens and a completion of 20.*rows of 16.*row_tokens=22"):
        pack_samples(samples, capacity=16)
    assert len(pack_samples(samples, capacity=22).targets) == 33
    assert len(pack_samples(samples, None, [1, 0, 1], capacity=16).targets) == 13, "samples left out may be of any length"


def test_refusals_name_the_field():
    samples = make_samples([(3, [4, 2]), (2, [9])])
    with pytest.raises(DataError, match=r"advantages of shape \(2,\).*3 samples"):
        pack_samples(samples, [1.0, 2.0], capacity=16)
    with pytest.raises(DataError, match=r"weights .* 1 of them not finite"):
        pack_samples(samples, None, [1.0, np.nan, 1.0], capacity=16)
    with pytest.raises(MessageError, match="other samples"):
        pack_samples(samples, None, None, reference_of(make_samples([(3, [4, 2])])), capacity=16)
    other = samples.tokens.copy()
    other[samples.cu_seqlens[1]] += 1
    with pytest.raises(MessageError, match="sample 1 is said to continue prompt 0"):
        pack_samples(make_copy(samples, tokens=other), capacity=16)
    with pytest.raises(MessageError, match="sample 2"):
        pack_samples(make_copy(samples, prompt_lengths=np.array([3, 3, 0], np.int32)), capacity=16)


def make_copy(samples, **changes):
    return msgspec.structs.replace(samples, **changes)


def test_rows_in_any_order_and_samples_weighed():
    samples = make_samples([(5, [4, 1, 3]), (2, [7, 7]), (3, [6]), (4, [9, 2])])
    packed = pack_samples(samples, capacity=16)
    outline = packed.outline()
    assert outline.sizes.tolist() == (packed.segments.reshape(-1, 16) >= 0).sum(axis=1).tolist()
    assert int(outline.lengths.sum()) == len(packed.targets)
    assert int(outline.counts.sum()) == len(outline.lengths) == 8
    order = np.arange(len(packed.keys))[::-1]
    turned = packed.take(order)
    check(turned)
    assert turned.keys.tolist() == packed.keys[::-1].tolist()
    # weights follow their samples wherever the rows go
    each = np.random.default_rng(0).random(8).astype(np.float32)
    flat = scatter(packed, weigh(packed, each).weights, samples)
    where = np.concatenate([np.flatnonzero(packed.runs()[0] == row) for row in order])
    np.testing.assert_array_equal(scatter(turned, weigh(turned, each[where]).weights, samples), flat)
    with pytest.raises(DataError, match=r"weights of shape \(3,\).*8 samples"):
        weigh(packed, each[:3])


def test_batches_that_differ_in_what_they_know_are_not_joined():
    packed = pack_samples(make_samples([(5, [4, 1, 3])]), capacity=16)
    bare = make_copy(packed, old=None)
    with pytest.raises(MessageError, match="some parts have 'old' and some have not"):
        type(packed).join([packed, bare])
    with pytest.raises(MessageError, match="capacity is 16 in one part and 32"):
        type(packed).join([packed, pack_samples(make_samples([(5, [4])]), capacity=32)])
    both = type(packed).join([bare, bare])
    assert both.old is None
    assert both.samples.tolist() == [*bare.samples.tolist(), *(bare.samples + 3).tolist()]

"""Packing of records: every trained token once, in order, predicted from its own beginning alone; rows never too full."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels.attention import Packed
from rolecall.protocols import PackedBatch, check
from rolecall.protocols.errors import DataError
from rolecall.roles.data.encode import Encoded, Pair
from rolecall.roles.data.packer import ROWS, attention_share, pack_block
from rolecall.roles.data.report import Report

FULL = 0.98  # share of the slots of a block's rows, but for its last, that best-fit decreasing fills on lengths far below a row


def encoded(rng: np.random.Generator, length: int, share: float = 0.5) -> Encoded:
    """A record whose every token is another number, with a random share of them trained."""
    return Encoded(rng.permutation(10_000)[:length].astype(np.int32), rng.random(length) < share, place=f"line {length}")


def pair(rng: np.random.Generator, shared: int, chosen: int, rejected: int) -> Pair:
    """A preference with all tokens of its answers trained."""
    prompt = rng.integers(0, 1000, shared)
    sides = [
        Encoded(np.concatenate([prompt, rng.integers(1000, 10_000, size)]).astype(np.int32), np.arange(shared + size) >= shared)
        for size in (chosen, rejected)
    ]
    return Pair(*sides, shared)


def trained_contexts(batch: PackedBatch) -> dict[int, list[tuple[tuple[int, ...], int]]]:
    """Sample → for each of its trained tokens, in order, the tokens that its prediction may look at (by position) and the token."""
    rows = torch.tensor(batch.segments.reshape(-1, batch.capacity))
    where = Packed(rows, torch.tensor(batch.parents), torch.tensor(batch.positions.reshape(-1, batch.capacity)))
    mask = where.dense().numpy()
    found: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    for source, target, sample in zip(batch.sources, batch.targets, batch.samples, strict=True):
        row, slot = divmod(int(source), batch.capacity)
        seen = row * batch.capacity + np.flatnonzero(mask[row, 0, slot])
        np.testing.assert_array_equal(batch.positions[seen], np.arange(len(seen)))
        found.setdefault(int(sample), []).append((tuple(batch.tokens[seen].tolist()), int(target)))
    return found


def wanted(one: Encoded) -> list[tuple[tuple[int, ...], int]]:
    """The same, of a record alone."""
    tokens = one.tokens.tolist()
    return [(tuple(tokens[:at]), tokens[at]) for at in np.flatnonzero(one.trained).tolist() if at > 0]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 30), max_size=20), st.integers(29, 60), st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 1.0]))
def test_laws_of_packing(lengths: list[int], capacity: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    records = [encoded(rng, length, share) for length in lengths]
    report = Report()
    batch = pack_block(records, capacity=capacity, block=3, too_long="refuse", report=report)
    check(batch)
    contexts = trained_contexts(batch)
    kept = [one for one in records if wanted(one)]
    assert [contexts[number] for number in range(len(kept))] == [wanted(one) for one in kept]
    assert len(contexts) == len(kept)
    assert (report.total("used"), report.total("dropped")) == (len(kept), len(records) - len(kept))
    assert batch.keys.tolist() == [3 * ROWS + row for row in range(len(batch.keys))]
    assert (batch.weights == 1).all()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12), st.integers(1, 12)), max_size=8), st.integers(31, 60), st.integers(0, 2**32)
)
def test_both_sides_of_a_preference_lie_in_one_row(sizes: list[tuple[int, int, int]], capacity: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [one for one in (pair(rng, *size) for size in sizes) if wanted(one.chosen) and wanted(one.rejected)]
    batch = pack_block(pairs, capacity=capacity, too_long="refuse")
    check(batch)
    contexts = trained_contexts(batch)
    for number, one in enumerate(pairs):
        assert contexts[2 * number] == wanted(one.chosen)
        assert contexts[2 * number + 1] == wanted(one.rejected)
    row_of = dict(zip(batch.samples.tolist(), (batch.sources // capacity).tolist(), strict=True))
    assert all(row_of[2 * number] == row_of[2 * number + 1] for number in range(len(pairs)))
    slots = sum(one.shared + sum(len(side) - one.shared - 1 for side in (one.chosen, one.rejected)) for one in pairs)
    assert int((batch.segments >= 0).sum()) == slots, "the shared beginning is computed once"


def test_rows_are_full_and_long_records_do_not_come_first() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 0.8, 1000), 2, 1024).astype(int)
    batch = pack_block([encoded(rng, length, 1.0) for length in lengths], capacity=1024)
    used = (batch.segments.reshape(-1, 1024) >= 0).sum(axis=1)
    assert np.sort(used)[1:].mean() >= FULL * 1024
    longest = np.array([np.unique(row[row >= 0], return_counts=True)[1].max() for row in batch.segments.reshape(-1, 1024)])
    half = len(longest) // 2
    assert abs(longest[:half].mean() - longest[half:].mean()) < 0.35 * longest.mean()


def test_what_is_too_long() -> None:
    rng = np.random.default_rng(1)
    long, short = encoded(rng, 50, 1.0), encoded(rng, 5, 1.0)
    with pytest.raises(DataError, match=r'line 50 is too long for a row.*49 slots.*room for 16.*"cut" or "drop" or "split"'):
        pack_block([short, long], capacity=16, too_long="refuse")
    report = Report()
    cut = pack_block([short, long], capacity=16, too_long="cut", report=report)
    assert trained_contexts(cut)[1] == wanted(long)[:16]
    assert report.counts == {("used", ""): 2, ("cut", "too long"): 1}
    assert report.first["cut", "too long"] == "line 50"
    report = Report()
    split = pack_block([short, long], capacity=16, too_long="split", report=report)
    check(split)
    assert [token for sample in range(1, 5) for _, token in trained_contexts(split)[sample]] == long.tokens[1:].tolist()
    assert report.counts == {("used", ""): 2, ("split", "too long"): 1}
    report = Report()
    drop = pack_block([short, long], capacity=16, too_long="drop", report=report)
    assert list(trained_contexts(drop)) == [0]
    assert report.counts == {("used", ""): 1, ("dropped", "too long"): 1}
    context = pack_block([short, long], capacity=64, longest=16, too_long="cut")
    assert trained_contexts(context)[1] == wanted(long)[:16], "longer than the model's context"
    late = Encoded(np.arange(50, dtype=np.int32), np.arange(50) > 40, place="late")
    report = Report()
    assert len(pack_block([late], capacity=16, report=report).keys) == 0
    assert report.counts == {("dropped", "too long"): 1}


@pytest.mark.parametrize(("sizes", "kept"), [((4, 20, 3), (11, 3)), ((4, 3, 20), (3, 11)), ((4, 20, 20), (7, 7)), ((12, 20, 20), (1, 1))])
def test_a_preference_that_is_too_long_is_cut_on_the_longer_side(sizes: tuple[int, int, int], kept: tuple[int, int]) -> None:
    one = pair(np.random.default_rng(2), *sizes)
    with pytest.raises(DataError, match='set too_long="cut" or "drop"'):
        pack_block([one], capacity=16 if sizes[0] < 12 else 12, too_long="split")
    contexts = trained_contexts(pack_block([one], capacity=16 if sizes[0] < 12 else 12, too_long="cut"))
    assert (contexts[0], contexts[1]) == (wanted(one.chosen)[: kept[0]], wanted(one.rejected)[: kept[1]])


def test_costs_count_attention() -> None:
    rng = np.random.default_rng(3)
    records = [encoded(rng, 101, 1.0), encoded(rng, 51, 1.0), encoded(rng, 51, 1.0)]
    batch = pack_block(records, capacity=100, square=0.01)
    assert batch.costs.tolist() == [100 + 100, 2 * 50 + 50]
    # a model of 10 layers, width 64, 1,000,000 parameters: at 1000 tokens, attention takes 2 x 64 x 10 x 1000² of 2 x 10⁹ FLOPs
    assert attention_share(64, 10, 1_000_000) * 1000**2 == pytest.approx(1000 * 2 * 64 * 10 * 1000**2 / (2 * 1000 * 1_000_000))

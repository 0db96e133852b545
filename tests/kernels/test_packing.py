"""Rows: laws that hold for any lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels import packing
from rolecall.kernels.packing import OpenRows, assign_rows, lay, pack_rows, stable_order


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 50), max_size=80), st.integers(50, 200))
def test_rows_hold_everything_once_and_are_few(lengths, capacity):
    rows = pack_rows(lengths, capacity)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert all(rows)
    assert max(filled, default=0) <= capacity
    # Two rows that could have been one would mean that a fit was missed.
    assert all(one + other > capacity for index, one in enumerate(filled) for other in filled[:index])
    assert rows == pack_rows(np.array(lengths), capacity)


def test_best_fit_by_hand():
    """60, 50, 40 and 30 in rows of 100: 40 goes beside 60 (none left), 30 beside 50."""
    assert pack_rows([30, 40, 50, 60], 100) == [[3, 1], [2, 0]]
    assert pack_rows([], 5) == []


def test_long_lists_fill_rows():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, size=20_000).astype(int).clip(1, 2048)
    rows = pack_rows(lengths, 4096)
    assert lengths.sum() / (len(rows) * 4096) > 0.995


def test_too_long_for_a_row():
    with pytest.raises(ValueError, match=r"sequence 1 of 11 slots.*rows of 10.*raise the capacity"):
        pack_rows([3, 11], 10)
    with pytest.raises(ValueError, match="sequence 0 of -3 slots"):
        pack_rows([-3], 10)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=120), st.integers(60, 200), st.integers(0, 40), st.sampled_from([1, 32]))
def test_rows_of_many_hold_everything_once(lengths, capacity, few, tail):
    """The way for many sequences, taken for few: every branch of it at small sizes."""
    kept = packing.FEW, packing.TAIL
    packing.FEW, packing.TAIL = few, tail
    try:
        rows = assign_rows(lengths, capacity)
    finally:
        packing.FEW, packing.TAIL = kept
    assert rows.shape == (len(lengths),)
    counts = np.bincount(rows)
    assert counts.min() >= 1, "rows are numbered without a gap"
    assert np.bincount(rows, weights=lengths).max() <= capacity
    assert (rows == assign_rows(np.array(lengths), capacity)).all() or few < len(lengths)


@pytest.mark.parametrize(
    ("middle", "spread", "capacity", "least"), [(6.5, 0.8, 8192, 0.995), (6.0, 1.5, 32768, 0.995), (5.0, 0.8, 4096, 0.995)]
)
def test_many_rows_are_full(middle, spread, capacity, least):
    lengths = np.random.default_rng(0).lognormal(middle, spread, size=20_000).astype(int).clip(1, min(8192, capacity))
    rows = assign_rows(lengths, capacity)
    assert lengths.sum() / ((rows.max() + 1) * capacity) > least
    assert (rows == assign_rows(lengths, capacity)).all()


def test_many_short_ones_take_few_rounds():
    assert len(set(assign_rows(np.ones(50_000, dtype=int), 8192).tolist())) <= 8
    assert set(assign_rows(np.zeros(50_000, dtype=int), 8192).tolist()) == {0}


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 50), max_size=80), st.integers(50, 120), st.integers(1, 6))
def test_open_rows_laws(lengths, capacity, number):
    """Every sequence once, in the order it came within its row; never too full, never too many open; best fit by a plain search."""
    rows = OpenRows(capacity, number)
    closed, plain, shut = [], [], []
    for ident, length in enumerate(lengths):
        closed += rows.add(length, ident)
        fits = [row for row in plain if capacity - sum(lengths[one] for one in row) >= length]
        if fits:
            row = max(fits, key=lambda row: sum(lengths[one] for one in row))
        else:
            if len(plain) == number:
                fullest = max(plain, key=lambda row: sum(lengths[one] for one in row))
                plain.remove(fullest)
                shut.append(fullest)
            row = []
            plain.append(row)
        row.append(ident)
        if sum(lengths[one] for one in row) == capacity:
            plain.remove(row)
            shut.append(row)
        assert len(rows.held) <= number
        assert [sum(lengths[one] for one in row) for row in rows.held] == sorted(
            (sum(lengths[one] for one in row) for row in plain), reverse=True
        )
    assert [sum(lengths[one] for one in row) for row in closed] == [sum(lengths[one] for one in row) for row in shut]
    everything = closed + rows.flush()
    assert rows.held == []
    assert sorted(ident for row in everything for ident in row) == list(range(len(lengths)))
    assert all(row == sorted(row) and sum(lengths[one] for one in row) <= capacity for row in everything)


def test_open_rows_fill_on_line():
    lengths = np.random.default_rng(0).lognormal(6.5, 0.8, size=30_000).astype(int).clip(1, 8192)
    rows = OpenRows(8192)
    closed = [row for ident, length in enumerate(lengths.tolist()) for row in rows.add(length, ident)]
    assert sum(lengths[row].sum() for row in map(np.array, closed)) / (len(closed) * 8192) > 0.995


def test_open_rows_refuse():
    with pytest.raises(ValueError, match=r"sequence 7 of 11 slots.*rows of 10"):
        OpenRows(10).add(11, 7)
    with pytest.raises(ValueError, match="open_rows=0"):
        OpenRows(10, 0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 30), max_size=30), st.integers(30, 90), st.sampled_from([0, 10**6]))
def test_laid_rows_hold_their_sequences(lengths, capacity, short):
    rows = pack_rows(lengths, capacity)
    edges = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    tokens = np.arange(100, 100 + edges[-1], dtype=np.int32)
    kept, packing.SHORT = packing.SHORT, short
    try:
        laid = lay(tokens, edges, rows, capacity)
    finally:
        packing.SHORT = kept
    number = 0
    for row, members in enumerate(rows):
        slot = row * capacity
        for member in members:
            here = slice(slot, slot + lengths[member])
            assert (laid.tokens[here] == tokens[edges[member] : edges[member + 1]]).all()
            assert (laid.positions[here] == np.arange(lengths[member])).all()
            assert (laid.segments[here] == number).all()
            slot, number = slot + lengths[member], number + 1
        rest = slice(slot, (row + 1) * capacity)
        assert (laid.segments[rest] == -1).all()
        assert not laid.tokens[rest].any()
        assert not laid.positions[rest].any()


def test_laying_refuses():
    with pytest.raises(ValueError, match=r"Row 0 is too full\. Asked: 9 tokens\. There is: 8 slots"):
        lay(np.zeros(9, np.int32), [0, 5, 9], [[0, 1]], 8)
    with pytest.raises(ValueError, match="unknown sequence"):
        lay(np.zeros(9, np.int32), [0, 5, 9], [[2]], 8)


@pytest.mark.parametrize("most", [9, 2**31, 2**62])
def test_equal_keys_keep_their_order(most):
    """In 32 bits, in 64, and where key and number don't fit into 64."""
    keys = np.random.default_rng(0).choice([0, 3, most - 1, most], size=1000).astype(np.int64)
    assert (stable_order(keys, most) == np.argsort(keys, kind="stable")).all()
    assert stable_order(keys[:0], most).tolist() == []

"""Rows and balance: laws that hold for any lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels.packing import balance, pack_rows


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


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 9))
def test_balance_laws(sizes, ranks):
    """Every unit once; a unit for every rank if there are enough; within the greedy bound; the same each time."""
    parts = balance(sizes, ranks)
    assert len(parts) == ranks
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(sizes)))
    assert all((np.diff(part) > 0).all() for part in parts)
    if len(sizes) >= ranks:
        assert min(len(part) for part in parts) >= 1
    totals = [sum(sizes[unit] for unit in part) for part in parts]
    if sizes:
        assert max(totals) - min(totals) <= max(sizes), "the greedy rule alone already gives that"
        least = max(max(sizes), -(-sum(sizes) // ranks))
        assert max(totals) <= 4 / 3 * least + max(sizes) / 3
    assert all((one == other).all() for one, other in zip(parts, balance(np.array(sizes), ranks), strict=True))


def test_swaps_mend_what_greed_spoils():
    """3 3 2 2 2 over two: greed ends at 7 and 5, a swap makes it 6 and 6."""
    assert sorted(sum([3, 3, 2, 2, 2][unit] for unit in part) for part in balance([3, 3, 2, 2, 2], 2)) == [6, 6]


def test_many_units_balance_closely():
    sizes = np.random.default_rng(0).lognormal(6, 1, size=4096).astype(int)
    totals = [int(sizes[part].sum()) for part in balance(sizes, 64)]
    assert max(totals) / np.mean(totals) < 1.001


def test_balance_needs_a_rank():
    with pytest.raises(ValueError, match="0 parts"):
        balance([1], 0)

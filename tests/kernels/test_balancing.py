"""Balance: laws that hold for any sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rolecall.kernels import balancing
from rolecall.kernels.balancing import balance, cost


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 9), st.sampled_from([0, 12]))
@example([0, 0], 2, 12)
@example([7, 0, 0], 3, 12)
def test_balance_laws(sizes, ranks, left):
    """Every unit once; a unit for every rank if there are enough; within the greedy bound; the same each time."""
    kept, balancing.LEFT = balancing.LEFT, left  # with none left over a few units are poured too
    try:
        parts, again = balance(sizes, ranks), balance(np.array(sizes), ranks)
    finally:
        balancing.LEFT = kept
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
    assert all((one == other).all() for one, other in zip(parts, again, strict=True))


def test_swaps_mend_what_greed_spoils():
    """3 3 2 2 2 over two: greed ends at 7 and 5, a swap makes it 6 and 6."""
    assert sorted(sum([3, 3, 2, 2, 2][unit] for unit in part) for part in balance([3, 3, 2, 2, 2], 2)) == [6, 6]


def test_many_units_balance_closely():
    sizes = np.random.default_rng(0).lognormal(6, 1, size=4096).astype(int)
    totals = [int(sizes[part].sum()) for part in balance(sizes, 64)]
    assert max(totals) / np.mean(totals) < 1.001


@pytest.mark.parametrize("ranks", [2, 3, 64])
@pytest.mark.parametrize("law", ["lognormal", "uniform", "alike", "equal"])
def test_many_units_of_any_law(law, ranks):
    random = np.random.default_rng(ranks)
    sizes = {
        "lognormal": random.lognormal(6, 1, size=4096).astype(int),
        "uniform": random.integers(0, 1500, size=4096),
        "alike": random.normal(1000, 100, size=4096).astype(int),
        "equal": np.full(4096, 7),
    }[law]
    parts = balance(sizes, ranks)
    assert (np.sort(np.concatenate(parts)) == np.arange(4096)).all()
    totals = np.array([sizes[part].sum() for part in parts])
    least = 1.001 if law != "equal" else 1.001 + 7 / totals.mean()
    assert totals.max() / totals.mean() < least


def test_balance_needs_a_rank():
    with pytest.raises(ValueError, match="0 parts"):
        balance([1], 0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 5))
def test_balance_takes_costs(sizes, ranks):
    parts = balance(np.array(sizes, dtype=np.float64), ranks)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(sizes)))


def test_balance_by_cost_evens_out_what_attention_costs():
    """By tokens alone a rank with one long sequence has more to do than one with many short ones."""
    lengths = np.random.default_rng(1).lognormal(6, 1, size=2048).astype(int).clip(1, 4000)
    costs = cost(lengths, 1.0, 1e-3)
    by_cost, by_tokens = ([costs[part].sum() for part in balance(sizes, 16)] for sizes in (costs, lengths))
    assert max(by_cost) / np.mean(by_cost) < 1.001
    assert max(by_tokens) / np.mean(by_tokens) > 1.005
    assert cost([3], 2.0, 10.0).tolist() == [96.0]


def test_balance_of_few_large_and_many_small():
    """Dealing the large ones out in turn leaves gaps; the small ones must be enough to fill them."""
    for seed in range(5):
        sizes = np.sort(np.random.default_rng(seed).pareto(1.1, size=3000) * 100 + 1).astype(int)
        totals = np.array([sizes[part].sum() for part in balance(sizes, 32)])
        assert totals.max() <= max(sizes.max(), 1.001 * totals.mean())


def test_balance_of_one_that_is_heavier_than_all():
    """It has a rank for itself; what others share is even."""
    totals = sorted(sum(([10**6] + [5] * 300)[unit] for unit in part) for part in balance([10**6] + [5] * 300, 4))
    assert totals == [500, 500, 500, 10**6]


def test_balance_refuses_what_costs_nothing_sensible():
    with pytest.raises(ValueError, match="finite and not negative"):
        balance([1.0, float("nan")], 2)
    with pytest.raises(ValueError, match="finite and not negative"):
        balance([-1, 2], 2)

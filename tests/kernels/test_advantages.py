"""Advantages: against verl's estimators, by hand, and the cases that verl gets wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels.advantages import group_advantages, leave_one_out
from rolecall.kernels.aggregation import constant_mean, sequence_mean, token_mean

TOLERANCE = 1e-6  # relative; ours is rounded to float32 once, verl runs here in float64


def verl_outcome(name, values, counts, **options):
    """verl's estimator in float64, one token a sample."""
    import torch
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    rewards = torch.tensor(values, dtype=torch.float64)[:, None]
    index = np.repeat(np.arange(len(counts)), counts)
    return ADV_ESTIMATOR_REGISTRY[name](rewards, torch.ones_like(rewards), index=index, **options)[0][:, 0].numpy()


@pytest.mark.parametrize("name", ["grpo", "grpo_vectorized"])
@pytest.mark.parametrize("divide_by_std", [False, True])
def test_group_advantages_equal_verl(name, divide_by_std):
    rng = np.random.default_rng(1)
    counts = rng.integers(2, 9, size=40)
    values = rng.normal(3.0, 2.0, size=counts.sum()).astype(np.float32)
    expected = verl_outcome(name, values, counts, norm_adv_by_std_in_grpo=divide_by_std)
    np.testing.assert_allclose(group_advantages(values, counts, divide_by_std=divide_by_std), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["rloo", "rloo_vectorized"])
def test_leave_one_out_equals_verl(name):
    rng = np.random.default_rng(2)
    counts = rng.integers(2, 9, size=40)
    values = rng.normal(size=counts.sum()).astype(np.float32)
    np.testing.assert_allclose(leave_one_out(values, counts), verl_outcome(name, values, counts), rtol=TOLERANCE, atol=TOLERANCE)


def test_by_hand():
    values, counts = [1.0, 0.0, 0.0, 5.0, 7.0], [3, 2]
    np.testing.assert_allclose(group_advantages(values, counts), [2 / 3, -1 / 3, -1 / 3, -1, 1], rtol=TOLERANCE)
    np.testing.assert_allclose(leave_one_out(values, counts), [1, -0.5, -0.5, -2, 2], rtol=TOLERANCE)


@pytest.mark.parametrize("function", [group_advantages, leave_one_out])
def test_a_sample_without_a_score_is_out_of_the_mean(function):
    with_hole = function([1.0, np.nan, 0.0, 2.0, 9.0], [4, 1], scored=[True, False, True, True, True])
    np.testing.assert_array_equal(with_hole[[0, 2, 3]], function([1.0, 0.0, 2.0], [3]))
    assert with_hole[1] == 0  # no score, no gradient
    assert with_hole[4] == 0  # alone in its group: nothing to compare with


def test_equal_scores_give_zero_however_small_the_rounding():
    """In float32, mean(0.1, 0.1, 0.1) is off by 7e-9: over a floor of 1e-6 that would be an advantage of 7e-3."""
    assert np.abs(group_advantages([0.1] * 3 + [1 / 3] * 7, [3, 7], divide_by_std=True)).max() < 1e-9


@pytest.mark.parametrize("function", [group_advantages, leave_one_out])
def test_refusals_say_what_to_do(function):
    with pytest.raises(ValueError, match="at least 2 completions"):
        function([1.0, 2.0], [1, 1])
    with pytest.raises(ValueError, match=r"sample 1 .*scored=False"):
        function([1.0, np.nan, 2.0], [3])
    with pytest.raises(ValueError, match="hold 3 samples"):
        function([1.0, 2.0], [3])
    assert function([], []).shape == (0,)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=6), min_size=1, max_size=6))
def test_laws(groups):
    """Advantages of a group add up to 0, don't change when a constant is added, and keep the order of the scores."""
    values, counts = np.concatenate(groups), [len(group) for group in groups]
    for function in (group_advantages, leave_one_out):
        found = function(values, counts)
        assert found.dtype == np.float32
        for part, scores in zip(np.split(found, np.cumsum(counts)[:-1]), groups, strict=True):
            assert abs(part.astype(np.float64).sum()) < 1e-2  # float32 rounding of up to 6 numbers of up to 2e3
            assert (np.argsort(scores, kind="stable") == np.argsort(part, kind="stable")).all() or len(set(part)) < len(part)
        np.testing.assert_allclose(function(values + 64.0, counts), found, atol=1e-2)


def test_weights_make_the_means():
    lengths, kept = [3, 5, 0, 2], [True, True, True, False]
    np.testing.assert_allclose(token_mean(lengths), [0.1, 0.1, 0, 0.1], rtol=TOLERANCE)
    np.testing.assert_allclose(token_mean(lengths, kept=kept), [1 / 8, 1 / 8, 0, 0], rtol=TOLERANCE)
    np.testing.assert_allclose(sequence_mean(lengths), [1 / 9, 1 / 15, 0, 1 / 6], rtol=TOLERANCE)
    np.testing.assert_allclose(sequence_mean(lengths, kept=kept), [1 / 6, 1 / 10, 0, 0], rtol=TOLERANCE)
    np.testing.assert_allclose(constant_mean(lengths, 10), [1 / 30, 1 / 30, 0, 1 / 30], rtol=TOLERANCE)
    assert not token_mean([0, 0]).any()
    assert not sequence_mean([4, 5], kept=[False, False]).any()
    with pytest.raises(ValueError, match="horizon=0"):
        constant_mean(lengths, 0)

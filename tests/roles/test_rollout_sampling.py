"""Sampling alone: exact truncation, the right distribution, streams that belong to the sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.protocols.errors import UserError
from rolecall.roles.rollout.sampling import FIRST_LOOK, Sampling, choose, sample_seed, uniforms

DRAWS = 4000
CHI_SIGMAS = 5.0  # of a chi-square's own spread: the draws are fixed, so this fails for a wrong distribution, never by chance
LOGPROB = 2e-6  # float32 log-softmax against float64, logits of size ~5


def draws(count: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(uniforms(np.full(count, seed, dtype=np.uint64), np.arange(count)))


def logits_of(vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, vocabulary)).float()


def chi_square(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """How many standard deviations the statistic is above its mean, over tokens expected at least 5 times."""
    seen = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    large = expected >= 5
    seen = torch.cat([seen[large], seen[~large].sum()[None]])
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    seen, expected = seen[expected > 0], expected[expected > 0]
    freedom = len(seen) - 1
    return (float(((seen - expected) ** 2 / expected).sum()) - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax_at_the_temperature(temperature):
    logits = logits_of(40)
    tokens, logprobs = choose(logits.repeat(DRAWS, 1), Sampling(temperature=temperature), draws(DRAWS))
    wanted = (logits.double() / temperature).log_softmax(-1)
    assert abs(chi_square(tokens, wanted.exp())) < CHI_SIGMAS
    assert torch.allclose(logprobs.double(), wanted[tokens], atol=LOGPROB)
    assert chi_square(tokens, (logits.double() / (temperature * 1.3)).softmax(-1)) > CHI_SIGMAS, "the test can't tell temperatures apart"


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.7), (12, 0.8), (1, 1.0), (0, 1e-6)])
def test_truncation_keeps_exactly_the_right_tokens_and_reports_full_logprobs(top_k, top_p):
    logits = logits_of(60, seed=3)
    tokens, logprobs = choose(logits.repeat(DRAWS, 1), Sampling(temperature=1.3, top_k=top_k, top_p=top_p), draws(DRAWS))
    full = (logits.double() / 1.3).softmax(-1)
    order = full.argsort(descending=True)
    kept = order[: top_k or None]
    mass = full[kept] / full[kept].sum()
    kept = kept[: int((mass.cumsum(0) < top_p).sum()) + 1]
    truncated = torch.zeros_like(full).index_put((kept,), full[kept] / full[kept].sum())
    assert set(tokens.tolist()) <= set(kept.tolist())
    if len(kept) > 1:
        assert abs(chi_square(tokens, truncated)) < CHI_SIGMAS
    assert torch.allclose(logprobs.double(), full.log()[tokens], atol=LOGPROB)


def test_top_p_looks_further_where_the_first_candidates_do_not_reach_it():
    flat, peaked = torch.zeros(4 * FIRST_LOOK), torch.zeros(4 * FIRST_LOOK)
    peaked[7] = 30.0
    rows = torch.stack([flat, peaked] * 500)
    tokens, _ = choose(rows, Sampling(top_p=0.9), draws(1000))
    assert set(tokens[1::2].tolist()) == {7}
    assert len(set(tokens[::2].tolist())) > FIRST_LOOK / 2, "only the first candidates were drawn"


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 600), st.integers(0, 50), st.floats(0.05, 1.0), st.integers(0, 2**32))
def test_a_row_draws_the_same_alone_and_among_others(vocabulary, top_k, top_p, seed):
    generator = np.random.default_rng(seed)
    rows = torch.from_numpy(np.round(generator.normal(0, 1.5, (6, vocabulary)), 1)).float()  # rounded: many ties
    numbers = torch.from_numpy(generator.random(6))
    chosen = Sampling(top_k=top_k, top_p=top_p)
    together, _ = choose(rows.clone(), chosen, numbers)
    alone = torch.cat([choose(rows[n : n + 1].clone(), chosen, numbers[n : n + 1])[0] for n in range(6)])
    assert torch.equal(together, alone)


def test_greedy_takes_the_best_token_and_reports_its_logprob_at_temperature_one():
    rows = torch.stack([logits_of(50, seed) for seed in range(8)])
    tokens, logprobs = choose(rows.clone(), Sampling(temperature=0.0), draws(8))
    assert torch.equal(tokens, rows.argmax(-1))
    assert torch.allclose(logprobs, rows.log_softmax(-1).amax(-1), atol=LOGPROB)


def test_impossible_tokens_are_never_drawn_at_the_ends_of_the_unit_interval():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).repeat(3, 1)
    tokens, _ = choose(logits, Sampling(), torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64))
    assert tokens.tolist() == [1, 3, 3]


def test_streams_are_uniform_differ_by_seed_and_do_not_repeat():
    seeds = np.array([sample_seed(0, 0, f"p{n}", sibling) for n in range(100) for sibling in range(4)], dtype=np.uint64)
    assert len(set(seeds.tolist())) == 400
    table = np.stack([uniforms(seeds, np.full(400, place)) for place in range(50)])
    assert table.min() >= 0
    assert table.max() < 1
    assert len(np.unique(table)) == table.size
    assert abs(table.mean() - 0.5) < 0.01  # 5 sigma of 20000 uniforms
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.035  # 5 sigma


def test_a_seed_depends_on_run_key_prompt_and_sibling():
    kinds = {
        sample_seed(0, 0, "a", 0),
        sample_seed(1, 0, "a", 0),
        sample_seed(0, 1, "a", 0),
        sample_seed(0, 0, "b", 0),
        sample_seed(0, 0, "a", 1),
    }
    assert len(kinds) == 5
    assert sample_seed(3, 1, "a", 2) == sample_seed(3, 1, "a", 2)


def test_the_stream_is_the_published_splitmix64():
    """First outputs for seed 1234567, as in the reference code of SplitMix64 (Vigna, public domain)."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = uniforms(np.full(3, 1234567, dtype=np.uint64), np.arange(3))
    assert found.tolist() == [(number >> 11) * 2.0**-53 for number in expected]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)

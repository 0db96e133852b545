"""The verl adapter: what it returns is what verl computes when called as verl's own trainer calls it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from rolecall.kernels.aggregation import sequence_mean, token_mean
from rolecall.kernels.losses import Tokens, clipped_surrogate, policy_gradient
from rolecall.kernels.verl import ESTIMATORS, LOSSES, verl_advantages, verl_loss

SAME = 1e-6  # relative: weights are float32, and verl adds 1e-8 to lengths
LENGTHS = [7, 1, 12, 4, 9]
OPTIONS = {"dro": {"dro_beta": 0.1}, "clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1}, "kl_cov": {"kl_cov_ratio": 0.2}}


def make_tokens(weights, seed=0):
    rng = torch.Generator().manual_seed(seed)
    samples = torch.repeat_interleave(torch.tensor([4, 0, 2, 3, 9]), torch.tensor(LENGTHS))  # any numbers, in runs
    old = -torch.randn(len(samples), generator=rng, dtype=torch.float64).abs()
    logprobs = (old + 0.5 * torch.randn(len(samples), generator=rng, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(len(LENGTHS), generator=rng, dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS))
    weight = torch.from_numpy(np.repeat(weights, LENGTHS).astype(np.float64))
    return Tokens(logprobs, old, advantages, weight, samples, reference=old - 0.1)


def straight_from_verl(name, tokens, mode, **config):
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
    from verl.workers.config import ActorConfig, PolicyLossConfig

    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    inner = PolicyLossConfig(**OPTIONS.get(name, {}))
    settings = ActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1, policy_loss=inner, **config)
    old, new, advantages = (
        torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, values)
        for values in (tokens.old, tokens.logprobs, tokens.advantages)
    )
    torch.manual_seed(0)  # clip_cov draws
    return POLICY_LOSS_REGISTRY[name](old, new, advantages, mask.double(), mode, settings)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_verl(name, mode):
    """Value and gradient, each average made by our weights."""
    mode = "seq-mean-token-mean" if name in ("sapo", "geo_mean") else mode  # they know no other
    tokens = make_tokens((token_mean if mode == "token-mean" else sequence_mean)(LENGTHS))
    expected, metrics = straight_from_verl(name, tokens, mode, clip_ratio_low=0.1, clip_ratio_high=0.3)
    loss = pickle.loads(pickle.dumps(verl_loss(name, clip_ratio_low=0.1, clip_ratio_high=0.3, **OPTIONS.get(name, {}))))
    torch.manual_seed(0)
    each, measures = loss(tokens)
    assert each.shape == tokens.logprobs.shape
    total = (each * tokens.weights).sum()
    assert total.item() == pytest.approx(expected.item(), rel=SAME, abs=SAME)
    slopes = [torch.autograd.grad(value, tokens.logprobs)[0] for value in (total, expected)]
    torch.testing.assert_close(*slopes, rtol=SAME, atol=SAME)
    if "actor/ppo_kl" in metrics:
        assert measures["approx_kl"].mean().item() == pytest.approx(metrics["actor/ppo_kl"], rel=SAME)


def test_token_by_token_it_is_our_own_loss():
    """Not only the sum: each token's loss and measures, KL included."""
    tokens = make_tokens(token_mean(LENGTHS))
    for ours, theirs in [
        (partial(clipped_surrogate, low=0.1, high=0.1, dual=3.0, kl=0.2), verl_loss("vanilla", clip_ratio=0.1, kl=0.2)),
        (policy_gradient, verl_loss("gpg")),
    ]:
        (one, measured), (other, means) = ours(tokens), theirs(tokens)
        torch.testing.assert_close(one, other, rtol=SAME, atol=SAME)
        for name in set(measured) & set(means):
            torch.testing.assert_close(measured[name].mean(), means[name].mean(), rtol=1e-5, atol=1e-6)


def test_an_empty_pass():
    tokens = make_tokens(token_mean(LENGTHS))
    each, _ = verl_loss("gspo")(Tokens(*(values[:0] if values is not None else None for values in tokens)))
    assert each.shape == (0,)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages_equal_verl(name):
    """As verl's trainer calls them: rewards at the last token of padded lines, float32; ours computes in float64."""
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    rng = np.random.default_rng(0)
    counts = np.array([4, 2, 5])
    values, lengths = rng.normal(size=11).astype(np.float32), rng.integers(1, 9, size=11)
    rewards, mask = torch.zeros(11, 8), torch.arange(8) < torch.from_numpy(lengths)[:, None]
    rewards[torch.arange(11), torch.from_numpy(lengths) - 1] = torch.from_numpy(values)
    expected, _ = ADV_ESTIMATOR_REGISTRY[name](
        token_level_rewards=rewards,
        response_mask=mask.float(),
        config=AlgoConfig(),
        **({} if name == "reinforce_plus_plus" else {"index": np.repeat([0, 1, 2], counts)}),
    )
    found = verl_advantages(name, values, counts, lengths=lengths)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected[:, 0].numpy(), rtol=1e-5, atol=1e-5)  # verl's float32 sums


def test_unscored_samples_are_left_out_of_verl():
    values, counts, scored = [1.0, np.nan, 0.0, 2.0, 5.0, 6.0], [4, 2], [True, False, True, True, True, True]
    found = verl_advantages("rloo", values, counts, scored=scored)
    assert found[1] == 0
    np.testing.assert_array_equal(found[[0, 2, 3, 4, 5]], verl_advantages("rloo", [1.0, 0.0, 2.0, 5.0, 6.0], [3, 2]))
    assert not verl_advantages("grpo", [np.nan], [1], scored=[False]).any()


def test_options_reach_the_estimator():
    values, counts = [1.0, 0.0, 4.0, 2.0], [4]
    plain, scaled = (verl_advantages("grpo", values, counts, norm_adv_by_std_in_grpo=flag) for flag in (False, True))
    np.testing.assert_allclose(plain / scaled, np.std(values, ddof=1), rtol=1e-5)
    assert not np.allclose(verl_advantages("gpg", values, counts, f_norm=2.0), verl_advantages("gpg", values, counts))


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match=r"'gspa'.*There is: .*gspo"):
        verl_loss("gspa")
    with pytest.raises(ValueError, match="bypass_mode"):
        verl_loss("bypass_mode")
    with pytest.raises(ValueError, match=r"clip_rato.*ActorConfig"):
        verl_loss("vanilla", clip_rato=0.1)(make_tokens(token_mean(LENGTHS)))
    with pytest.raises(ValueError, match=r"'gae'.*There is: .*rloo"):
        verl_advantages("gae", [1.0, 2.0], [2])
    with pytest.raises(ValueError, match="gama"):
        verl_advantages("rloo", [1.0, 2.0], [2], gama=0.9)
    with pytest.raises(ValueError, match="gamma=1"):
        verl_advantages("reinforce_plus_plus", [1.0, 2.0], [2], lengths=[3, 3], gamma=0.5)
    with pytest.raises(ValueError, match="hold 3 samples"):
        verl_advantages("rloo", [1.0, 2.0], [3])


def test_names_are_verl_s():
    """Every loss and estimator of the pinned verl is offered, or is known to need what a sample's score can't give."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

    assert {"bypass_mode"} == set(POLICY_LOSS_REGISTRY) - set(LOSSES)
    other_inputs = {"gae", "gdpo", "remax", "optimal_token_baseline", "tir_optimal_token_baseline"}
    assert other_inputs == set(ADV_ESTIMATOR_REGISTRY) - set(ESTIMATORS)
    assert set(LOSSES) < set(POLICY_LOSS_REGISTRY)
    assert set(ESTIMATORS) < set(ADV_ESTIMATOR_REGISTRY)


def test_the_root_logger_is_left_alone():
    code = (
        "import logging; from rolecall.kernels.verl import verl_advantages; verl_advantages('rloo', [1., 2.], [2]); "
        "print(logging.getLogger().handlers, logging.getLogger().level == logging.WARNING)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=150)
    assert found.stdout.strip().splitlines()[-1] == "[] True"

"""Losses: against verl's, against finite differences, and at the edges of floating point."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from rolecall.kernels.aggregation import constant_mean, sequence_mean, token_mean
from rolecall.kernels.losses import Tokens, clipped_surrogate, kl_to_reference, nll, policy_gradient

EXACT = 1e-12  # float64 against float64: the same operations, added up in another order
SINGLE = 1e-6  # float32 against float32, numbers of order 1


def make_tokens(lengths, weights, dtype=torch.float64, spread=0.5, seed=0):
    """Tokens of samples of these lengths, with ratios well outside of the clip; entropy and reference too."""
    rng = torch.Generator().manual_seed(seed)
    samples = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def normal(scale=1.0):
        return scale * torch.randn(len(samples), generator=rng, dtype=torch.float64).to(dtype)

    old = -normal().abs()
    logprobs = (old + normal(spread)).requires_grad_()
    weight = torch.as_tensor(np.asarray(weights), dtype=dtype)[samples]
    return Tokens(logprobs, old, normal(), weight, samples, reference=old + normal(spread), entropy=normal().abs().requires_grad_())


def padded(tokens, lengths):
    """Field values [K] → [N, Tmax], and the mask."""
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]

    def lines(values):
        return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, values)

    return lines, mask.to(tokens.old.dtype)


LENGTHS = [7, 1, 12, 4, 9]
MEANS = {
    "token-mean": token_mean,
    "seq-mean-token-mean": sequence_mean,
    "seq-mean-token-sum-norm": partial(constant_mean, horizon=max(LENGTHS)),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, SINGLE)])
@pytest.mark.parametrize("mode", MEANS)
@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, 0.2, 3.0), (0.2, 0.28, 1.5), (0.0003, 0.0004, 3.0)])
def test_clipped_surrogate_equals_verl(dtype, tolerance, mode, low, high, dual):
    """Value, gradient and metrics of verl's `vanilla`, with each of its averages made by our weights."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config import ActorConfig

    weights = MEANS[mode](LENGTHS).astype(np.float64)
    # The weights are float32, as in a batch; what they leave out of verl's float64 mean is their rounding.
    tolerance = max(tolerance, 1e-7)
    tokens = make_tokens(LENGTHS, weights, dtype, spread=1.0)
    lines, mask = padded(tokens, LENGTHS)
    config = ActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=dual
    )
    expected, metrics = compute_policy_loss_vanilla(
        lines(tokens.old), lines(tokens.logprobs), lines(tokens.advantages), mask, loss_agg_mode=mode, config=config
    )
    (slope,) = torch.autograd.grad(expected, tokens.logprobs)
    loss, measures = clipped_surrogate(tokens, low=low, high=high, dual=dual)
    total = (loss * tokens.weights).sum()
    assert total.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    torch.testing.assert_close(torch.autograd.grad(total, tokens.logprobs)[0], slope, rtol=tolerance, atol=tolerance)
    names = {"clip_fraction": "actor/pg_clipfrac", "dual_fraction": "actor/pg_clipfrac_lower", "approx_kl": "actor/ppo_kl"}
    for ours, theirs in names.items():
        assert measures[ours].mean().item() == pytest.approx(metrics[theirs], rel=1e-5, abs=1e-6)  # verl adds 1e-8 to counts
    assert 0 < measures["clip_fraction"].mean() < 1, "the case must exercise the clip"


@pytest.mark.parametrize("spread", [0.3, 2.0, 30.0])
def test_kl_equals_verl(spread):
    from verl.trainer.ppo.core_algos import kl_penalty

    tokens = make_tokens([200], [1.0], spread=spread)
    expected = kl_penalty(tokens.logprobs, tokens.reference, "low_var_kl")
    found = kl_to_reference(tokens.logprobs, tokens.reference)
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
    for one, other in zip(*(torch.autograd.grad(k.sum(), tokens.logprobs) for k in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)
    assert (found >= 0).all()


@pytest.mark.parametrize(
    "loss",
    [
        partial(clipped_surrogate, low=0.2, high=0.28, dual=3.0, kl=0.1, entropy=0.01),
        partial(policy_gradient, kl=0.1, entropy=0.01),
        nll,
    ],
)
def test_gradients_are_those_of_finite_differences(loss):
    tokens = make_tokens([20], [0.05])

    def value(logprobs, entropy):
        return loss(tokens._replace(logprobs=logprobs, entropy=entropy))[0]

    assert torch.autograd.gradcheck(value, (tokens.logprobs, tokens.entropy))


def test_policy_gradient_is_the_surrogate_at_ratio_one():
    tokens = make_tokens([30], [1 / 30], spread=0.0)
    slopes = [
        torch.autograd.grad((loss(tokens)[0] * tokens.weights).sum(), tokens.logprobs)[0] for loss in (clipped_surrogate, policy_gradient)
    ]
    torch.testing.assert_close(*slopes, rtol=EXACT, atol=EXACT)


def test_terms_add_up():
    tokens = make_tokens([30], [1 / 30])
    plain, _ = clipped_surrogate(tokens)
    both, measures = clipped_surrogate(tokens, kl=0.5, entropy=0.25)
    torch.testing.assert_close(both, plain + 0.5 * measures["kl"] - 0.25 * measures["entropy"], rtol=EXACT, atol=EXACT)
    assert not any(values.requires_grad for values in measures.values())
    assert all(values.shape == plain.shape for values in measures.values())
    without, measures = nll(tokens._replace(reference=None, entropy=None))
    torch.testing.assert_close(without, -tokens.logprobs, rtol=0, atol=0)
    assert measures == {}


@pytest.mark.parametrize("loss", [partial(clipped_surrogate, dual=3.0, kl=0.1, entropy=0.1), partial(policy_gradient, kl=0.1)])
def test_extreme_but_finite_inputs_stay_finite(loss):
    edge = torch.tensor([-1e30, -1e4, -100.0, -1e-30, 0.0], dtype=torch.float32)
    logprobs, old, advantages = (grid.flatten() for grid in torch.meshgrid(edge, edge, torch.tensor([-5.0, 0.0, 5.0]), indexing="ij"))
    tokens = Tokens(
        logprobs.clone().requires_grad_(), old, advantages, torch.ones_like(old), torch.zeros_like(old), old.flip(0), torch.zeros_like(old)
    )
    each, measures = loss(tokens)
    each.sum().backward()
    assert tokens.logprobs.grad.isfinite().all()
    assert each.isfinite().all()
    assert all(values.isfinite().all() for values in measures.values())


def test_refusals_say_what_to_do():
    tokens = make_tokens([3], [1.0])
    with pytest.raises(ValueError, match=r"kl=0.1.*reference=reference.split.logprobs\(samples\), or set kl=0"):
        clipped_surrogate(tokens._replace(reference=None), kl=0.1)
    with pytest.raises(ValueError, match=r"Tokens\.entropy"):
        policy_gradient(tokens._replace(entropy=None), entropy=0.1)
    for bad in ({"low": -0.1}, {"high": -1.0}, {"dual": 0.5}, {"dual": 1.0}):
        with pytest.raises(ValueError, match=r"dual > 1 \(3 is usual\)"):
            clipped_surrogate(tokens, **bad)


def test_importing_losses_and_advantages_costs_no_torch():
    code = (
        "import sys, rolecall.kernels.losses, rolecall.kernels.advantages, rolecall.kernels.aggregation, rolecall.kernels.packing, "
        "rolecall.kernels.verl; print(sorted({'torch', 'verl', 'ray', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"

"""Supervised fine-tuning takes a shorter way through the head: the same loss and gradient as by logprobs."""

from __future__ import annotations

from functools import partial

import msgspec
import numpy as np
import pytest
from rolecall.kernels.losses import nll
from rolecall.protocols.messages import PackedBatch
from rolecall.roles.base import Member
from rolecall.roles.packing import pack_samples
from rolecall.roles.policy import Policy
from tiny import tiny_samples

# Sums over the vocabulary in another order; float64 differs by the float32 of norms and rotary angles, which is the same in both.
LOSS, GRADIENT = {"float32": 1e-6, "float64": 1e-12}, {"float32": 2e-5, "float64": 1e-10}


def documents(siblings: int = 1) -> PackedBatch:
    """Tokens that nobody sampled: no old logprobs, some of weight 0. With siblings, one slot predicts several tokens."""
    samples = tiny_samples(3, siblings)
    weights = np.linspace(0.0, 0.2, len(samples.prompt_lengths))
    batch = pack_samples(samples, None, weights, capacity=64)
    return msgspec.structs.replace(batch, old=None, advantages=None)


def gradients(policy: Policy, batch: PackedBatch, loss: object) -> tuple[dict[str, tuple[float, float]], list[np.ndarray]]:
    sums = policy.accumulate(batch, loss).sums
    found = [view.double().numpy().copy() for view in policy._training.gradients.views]
    policy._training.gradients.clear()
    return sums, found


@pytest.mark.parametrize("siblings", [1, 2])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_loss_and_gradient_are_those_by_logprobs(tiny: str, dtype: str, rows: int, siblings: int) -> None:
    policy = Policy(tiny, dtype=dtype, rows_per_pass=rows)
    policy.setup(Member())
    batch = documents(siblings)
    short, own = gradients(policy, batch, nll)
    long, expected = gradients(policy, batch, partial(nll))  # another object: the way of all losses
    assert short["loss"][0] == pytest.approx(long["loss"][0], rel=LOSS[dtype])
    assert short["loss"][1] == long["loss"][1]
    assert short["tokens"] == long["tokens"]
    for ours, theirs in zip(own, expected, strict=True):
        assert np.abs(ours - theirs).max() <= GRADIENT[dtype] * max(np.abs(theirs).max(), 1e-12)


def test_a_temperature_or_old_logprobs_take_the_long_way(tiny: str) -> None:
    policy = Policy(tiny)
    policy.setup(Member())
    batch = documents()
    assert "entropy" not in gradients(policy, batch, nll)[0]
    assert "entropy" in gradients(policy, msgspec.structs.replace(batch, temperature=0.7), nll)[0]
    sampled = msgspec.structs.replace(batch, old=np.full(len(batch.targets), -1.0, np.float32))
    assert "logprob_gap" in gradients(policy, sampled, nll)[0]

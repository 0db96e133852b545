"""Which numbers are wide: weights may be bfloat16, what is summed or small is float32 at least."""

from __future__ import annotations

import pytest
import torch
from rolecall.kernels.losses import Tokens, nll
from rolecall.protocols.messages import PackedBatch
from rolecall.roles.base import Member
from rolecall.roles.models.lora import Lora
from rolecall.roles.packing import pack_samples
from rolecall.roles.policy import Policy
from rolecall.roles.policy.gradients import Gradients
from tiny import tiny_samples

WIDE = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
BFLOAT16 = 0.1  # of a gradient's norm: 8 bits, through two layers whose weights are ten times the usual


def batch(weight: float = 0.1) -> PackedBatch:
    return pack_samples(tiny_samples(2, 2), None, [weight] * 4, capacity=64)


def ready(model: str, **settings: object) -> Policy:
    policy = Policy(model, **settings)
    policy.setup(Member())
    return policy


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["all", "lora"])
@pytest.mark.parametrize("dtype", WIDE)
def test_parameters_are_as_asked_and_all_else_is_wide(tiny: str, dtype: str, lora: Lora | None) -> None:
    policy, seen = ready(tiny, dtype=dtype, lora=lora), []

    def loss(tokens: Tokens):
        seen.extend(each.dtype for each in (tokens.logprobs, tokens.weights, tokens.entropy) if each is not None)
        return nll(tokens)

    policy.accumulate(batch(), loss)
    policy.update(1e-3)
    training, wide = policy._training, WIDE[dtype]
    assert {parameter.dtype for parameter in training.model.parameters()} == {getattr(torch, dtype)}
    assert (
        set(seen) == {view.dtype for view in training.gradients.views} == {buffer.dtype for buffer in training.gradients.buffers} == {wide}
    )
    state = training.optimiser.tensors()
    assert {tensor.dtype for tensor in state.values()} == {wide}
    assert any(name.startswith("master/") for name in state) == (dtype == "bfloat16")


def test_many_small_contributions_are_not_rounded_away() -> None:
    """512 passes of 1/512 are one of 1. Summed in bfloat16, what is below 1/512 of the sum is lost."""
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    gradients = Gradients([parameter])
    alone = torch.zeros(3, dtype=torch.bfloat16)
    for _ in range(512):
        (parameter / 512).sum().backward()
        alone += 1 / 512
    assert torch.equal(gradients.views[0], torch.ones(3))
    assert (alone < 0.6).all()


def test_bfloat16_points_where_float32_points(tiny: str) -> None:
    narrow, wide = ready(tiny, dtype="bfloat16"), ready(tiny)
    for policy in (narrow, wide):
        policy.accumulate(batch(), nll)
    found, wanted = (torch.cat([view.flatten() for view in policy._training.gradients.views]) for policy in (narrow, wide))
    assert (found - wanted).norm() <= BFLOAT16 * wanted.norm()

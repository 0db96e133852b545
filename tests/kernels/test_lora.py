"""The fused adapter is the formula, and its gradients are the formula's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels.lora import lora_linear, lora_linear_plain

EXACT = 1e-12  # float64, sums in another order
BFLOAT16 = 2e-2  # of the largest entry; bfloat16 keeps 8 bits


def made(shape: tuple[int, ...], inputs: int, outputs: int, r: int, seed: int, dtype: torch.dtype = torch.float64):
    make = torch.Generator().manual_seed(seed)
    sizes = ((*shape, inputs), (outputs, inputs), (outputs,), (r, inputs), (outputs, r))
    return [torch.randn(size, generator=make, dtype=torch.float64).to(dtype) for size in sizes]


@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    r=st.integers(1, 5),
    bias=st.booleans(),
    first=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_the_formula(shape, inputs, outputs, r, bias, first, seed):
    x, weight, b, down, up = made(tuple(shape), inputs, outputs, r, seed)
    wanted = [down.requires_grad_(), up.requires_grad_()] + ([] if first else [x.requires_grad_()])
    found = []
    for form in (lora_linear, lora_linear_plain):
        out = form(x, weight, b if bias else None, down, up, 0.7)
        found.append([out.detach(), *torch.autograd.grad((out * out.detach().cos()).sum(), wanted)])
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=EXACT, atol=EXACT * max(1.0, float(other.abs().max()) if other.numel() else 1.0))


def test_gradients_by_finite_differences():
    x, weight, b, down, up = made((3,), 4, 5, 2, 0)
    inputs = [tensor.requires_grad_() for tensor in (x, down, up)]
    assert torch.autograd.gradcheck(lambda x, down, up: lora_linear(x, weight, b, down, up, 1.5), inputs)


def test_the_layer_itself_gets_no_gradient():
    x, weight, b, down, up = (tensor.requires_grad_() for tensor in made((3,), 4, 5, 2, 0))
    for form in (lora_linear, lora_linear_plain):
        found = torch.autograd.grad(form(x, weight, b, down, up, 1.0).sum(), [x, weight, b, down, up], allow_unused=True)
        assert [each is None for each in found] == [False, True, True, False, False]


def test_bfloat16_stays_near_float64():
    exact, rounded = made((64,), 96, 80, 8, 1), made((64,), 96, 80, 8, 1, torch.bfloat16)
    wanted, found = lora_linear(*exact, 0.5), lora_linear(*rounded, 0.5)
    assert found.dtype == torch.bfloat16
    assert (found.double() - wanted).abs().max() <= BFLOAT16 * wanted.abs().max()


def test_a_dropped_input_feeds_the_adapter_alone():
    x, weight, b, down, up = made((3,), 4, 5, 2, 0)
    assert torch.equal(lora_linear(x, weight, b, down, up, 1.0, dropped=torch.zeros_like(x)), torch.nn.functional.linear(x, weight, b))


def test_shapes_that_disagree_are_refused():
    x, weight, b, down, up = made((3,), 4, 5, 2, 0)
    with pytest.raises(ValueError, match=r"Adapter and layer disagree.*Do: give x"):
        lora_linear(x, weight, b, down[:, 1:], up, 1.0)

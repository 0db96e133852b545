"""The norm of queries and keys with their turn: the formula, the operation that torch.compile sees, and its kernels on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels.norm_rotary import norm_rotary, norm_rotary_op, norm_rotary_plain, rms_norm

EPS = 1e-6
EXACT = 1e-12  # float64, the same sums in another order; a share of the largest
SINGLE = 2e-6  # float32: some units in the last place of sums over a few dozen terms, of numbers around 1
HALF = 6e-3  # bfloat16 results: half a unit of 8 bits, as a share of the norm
SHAPES = [(3, 16, True, 0.0), (2, 24, True, 1.0), (4, 8, False, 0.0)]  # heads, size, with a gain, its offset


def drawn(heads: int, size: int, gained: bool, *, slots: int = 7, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    random = torch.Generator().manual_seed(heads * size)
    x, slope = (torch.randn(2, slots, heads, size, generator=random).to(device, dtype) for _ in range(2))
    angles = torch.rand(2, slots, 1, size // 2, generator=random) * 6
    gain = torch.randn(size, generator=random).to(device, dtype).requires_grad_() if gained else None
    return x.requires_grad_(), angles.cos().to(device, dtype), angles.sin().to(device, dtype), gain, slope


def wanted(x, cosines, sines, gain, slope, offset: float) -> list[torch.Tensor]:
    """By the formula in float64: what comes out, and the gradients of x and gain."""
    x = x.detach().double().requires_grad_()
    gain = None if gain is None else gain.detach().double().requires_grad_()
    out = norm_rotary_plain(x, cosines.double(), sines.double(), gain, eps=EPS, offset=offset, wide=True)
    out.backward(slope.double())
    return [out.detach(), x.grad, *([] if gain is None else [gain.grad])]


def share(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("heads", "size", "gained", "offset"), SHAPES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_operation_and_its_gradients_are_the_formula(heads: int, size: int, gained: bool, offset: float, compiled: bool) -> None:
    x, cosines, sines, gain, slope = drawn(heads, size, gained)

    def call(x, cosines, sines, gain):
        return norm_rotary_op(x * 2, cosines, sines, gain, EPS, offset) + 0.0

    torch._dynamo.reset()
    run = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    out = run(x, cosines, sines, gain)
    out.backward(slope)
    expected = wanted(x * 2, cosines, sines, gain, slope, offset)
    expected[1] *= 2
    for found, want in zip([out, x.grad, *([] if gain is None else [gain.grad])], expected, strict=True):
        assert share(found, want) < SINGLE


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3),
    slots=st.integers(0, 4),
    heads=st.integers(1, 3),
    half=st.integers(1, 4),
    gained=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
    scale=st.sampled_from([1e-150, 1e-3, 1.0, 1e6, 1e150]),
    seed=st.integers(0, 9),
)
def test_any_shape_and_size_of_numbers_in_float64(rows, slots, heads, half, gained, offset, scale, seed) -> None:
    random = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(rows, slots, heads, 2 * half, generator=random, dtype=torch.float64)).requires_grad_()
    angles = torch.randn(rows, slots, 1, half, generator=random, dtype=torch.float64) * 1e4
    gain = torch.randn(2 * half, generator=random, dtype=torch.float64).requires_grad_() if gained else None
    slope = torch.randn(x.shape, generator=random, dtype=torch.float64)
    leaves = (x,) if gain is None else (x, gain)
    one = norm_rotary_op(x, angles.cos(), angles.sin(), gain, EPS, offset)
    two = norm_rotary_plain(x, angles.cos(), angles.sin(), gain, eps=EPS, offset=offset, wide=True)
    for found, want in zip((one, *torch.autograd.grad(one, leaves, slope)), (two, *torch.autograd.grad(two, leaves, slope)), strict=True):
        assert want.isfinite().all()
        torch.testing.assert_close(found, want, rtol=0, atol=EXACT * float(want.detach().abs().max() if want.numel() else 0))


@pytest.mark.parametrize(("gained", "offset"), [(True, 0.0), (True, 1.0), (False, 0.0)])
def test_gradients_are_those_of_finite_differences(gained: bool, offset: float) -> None:
    x, cosines, sines, gain, _ = drawn(2, 6, gained, slots=3, dtype=torch.float64)

    def call(x, gain=None):
        return norm_rotary_op(x, cosines, sines, gain, EPS, offset)

    assert torch.autograd.gradcheck(call, (x,) if gain is None else (x, gain.detach().requires_grad_()))


def test_the_operation_keeps_what_torch_asks_of_one() -> None:
    x, cosines, sines, gain, _ = drawn(2, 8, True)
    torch.library.opcheck(norm_rotary_op, (x, cosines, sines, gain, EPS, 0.5))
    torch.library.opcheck(norm_rotary_op, (x, cosines, sines, None, EPS, 0.0))


def test_a_turn_keeps_lengths_and_depends_on_distance_alone() -> None:
    x, _, _, _, _ = drawn(1, 16, False, slots=40)
    angles = torch.arange(40.0)[None, :, None, None] * torch.rand(8, generator=torch.Generator().manual_seed(0))
    same = x[:1, :1].expand(1, 40, 1, 16)
    turned = norm_rotary(same, angles.cos(), angles.sin())[0, :, 0]
    products = turned @ turned.T
    assert torch.allclose(turned.norm(dim=-1), same[0, :, 0].norm(dim=-1), rtol=1e-5)
    assert torch.allclose(products[3, 10], products[20, 27], rtol=1e-4)
    assert not torch.allclose(products[3, 10], products[3, 11], rtol=1e-2)


def test_a_norm_rounds_where_a_family_wants_it() -> None:
    x, _, _, gain, _ = drawn(1, 16, True, dtype=torch.bfloat16)
    unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    assert torch.equal(rms_norm(x, gain, eps=EPS), gain * unit.bfloat16())
    assert torch.equal(rms_norm(x, gain, eps=EPS, offset=1.0, wide=True), (unit * (1 + gain.float())).bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "size", "gained", "offset"), [*SHAPES, (16, 128, True, 0.0), (4, 256, True, 1.0), (9, 64, False, 0.0)])
def test_kernels_give_the_formula(heads: int, size: int, gained: bool, offset: float) -> None:
    x, cosines, sines, gain, slope = drawn(heads, size, gained, slots=1000, dtype=torch.bfloat16, device="cuda")
    out = norm_rotary(x, cosines, sines, gain, eps=EPS, offset=offset)
    out.backward(slope)
    expected = wanted(x, cosines, sines, gain, slope, offset)
    for found, want in zip([out, x.grad, *([] if gain is None else [gain.grad])], expected, strict=True):
        assert share(found, want) < HALF

"""A frozen linear layer with a low-rank adapter (Hu et al. 2021, arXiv:2106.09685).

N tokens, I inputs, O outputs, r rank. y = x Wᵀ + b + s (x Aᵀ) Bᵀ with A `down` [r, I], B `up` [O, r].
Both functions have one signature; the tests hold the fused one to the plain one in float64.

What the fused one saves over the plain one: the adapter's output is added by the matrix product that makes it (and its
gradient to x likewise), so that no [N, O] or [N, I] tensor is written and read a second time; nothing is kept for the
backward pass but x and the [N, r] product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, *, dropped: Tensor | None = None
) -> Tensor:
    """x Wᵀ + b + scale (x Aᵀ) Bᵀ; gradients go to x, A and B, never to W and b.

    Args:
        x: [..., I] input, of at least two dimensions.
        weight: [O, I], frozen. bias: [O] or None, frozen.
        down: [r, I], A. up: [O, r], B; of the dtype of `weight`.
        scale: alpha / r.
        dropped: [..., I], what the adapter sees in place of x (its dropout).

    Returns:
        [..., O] in the dtype of x.

    Raises:
        ValueError: shapes disagree.
    """
    _check(x, weight, down, up)
    if dropped is not None:
        return lora_linear_plain(x, weight, bias, down, up, scale, dropped=dropped)
    out: Tensor = _LoraLinear.apply(x, weight, bias, down, up, float(scale))  # type: ignore[no-untyped-call]
    return out


def lora_linear_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, *, dropped: Tensor | None = None
) -> Tensor:
    """The same by the formula."""
    _check(x, weight, down, up)
    frozen = functional.linear(x, weight.detach(), None if bias is None else bias.detach())
    return frozen + scale * functional.linear(functional.linear(x if dropped is None else dropped, down), up)


def _check(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> None:
    outputs, inputs = weight.shape
    if x.ndim < 2 or x.shape[-1] != inputs or down.shape[1:] != (inputs,) or up.shape != (outputs, down.shape[0]):
        raise ValueError(
            f"Adapter and layer disagree. Asked: x {tuple(x.shape)}, A {tuple(down.shape)}, B {tuple(up.shape)}. "
            f"There is: W {tuple(weight.shape)}. Do: give x [..., I], A [r, I] and B [O, r] for W [O, I]."
        )


class _LoraLinear(torch.autograd.Function):
    """x, W, b, A, B, s → y; only what is asked for is computed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
        flat = x.flatten(0, -2)
        low = flat @ down.T  # [N, r]
        out = functional.linear(flat, weight, bias)
        out.addmm_(low, up.T, alpha=scale)
        ctx.save_for_backward(flat, weight, down, up, low)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, down, up, low = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        wants_x, _, _, wants_down, wants_up, _ = ctx.needs_input_grad
        to_low = (grad @ up).mul_(ctx.scale) if wants_x or wants_down else None  # [N, r]
        to_x = None
        if wants_x and to_low is not None:
            to_x = (grad @ weight).addmm_(to_low, down).view(ctx.shape)
        to_down = to_low.T @ flat if wants_down and to_low is not None else None
        to_up = (grad.T @ low).mul_(ctx.scale) if wants_up else None
        return to_x, None, None, to_down, to_up, None

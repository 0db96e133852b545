"""A frozen linear layer with a low-rank adapter (Hu et al. 2021, arXiv:2106.09685).

N tokens, I inputs, O outputs, r rank. y = x Wᵀ + b + s (x Aᵀ) Bᵀ with A `down` [r, I], B `up` [O, r].
Both functions have one signature; the tests hold the fused one to the plain one in float64.

What the fused one saves over the plain one: the adapter's output comes first and the layer's product is added onto it as it is made
(and their gradients to x likewise), so that no third [N, O] or [N, I] tensor is written and read; nothing is kept for the backward pass
but x and the [N, r] product. In this order because the large product hides the reading, which is what the small one
would take most of its time for. It is an operator of its own so that torch.compile takes it as it is: of an addition in
place it would make a copy and an addition.
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
    out: Tensor = _forward(x.flatten(0, -2), weight, bias, down, up, float(scale))[0]
    return out.view(*x.shape[:-1], weight.shape[0])


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


@torch.library.custom_op(
    "rolecall::lora_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor? b, Tensor down, Tensor up, float scale) -> (Tensor, Tensor)",
)
def _forward(x: Tensor, w: Tensor, b: Tensor | None, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """y [N, O] and x Aᵀ [N, r] of x [N, I]."""
    low = x @ down.T
    start = x.new_empty(x.shape[0], w.shape[0]) if b is None else b
    out = torch.addmm(start, low, up.T, beta=0 if b is None else 1, alpha=scale)  # beta 0: what the start holds is not looked at
    return out.addmm_(x, w.T), low


@torch.library.custom_op(
    "rolecall::lora_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor w, Tensor down, Tensor up, Tensor low, float scale, bool wants) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, x: Tensor, w: Tensor, down: Tensor, up: Tensor, low: Tensor, scale: float, wants: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (nothing unless it is wanted), A and B, of those of y [N, O]."""
    to_low = (grad @ up).mul_(scale)
    to_x = (to_low @ down).addmm_(grad, w) if wants else x.new_empty(0)
    return to_x, to_low.T @ x, (grad.T @ low).mul_(scale)


@_forward.register_fake
def _(x: Tensor, w: Tensor, b: Tensor | None, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], w.shape[0]), x.new_empty(x.shape[0], down.shape[0])


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, w: Tensor, down: Tensor, up: Tensor, low: Tensor, scale: float, wants: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x) if wants else x.new_empty(0), torch.empty_like(down), torch.empty_like(up)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w, _, down, up, ctx.scale = inputs
    ctx.save_for_backward(x, w, down, up, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _low: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    wants = ctx.needs_input_grad[0]
    to_x, to_down, to_up = _backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale, wants)
    return to_x if wants else None, None, None, to_down, to_up, None


_forward.register_autograd(_differentiate, setup_context=_keep)

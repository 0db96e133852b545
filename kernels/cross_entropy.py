"""Cross entropy of next tokens from hidden states: the head and the loss in one, logits made once and never whole.

N tokens, D hidden size, V vocabulary, Vp rows of the head. Tokens that are ignored, or weigh nothing, are dropped before the
projection: time falls with their share. Gradients are computed in the forward pass, from the same logits as the loss, `chunk`
tokens at a time: 6 N D V operations in all, where computing logits again in the backward pass costs 8. The backward pass only
multiplies them by the gradient of the loss. bfloat16 tensors on a Hopper GPU take the fused way of `kernels/head_fused.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from rolecall.kernels.head import Gradients, Law, chunks, factor, law, logits, wide
from rolecall.kernels.head_fused import fused
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    ignore: int = -100,
    vocab: int = 0,
    softcap: float = 0.0,
    scale: float = 1.0,
    chunk: int = 0,
) -> Tensor:
    """sum_n weights_n * -log softmax(z_n)[target_n] over the tokens that are not ignored, with exact gradients.

    For the mean over the trained tokens, give weights of one over their number.

    Args:
        hidden: [N, D], the states that predict the tokens (after the final norm).
        head: [Vp, D], output embedding, of the same dtype.
        targets: [N] int; those equal to `ignore` count nothing.
        weights: [N] float, of each token in the sum; None for 1 each. They get no gradient.
        ignore: the target that marks an ignored token.
        vocab: true size of the vocabulary, where the head has padding rows beyond it; 0 means Vp.
        softcap: soft cap of the logits, 0 for none.
        scale: multiplies the products of states and head.
        chunk: tokens whose logits are held at once; 0 means as many as suits the device.

    Returns:
        A scalar, float32 (float64 if the inputs are). Its gradients go to `hidden` and `head`; it can't be differentiated again.

    Raises:
        ValueError: shapes disagree, chunk is negative, vocab is more than Vp, or weights want a gradient.
    """
    rule = _checked(hidden, head, targets, weights, vocab, softcap, scale, chunk)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, head, targets.long(), weights, ignore, rule, chunk)  # type: ignore[no-untyped-call]
    return loss


def linear_cross_entropy_plain(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    ignore: int = -100,
    vocab: int = 0,
    softcap: float = 0.0,
    scale: float = 1.0,
    chunk: int = 0,
) -> Tensor:
    """The same by the formula, all logits at once; `chunk` is only checked."""
    rule = _checked(hidden, head, targets, weights, vocab, softcap, scale, chunk)
    dtype = wide(hidden, head)
    raw = scale * (hidden.to(dtype) @ head[: rule.vocab].to(dtype).T)
    table = softcap * torch.tanh(raw / softcap) if softcap else raw
    each = torch.nn.functional.cross_entropy(table, targets.long(), ignore_index=ignore, reduction="none")
    return each.sum() if weights is None else torch.where(targets == ignore, 0, each * weights.to(dtype)).sum()


def _checked(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None, vocab: int, softcap: float, scale: float, chunk: int
) -> Law:
    if targets.ndim != 1 or (weights is not None and weights.shape != targets.shape):
        shape = None if weights is None else tuple(weights.shape)
        raise ValueError(f"Shapes disagree. Asked: targets {tuple(targets.shape)}, weights {shape}. Do: give both [N].")
    if weights is not None and weights.requires_grad:
        raise ValueError("Weights get no gradient here. Do: detach them, or use token_logprobs and weigh its results.")
    rule = law(hidden, head, targets, vocab=vocab, softcap=softcap, scale=scale)
    chunks(0, chunk, hidden, rule.vocab)
    return rule


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None, ignore: int, rule: Law, chunk: int
    ) -> Tensor:
        kept = targets != ignore
        if weights is not None:
            kept &= weights != 0
        rows = kept.nonzero()[:, 0]
        share = torch.ones_like(rows, dtype=wide(hidden, head)) if weights is None else weights[rows].to(wide(hidden, head))
        wanted = {"to_hidden": ctx.needs_input_grad[0], "to_head": ctx.needs_input_grad[1]}
        quick = fused(hidden, head)
        counted = (hidden, head, targets[rows], rows, share, rule, chunk)
        found = None if quick is None else quick.losses(*counted, **wanted)
        loss, to_hidden, to_head = _losses(*counted, **wanted) if found is None else found
        ctx.found, ctx.quick = (to_hidden, to_head), quick  # not saved by autograd: backward gives them away, it makes no copies
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the forward pass times that of the loss; in place, so that the head's is not there twice."""
        if ctx.found is None:
            raise RuntimeError("The gradients of this loss were given away by its first backward pass. Do: compute the loss again.")
        to_hidden, to_head = ctx.found
        ctx.found = None
        multiply = _multiply if ctx.quick is None else ctx.quick.multiply
        for each in (to_hidden, to_head):
            if each is not None:
                multiply(each, slope)
        return to_hidden, to_head, None, None, None, None, None


def _multiply(values: Tensor, number: Tensor) -> None:
    """values *= number, in place; a 1 costs nothing on a CPU (on a GPU one would have to wait for it)."""
    if values.is_cuda or number != 1:
        values.mul_(number)


def _losses(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    rows: Tensor,
    share: Tensor,
    rule: Law,
    chunk: int,
    *,
    to_hidden: bool,
    to_head: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and its gradients.

    Args:
        hidden: [N, D].
        targets, rows, share: [n] each: token, row of `hidden` and weight of what counts.
    """
    gradients = Gradients(hidden, head, to_hidden=to_hidden, to_head=to_head)
    weight = factor(head[: rule.vocab])
    loss = hidden.new_zeros((), dtype=share.dtype)
    for part in chunks(len(rows), chunk, hidden, rule.vocab):
        states, at = hidden[rows[part]], targets[part, None]
        table = logits(states, weight, rule)
        bend = rule.bend(table) if to_hidden or to_head else 1.0
        table.sub_(table.amax(-1, keepdim=True))
        at_target = table.gather(1, at)
        mass = table.exp_()
        total = mass.sum(-1, keepdim=True)
        loss += ((total.log() - at_target)[:, 0] * share[part]).sum()
        if to_hidden or to_head:
            slope = mass.mul_(share[part, None] / total).scatter_add_(1, at, -share[part, None])
            gradients.add(slope.mul_(bend) if isinstance(bend, Tensor) or bend != 1 else slope, states, weight, rows[part])
    return loss, *gradients.results()

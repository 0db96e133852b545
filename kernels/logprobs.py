"""Logprobs and entropies of given tokens from hidden states, without ever holding all logits.

K tokens, D hidden size, V vocabulary, Vp rows of the head. Logits are those of `kernels/head.py`; they are made `chunk` tokens at a
time, in the backward pass once more, so memory above the gradients is about 2 x chunk x V floats. Both functions have one signature;
the tests hold the chunked one to the plain one in float64. bfloat16 tensors on a Hopper GPU take the fused way of
`kernels/head_fused.py`, where a product's epilogue reduces the logits while they are still in registers.
On one CPU core (K = 768, D = 576, V = 49152, float32) the chunked one takes as long as the plain one, forward and backward
together, and 0.6 of the time of `torch.utils.checkpoint` a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from rolecall.kernels.head import Gradients, Law, chunks, factor, law, logits, wide
from rolecall.kernels.head_fused import fused
from torch import Tensor


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 0,
    vocab: int = 0,
    softcap: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Logprob of each target, and entropy of the distribution it is drawn from; both with exact gradients.

    logprob_k = z_k[target_k] - logsumexp(z_k), entropy_k = -sum_v p_kv log p_kv with p = softmax(z).

    Args:
        hidden: [K, D], the states that predict the tokens (after the final norm).
        head: [Vp, D], output embedding, of the same dtype.
        targets: [K] int, the tokens, each below the vocabulary's size.
        temperature: divides the logits; must be positive.
        chunk: tokens whose logits are held at once; 0 means as many as suits the device.
        vocab: true size of the vocabulary, where the head has padding rows beyond it; 0 means Vp.
        softcap: soft cap of the logits, 0 for none.
        scale: multiplies the products of states and head.

    Returns:
        logprobs [K], entropy [K] in nats; float32 (float64 if the inputs are). Logits of float16 and bfloat16 inputs are
        accumulated and kept in float32. Gradients of both go to `hidden` and `head`; they can't be differentiated again.

    Raises:
        ValueError: shapes disagree, temperature is not positive, chunk is negative, or vocab is more than Vp.
    """
    rule = _checked(hidden, head, targets, temperature, chunk, vocab, softcap, scale)
    logprobs, entropy = _TokenLogprobs.apply(hidden, head, targets.long(), rule, chunk)  # type: ignore[no-untyped-call]
    return logprobs, entropy


def token_logprobs_plain(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 0,
    vocab: int = 0,
    softcap: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The same by the formula, all logits at once; `chunk` is only checked."""
    rule = _checked(hidden, head, targets, temperature, chunk, vocab, softcap, scale)
    dtype = wide(hidden, head)
    raw = scale * (hidden.to(dtype) @ head[: rule.vocab].to(dtype).T)
    table = torch.log_softmax((softcap * torch.tanh(raw / softcap) if softcap else raw) / temperature, dim=-1)
    return table.gather(1, targets.long()[:, None])[:, 0], -(table.exp() * table).sum(-1)


def _checked(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk: int, vocab: int, softcap: float, scale: float
) -> Law:
    if targets.ndim != 1:
        raise ValueError(f"Asked: targets {tuple(targets.shape)}. Do: give targets [K], one a row of hidden.")
    rule = law(hidden, head, targets, vocab=vocab, temperature=temperature, softcap=softcap, scale=scale)
    chunks(0, chunk, hidden, rule.vocab)
    return rule


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, rule: Law, chunk: int) -> tuple[Tensor, Tensor]:
        quick = fused(hidden, head)
        measure = _measure if quick is None else quick.measure
        logprobs, entropy, normaliser = measure(hidden, head, targets, rule, chunk)
        ctx.save_for_backward(hidden, head, targets, logprobs, normaliser, entropy)
        ctx.set_materialize_grads(False)
        ctx.rule, ctx.chunk, ctx.quick = rule, chunk, quick
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Logits are made again, chunk by chunk; of them come the gradients of the logits, of those the two results."""
        hidden, head, targets, logprobs, normaliser, entropy = ctx.saved_tensors
        if of_logprobs is None and of_entropy is None:
            return None, None, None, None, None
        if of_logprobs is None:
            of_logprobs = torch.zeros_like(normaliser)
        wanted = {"to_hidden": ctx.needs_input_grad[0], "to_head": ctx.needs_input_grad[1]}
        found = (logprobs, normaliser, entropy)
        if ctx.quick is None:
            to_hidden, to_head = _spread(hidden, head, targets, found, (of_logprobs, of_entropy), ctx.rule, ctx.chunk, **wanted)
        else:
            to_hidden, to_head = ctx.quick.spread(hidden, head, targets, found, (of_logprobs, of_entropy), ctx.rule, ctx.chunk, **wanted)
        return to_hidden, to_head, None, None, None


def _measure(hidden: Tensor, head: Tensor, targets: Tensor, rule: Law, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs, entropy and logsumexp, each [K]."""
    logprobs, entropy, normaliser = (hidden.new_empty(len(targets), dtype=wide(hidden, head)) for _ in range(3))
    weight = factor(head[: rule.vocab])
    for part in chunks(len(targets), chunk, hidden, rule.vocab):
        table = logits(hidden[part], weight, rule)
        top = table.amax(-1, keepdim=True)
        table.sub_(top)
        at_target = table.gather(1, targets[part, None])[:, 0]
        mass = table.exp()
        total = mass.sum(-1)
        log_total = total.log()
        logprobs[part] = at_target - log_total
        entropy[part] = log_total - mass.mul_(table).sum(-1) / total
        normaliser[part] = log_total + top[:, 0]
    return logprobs, entropy, normaliser


def _spread(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    slopes: tuple[Tensor, Tensor | None],
    rule: Law,
    chunk: int,
    *,
    to_hidden: bool,
    to_head: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and head from those of logprobs and entropy; `found` are the results of `_measure`."""
    _, normaliser, entropy = found
    of_logprobs, of_entropy = slopes
    gradients = Gradients(hidden, head, to_hidden=to_hidden, to_head=to_head)
    weight = factor(head[: rule.vocab])
    if not rule.softcap:
        # Scale and temperature multiply the gradients of the results, not those of all logits: the same, and V times less work.
        of_logprobs = of_logprobs * rule.bend(of_logprobs)
        of_entropy = None if of_entropy is None else of_entropy * rule.bend(of_entropy)
    for part in chunks(len(targets), chunk, hidden, rule.vocab):
        table = logits(hidden[part], weight, rule)
        bend = rule.bend(table) if rule.softcap else None
        of_entropies = None if of_entropy is None else of_entropy[part, None]
        log_p = table.sub_(normaliser[part, None])
        slope = _slope(log_p, targets[part, None], entropy[part, None], of_logprobs[part, None], of_entropies)
        gradients.add(slope if bend is None else slope.mul_(bend), hidden[part], weight, part)
    return gradients.results()


def _slope(log_p: Tensor, targets: Tensor, entropy: Tensor, of_logprobs: Tensor, of_entropy: Tensor | None) -> Tensor:
    """Gradient of the loss in the logits: g_logprob (onehot - p) - g_entropy p (log p + entropy). Overwrites `log_p`."""
    if of_entropy is None:
        slope = log_p.exp_().mul_(-of_logprobs)
    else:
        p = log_p.exp()
        slope = log_p.add_(entropy).mul_(p).mul_(-of_entropy).sub_(p.mul_(of_logprobs))
    return slope.scatter_add_(1, targets, of_logprobs)

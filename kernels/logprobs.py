"""Logprobs and entropies of given tokens from hidden states, without ever holding all logits.

K tokens, D hidden size, V vocabulary. Logits are z = hidden @ head.T / temperature [K, V]; they are made `chunk` tokens
at a time, in the backward pass once more, so memory above the gradients is 2 x chunk x V floats.
Both functions have one signature; the tests hold the chunked one to the plain one in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # tokens; at V = 49152 a chunk of float32 logits is 50 MB


def token_logprobs(hidden: Tensor, head: Tensor, targets: Tensor, *, temperature: float = 1.0, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Logprob of each target, and entropy of the distribution it is drawn from; both with exact gradients.

    logprob_k = z_k[target_k] - logsumexp(z_k), entropy_k = -sum_v p_kv log p_kv with p = softmax(z).

    Args:
        hidden: [K, D], the states that predict the tokens (after the final norm).
        head: [V, D], output embedding, of the same dtype.
        targets: [K] int, the tokens.
        temperature: divides the logits; must be positive.
        chunk: tokens whose logits are held at once.

    Returns:
        logprobs [K], entropy [K] in nats; float32 (float64 if the inputs are). Logits of float16 and bfloat16 inputs are
        accumulated and kept in float32. Gradients go to `hidden` and `head`, once (not twice differentiable).

    Raises:
        ValueError: shapes disagree, or temperature or chunk is not positive.
    """
    _check(hidden, head, targets, temperature, chunk)
    logprobs, entropy = _TokenLogprobs.apply(hidden, head, targets.long(), float(temperature), int(chunk))  # type: ignore[no-untyped-call]
    return logprobs, entropy


def token_logprobs_plain(
    hidden: Tensor, head: Tensor, targets: Tensor, *, temperature: float = 1.0, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The same by the formula, all logits at once; `chunk` is only checked."""
    _check(hidden, head, targets, temperature, chunk)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    table = torch.log_softmax(hidden.to(wide) @ head.to(wide).T / temperature, dim=-1)
    return table.gather(1, targets.long()[:, None])[:, 0], -(table.exp() * table).sum(-1)


def _check(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk: int) -> None:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"Shapes disagree. Asked: hidden {tuple(hidden.shape)}, head {tuple(head.shape)}, targets {tuple(targets.shape)}. "
            "Do: give hidden [K, D], head [V, D], targets [K]."
        )
    if not temperature > 0 or chunk < 1:
        raise ValueError(
            f"A temperature and a chunk are positive. Asked: temperature={temperature}, chunk={chunk}. "
            "Do: give the temperature that the tokens were sampled at (greedy samples have none: use 1)."
        )


def _product_head(head: Tensor) -> Tensor:
    """The head as `_logits` wants it: 16-bit heads are widened once on a CPU, whose 16-bit product would round."""
    return head.float() if head.dtype in (torch.float16, torch.bfloat16) and not head.is_cuda else head


def _logits(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    """[k, V] logits in float32 (or float64), a tensor that the caller may change."""
    if head.dtype in (torch.float16, torch.bfloat16):  # on a GPU: a product of 16-bit tensors, kept in float32
        return torch.mm(hidden, head.T, out_dtype=torch.float32).div_(temperature)
    return (hidden.to(head.dtype) / temperature) @ head.T


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, normaliser = (hidden.new_empty(len(targets), dtype=wide) for _ in range(3))
        factor = _product_head(head)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], factor, temperature)
            top = logits.amax(-1, keepdim=True)
            logits.sub_(top)
            at_target = logits.gather(1, targets[part, None])[:, 0]
            mass = logits.exp()
            total = mass.sum(-1)
            log_total = total.log()
            logprobs[part] = at_target - log_total
            entropy[part] = log_total - mass.mul_(logits).sum(-1) / total
            normaliser[part] = log_total + top[:, 0]
        ctx.save_for_backward(hidden, head, targets, normaliser, entropy)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Logits are made again, chunk by chunk; of them come the gradients of the logits, of those the two results."""
        hidden, head, targets, normaliser, entropy = ctx.saved_tensors
        if of_logprobs is None and of_entropy is None:
            return None, None, None, None, None
        of_logprobs = torch.zeros_like(normaliser) if of_logprobs is None else of_logprobs
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_head = torch.zeros_like(head, dtype=normaliser.dtype) if ctx.needs_input_grad[1] else None
        factor = _product_head(head)
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            log_p = _logits(hidden[part], factor, ctx.temperature).sub_(normaliser[part, None])
            slope = _slope(
                log_p,
                targets[part, None],
                entropy[part, None],
                of_logprobs[part, None],
                None if of_entropy is None else of_entropy[part, None],
            ).div_(ctx.temperature)
            if to_hidden is not None:
                to_hidden[part] = (slope.to(factor.dtype) @ factor).to(hidden.dtype)
            if to_head is not None:
                to_head.addmm_(slope.T, hidden[part].to(slope.dtype))
        return to_hidden, None if to_head is None else to_head.to(head.dtype), None, None, None


def _slope(log_p: Tensor, targets: Tensor, entropy: Tensor, of_logprobs: Tensor, of_entropy: Tensor | None) -> Tensor:
    """Gradient of the loss in the logits: g_logprob (onehot - p) - g_entropy p (log p + entropy). Overwrites `log_p`."""
    if of_entropy is None:
        slope = log_p.exp_().mul_(-of_logprobs)
    else:
        p = log_p.exp()
        slope = log_p.add_(entropy).mul_(p).mul_(-of_entropy).sub_(p.mul_(of_logprobs))
    return slope.scatter_add_(1, targets, of_logprobs)

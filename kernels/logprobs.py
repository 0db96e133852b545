"""Logprobs and entropies of given tokens from hidden states, without ever holding all logits.

K tokens, D hidden size, V vocabulary. Logits are z = hidden @ head.T / temperature [K, V]; they are made `chunk` tokens
at a time, in the backward pass once more, so memory above the gradients is about 2 x chunk x V floats.
Both functions have one signature; the tests hold the chunked one to the plain one in float64.
On one CPU core (K = 768, D = 576, V = 49152, float32) the chunked one takes as long as the plain one, forward and backward
together, and 0.6 of the time of `torch.utils.checkpoint` a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS = {"cpu": 2**24, "cuda": 2**26}  # logits held at once by default: 64 and 256 MiB in float32


def token_logprobs(hidden: Tensor, head: Tensor, targets: Tensor, *, temperature: float = 1.0, chunk: int = 0) -> tuple[Tensor, Tensor]:
    """Logprob of each target, and entropy of the distribution it is drawn from; both with exact gradients.

    logprob_k = z_k[target_k] - logsumexp(z_k), entropy_k = -sum_v p_kv log p_kv with p = softmax(z).

    Args:
        hidden: [K, D], the states that predict the tokens (after the final norm).
        head: [V, D], output embedding, of the same dtype.
        targets: [K] int, the tokens.
        temperature: divides the logits; must be positive.
        chunk: tokens whose logits are held at once; 0 means as many as `LOGITS` allows.

    Returns:
        logprobs [K], entropy [K] in nats; float32 (float64 if the inputs are). Logits of float16 and bfloat16 inputs are
        accumulated and kept in float32. Gradients of both go to `hidden` and `head`; they can't be differentiated again.

    Raises:
        ValueError: shapes disagree, temperature is not positive, or chunk is negative.
    """
    _check(hidden, head, targets, temperature, chunk)
    chunk = chunk or max(1, LOGITS.get(hidden.device.type, LOGITS["cpu"]) // len(head))
    logprobs, entropy = _TokenLogprobs.apply(hidden, head, targets.long(), float(temperature), chunk)  # type: ignore[no-untyped-call]
    return logprobs, entropy


def token_logprobs_plain(
    hidden: Tensor, head: Tensor, targets: Tensor, *, temperature: float = 1.0, chunk: int = 0
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
    if not temperature > 0 or chunk < 0:
        raise ValueError(
            f"A temperature is positive, a chunk not negative. Asked: temperature={temperature}, chunk={chunk}. "
            "Do: give the temperature that the tokens were sampled at (greedy samples have none: use 1)."
        )


def _factor(head: Tensor) -> Tensor:
    """The head as the products below take it: 16 bits wide only where they can be accumulated and kept in float32.

    That is bfloat16 on a GPU; gradients of logits underflow in float16, and a CPU rounds its 16-bit products.
    """
    return head if head.dtype == torch.bfloat16 and head.is_cuda else head.to(torch.promote_types(head.dtype, torch.float32))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32 (or float64), for both of the dtype of `_factor`."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.dtype == torch.bfloat16 else left @ right


def _logits(hidden: Tensor, factor: Tensor, temperature: float) -> Tensor:
    """[k, V] logits in float32 (or float64), a tensor that the caller may change."""
    logits = _product(hidden.to(factor.dtype), factor.T)
    return logits if temperature == 1 else logits.div_(temperature)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(torch.promote_types(hidden.dtype, head.dtype), torch.float32)
        logprobs, entropy, normaliser = (hidden.new_empty(len(targets), dtype=wide) for _ in range(3))
        factor = _factor(head)
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
        # The temperature divides the gradients of the results, not those of all logits: the same, and V times less work.
        of_logprobs = torch.zeros_like(normaliser) if of_logprobs is None else of_logprobs / ctx.temperature
        of_entropy = None if of_entropy is None else of_entropy / ctx.temperature
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_head = torch.zeros_like(head, dtype=normaliser.dtype) if ctx.needs_input_grad[1] else None
        factor = _factor(head)
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            log_p = _logits(hidden[part], factor, ctx.temperature).sub_(normaliser[part, None])
            of_entropies = None if of_entropy is None else of_entropy[part, None]
            slope = _slope(log_p, targets[part, None], entropy[part, None], of_logprobs[part, None], of_entropies).to(factor.dtype)
            if to_hidden is not None:
                to_hidden[part] = _product(slope, factor).to(hidden.dtype)
            if to_head is not None and slope.dtype == to_head.dtype:
                to_head.addmm_(slope.T, hidden[part].to(slope.dtype))  # in place: a product apart would be a second [V, D]
            elif to_head is not None:
                to_head.add_(_product(slope.T, hidden[part].to(slope.dtype)))
        return to_hidden, None if to_head is None else to_head.to(head.dtype), None, None, None


def _slope(log_p: Tensor, targets: Tensor, entropy: Tensor, of_logprobs: Tensor, of_entropy: Tensor | None) -> Tensor:
    """Gradient of the loss in the logits: g_logprob (onehot - p) - g_entropy p (log p + entropy). Overwrites `log_p`."""
    if of_entropy is None:
        slope = log_p.exp_().mul_(-of_logprobs)
    else:
        p = log_p.exp()
        slope = log_p.add_(entropy).mul_(p).mul_(-of_entropy).sub_(p.mul_(of_logprobs))
    return slope.scatter_add_(1, targets, of_logprobs)

"""Attention that is computed rectangle by rectangle, as one differentiable function; sinks are added to what any kernel returns.

A job has `forward(q, k, v) -> (mean [R, H, C, d], log of the sum of exponentials [R, H, C])` and
`backward(to_mean, q, k, v, mean, log_sum) -> (to_q, to_k, to_v)`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Job(Protocol):
    """Attention over some rectangles by some kernel."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted mean [R, H, C, d], and the logarithm of each softmax's sum [R, H, C], float32 or wider."""

    def backward(self, to_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values from that of the mean; `out` and `log_sum` are what `forward` gave."""


def by_job(q_RHCd: Tensor, k_RGKd: Tensor, v_RGKd: Tensor, job: Job, sinks: Tensor | None = None) -> Tensor:
    """[R, H, C, d]: what the job computes, with a logit a head (`sinks`, [H]) that takes part in the softmax and has no value."""
    found: Tensor = _ByJob.apply(q_RHCd, k_RGKd, v_RGKd, sinks, job)  # type: ignore[no-untyped-call]
    return found


class _ByJob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, job: Job) -> Tensor:
        out, log_sum = job.forward(q, k, v)
        if sinks is not None:
            # One more summand e^sink: every weight shrinks by the same factor.
            whole = torch.logaddexp(log_sum, sinks.to(log_sum.dtype)[None, :, None])
            out = (out * torch.exp(log_sum - whole)[..., None]).to(out.dtype)
            log_sum = whole
        ctx.save_for_backward(q, k, v, sinks, out, log_sum)
        ctx.job = job
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_out: Tensor) -> tuple[Tensor | None, ...]:
        """The sink's value is 0, so its gradient is minus its weight times the mean gradient of the weights."""
        q, k, v, sinks, out, log_sum = ctx.saved_tensors
        to_sinks = None
        if sinks is not None:
            weight = torch.exp(sinks.to(log_sum.dtype)[None, :, None] - log_sum)
            mean = (to_out.to(log_sum.dtype) * out.to(log_sum.dtype)).sum(-1)
            to_sinks = -(weight * mean).sum((0, 2)).to(sinks.dtype)
        return (*ctx.job.backward(to_out, q, k, v, out, log_sum), to_sinks, None)

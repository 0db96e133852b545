"""Gradients in a few flat buffers: accumulated, added up over members and clipped there.

The buffers are float32 (float64 for float64 parameters) whatever the parameters are, so that many small contributions
are not rounded away in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from rolecall.roles.policy.distributed import Meeting
from torch import Tensor

BUCKET = 1 << 23  # numbers in a buffer (32 MiB): large enough for full bandwidth, small enough to overlap


class Gradients:
    """Gradients of a list of parameters.

    Attributes:
        views: the gradient of each parameter, of its shape; slices of the buffers.
        buffers: those, one for each bucket.
        buckets: numbers of the parameters whose gradients lie in a buffer, in their order there.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.buckets = _buckets(parameters)
        self.buffers: list[Tensor] = []
        found: dict[int, Tensor] = {}
        for bucket in self.buckets:
            first = parameters[bucket[0]]
            wide = torch.promote_types(first.dtype, torch.float32)
            flat = torch.zeros(sum(parameters[number].numel() for number in bucket), dtype=wide, device=first.device)
            self.buffers.append(flat)
            found |= zip(bucket, parts(flat, [parameters[number] for number in bucket]), strict=True)
        self.views = [found[number] for number in range(len(parameters))]
        for parameter, view in zip(parameters, self.views, strict=True):
            if parameter.dtype == view.dtype:
                parameter.grad = view  # backward adds to it in place
            else:
                parameter.register_post_accumulate_grad_hook(_adds_to(view))

    def add_up(self, meeting: Meeting) -> None:
        """Sum over the members; their weights already make it the gradient of the whole batch."""
        meeting.add_up(self.buffers)

    def clip(self, limit: float) -> float:
        """Scale all so that their global norm is at most `limit` (0: no limit); returns the norm before, maybe not finite."""
        norm = float(torch.nn.utils.get_total_norm(self.buffers))
        if math.isfinite(norm) and 0 < limit < norm:
            torch._foreach_mul_(self.buffers, limit / norm)
        return norm

    def clear(self) -> None:
        """Set all to 0."""
        torch._foreach_zero_(self.buffers)


def parts(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A contiguous tensor cut into views of the shapes of these."""
    sizes = [each.numel() for each in like]
    return [part.view(each.shape) for part, each in zip(flat.view(-1).split(sizes), like, strict=True)]


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> list[list[int]]:
    """Numbers of the parameters: dtypes apart, and vectors apart from matrices, as optimisers treat them unlike; cut where one is full."""
    buckets: list[list[int]] = []
    current: dict[tuple[torch.dtype, bool], tuple[list[int], int]] = {}
    for number, parameter in enumerate(parameters):
        kind = parameter.dtype, parameter.ndim > 1
        bucket, size = current.get(kind, ([], BUCKET))
        if size >= BUCKET:
            bucket, size = [], 0
            buckets.append(bucket)
        bucket.append(number)
        current[kind] = bucket, size + parameter.numel()
    return buckets


def _adds_to(view: Tensor) -> Callable[[Tensor], None]:
    """A hook for after a parameter's gradient is made: moves it into the wide buffer."""

    def move(parameter: Tensor) -> None:
        if parameter.grad is not None:
            view.add_(parameter.grad)
            parameter.grad = None

    return move

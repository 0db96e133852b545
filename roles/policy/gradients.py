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
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.views: list[Tensor] = []
        self._buffers: list[Tensor] = []
        for bucket in _buckets(parameters):
            first = bucket[0]
            wide = torch.promote_types(first.dtype, torch.float32)
            flat = torch.zeros(sum(parameter.numel() for parameter in bucket), dtype=wide, device=first.device)
            self._buffers.append(flat)
            for parameter, part in zip(bucket, flat.split([parameter.numel() for parameter in bucket]), strict=True):
                view = part.view(parameter.shape)
                self.views.append(view)
                if parameter.dtype == wide:
                    parameter.grad = view  # backward adds to it in place
                else:
                    parameter.register_post_accumulate_grad_hook(_adds_to(view))

    def add_up(self, meeting: Meeting) -> None:
        """Sum over the members; their weights already make it the gradient of the whole batch."""
        meeting.add_up(self._buffers)

    def clip(self, limit: float) -> float:
        """Scale all so that their global norm is at most `limit` (0: no limit); returns the norm before, maybe not finite."""
        norm = float(torch.nn.utils.get_total_norm(self.views))
        if math.isfinite(norm) and 0 < limit < norm:
            for flat in self._buffers:
                flat.mul_(limit / norm)
        return norm

    def clear(self) -> None:
        """Set all to 0."""
        for flat in self._buffers:
            flat.zero_()


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Parameters in order, cut where a buffer is full or the dtype changes."""
    buckets: list[list[torch.nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        if not buckets or size >= BUCKET or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel()
    return buckets


def _adds_to(view: Tensor) -> Callable[[Tensor], None]:
    """A hook for after a parameter's gradient is made: moves it into the wide buffer."""

    def move(parameter: Tensor) -> None:
        if parameter.grad is not None:
            view.add_(parameter.grad)
            parameter.grad = None

    return move

"""Attention over packed rows by PyTorch's own flash kernels for sequences of any lengths, on CUDA devices; for rows without parents.

All rows are one line of T = R x C slots, cut into segments; pieces of the gaps between them are sequences too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from rolecall.kernels.segments import Segments
from torch import Tensor

GAP = 64  # slots; where there is no segment, pieces of this size see themselves, so that nothing is left unwritten


class Line(NamedTuple):
    """Where the sequences begin and end, [n + 1] int32 on the device, and the length of the longest."""

    edges: Tensor
    longest: int


def find_line(found: Segments, device: torch.device) -> Line:
    """The segments of some rows; parents are not looked at."""
    tiles = found.tiles(GAP)
    return Line(torch.from_numpy(tiles.astype(np.int32)).to(device, non_blocking=True), int(np.diff(tiles).max(initial=0)))


class FlashJob:
    """What `attention_spans.by_job` runs."""

    def __init__(self, line: Line, window: int, scale: float) -> None:
        self._ends = line.edges, line.edges, line.longest, line.longest, 0.0, not window
        self._reach = {"scale": scale, "window_size_left": window - 1 if window else -1, "window_size_right": 0}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Means [R, H, C, d] and the logs of the sums [R, H, C]."""
        rows, heads, slots, size = q.shape
        out, log_sum, *_ = torch.ops.aten._flash_attention_forward(_lined(q), _lined(k), _lined(v), *self._ends, False, **self._reach)
        return out.view(rows, slots, heads, size).transpose(1, 2), log_sum.view(heads, rows, slots).transpose(0, 1)

    def backward(self, to_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values."""
        total = log_sum.transpose(0, 1).reshape(q.shape[1], -1).contiguous()
        seed, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        parts = (_lined(part) for part in (to_out, q, k, v, out))
        slopes = torch.ops.aten._flash_attention_backward(*parts, total, *self._ends, seed, unused, **self._reach)
        to_q, to_k, to_v = (
            slope.view(part.shape[0], part.shape[2], part.shape[1], part.shape[3]).transpose(1, 2)
            for slope, part in zip(slopes, (q, k, v), strict=True)
        )
        return to_q, to_k, to_v


def _lined(part: Tensor) -> Tensor:
    """[R, H, C, d] as [R * C, H, d]; no copy where heads of a slot lie together."""
    return part.transpose(1, 2).reshape(-1, part.shape[1], part.shape[3])

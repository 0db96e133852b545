"""Attention over packed rows by PyTorch's own flash kernels for sequences of any lengths, on CUDA devices.

All rows are one line of T = R x C slots. A segment's own rectangle is a causal sequence; what is seen of parents is a second call, in which
queries and keys come from different slots; means are joined by the logs of their sums, as in attention_cpu.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from rolecall.kernels.segments import Segments, Spans
from torch import Tensor

GAP = 64  # slots; where there is no segment, pieces of this size see themselves, so that nothing is left unwritten


class Line(NamedTuple):
    """One call of the kernel: boundaries of sequences of queries and of keys in the line of slots, [n + 1] int32 on the device."""

    of_q: Tensor
    of_k: Tensor
    longest_q: int
    longest_k: int
    causal: bool


def find_lines(found: Segments, device: torch.device) -> list[Line]:
    """The calls that cover all rows: segments, then what they see of parents, grandparents, …"""
    tiles = found.tiles(GAP)
    longest = int(np.diff(tiles).max(initial=0))
    own = _on(tiles, device)
    return [Line(own, own, longest, longest, True), *(_line(spans, found.rows * found.capacity, device) for spans in found.above())]


def _line(spans: Spans, slots: int, device: torch.device) -> Line:
    """Queries and keys between the spans belong to sequences that have no keys or no queries."""
    edges_q, edges_k = [0], [0]
    for q0, q_length, k0, k_length in zip(*(part.tolist() for part in spans), strict=True):
        q1, k1 = q0 + q_length, k0 + k_length
        # Up to the queries: no keys. Up to the keys: no queries. Then the span itself.
        edges_q += [q0, q0, q1]
        edges_k += [edges_k[-1], k0, k1]
    edges_q += [slots, slots]
    edges_k += [edges_k[-1], slots]
    of_q, of_k = np.asarray(edges_q), np.asarray(edges_k)
    seen = (np.diff(of_q) > 0) & (np.diff(of_k) > 0)
    longest_q, longest_k = int(np.diff(of_q).max()), int(np.diff(of_k)[seen].max())
    return Line(_on(of_q, device), _on(of_k, device), longest_q, longest_k, False)


def _on(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int32)).to(device, non_blocking=True)


class FlashJob:
    """What `attention_spans.by_job` runs. A window may hide nothing of a parent."""

    def __init__(self, lines: list[Line], window: int, scale: float) -> None:
        self._lines, self._window, self._scale = lines, window, scale

    def _reach(self, line: Line) -> dict[str, int | bool]:
        if not line.causal:
            return {"window_size_left": -1, "window_size_right": -1}
        return {"window_size_left": self._window - 1 if self._window else -1, "window_size_right": 0}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Means [R, H, C, d] and the logs of the sums [R, H, C]."""
        rows, heads, slots, size = q.shape
        parts = _lined(q), _lined(k), _lined(v)
        out, log_sum = None, None
        for line in self._lines:
            mean, total, *_ = torch.ops.aten._flash_attention_forward(
                *parts,
                line.of_q,
                line.of_k,
                line.longest_q,
                line.longest_k,
                0.0,
                line.causal and not self._window,
                False,
                scale=self._scale,
                **self._reach(line),
            )
            if out is None or log_sum is None:
                out, log_sum = mean, total
            else:
                total = total.masked_fill(total == float("inf"), float("-inf"))  # that is how the kernel says "no keys"
                joined = torch.logaddexp(log_sum, total)
                share = torch.exp(total - joined).mT[..., None]
                out = torch.lerp(out.float(), mean.float(), share).to(q.dtype)
                log_sum = joined
        assert out is not None  # noqa: S101 - there is always the line of segments
        assert log_sum is not None  # noqa: S101
        return out.view(rows, slots, heads, size).transpose(1, 2), log_sum.view(heads, rows, slots).transpose(0, 1)

    def backward(self, to_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values."""
        parts = tuple(_lined(part) for part in (to_out, q, k, v, out))
        total = log_sum.transpose(0, 1).reshape(q.shape[1], -1).contiguous()
        seed, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        found: list[Tensor] = []
        for line in self._lines:
            slopes = torch.ops.aten._flash_attention_backward(
                *parts,
                total,
                line.of_q,
                line.of_k,
                line.longest_q,
                line.longest_k,
                0.0,
                line.causal and not self._window,
                seed,
                unused,
                scale=self._scale,
                **self._reach(line),
            )
            found = [whole + slope for whole, slope in zip(found, slopes, strict=True)] if found else list(slopes)
        to_q, to_k, to_v = (
            slope.view(part.shape[0], part.shape[2], part.shape[1], part.shape[3]).transpose(1, 2)
            for slope, part in zip(found, (q, k, v), strict=True)
        )
        return to_q, to_k, to_v


def _lined(part: Tensor) -> Tensor:
    """[R, H, C, d] as [R * C, H, d]; no copy where heads of a slot lie together."""
    return part.transpose(1, 2).reshape(-1, part.shape[1], part.shape[3])

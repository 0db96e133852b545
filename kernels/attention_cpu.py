"""Attention over packed rows on a CPU: one call of PyTorch's flash kernel for each rectangle that is seen, no dense mask.

Shape letters as in attention.py. Each rectangle gives a mean over its own keys and the log of their sum; means over several
rectangles are joined by these. Backwards each rectangle is told the joined mean and sum, which makes its share exact
(Dao et al. 2022, FlashAttention, appendix B.2: the gradient needs nothing else of the other keys).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from rolecall.kernels.segments import Segments
from torch import Tensor

CALL = 600  # (query, key) pairs that cost as much as calling the kernel once more; measured at 9 heads of 64, one thread
STEP = 256  # queries of a rectangle that a window cuts


class Block(NamedTuple):
    """A rectangle: queries q0 .. q1-1 and keys k0 .. k1-1 of one row."""

    row: int
    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool  # query i sees keys 0 .. i
    band: tuple[int, int] | None  # (a, w): query i sees key j if 0 <= i + a - j < w
    joins: bool  # these queries have seen keys before


def find_blocks(found: Segments, window: int) -> list[Block]:
    """The rectangles of some rows under a window (0 for none)."""
    blocks = []
    for start, length in zip(found.start.tolist(), found.length.tolist(), strict=True):
        row, begin = divmod(start, found.capacity)
        head = min(length, window) if window else length
        blocks.append(Block(row, begin, begin + head, begin, begin + head, True, None, False))
        step = min(512, max(64, window // 4))
        for low in range(begin + head, begin + length, step):
            high = min(low + step, begin + length)
            blocks.append(Block(row, low, high, low - window + 1, high, False, (window - 1, window), False))
    if not window or not found.beyond(window):
        for spans in found.above():
            for q_start, q_length, k_start, k_length in zip(*(part.tolist() for part in spans), strict=True):
                row, q0 = divmod(q_start, found.capacity)
                k0 = k_start % found.capacity
                blocks.append(Block(row, q0, q0 + q_length, k0, k0 + k_length, False, None, True))
        return blocks
    return blocks + _cut_by_window(found, window)


def _cut_by_window(found: Segments, window: int) -> list[Block]:
    """Rectangles of segments and their ancestors of which a window hides a part: few queries at a time, only keys in reach."""
    blocks = []
    for inner, outer in zip(*(part.tolist() for part in found.pairs()), strict=True):
        if inner == outer:
            continue
        row, begin = divmod(int(found.start[inner]), found.capacity)
        above, at = int(found.start[outer]) % found.capacity, int(found.position[outer])
        end, place = int(found.length[outer]), int(found.position[inner])
        reach = min(int(found.length[inner]), window + at + end - 1 - place)  # later queries are too far from the last key
        for low in range(0, reach, STEP):
            high = min(low + STEP, reach)
            first = max(0, place + low - window + 1 - at)
            shift = place + low - at - first  # position of the first query less that of the first key
            band = (shift, window) if shift + high - low - 1 >= window else None
            blocks.append(Block(row, begin + low, begin + high, above + first, above + end, False, band, True))
    return blocks


def worth_it(blocks: list[Block], rows: int, capacity: int) -> bool:
    """Whether the rectangles cost less than all rows in one call with a dense mask."""
    pairs = sum((block.q1 - block.q0) * (block.k1 - block.k0) // (2 if block.causal else 1) for block in blocks)
    return pairs + CALL * len(blocks) < rows * capacity * capacity + CALL


class CpuJob:
    """What `attention_spans.by_job` runs: forward and backward over the rectangles."""

    def __init__(self, blocks: list[Block], scale: float) -> None:
        self._blocks, self._scale = blocks, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Means [R, H, C, d] (0 at slots that see nothing) and the logs of the sums [R, H, C] (-inf there)."""
        rows, heads, slots, size = q.shape
        out = q.new_zeros((rows, slots, heads, size)).transpose(1, 2)
        wide = torch.promote_types(q.dtype, torch.float32)
        log_sum = torch.full((rows, slots, heads), float("-inf"), dtype=wide).transpose(1, 2)
        for block in self._blocks:
            of_q, of_k = _slices(block)
            mean, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[of_q], k[of_k], v[of_k], 0.0, block.causal, attn_mask=_band(block, q.dtype), scale=self._scale
            )
            if block.joins:
                before = log_sum[of_q]
                joined = torch.logaddexp(before, total)
                share = torch.exp(total - joined)[..., None]
                mean = torch.lerp(out[of_q].to(wide), mean.to(wide), share)
                total = joined
            out[of_q] = mean.to(out.dtype)
            log_sum[of_q] = total
        return out, log_sum

    def backward(self, to_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values."""
        found = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in self._blocks:
            of_q, of_k = _slices(block)
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                to_out[of_q],
                q[of_q],
                k[of_k],
                v[of_k],
                out[of_q],
                log_sum[of_q],
                0.0,
                block.causal,
                attn_mask=_band(block, q.dtype),
                scale=self._scale,
            )
            for whole, at, part in zip(found, (of_q, of_k, of_k), parts, strict=True):
                whole[at] += part
        return found


def _slices(block: Block) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    row = slice(block.row, block.row + 1)
    return (row, slice(None), slice(block.q0, block.q1)), (row, slice(None), slice(block.k0, block.k1))


def _band(block: Block, dtype: torch.dtype) -> Tensor | None:
    return None if block.band is None else _band_mask(block.q1 - block.q0, block.k1 - block.k0, *block.band, dtype)


@lru_cache(maxsize=32)
def _band_mask(queries: int, keys: int, shift: int, window: int, dtype: torch.dtype) -> Tensor:
    """[queries, keys]: 0 where a query sees a key, -inf elsewhere."""
    apart = torch.arange(queries)[:, None] + shift - torch.arange(keys)[None, :]
    return torch.zeros(queries, keys, dtype=dtype).masked_fill_((apart < 0) | (apart >= window), float("-inf"))

"""Attention over packed rows by FlexAttention, for what kernels for sequences don't know: parents, soft caps.

The block mask is made from the segments' bounds, not by asking the mask about every pair: a millisecond or two on the host for a row of 32k
slots, while the device is still busy with what was asked before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rolecall.kernels.segments import Int64, Segments
from torch import Tensor

BLOCK = 128  # slots; what FlexAttention's kernels go by
NARROWEST = 16  # size of a head; its kernels refuse smaller ones
SHAPES = 64  # of rows, heads, windows and caps that one process may compile for
Grid = npt.NDArray[np.bool_]


class _Strips(NamedTuple):
    """Rectangles cut at the blocks of queries, all [m] int64: `queries` queries of a block see keys (columns of the row) from … to."""

    row: Int64
    block: Int64
    queries: Int64
    some: tuple[Int64, Int64]  # keys that one of the queries sees
    whole: tuple[Int64, Int64]  # keys that all of them see


def find_grid(found: Segments, window: int, block: int = BLOCK) -> tuple[Grid, Grid]:
    """Which blocks of the attention matrix have something to see, and which are seen whole.

    Returns:
        Two bool arrays [R, n, n] with n = ceil(C / block): [r, i, j] is queries i * block … against keys j * block … of row r.
    """
    side = -(-found.capacity // block)
    strips = _strips(found, window, block)
    at = strips.row * side + strips.block
    touched = np.zeros((found.rows * side, side + 1), dtype=np.int32)  # of each row, differences along the keys
    low, high = strips.some
    held = np.flatnonzero(low < high)
    np.add.at(touched, (at[held], low[held] // block), 1)
    np.add.at(touched, (at[held], (high[held] - 1) // block + 1), -1)
    some = (np.cumsum(touched[:, :-1], axis=1) > 0).reshape(found.rows, side, side)
    some |= np.eye(side, dtype=bool)  # slots without a segment see themselves
    filled = np.zeros((found.rows * side, side + 2), dtype=np.int64)  # differences of the number of visible pairs
    low, high = strips.whole
    held = np.flatnonzero(low < high)
    low, high, row, queries = low[held], high[held], at[held], strips.queries[held]
    # [low, high) covers block j by clip(high - j block) - clip(low - j block), each a ramp over one block.
    for edge, sign in ((high, 1), (low, -1)):
        whole, part = np.divmod(edge, block)
        np.add.at(filled, (row, np.zeros_like(whole)), sign * queries * block)
        np.add.at(filled, (row, whole), sign * queries * (part - block))
        np.add.at(filled, (row, whole + 1), -sign * queries * part)
    full = (np.cumsum(filled[:, :side], axis=1) == block * block).reshape(found.rows, side, side)
    return some, full


def _strips(found: Segments, window: int, block: int) -> _Strips:
    inner, outer = found.pairs()
    start, length = found.start[inner] % found.capacity, found.length[inner]
    first, last = start // block, (start + length - 1) // block
    count = last - first + 1
    which = np.repeat(np.arange(len(inner)), count)
    number = first[which] + np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    q_low = np.maximum(start[which], number * block)
    q_high = np.minimum(start[which] + length[which], (number + 1) * block) - 1
    inner, outer = inner[which], outer[which]
    own = inner == outer
    k_low = found.start[outer] % found.capacity
    k_high = k_low + found.length[outer]
    some_to, whole_to = np.where(own, q_high + 1, k_high), np.where(own, q_low + 1, k_high)
    some_from = whole_from = k_low
    if window:
        # Key column of the first position within reach of a query at column c: k_low + (its position - window + 1) - position of k_low.
        lag = found.position[inner] - start[which] - window + 1 - found.position[outer] + k_low
        some_from, whole_from = np.maximum(k_low, q_low + lag), np.maximum(k_low, q_high + lag)
    return _Strips(found.row[inner], number, q_high - q_low + 1, (some_from, some_to), (whole_from, whole_to))


def find_intervals(found: Segments) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Two numbers a slot, [R, C] int32: a slot's segment is seen by those whose first number lies in [first, second) of it.

    First numbers count the segments as a walk through the families meets them, parents before children; second numbers end the family.
    Slots without a segment are families of one.
    """
    number = len(found.start)
    chain = [np.arange(number)]
    while (chain[-1] >= 0).any():
        chain.append(np.where(chain[-1] >= 0, found.parent[chain[-1]], -1))
    ups = np.stack(chain)  # [depth, n]: itself, parent, grandparent, …; -1 above the root
    depth = (ups >= 0).sum(axis=0)
    columns = np.arange(number)
    path = [np.where(depth > step, ups[np.maximum(depth - 1 - step, 0), columns], -1) for step in range(len(chain) - 1)]
    order = np.lexsort(path[::-1]) if path else columns
    first = np.empty(number, dtype=np.int64)
    first[order] = columns
    second = first + np.bincount(found.pairs()[1], minlength=number)
    total = found.rows * found.capacity
    opens = number + np.arange(total)
    closes = opens + 1
    slots = np.repeat(found.start - np.cumsum(found.length) + found.length, found.length) + np.arange(int(found.length.sum()))
    opens[slots], closes[slots] = np.repeat(first, found.length), np.repeat(second, found.length)
    shape = (found.rows, found.capacity)
    return opens.reshape(shape).astype(np.int32), closes.reshape(shape).astype(np.int32)


def make_block_mask(found: Segments, positions: Tensor, window: int, device: torch.device) -> Any:
    """The BlockMask of packed rows on the device, for all heads, as `create_block_mask` gives it; it holds the tensors its mask reads."""
    from torch.nn.attention.flex_attention import BlockMask

    some, full = (torch.from_numpy(grid).to(device, non_blocking=True)[:, None] for grid in find_grid(found, window))
    opens, closes = (torch.from_numpy(part).to(device, non_blocking=True) for part in find_intervals(found))
    places = positions.to(device, torch.int32, non_blocking=True)
    part = some & ~full
    grids: dict[str, Any] = _ordered("kv", part) | _ordered("full_kv", full) | _ordered("q", part.mT) | _ordered("full_q", full.mT)
    mask = _window_mask(opens, closes, places, window) if window else _family_mask(opens, closes)
    return BlockMask(seq_lengths=(found.capacity, found.capacity), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask, **grids)


def _family_mask(opens: Tensor, closes: Tensor) -> Callable[..., Tensor]:
    def mask(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at, first = opens[row, query], opens[row, key]
        return (query >= key) & (first <= at) & (at < closes[row, key])

    return mask


def _window_mask(opens: Tensor, closes: Tensor, places: Tensor, window: int) -> Callable[..., Tensor]:
    family = _family_mask(opens, closes)

    def mask(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return family(row, head, query, key) & (places[row, query] - places[row, key] < window)

    return mask


def _ordered(name: str, grid: Tensor) -> dict[str, Tensor]:
    """For each row of blocks how many are set, and their numbers first; without gaps in memory, as the kernels take for granted."""
    grid = grid.contiguous()
    return {
        f"{name}_num_blocks": grid.sum(-1, dtype=torch.int32),
        f"{name}_indices": torch.argsort(grid.to(torch.uint8), dim=-1, descending=True, stable=True).to(torch.int32),
    }


def flex(q: Tensor, k: Tensor, v: Tensor, block_mask: Any, *, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
    """Compiled FlexAttention under a block mask of `make_block_mask`; as `attention.attend`."""
    from torch.nn.attention.flex_attention import AuxRequest

    out: Tensor
    out, aux = _compiled()(
        q,
        k,
        v,
        score_mod=_capped(softcap) if softcap else None,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is None:
        return out
    return (out * torch.sigmoid(aux.lse - sinks.float()[None, :, None])[..., None]).to(q.dtype)


@lru_cache(maxsize=8)
def _capped(softcap: float) -> Callable[..., Tensor]:
    def score(value: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(value / softcap)

    return score


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    # Compiled for each shape. Past the limit PyTorch would go on uncompiled, with all logits in memory: here it must stop instead.
    torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)

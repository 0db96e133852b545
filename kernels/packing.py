"""Which sequence goes into which row, and which unit to which member. Numbers in, numbers out."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


def pack_rows(lengths: npt.ArrayLike, capacity: int) -> list[list[int]]:
    """Lay sequences into as few rows as best-fit decreasing finds: longest first, each into the fullest row it fits.

    At most 11/9 of the fewest rows possible, and a few more (Johnson 1974). Deterministic: equal lengths keep their order.

    Args:
        lengths: [N] int, slots that each sequence takes.
        capacity: slots of a row.

    Returns:
        For each row the numbers of its sequences.

    Raises:
        ValueError: a sequence is longer than a row, or has a negative length.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and (int(sizes.max()) > capacity or int(sizes.min()) < 0):
        wrong = int(np.flatnonzero((sizes > capacity) | (sizes < 0))[0])
        raise ValueError(
            f"A sequence doesn't fit a row. Asked: sequence {wrong} of {int(sizes[wrong])} slots. There is: rows of {capacity}. "
            "Do: raise the capacity, or shorten or leave out the sequence."
        )
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # free slots → rows that have just so many
    spaces: list[int] = []  # keys of by_space, ascending
    order = np.argsort(-sizes, kind="stable")
    for number, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        at = bisect_left(spaces, size)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[at]
        rows[row].append(number)
        left = space - size
        if left not in by_space:
            by_space[left] = []
            insort(spaces, left)
        by_space[left].append(row)
    return rows


def balance(sizes: npt.ArrayLike, ranks: int) -> list[Int64]:
    """Divide units over ranks so that the sums of sizes are nearly equal: largest first, each to the lightest rank.

    At most 4/3 of the best possible heaviest rank (Graham 1969), then improved by swaps between the heaviest and the
    lightest. Every rank gets a unit if there are enough. Deterministic.

    Args:
        sizes: [P] int, what each unit costs (tokens).
        ranks: into how many parts.

    Returns:
        For each rank the numbers of its units, ascending, int64.

    Raises:
        ValueError: ranks is less than 1.
    """
    if ranks < 1:
        raise ValueError(f"Units are divided over members. Asked: {ranks} parts. Do: give 1 or more.")
    costs = np.asarray(sizes, dtype=np.int64)
    heap = [(0, 0, rank) for rank in range(ranks)]
    owner = np.zeros(len(costs), dtype=np.int64)
    order = np.argsort(-costs, kind="stable")
    for unit, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        total, count, rank = heapq.heappop(heap)
        owner[unit] = rank
        heapq.heappush(heap, (total + cost, count + 1, rank))
    _even_out(costs, owner, ranks)
    return [np.flatnonzero(owner == rank) for rank in range(ranks)]


def _even_out(costs: Int64, owner: Int64, ranks: int) -> None:
    """Swap units of the heaviest and the lightest rank while that lowers their difference; changes `owner`."""
    totals = np.bincount(owner, weights=costs, minlength=ranks).astype(np.int64)
    for _ in range(4 * ranks):
        heavy, light = int(totals.argmax()), int(totals.argmin())
        gap = int(totals[heavy] - totals[light])
        ours, theirs = np.flatnonzero(owner == heavy), np.flatnonzero(owner == light)
        if gap < 2 or not len(theirs):
            return
        theirs = theirs[np.argsort(costs[theirs], kind="stable")]
        # A swap that shifts s leaves |gap - 2 s|: for each unit of ours the partner is the one nearest to cost - gap / 2,
        # which stands on either side of where that number would be sorted in.
        right = np.searchsorted(costs[theirs], costs[ours] - gap // 2).clip(max=len(theirs) - 1)
        partners = np.stack([right, (right - 1).clip(min=0)])
        left_over = np.abs(gap - 2 * (costs[ours] - costs[theirs[partners]]))
        side, best = np.unravel_index(int(left_over.argmin()), left_over.shape)
        if left_over[side, best] >= gap:
            return
        one, other = ours[best], theirs[partners[side, best]]
        shift = int(costs[one] - costs[other])
        owner[one], owner[other] = light, heavy
        totals[heavy] -= shift
        totals[light] += shift

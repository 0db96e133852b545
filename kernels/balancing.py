"""Which unit goes to which member, so that all have as much to do. Numbers in, numbers out.

P units.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt
from rolecall.kernels.packing import stable_order

Int64 = npt.NDArray[np.int64]
EVEN = 1500  # the heaviest rank is within 1/1500 of the mean: even enough
LEFT = 12  # units a rank that go to the lightest one by one: the last of them make ranks even
ROUNDS = 16  # of swaps, of many pairs of ranks at once


def cost(lengths: npt.ArrayLike, per_token: float = 1.0, per_pair: float = 0.0) -> npt.NDArray[np.float64]:
    """What sequences cost to compute, [N] float64: per_token * s + per_pair * s^2, the second for attention.

    For a decoder with P parameters besides the embedding and L layers of H heads of size d, a token costs 2 P FLOPs forward, and a sequence
    2 L H d s^2 for causal attention: per_pair / per_token = L H d / P.
    """
    size = np.asarray(lengths, dtype=np.float64)
    return per_token * size + per_pair * size * size


def balance(sizes: npt.ArrayLike, ranks: int) -> list[Int64]:
    """Divide units over ranks so that the sums of sizes are nearly equal: largest first, each to the lightest rank.

    At most 4/3 of the best possible heaviest rank (Graham 1969), then improved by swaps between the heaviest and the
    lightest. Every rank gets a unit if there are enough. Deterministic. Where there are many units, the largest ones are dealt out in turn,
    there and back, and most others poured into what that leaves uneven, as long as the smallest ones can make up for the rest.

    Args:
        sizes: [P] int or float, not negative: what each unit costs (tokens, or `cost`).
        ranks: into how many parts.

    Returns:
        For each rank the numbers of its units, ascending, int64.

    Raises:
        ValueError: ranks is less than 1, or a size is negative or not finite.
    """
    if ranks < 1:
        raise ValueError(f"Units are divided over members. Asked: {ranks} parts. Do: give 1 or more.")
    costs = _whole(np.asarray(sizes))
    owner = _lightest(costs, ranks)
    _even_out(costs, owner, ranks)
    order = stable_order(owner, ranks).astype(np.int64)
    ends = np.cumsum(np.bincount(owner, minlength=ranks)).tolist()
    return [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _whole(sizes: npt.NDArray[Any]) -> Int64:
    """Costs as whole numbers; floats are scaled so that the largest has 31 bits."""
    if sizes.size and not (np.isfinite(sizes).all() and sizes.min() >= 0):
        raise ValueError("Sizes are finite and not negative. Do: give what each unit costs, in tokens or by `cost`.")
    if sizes.dtype.kind == "f":
        most = float(sizes.max(initial=0))
        sizes = np.rint(sizes / (most or 1.0) * 2**31)
    return sizes.astype(np.int64)


def _lightest(costs: Int64, ranks: int) -> Int64:
    """[P] the rank of each unit: the largest are dealt out in turn, most others poured, each of the rest goes to the lightest rank."""
    number = len(costs)
    if not number:
        return np.zeros(0, dtype=np.int64)
    most = int(costs.max())
    order = stable_order(most - costs, most)  # largest first, ties by number
    ordered = costs[order]
    dealt, totals = _deal(ordered, ranks)
    poured = _pour(ordered[dealt:], totals) if dealt else np.zeros(0, np.int64)
    totals = totals + np.bincount(poured, weights=ordered[dealt : dealt + len(poured)], minlength=ranks).astype(np.int64)
    heap = (totals * ranks + np.arange(ranks)).tolist()  # one number for total and rank: quicker to compare than a pair
    heapq.heapify(heap)
    replace = heapq.heapreplace
    # A unit that costs nothing counts 1 here: else all of them would go to one rank, and others could stay empty.
    rest = (ordered[dealt + len(poured) :].clip(min=1) * ranks).tolist()
    lightest = np.asarray([replace(heap, heap[0] + step) for step in rest], dtype=np.int64) % ranks
    there = np.arange(ranks)
    owner = np.empty(number, dtype=np.int64)
    owner[order] = np.concatenate([*[there, there[::-1]] * (dealt // (2 * ranks)), poured, lightest])
    return owner


def _deal(ordered: Int64, ranks: int) -> tuple[int, Int64]:
    """How many of the largest units to deal out in turn, there and back, and each rank's total after that."""
    turns = len(ordered) // (2 * ranks)
    pairs = ordered[: turns * 2 * ranks].reshape(turns, 2, ranks)
    totals = np.cumsum(pairs[:, 0] + pairs[:, 1, ::-1], axis=0)
    lacking = totals.max(axis=1, initial=0) * ranks - totals.sum(axis=1) if turns else np.zeros(0, np.int64)
    rest = int(ordered.sum()) - totals.sum(axis=1)
    # Only where the small ones left over can fill up all ranks twice: the last of them then even out what the first leave.
    fine = np.flatnonzero(2 * lacking <= rest)
    fine = fine[fine < turns * 3 // 4]
    if not len(fine):
        return 0, np.zeros(ranks, dtype=np.int64)
    return (int(fine[-1]) + 1) * 2 * ranks, totals[fine[-1]]


def _pour(ordered: Int64, totals: Int64) -> Int64:
    """Ranks of the first of these units, laid end to end along what each rank lacks to one level; none where they don't reach it.

    A unit goes where its middle lies, so a rank ends within one unit of the level, and two ranks within two. Left over are as many units
    as make up for that where each goes to the lightest rank, and LEFT a rank at least.
    """
    ranks, none = len(totals), np.zeros(0, dtype=np.int64)
    upto = np.cumsum(ordered)
    mass = int(upto[-1]) - 2 * ranks * int(ordered[0])
    count = min(int(np.searchsorted(upto, mass, side="right")), len(ordered) - LEFT * ranks) if mass > 0 else 0
    if count <= 0:
        return none
    level = (int(totals.sum()) + int(upto[count - 1])) // ranks
    if level < int(totals.max()):
        return none
    middles = upto[:count] - ordered[:count] // 2
    return np.searchsorted(np.cumsum(level - totals), middles).clip(max=ranks - 1)


def _even_out(costs: Int64, owner: Int64, ranks: int) -> None:
    """Swap units of ranks that are too heavy and of as many light ones while that lowers their differences; changes `owner`."""
    totals = np.bincount(owner, weights=costs, minlength=ranks).astype(np.int64)
    mean = int(totals.sum()) // ranks
    for _ in range(ROUNDS):
        pairs = min(int(np.count_nonzero((totals - mean) * EVEN > mean)), ranks // 2)
        ranked = np.argsort(totals, kind="stable")
        heavy, light = ranked[: -pairs - 1 : -1], ranked[:pairs]  # the heaviest with the lightest, and so on
        one, two, pair = _swaps(costs, _members(owner, heavy, ranks), _members(owner, light, ranks), totals[heavy] - totals[light])
        if not len(pair) or pair[0]:
            return  # the heaviest stays as it is
        shift = costs[one] - costs[two]
        owner[one], owner[two] = light[pair], heavy[pair]
        totals[heavy[pair]] -= shift
        totals[light[pair]] += shift


def _swaps(costs: Int64, ours: tuple[Int64, Int64], theirs: tuple[Int64, Int64], gaps: Int64) -> tuple[Int64, Int64, Int64]:
    """Of pairs of ranks, the units whose swap leaves least of each gap, and the numbers of the pairs; none where no swap helps."""
    (mine, pair), (others, other) = ours, theirs
    none = np.zeros(0, dtype=np.int64)
    span = int(costs.max(initial=0)) + 1
    keys = other * span + costs[others]
    sorting = np.argsort(keys, kind="stable")
    others, keys = others[sorting], keys[sorting]
    edges = np.searchsorted(other[sorting], np.arange(len(gaps) + 1))
    if not len(gaps) or not np.diff(edges).all():
        return none, none, none  # a rank without units has no fewer than it can have
    # A swap that shifts s leaves |gap - 2 s|: for each unit of ours the partner is the one nearest to cost - gap / 2,
    # which stands on either side of where that number would be sorted in.
    right = np.searchsorted(keys, pair * span + (costs[mine] - gaps[pair] // 2).clip(min=0))
    sides = np.stack([right, right - 1]).clip(edges[pair], edges[pair + 1] - 1)
    leaves = np.abs(gaps[pair] - 2 * (costs[mine] - costs[others[sides]]))
    partners = np.where(leaves[1] < leaves[0], sides[1], sides[0])
    leaves = leaves.min(axis=0)
    best = gaps.copy()
    np.minimum.at(best, pair, leaves)
    found = np.flatnonzero((leaves == best[pair]) & (leaves < gaps[pair]))
    which, first = np.unique(pair[found], return_index=True)
    chosen = found[first]
    return mine[chosen], others[partners[chosen]], which


def _members(owner: Int64, chosen: Int64, ranks: int) -> tuple[Int64, Int64]:
    """Units of the chosen ranks, and for each which of those it is."""
    which = np.full(ranks, -1)
    which[chosen] = np.arange(len(chosen))
    pair = which[owner]
    units = np.flatnonzero(pair >= 0)
    return units, pair[units]

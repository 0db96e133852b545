"""Which sequence goes into which row, and which unit to which member. Numbers in, numbers out.

N sequences, R rows, C capacity, P units, T tokens.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
FEW = 4096  # sequences up to which best fit one by one is quick enough, and better
EVEN = 1500  # the heaviest rank is within 1/1500 of the mean: even enough
SHORT = 600  # tokens of an average sequence from which copying one by one is quicker than by index
BLOCK = 2**14  # slots laid at once, so that what is computed on the way stays in a cache and in memory that is there
WAVES = 4  # more fill rows better and take longer
MANY = 24  # sequences of a row from which one wave fills rows as well as several


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
    sizes = _checked(lengths, capacity)
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


def assign_rows(lengths: npt.ArrayLike, capacity: int) -> Int64:
    """As `pack_rows`, for many sequences at once: nearly as full, and ten times as fast from some ten thousand on.

    First-fit decreasing fills a row by taking the longest sequence left that fits, again and again. Here a wave of rows does so together:
    in each round the emptiest row takes the longest sequence, the next one the longest of the others that it has room for, and so on.
    Sequences of one length are told apart only in the end.

    Returns:
        [N] the row of each sequence; rows are numbered from 0 without a gap.

    Raises:
        ValueError: as `pack_rows`.
    """
    sizes = _checked(lengths, capacity)
    if len(sizes) <= FEW:
        return _by_best_fit(sizes, capacity)
    if len(sizes) * capacity > 48 * int(sizes.sum()):
        return _assign_bundles(sizes, capacity)
    narrow = np.uint16 if capacity < 2**16 else np.int64  # NumPy sorts 16 bits by counting
    sizes = sizes.astype(narrow)
    hist = np.bincount(sizes)
    mass = int(sizes.sum(dtype=np.int64))
    waves = WAVES if len(sizes) * capacity < MANY * mass else 1
    share, left, first = -(-mass // (capacity * waves)), len(sizes), 0
    rounds: list[tuple[Int64, Int64]] = []
    while left:
        wave = max(1, min(share, -(-mass // capacity)))
        taken = _fill_wave(hist, np.arange(first, first + wave), capacity, narrow)
        first += wave
        left -= sum(len(part) for _, part in taken)
        mass -= sum(int(part.sum()) for _, part in taken)
        rounds += taken
    rows, took = (np.concatenate(parts) for parts in zip(*rounds, strict=True))
    found = np.empty(len(sizes), dtype=np.int64)
    found[np.argsort(sizes, kind="stable")] = rows[np.argsort(took.astype(narrow), kind="stable")]
    return found


def _assign_bundles(sizes: Int64, capacity: int) -> Int64:
    """Rows of many sequences each take many rounds: neighbours in the stream that are short are taken as one."""
    short = np.flatnonzero(sizes <= capacity // 64)
    before = np.cumsum(sizes[short]) - sizes[short]
    bundle = before // max(1, capacity // 32)
    items = np.arange(len(sizes))
    fresh, number = np.unique(bundle, return_inverse=True)
    long = np.delete(items, short)
    unit = np.empty(len(sizes), dtype=np.int64)
    unit[short], unit[long] = number, len(fresh) + np.arange(len(long))
    masses = np.bincount(unit, weights=sizes, minlength=len(fresh) + len(long)).astype(np.int64)
    if len(masses) == len(sizes):  # nothing was short: as many as a row may hold
        return _by_best_fit(sizes, capacity)
    return assign_rows(masses, capacity)[unit]


def _by_best_fit(sizes: Int64, capacity: int) -> Int64:
    rows = np.empty(len(sizes), dtype=np.int64)
    for number, members in enumerate(pack_rows(sizes, capacity)):
        rows[members] = number
    return rows


def _fill_wave(hist: Int64, rows: Int64, capacity: int, narrow: type[np.integer]) -> list[tuple[Int64, Int64]]:
    """Fill empty rows; returns round by round which rows took sequences of which lengths, and takes them out of `hist`."""
    rounds: list[tuple[Int64, Int64]] = []
    space = np.full(len(rows), capacity, dtype=narrow)
    longest = len(hist) - 1
    while len(rows):
        order = np.argsort(space, kind="stable")[::-1]  # the emptiest first
        upto = np.cumsum(hist)
        # Sequences in ascending order are numbered 0, 1, …; a row with room for the lengths up to l takes number upto[l] - 1 or, where
        # emptier rows have come before, the next one below.
        place = np.arange(len(order))
        takes = np.minimum.accumulate(upto[np.minimum(space[order], longest)] - 1 + place) - place
        order = order[: int(np.count_nonzero(takes >= 0))]
        if not len(order):
            break
        took = np.searchsorted(upto, takes[: len(order)], side="right")
        rows, space = rows[order], (space[order] - took).astype(narrow)
        rounds.append((rows, took))
        hist -= np.bincount(took, minlength=len(hist))
    return rounds


class OpenRows:
    """Rows filled while sequences come in: each goes into the fullest open row that has room for it (best fit).

    A row is closed when it is full, or, the fullest one first, when a new row is needed and no more may be open.

    Args:
        capacity: slots of a row.
        open_rows: most rows open at once: how far a sequence can be from its neighbours in the stream, in rows.

    Raises:
        ValueError: one of them is less than 1.
    """

    def __init__(self, capacity: int, open_rows: int = 32) -> None:
        if capacity < 1 or open_rows < 1:
            raise ValueError(f"Rows need slots. Asked: capacity={capacity}, open_rows={open_rows}. Do: give 1 or more of each.")
        self.capacity, self.open_rows = capacity, open_rows
        self._spaces: list[int] = []  # of the open rows, ascending
        self._rows: list[list[int]] = []  # what they hold, in the same order

    @property
    def held(self) -> list[list[int]]:
        """What the open rows hold, the fullest first."""
        return [list(row) for row in self._rows]

    def add(self, length: int, ident: int) -> list[list[int]]:
        """Take one sequence in; returns the rows that this closed (none, one or two), each a list of what was given as `ident`.

        Raises:
            ValueError: the sequence is longer than a row, or has a negative length.
        """
        if not 0 <= length <= self.capacity:
            raise ValueError(_too_long(ident, length, self.capacity))
        closed = []
        at = bisect_left(self._spaces, length)
        if at < len(self._spaces):
            space, row = self._spaces.pop(at), self._rows.pop(at)
        else:
            if len(self._spaces) == self.open_rows:
                del self._spaces[0]
                closed.append(self._rows.pop(0))
            space, row = self.capacity, []
        row.append(ident)
        space -= length
        if space == 0:
            closed.append(row)
        else:
            at = bisect_left(self._spaces, space)
            self._spaces.insert(at, space)
            self._rows.insert(at, row)
        return closed

    def flush(self) -> list[list[int]]:
        """Close all open rows and return them, the fullest first."""
        rows, self._rows, self._spaces = self._rows, [], []
        return rows


class Laid(NamedTuple):
    """Sequences laid into rows, all [R * C] int32."""

    tokens: Int32  # 0 where there is none
    positions: Int32  # within the sequence; 0 where there is none
    segments: Int32  # sequences numbered as they lie; -1 where there is none


def lay(tokens: npt.NDArray[np.integer], cu_seqlens: npt.ArrayLike, rows: Sequence[npt.ArrayLike], capacity: int) -> Laid:
    """Lay a stream of sequences into rows, each one's sequences side by side from its first slot on.

    Args:
        tokens: [T] int, all sequences end to end.
        cu_seqlens: [N + 1] int, where each begins; the last one is T.
        rows: for each row the numbers of its sequences, as `pack_rows` returns them.
        capacity: C, slots of a row.

    Raises:
        ValueError: the sequences of a row need more than `capacity` slots, or a number is not one of a sequence.
    """
    starts = np.asarray(cu_seqlens, dtype=np.int64)
    counts = np.asarray([len(np.atleast_1d(row)) for row in rows], dtype=np.int64)
    order = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]) if len(rows) else np.zeros(0, np.int64)
    if len(order) and not 0 <= int(order.min()) <= int(order.max()) < len(starts) - 1:
        raise ValueError(f"A row holds an unknown sequence. Asked: {int(order.max())}. There is: {len(starts) - 1} sequences.")
    lengths = (starts[1:] - starts[:-1])[order]
    ends = np.cumsum(lengths)
    row_ends = np.append(0, ends)[np.cumsum(counts)]
    filled = np.diff(row_ends, prepend=0)
    if len(filled) and int(filled.max()) > capacity:
        row = int(filled.argmax())
        raise ValueError(f"Row {row} is too full. Asked: {int(filled[row])} tokens. There is: {capacity} slots. Do: pack by these lengths.")
    if len(order) * SHORT > int(filled.sum()):
        return _lay_short(tokens, starts[order], lengths, counts, capacity - filled)
    slots = ends - lengths + np.repeat(np.arange(len(rows)) * capacity - (row_ends - filled), counts)
    found = Laid(*(np.full(len(rows) * capacity, empty, dtype=np.int32) for empty in (0, 0, -1)))
    count = np.arange(int(lengths.max(initial=0)), dtype=np.int32)
    for number, (slot, length, start) in enumerate(zip(slots.tolist(), lengths.tolist(), starts[order].tolist(), strict=True)):
        end = slot + length
        found.tokens[slot:end] = tokens[start : start + length]
        found.positions[slot:end] = count[:length]
        found.segments[slot:end] = number
    return found


def _lay_short(tokens: npt.NDArray[np.integer], first: Int64, lengths: Int64, counts: Int64, spaces: Int64) -> Laid:
    """Many short sequences: some rows at once, what is left of each row being one more piece."""
    capacity = int(lengths[: counts[0]].sum() + spaces[0])
    ends = np.cumsum(counts)
    gaps = ends + np.arange(len(counts))  # numbers of those pieces among all
    sizes, numbers, begins = np.insert(lengths, ends, spaces), np.insert(np.arange(len(lengths)), ends, -1), np.insert(first, ends, 0)
    after = np.cumsum(sizes)
    starts = after - sizes
    found = Laid(*(np.empty(int(after[-1]), dtype=np.int32) for _ in Laid._fields))
    step = max(1, BLOCK // capacity)
    for row in range(0, len(counts), step):
        last = min(row + step, len(counts)) - 1
        pieces, slots = slice(int(gaps[row - 1]) + 1 if row else 0, int(gaps[last]) + 1), slice(row * capacity, (last + 1) * capacity)
        each = sizes[pieces]
        flat = np.arange(slots.start, slots.stop)
        found.segments[slots] = np.repeat(numbers[pieces], each)
        found.positions[slots] = flat - np.repeat(starts[pieces], each)
        found.tokens[slots] = tokens.take(flat + np.repeat((begins - starts)[pieces], each), mode="clip") if len(tokens) else 0
    for start, end in zip(starts[gaps].tolist(), after[gaps].tolist(), strict=True):
        found.tokens[start:end] = found.positions[start:end] = 0
    return found


def cost(lengths: npt.ArrayLike, per_token: float = 1.0, per_pair: float = 0.0) -> npt.NDArray[np.float64]:
    """What sequences cost to compute, [N] float64: per_token * s + per_pair * s^2, the second for attention.

    For a decoder with P parameters besides the embedding and L layers of H heads of size d, a token costs 2 P FLOPs forward, and a sequence
    2 L H d s^2 for causal attention: per_pair / per_token = L H d / P.
    """
    size = np.asarray(lengths, dtype=np.float64)
    return per_token * size + per_pair * size * size


def _checked(lengths: npt.ArrayLike, capacity: int) -> Int64:
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and (int(sizes.max()) > capacity or int(sizes.min()) < 0):
        wrong = int(np.flatnonzero((sizes > capacity) | (sizes < 0))[0])
        raise ValueError(_too_long(wrong, int(sizes[wrong]), capacity))
    return sizes


def _too_long(number: int, size: int, capacity: int) -> str:
    return (
        f"A sequence doesn't fit a row. Asked: sequence {number} of {size} slots. There is: rows of {capacity}. "
        "Do: raise the capacity, or shorten or leave out the sequence."
    )


def balance(sizes: npt.ArrayLike, ranks: int) -> list[Int64]:
    """Divide units over ranks so that the sums of sizes are nearly equal: largest first, each to the lightest rank.

    At most 4/3 of the best possible heaviest rank (Graham 1969), then improved by swaps between the heaviest and the
    lightest. Every rank gets a unit if there are enough. Deterministic. Where there are many units, the largest ones are dealt out in turn,
    there and back, as long as the smaller ones can make up for what that leaves uneven.

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
    order = np.argsort(owner.astype(np.uint16) if ranks < 2**16 else owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=ranks))[:-1])


def _whole(sizes: npt.NDArray[Any]) -> Int64:
    """Costs as whole numbers; floats are scaled so that the largest has 31 bits."""
    if sizes.size and not (np.isfinite(sizes).all() and sizes.min() >= 0):
        raise ValueError("Sizes are finite and not negative. Do: give what each unit costs, in tokens or by `cost`.")
    if sizes.dtype.kind == "f":
        most = float(sizes.max(initial=0))
        sizes = np.rint(sizes / (most or 1.0) * 2**31)
    return sizes.astype(np.int64)


def _lightest(costs: Int64, ranks: int) -> Int64:
    """[P] the rank of each unit: the largest are dealt out in turn, each of the rest goes to the lightest rank."""
    number = len(costs)
    if not number:
        return np.zeros(0, dtype=np.int64)
    order = np.sort((int(costs.max()) - costs) * number + np.arange(number)) % number  # largest first, ties by number
    ordered = costs[order]
    dealt, totals = _deal(ordered, ranks)
    places = np.empty(number, dtype=np.int64)
    there = np.arange(ranks)
    places[:dealt] = np.concatenate([there, there[::-1]] * (dealt // (2 * ranks)) or [there[:0]])
    heap = (totals * ranks + np.arange(ranks)).tolist()  # one number for total and rank: quicker to compare than a pair
    heapq.heapify(heap)
    lightest = []
    # A unit that costs nothing counts 1 here: else all of them would go to one rank, and others could stay empty.
    for step in (ordered[dealt:].clip(min=1) * ranks).tolist():
        top = heap[0]
        lightest.append(top)
        heapq.heapreplace(heap, top + step)
    places[dealt:] = np.asarray(lightest, dtype=np.int64) % ranks
    owner = np.empty(number, dtype=np.int64)
    owner[order] = places
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


def _even_out(costs: Int64, owner: Int64, ranks: int) -> None:
    """Swap units of the heaviest and the lightest rank while that lowers their difference; changes `owner`."""
    totals = np.bincount(owner, weights=costs, minlength=ranks).astype(np.int64)
    mean = int(totals.sum()) // ranks
    for _ in range(4 * ranks):
        heavy, light = int(totals.argmax()), int(totals.argmin())
        gap = int(totals[heavy] - totals[light])
        if gap < 2 or (int(totals[heavy]) - mean) * EVEN <= mean:
            return
        ours, theirs = np.flatnonzero(owner == heavy), np.flatnonzero(owner == light)
        if not len(theirs):
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

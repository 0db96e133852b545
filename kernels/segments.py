"""Where the segments of packed rows lie, and which rectangles of queries and keys they make: host numbers only, computed once a batch.

Slots are counted through all rows (slot = row * C + column). R rows, C capacity, S segments, n segments that have slots, ordered by slot.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


class Spans(NamedTuple):
    """Rectangles of the attention matrix: span i lets `q_length[i]` queries from slot `q_start[i]` see `k_length[i]` keys."""

    q_start: Int64
    q_length: Int64
    k_start: Int64
    k_length: Int64


class Segments(NamedTuple):
    """The n segments of some rows that have slots, all [n] int64, in the order of their slots."""

    rows: int
    capacity: int
    start: Int64
    length: Int64
    position: Int64  # of the first slot, within its sequence
    parent: Int64  # which of these n it continues, -1 for none

    @property
    def row(self) -> Int64:
        """[n] the row that each segment lies in."""
        return self.start // max(1, self.capacity)

    def own(self) -> Spans:
        """Each segment's own rectangle, to be read as causal."""
        return Spans(self.start, self.length, self.start, self.length)

    def above(self) -> list[Spans]:
        """What lies before: for parents, grandparents, … the rectangles that are seen whole.

        Neighbours that continue one segment are one rectangle. Within a list no query and no key occurs twice, and both rise.
        """
        levels: list[Spans] = []
        ancestor = self.parent
        while (ancestor >= 0).any():
            child = np.flatnonzero(ancestor >= 0)
            above = ancestor[child]
            start, end = self.start[child], self.start[child] + self.length[child]
            fresh = np.ones(len(child), dtype=bool)
            fresh[1:] = (above[1:] != above[:-1]) | (start[1:] != end[:-1])
            first, last = np.flatnonzero(fresh), np.append(np.flatnonzero(fresh)[1:], len(child)) - 1
            levels += _rising(Spans(start[first], end[last] - start[first], self.start[above[first]], self.length[above[first]]))
            ancestor = np.where(ancestor >= 0, self.parent[ancestor], -1)
        return levels

    def pairs(self) -> tuple[Int64, Int64]:
        """(segment, what it sees) for every segment with itself and each of its ancestors, by number among the n."""
        inner, outer = [np.arange(len(self.start))], [np.arange(len(self.start))]
        while (self.parent[outer[-1]] >= 0).any():
            above = self.parent[outer[-1]]
            inner.append(inner[-1][above >= 0])
            outer.append(above[above >= 0])
        return np.concatenate(inner), np.concatenate(outer)

    def beyond(self, window: int) -> bool:
        """Whether a sliding window hides something of an ancestor from one of these segments."""
        inner, outer = self.pairs()
        apart = self.position[inner] + self.length[inner] - 1 - self.position[outer]  # of the last query and the first key
        return bool(((apart >= window) & (inner != outer)).any())

    def pair_count(self, window: int = 0) -> int:
        """How many (query, key) pairs attention computes over these rows: what its cost is proportional to."""
        size = np.minimum(self.length, window) if window else self.length
        whole = int((size * (size + 1) // 2 + (self.length - size) * size).sum())
        for level in self.above():
            keys = np.minimum(level.k_length, window) if window else level.k_length
            whole += int((level.q_length * keys).sum())
        return whole

    def tiles(self, longest_gap: int) -> Int64:
        """[m + 1] boundaries that cut all rows into segments and, where there are none, pieces of at most `longest_gap` slots."""
        total = self.rows * self.capacity
        edges = np.concatenate([[0], np.stack([self.start, self.start + self.length], axis=1).ravel(), [total]])
        low, high = edges[:-1:2], edges[1::2]  # the gaps between segments
        pieces = -(-(high - low) // longest_gap)
        which = np.repeat(np.arange(len(low)), pieces)
        inside = np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        cuts = low[which] + inside * longest_gap
        return np.unique(np.concatenate([[0], cuts, self.start, self.start + self.length, [total]]))


def _rising(spans: Spans) -> list[Spans]:
    """Lists of spans whose keys rise as their queries do: mostly one."""
    ends: list[int] = []  # of the keys of each list so far
    lists = np.empty(len(spans.q_start), dtype=np.int64)
    for number, (start, length) in enumerate(zip(spans.k_start.tolist(), spans.k_length.tolist(), strict=True)):
        at = next((at for at, end in enumerate(ends) if end <= start), len(ends))
        if at == len(ends):
            ends.append(0)
        lists[number], ends[at] = at, start + length
    return [Spans(*(part[lists == at] for part in spans)) for at in range(len(ends))]


def find_segments(segments: npt.ArrayLike, parents: npt.ArrayLike, positions: npt.ArrayLike) -> Segments:
    """Find the segments of packed rows and check that they make sense.

    Args:
        segments: [R, C] int, number of the segment of each slot, -1 where there is none.
        parents: [S] int, segment that each one continues, -1 for none. One without slots is passed over: its own parent counts.
        positions: [R, C] int, of each slot within its sequence.

    Raises:
        ValueError: a segment has no entry in `parents`, or lies in two pieces; parents go in a circle, lie in another row or after the
            segment that continues them; positions within a segment don't count up by one.
    """
    grid, above, places = (np.asarray(values, dtype=np.int64) for values in (segments, parents, positions))
    rows, capacity = grid.shape
    flat, places = grid.ravel(), places.ravel()
    fresh = np.ones(len(flat), dtype=bool)
    fresh[1:] = flat[1:] != flat[:-1]
    if capacity:
        fresh[::capacity] = True
    start = np.flatnonzero(fresh)
    length, number = np.diff(np.append(start, len(flat))), flat[start]
    used = number >= 0
    start, length, number = start[used], length[used], number[used]
    _check_numbers(number, above)
    here = np.full(len(above) + 1, -1, dtype=np.int64)  # segment → which of the n; the last entry answers for "none"
    here[number] = np.arange(len(number))
    parent = above[number]
    while ((parent >= 0) & (here[parent] < 0)).any():
        parent = np.where((parent >= 0) & (here[parent] < 0), above[parent], parent)
    parent = np.where(parent >= 0, here[parent], -1)
    found = Segments(rows, capacity, start, length, places[start], parent)
    _check_places(found, number, ~fresh & (flat >= 0), places)
    return found


def _check_numbers(number: Int64, above: Int64) -> None:
    known = len(above)
    if len(number) and int(number.max()) >= known:
        raise ValueError(
            f"A segment is unknown. Asked: segment {int(number.max())}. There is: parents of {known}. "
            "Do: give the parents of all segments of these rows."
        )
    if known and int(above.max()) >= known:
        raise ValueError(
            f"A parent is unknown. Asked: parent {int(above.max())} of segment {int(above.argmax())}. There is: parents of {known}. "
            "Do: number the segments from 0 without a gap."
        )
    names, pieces = np.unique(number, return_counts=True)
    if (pieces > 1).any():
        raise ValueError(
            f"Segments don't tile the rows. Asked: segment {int(names[pieces > 1][0])} in {int(pieces[pieces > 1][0])} pieces. "
            "Do: lay each segment into neighbouring slots of one row."
        )
    ancestor, depth = above, 0
    while (ancestor >= 0).any():
        ancestor = np.where(ancestor >= 0, above[ancestor], -1)
        depth += 1
        if depth > known:
            raise ValueError("Parents of segments go in a circle. Do: let each segment continue one that was made before it.")


def _check_places(found: Segments, number: Int64, within: npt.NDArray[np.bool_], places: Int64) -> None:
    child = np.flatnonzero(found.parent >= 0)
    above = found.parent[child]
    wrong = child[(found.row[child] != found.row[above]) | (found.start[child] < found.start[above])]
    if len(wrong):
        one = int(wrong[0])
        raise ValueError(
            f"A segment can't see its parent. Asked: segment {int(number[one])} in row {int(found.row[one])} continues segment "
            f"{int(number[found.parent[one]])} in row {int(found.row[found.parent[one]])}. Do: lay parents into the same row, before what "
            "continues them."
        )
    jumps = np.flatnonzero(within[1:] & (np.diff(places) != 1)) + 1
    if len(jumps):
        slot = int(jumps[0])
        raise ValueError(
            f"Positions jump within a segment. Asked: position {int(places[slot])} after {int(places[slot - 1])} in row "
            f"{slot // found.capacity}, column {slot % found.capacity}. Do: let positions count up by one within a segment."
        )

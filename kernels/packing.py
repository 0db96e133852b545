"""Which sequence goes into which row. Numbers in, numbers out.

N sequences, R rows, C capacity, T tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
FEW = 4096  # sequences up to which best fit one by one is quick enough, and better
SHORT = 600  # tokens of an average sequence from which copying one by one is quicker than by index
BLOCK = 2**14  # slots laid at once, so that what is computed on the way stays in a cache and in memory that is there
WAVES = 4  # more fill rows better and take longer
MANY = 24  # sequences of a row from which one wave fills rows as well as several
TAIL = 32  # a wave of fewer rows than such a part of the first would take many rounds for little


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
    return _assign_waves(sizes, capacity)


def _assign_waves(sizes: Int64, capacity: int) -> Int64:
    """Wave after wave of rows, the last few sequences one after the other."""
    hist = np.bincount(sizes)
    order = stable_order(sizes, len(hist) - 1)
    base = np.cumsum(hist) - hist  # in that order, where the sequences of each length begin; those still to place come first
    mass = int(sizes.sum())
    waves = WAVES if len(sizes) * capacity < MANY * mass else 1
    share, first = -(-mass // (capacity * waves)), 0
    found = np.empty(len(sizes), dtype=np.int64)
    while (need := -(-mass // capacity)) * TAIL > share:
        wave = min(share, need)
        for rows, places in _fill_wave(hist, base, first + np.arange(wave), capacity):
            found[order[places]] = rows
        first += wave
        mass = int(hist @ np.arange(len(hist)))
    rest = np.repeat(base + hist - np.cumsum(hist), hist) + np.arange(int(hist.sum()))
    last = order[rest][::-1]  # the longest first
    found[last] = first + _next_fit(sizes[last], capacity)
    return found


def stable_order(keys: Int64, most: int) -> npt.NDArray[np.integer]:
    """Numbers of the keys, none negative or above `most`, in ascending order of them; equal ones by number.

    Key and number side by side in one number are sorted in a third of the time that numbers by their keys take.
    """
    bits = len(keys).bit_length()
    width = bits + most.bit_length()
    if width > 64:
        return np.argsort(keys, kind="stable")
    both: npt.NDArray[Any] = keys.astype(np.uint32 if width <= 32 else np.uint64)
    both <<= bits
    both |= np.arange(len(keys), dtype=both.dtype)
    both.sort()
    both &= 2**bits - 1
    return both if width <= 32 else both.astype(np.int64)


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


def _fill_wave(hist: Int64, base: Int64, rows: Int64, capacity: int) -> Iterator[tuple[Int64, Int64]]:
    """Fill empty rows. Yields round by round which rows took which sequences, by their places, and takes those out of `hist`."""
    used = np.zeros(len(rows), dtype=np.uint16 if capacity < 2**16 else np.int64)  # NumPy sorts 16 bits by counting
    turn = np.arange(len(rows))
    longest = len(hist) - 1
    while True:
        order = np.argsort(used, kind="stable")  # the emptiest first
        rows, used = rows[order], used[order]
        longest = min(longest, capacity - int(used[0]))
        left = hist[: longest + 1]
        upto = np.cumsum(left)
        # Sequences in ascending order are numbered 0, 1, …; a row with room for the lengths up to l takes number upto[l] - 1 or, where
        # emptier rows have come before, the next one below.
        takes = upto[np.minimum(capacity - used.astype(np.int64), longest)] + turn[: len(rows)]
        takes = np.minimum.accumulate(takes) - 1 - turn[: len(rows)]
        count = int(np.count_nonzero(takes >= 0))
        if not count:
            return
        rows, used, takes = rows[:count], used[:count], takes[:count]
        took = np.searchsorted(upto, takes[::-1], side="right")[::-1]  # ascending ones are found faster
        # What is taken of a length is always the last of it, so what is left of it stays side by side from its base on.
        yield rows, takes + base[took] - upto[took] + left[took]
        left -= np.bincount(took, minlength=longest + 1)
        used = used + took.astype(used.dtype)


def _next_fit(sizes: Int64, capacity: int) -> Int64:
    """[N] rows: as many sequences as fit, one after the other, then the next row."""
    upto = np.cumsum(sizes)
    ends, end, before = [0], 0, 0
    while end < len(sizes):
        end = int(np.searchsorted(upto, before + capacity, side="right"))
        before = int(upto[end - 1])
        ends.append(end)
    return np.repeat(np.arange(len(ends) - 1), np.diff(ends))


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

"""The order in which the rows of one source are given: a pure function of seed, epoch and the source's pieces.

In each epoch the pieces (files, ranges of lines, row groups) are shuffled and taken in groups. A window is one chunk of
every piece of the group, and its rows are shuffled. So memory holds one window, files are read from front to back, and a
place in the order is four integers (`Anchor`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xxhash
from rolecall.protocols.errors import DataError
from rolecall.roles.data.sources.base import Found, Rows, Table

_REMEMBERED = 4096  # windows whose anchors are kept


class Anchor(NamedTuple):
    """Where a window begins."""

    first: int = 0  # rows before it, over all epochs
    epoch: int = 0
    group: int = 0
    turn: int = 0  # chunks of each piece before it


class _Window:
    """Rows that lie in memory, in the order in which they are given."""

    def __init__(self, chunks: list[Rows], order: np.ndarray | None) -> None:
        self._chunks = chunks
        chunk = np.repeat(np.arange(len(chunks)), [len(each) for each in chunks])
        row = np.concatenate([np.arange(len(each)) for each in chunks]) if chunks else np.zeros(0, np.int64)
        self.chunk: list[int] = (chunk if order is None else chunk[order]).tolist()
        self.row: list[int] = (row if order is None else row[order]).tolist()

    def __len__(self) -> int:
        return len(self.row)

    def decode(self, place: int) -> Found | None:
        return self._chunks[self.chunk[place]].decode(self.row[place])


_NOTHING = _Window([], None)


class Walk:
    """Gives the k-th row of a source, for k mostly rising; epochs follow each other without end.

    Args:
        table: the source.
        seed: of the order.
        name: of the source; sources of one mix are shuffled differently.
        shuffle: False gives pieces and rows as they lie.
        window: rows that are shuffled together, at most.
        size: bytes of the rows that are shuffled together, about.
        together: pieces that are read at the same time.
    """

    def __init__(
        self, table: Table, seed: int, name: str = "", *, shuffle: bool = True, window: int = 16384, size: int = 1 << 26, together: int = 16
    ) -> None:
        self.table, self.name, self._shuffle = table, name, shuffle
        self._words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, xxhash.xxh32_intdigest(name.encode())]
        self._groups = math.ceil(table.pieces / together) if shuffle else table.pieces
        self._window_rows, self._size = table.window or window, size
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        self._rows = [table.rows(piece) for piece in range(table.pieces)]  # None where a piece must be read to know
        self._total = sum(rows for rows in self._rows if rows is not None) if None not in self._rows else None
        self._here, self._window = Anchor(), _NOTHING
        self._readers: dict[int, Iterator[Rows]] = {}
        self._open = (-1, -1, -1)  # epoch, group and next turn of the readers
        self._anchors: deque[Anchor] = deque([self._here], maxlen=_REMEMBERED)

    def row(self, number: int) -> tuple[int, Found | None]:
        """Epoch and record of the row `number` (over all epochs); None where the row holds no record.

        Raises:
            DataError: it can't be read or decoded, or the source is empty.
        """
        here = self._here
        if not here.first <= number < here.first + len(self._window):
            self._seek(number)
            here = self._here
        return here.epoch, self._window.decode(number - here.first)

    def total(self) -> int:
        """Rows of an epoch; where the source doesn't know, it is read once from front to back.

        Raises:
            DataError: the source can't be read.
        """
        if self._total is None:
            total = 0
            for piece, rows in enumerate(self._rows):
                read = self.table.read(piece, self._window_rows, self._size, 0) if rows is None else ()
                total += sum(map(len, read)) if rows is None else rows
            self._total = total
        return self._total

    def anchor(self, number: int) -> Anchor:
        """The nearest known place at or before the row `number`, from which another process can go on at once."""
        return max((each for each in self._anchors if each.first <= number), default=Anchor())

    def start(self, anchor: Anchor) -> None:
        """Go on from an anchor that another walk over the same source gave."""
        self._here, self._window = anchor, _NOTHING
        self._anchors.append(anchor)

    def _seek(self, number: int) -> None:
        if number < self._here.first:
            self._here, self._window = self.anchor(number), _NOTHING
        if self._total:
            epoch = number // self._total
            if epoch > self._here.epoch:
                self._here, self._window = Anchor(epoch * self._total, epoch), _NOTHING
        turns = 0  # groups without a row, one after the other
        while turns <= 2 * self._groups:
            here = self._here
            rows = len(self._window) or self._known(here)
            if rows is None or here.first <= number < here.first + rows:
                self._window = self._load(here)
                rows = len(self._window)
            if here.first <= number < here.first + rows:
                self._anchors.append(here)
                return
            turns = 0 if rows else turns + 1
            self._window = _NOTHING
            self._here = Anchor(here.first + rows, here.epoch, here.group, here.turn + 1) if rows else self._turn(here)
        raise DataError(f"The source {self.name!r} is empty.", have="no record", remedy="give a source with at least one record")

    def _turn(self, here: Anchor) -> Anchor:
        """The next group, or the next epoch."""
        if here.group + 1 < self._groups:
            return Anchor(here.first, here.epoch, here.group + 1)
        return Anchor(here.first, here.epoch + 1)

    def _pieces(self, here: Anchor) -> list[int]:
        """The pieces of a group."""
        if self._order[0] != here.epoch:
            pieces = np.arange(self.table.pieces)
            self._order = (here.epoch, self._random(here.epoch).permutation(pieces) if self._shuffle else pieces)
        count, groups = self.table.pieces, self._groups
        return [int(each) for each in self._order[1][count * here.group // groups : count * (here.group + 1) // groups]]

    def _known(self, here: Anchor) -> int | None:
        """Rows of a window, where they are known without reading."""
        if not self._groups:
            return 0
        pieces = self._pieces(here)
        rows, size = self._share(len(pieces))
        known = 0
        for piece in pieces:
            count = self._rows[piece]
            if count is None:
                return None
            chunk = self.table.chunk(piece, rows, size)
            known += min(max(count - here.turn * chunk, 0), chunk)
        return known

    def _load(self, here: Anchor) -> _Window:
        pieces = self._pieces(here)
        if self._open != (here.epoch, here.group, here.turn):
            rows, size = self._share(len(pieces))
            self._readers = {piece: self.table.read(piece, rows, size, here.turn) for piece in pieces}
        chunks = []
        for piece in pieces:
            if piece in self._readers:
                chunk = next(self._readers[piece], None)
                if chunk is None:
                    del self._readers[piece]
                else:
                    chunks.append(chunk)
        self._open = (here.epoch, here.group, here.turn + 1)
        count = sum(map(len, chunks))
        return _Window(chunks, self._random(*here[1:]).permutation(count) if self._shuffle else None)

    def _share(self, pieces: int) -> tuple[int, int]:
        """Rows and bytes of a window that each of its pieces has."""
        return max(1, self._window_rows // pieces), max(1, self._size // pieces)

    def _random(self, *words: int) -> np.random.RandomState:
        """RandomState, because its stream is frozen: a run can be resumed with another numpy."""
        return np.random.RandomState([*self._words, *words])

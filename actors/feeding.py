"""Packed rows on their way to the policy: data members make blocks of them ahead of the training, in one order."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from rolecall.actors.group import Group
from rolecall.actors.pending import Pending, stretch
from rolecall.protocols import PackedBatch


@dataclass(eq=False)
class _Block:
    """A block that was asked for."""

    pending: Pending[PackedBatch]
    rows: int = -1  # once it is there


class Feed:
    """The rows of a data group in the order of their blocks, so many at a time.

    Which rows a block has depends on its number alone, so neither the members nor the batches change their order: member
    r of w makes the blocks r, r + w, r + 2 w, … A place in the order is a block and a row of it.

    Args:
        data: a group whose role has the verb `batch(block)`.
        ahead: rows to have asked for beyond those in use. Each member is asked for one block at least.
        block, row: where to begin.

    Attributes:
        block, row: the place after the rows that were taken.
        waited: seconds that the last `take` waited.
    """

    def __init__(self, data: Group, *, ahead: int, block: int = 0, row: int = 0) -> None:
        self.block, self.row, self.waited = block, row, 0.0
        self._data, self._ahead, self._next, self._ended = data, ahead, block, False
        self._blocks: deque[_Block] = deque()  # from `self.block` on
        self._largest = 0  # rows of the largest block so far

    def take(self, rows: int, more: int) -> Pending[PackedBatch] | None:
        """The next `rows` rows, fewer at the end of the data; None where nothing is left.

        Args:
            rows: how many.
            more: rows that will be asked for later: no block is made that will not be needed.
        """
        started = time.monotonic()
        while (have := self._known() - self.row) < rows and not self._ended:
            self._ask(rows, more)
            unknown = next(block for block in self._blocks if block.rows < 0)
            unknown.rows = len(unknown.pending.outline.keys)
            unknown.pending.ahead = False
            self._largest = max(self._largest, unknown.rows)
            self._ended = unknown.rows == 0
        self.waited = time.monotonic() - started
        stop = self.row + min(rows, have)
        if stop == self.row:
            return None
        used = [block.pending for block in self._blocks if block.rows > 0]
        taken = stretch(used, self.row, stop)
        self.row = stop
        while self._blocks and 0 < self._blocks[0].rows <= self.row:
            self.row -= self._blocks.popleft().rows
            self.block += 1
        self._ask(0, more)
        return taken

    def _known(self) -> int:
        """Rows of the blocks that are there, up to the first that isn't."""
        total = 0
        for block in self._blocks:
            if block.rows < 0:
                break
            total += block.rows
        return total

    def _ask(self, now: int, more: int) -> None:
        """Ask for as many blocks as hold the rows needed now and those to be ahead, one for each member at least."""
        while not self._ended:
            unknown = sum(block.rows < 0 for block in self._blocks)
            expected = self._known() - self.row + unknown * self._largest
            if self._largest and expected >= now + more:
                return
            if unknown >= self._data.world and (not self._largest or expected >= now + min(more, self._ahead)):
                return
            pending = self._data.one(self._next % self._data.world).batch(self._next)
            pending.ahead = True
            self._blocks.append(_Block(pending))
            self._next += 1

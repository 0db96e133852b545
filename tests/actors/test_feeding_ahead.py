"""Back-pressure: however long training takes, a bounded number of rows is made ahead; and each member always has a block to make."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from rolecall.actors import feeding
from rolecall.actors.feeding import Feed

ROWS, AHEAD = 5, 12  # rows of a block; rows to be ahead


class Endless:
    """A data group whose blocks are there at once; remembers who was asked for which."""

    def __init__(self, world: int) -> None:
        self.world, self.asked = world, list[tuple[int, int]]()

    def one(self, rank: int) -> Any:
        return SimpleNamespace(batch=lambda block: self._batch(rank, block))

    def _batch(self, rank: int, block: int) -> Any:
        self.asked.append((rank, block))
        return SimpleNamespace(outline=SimpleNamespace(keys=range(ROWS)), ahead=False)


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 4, 23])
def test_a_bounded_number_of_rows_is_made_ahead(world: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "stretch", lambda used, start, stop: (start, stop))
    data = Endless(world)
    feed = Feed(data, ahead=AHEAD)  # type: ignore[arg-type]
    for step in range(1, 200):
        start, stop = feed.take(rows, 10**9)  # type: ignore[misc]
        assert stop - start == rows
        ahead = len(data.asked) * ROWS - step * rows
        assert AHEAD <= ahead <= max(AHEAD, world * ROWS) + 2 * ROWS
    assert data.asked == [(block % world, block) for block in range(len(data.asked))], "each member in turn, each block once"
    made = len(data.asked)
    feed.take(rows, 0)
    assert len(data.asked) <= made + -(-rows // ROWS), "at the end nothing more is made ahead"

"""The order of one source: every row once an epoch, the same wherever reading begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.roles.data.order import Walk


class Pieces:
    """A table of pieces of these sizes; a row's record says where it is. Counts what is read."""

    window = 0

    def __init__(self, sizes: list[int], known: bool) -> None:
        self.sizes, self.pieces, self.known = sizes, len(sizes), known
        self.opened: Counter[int] = Counter()

    def identity(self) -> str:
        return repr(self.sizes)

    def rows(self, piece: int) -> int | None:
        return self.sizes[piece] if self.known else None

    def chunk(self, piece: int, rows: int, size: int) -> int:
        return rows

    def read(self, piece: int, rows: int, size: int, skip: int) -> Iterator[Chunk]:
        self.opened[piece] += 1
        for start in range(skip * rows, self.sizes[piece], rows):
            yield Chunk(piece, start, min(rows, self.sizes[piece] - start))

    def close(self) -> None:
        pass


class Chunk:
    def __init__(self, piece: int, start: int, count: int) -> None:
        self.piece, self.start, self.count = piece, start, count

    def __len__(self) -> int:
        return self.count

    def decode(self, row: int) -> tuple[str, dict]:
        return "", {"at": (self.piece, self.start + row)}


def rows(walk: Walk, numbers) -> list[tuple[int, tuple[int, int]]]:
    return [(epoch, found[1]["at"]) for epoch, found in (walk.row(number) for number in numbers)]


SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
SHAPES = st.fixed_dictionaries({"window": st.integers(1, 60), "together": st.integers(1, 5), "shuffle": st.booleans()})


@settings(deadline=None, max_examples=80)
@given(SIZES, SHAPES, st.integers(0, 2**64 - 1))
def test_every_epoch_gives_every_row_once_and_knowing_the_sizes_changes_nothing(sizes: list[int], shape: dict, seed: int):
    total = sum(sizes)
    found = rows(Walk(Pieces(sizes, False), seed, **shape), range(3 * total))
    everything = sorted((piece, row) for piece, size in enumerate(sizes) for row in range(size))
    for epoch in range(3):
        part = found[epoch * total : (epoch + 1) * total]
        assert {each for each, _ in part} == {epoch}
        assert sorted(place for _, place in part) == everything
        if not shape["shuffle"]:
            assert [place for _, place in part] == everything
    assert rows(Walk(Pieces(sizes, True), seed, **shape), range(3 * total)) == found


@settings(deadline=None, max_examples=40)
@given(SIZES, SHAPES, st.booleans(), st.data())
def test_reading_may_begin_anywhere_and_jump(sizes: list[int], shape: dict, known: bool, data: st.DataObject):
    total = sum(sizes)
    found = rows(Walk(Pieces(sizes, known), 7, **shape), range(3 * total))
    jumps = data.draw(st.lists(st.integers(0, 3 * total - 1), max_size=6))
    walk = Walk(Pieces(sizes, known), 7, **shape)
    assert rows(walk, jumps) == [found[number] for number in jumps]
    for number in jumps:  # from an anchor, as another process does
        other = Walk(Pieces(sizes, known), 7, **shape)
        other.start(walk.anchor(number))
        assert rows(other, range(number, 3 * total)) == found[number:]


def test_an_anchor_spares_reading_what_came_before():
    table = Pieces([100] * 40, False)
    walk = Walk(table, 0, window=40, together=4)
    walk.row(3500)
    anchor = walk.anchor(3500)
    assert 3460 <= anchor.first <= 3500
    fresh = Pieces([100] * 40, False)
    other = Walk(fresh, 0, window=40, together=4)
    other.start(anchor)
    assert other.row(3500) == walk.row(3500)
    assert sum(fresh.opened.values()) == 4  # one group


def test_where_sizes_are_known_a_jump_reads_nothing_in_between():
    table = Pieces([100] * 40, True)
    walk = Walk(table, 0, window=40, together=4)
    walk.row(10_000_000 * 4000 + 3500)
    assert sum(table.opened.values()) == 4


@pytest.mark.parametrize("together", [1, 8])
def test_rows_are_mixed_within_windows_and_between_pieces(together: int):
    """Two rows that follow each other stand, on average, a third of the window apart, as in a random permutation."""
    walk = Walk(Pieces([1000] * 8, False), 3, window=500, together=together)
    at = np.array([piece * 1000 + row for _, (piece, row) in rows(walk, range(8000))])
    steps = np.abs(np.diff(at))
    if together == 8:
        assert steps.mean() > 2000  # of 8000: pieces alternate
    else:
        assert steps[steps < 500].mean() == pytest.approx(500 / 3, rel=0.05)
    assert abs(np.corrcoef(np.arange(8000), at)[0, 1]) < 0.9


def test_orders_differ_by_seed_epoch_and_name():
    orders = [
        [place for _, place in rows(Walk(Pieces([50, 50], False), seed, name), range(start, start + 100))]
        for seed, name, start in ((0, "a", 0), (1, "a", 0), (1 << 40, "a", 0), (0, "b", 0), (0, "a", 100))
    ]
    assert len({tuple(order) for order in orders}) == 5

"""How many tokens of the fused head are taken at a time: a model of the GPU's waves, and the memory that a chunk may have.

A chunk's three products are cut into tiles, one a multiprocessor at a time, so a product takes whole waves of WAVE tiles: 133 of
them take as long as 264. The gradient of the states has few tiles with long sums (over the vocabulary); cut into `splits` parts that
are multiplied side by side and added afterwards it fills waves better. The gradient of the head is read and written once a chunk, so
few large chunks are better than many small ones, as far as memory goes. The constants are of an H100; what they foretell and what was
measured stands in docs/kernels.md.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

ROWS, COLUMNS = 128, 256  # of a tile
WAVE = 132  # multiprocessors
TILE_RATE = 6.44e12  # FLOP/s of one multiprocessor within a tile's sums: 850e12 of the whole GPU
OWN_RATE = 750e12  # FLOP/s of a product with few tiles where cuBLAS itself chooses how to cut its sums
EPILOGUE, UPDATE = 3.1e-6, 2.4e-6  # seconds a tile takes beyond its sums: exponentials written; gradient of the head read and written
COPY = 3.0e12  # bytes/s
CHUNK = 60e-6  # seconds of a chunk's small kernels and of the ends of its large ones
PART = 15e-6  # seconds that cutting the gradient of the states costs beyond its traffic; the same again for what the parts leave over
SPLITS = 16  # at most
MORE = 8  # chunks beyond the fewest that are looked at


@dataclass(frozen=True)
class Chunk:
    """Tokens, and parts of the vocabulary that the gradient of the states is made of."""

    rows: int
    splits: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a call: tokens, hidden size, vocabulary, and bytes that a token needs besides partial sums."""

    count: int
    depth: int
    vocab: int
    token_bytes: int

    def bytes(self, chunks: Sequence[Chunk]) -> int:
        """What is held at the peak: buffers for the largest chunk, and the largest partial sums."""
        rows, parts = max(chunk.rows for chunk in chunks), max(chunk.rows * chunk.splits for chunk in chunks)
        return rows * self.token_bytes + 4 * self.depth * parts


def plan(shape: Shape, memory: int, rows: int = 0) -> tuple[Chunk, ...]:
    """Chunks that cover all tokens within `memory` bytes in the least time by the model; of `rows` each if that is given.

    A chunk of one row of tiles is taken even if it needs more.
    """
    if not shape.count:
        return ()
    tiles = -(-shape.count // ROWS)
    if rows:
        sizes = [min(rows, shape.count - start) for start in range(0, shape.count, rows)]
        return tuple(Chunk(size, _best(-(-size // ROWS), shape, 2**62)[1]) for size in sizes)
    left: int = shape.count
    chunks: list[Chunk] = []
    for height, splits in _cut(tiles, Shape(0, shape.depth, shape.vocab, shape.token_bytes), memory):
        chunks.append(Chunk(min(left, height * ROWS), splits))
        left -= chunks[-1].rows
    return tuple(chunks)


@functools.lru_cache(maxsize=4096)
def _cut(tiles: int, shape: Shape, memory: int) -> tuple[tuple[int, int], ...]:
    """(Rows of tiles, splits) of each chunk; the heights of chunks differ by one at most."""
    highest = max(1, min(tiles, memory // shape.bytes([Chunk(ROWS, 1)])))
    found: tuple[float, tuple[tuple[int, int], ...]] = (float("inf"), ())
    fewest = -(-tiles // highest)
    for count in range(fewest, min(tiles, fewest + MORE) + 1):
        low, more = divmod(tiles, count)
        heights = [low + 1] * more + [low] * (count - more)
        left = memory - max(heights) * ROWS * shape.token_bytes
        each = {height: _best(height, shape, left) for height in {*heights}}
        found = min(found, (sum(each[height][0] for height in heights), tuple((height, each[height][1]) for height in heights)))
    return found[1]


def _best(height: int, shape: Shape, memory: int) -> tuple[float, int]:
    """Seconds of a chunk, and its splits, whose partial sums have `memory` bytes."""
    within = [splits for splits in range(1, SPLITS + 1) if splits == 1 or 4 * height * ROWS * shape.depth * splits <= memory]
    return min((seconds(height, splits, shape), splits) for splits in within)


def seconds(height: int, splits: int, shape: Shape) -> float:
    """What a chunk of `height` rows of tiles takes by the model: logits, gradient of the head, gradient of the states."""
    rows, depth, vocab = height * ROWS, shape.depth, shape.vocab
    tile = 2 * ROWS * COLUMNS / TILE_RATE  # per step of a sum
    logits = _waves(height * -(-vocab // COLUMNS)) * (depth * tile + EPILOGUE)
    head = _waves(-(-depth // ROWS) * -(-vocab // COLUMNS)) * (rows * tile + UPDATE)
    if splits == 1:
        states = 2 * rows * depth * vocab / OWN_RATE
    else:
        states = _waves(splits * height * -(-depth // COLUMNS)) * vocab / splits * tile
        states += 8 * splits * rows * depth / COPY + PART * (1 if vocab % (8 * splits) == 0 else 2)
    return logits + head + states + CHUNK


def _waves(tiles: int) -> int:
    return -(-tiles // WAVE)

"""Chunks of the fused head: they cover all tokens, fit the memory they may have, and are not far from the best by their model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels.head_plan import ROWS, WAVE, Chunk, Shape, plan, seconds

LIMIT = 512_000_000
SHAPES = [(16384, 2048, 248320), (8192, 2304, 256000), (16384, 1024, 151936)]


def loss_shape(count, depth, vocab):
    """As cross entropy asks: exponentials in bfloat16, states, and sums of tiles."""
    return Shape(count, depth, vocab, 2 * (-(-vocab // 64) * 64) + 2 * depth + 4 * -(-vocab // 256))


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(0, 40_000),
    depth=st.sampled_from([8, 64, 1000, 1024, 2304, 8192]),
    vocab=st.integers(1, 300_000),
    memory=st.integers(1, 2**30),
    rows=st.sampled_from([0, 0, 0, 1, 100, 1000]),
)
def test_chunks_cover_all_tokens_within_the_memory(count, depth, vocab, memory, rows):
    shape = loss_shape(count, depth, vocab)
    found = plan(shape, memory, rows)
    assert sum(chunk.rows for chunk in found) == count
    assert all(chunk.rows > 0 and chunk.splits >= 1 for chunk in found)
    if rows:
        assert all(chunk.rows == rows for chunk in found[:-1])
        return
    assert all(chunk.rows % ROWS == 0 for chunk in found[:-1]), "only the last chunk has a row of tiles that is not full"
    assert not found or shape.bytes(found) <= max(memory, shape.bytes([Chunk(ROWS, 1)]))


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("share", [1.0, 0.7, 0.3, 0.01])
def test_large_models_stay_below_the_limit_and_fill_the_waves(size, share):
    count = int(size[0] * share)
    shape = loss_shape(count, *size[1:])
    found = plan(shape, LIMIT)
    assert shape.bytes(found) <= LIMIT
    heights = {-(-chunk.rows // ROWS) for chunk in found}
    assert max(heights) - min(heights) <= 1, "no chunk is much smaller than the others"
    for naive in range(1, max(heights) + 1):
        whole, rest = divmod(-(-count // ROWS), naive)
        by_hand = whole * seconds(naive, 1, shape) + (seconds(rest, 1, shape) if rest else 0)
        assert sum(seconds(-(-chunk.rows // ROWS), chunk.splits, shape) for chunk in found) <= 1.0001 * by_hand


def test_a_wave_more_costs_a_wave():
    """A gradient of the states of 133 tiles takes nearly twice as long as one of 132."""
    shape = Shape(0, 256, 256_000, 0)
    product = [seconds(height, 2, shape) - seconds(height, 1, shape) for height in (WAVE // 2, WAVE // 2 + 1)]
    assert product[1] > product[0] + 0.5e-3


def test_nothing_to_do():
    assert plan(loss_shape(0, 64, 100), LIMIT) == ()
    assert plan(loss_shape(1, 64, 100), LIMIT) == (Chunk(1, 1),)

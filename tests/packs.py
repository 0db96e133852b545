"""Packed rows for tests of attention: random forests of segments, and rows said by hand."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from rolecall.kernels.attention import Packed


def packed(rows, capacity):
    """Rows of items: a length stands alone, a negative one is a gap, (length, [lengths]) is a prompt with what continues it."""
    segments, positions, parents = np.full((len(rows), capacity), -1), np.zeros((len(rows), capacity), dtype=int), []
    for number, items in enumerate(rows):
        at = 0
        for item in items:
            length, children = item if isinstance(item, tuple) else (item, [])
            if length < 0:
                at -= length
                continue
            root, start = len(parents), length
            for place, size, parent in [(0, length, -1), *((start, size, root) for size in children)]:
                segments[number, at : at + size] = len(parents)
                positions[number, at : at + size] = place + np.arange(size)
                parents.append(parent)
                at += size
    return Packed(torch.tensor(segments), torch.tensor(parents, dtype=torch.int64), torch.tensor(positions))


@st.composite
def packs(draw, capacity, rows=2, families=True):
    """Rows of random segments with gaps; with `families`, segments continue any earlier one of their row."""
    segments, positions, parents = np.full((rows, capacity), -1), np.zeros((rows, capacity), dtype=int), []
    for row in range(rows):
        at, here = 0, []
        while at < capacity and draw(st.integers(0, 7)):
            length = draw(st.integers(1, capacity - at) if draw(st.booleans()) else st.integers(1, min(5, capacity - at)))
            if draw(st.integers(0, 4)):
                above, begins = draw(st.sampled_from([(-1, 0), *here])) if families else (-1, 0)
                segments[row, at : at + length] = len(parents)
                positions[row, at : at + length] = begins + np.arange(length)
                here.append((len(parents), begins + length))
                parents.append(above)
            at += length
    return Packed(torch.tensor(segments), torch.tensor(parents, dtype=torch.int64), torch.tensor(positions))

"""The packed mask: against a loop that says it in words."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels.attention import packed_mask


def by_words(segments, parents):
    """A slot sees what is not after it and is of its own segment or of one that this continues; an empty one, itself."""
    rows, capacity = segments.shape
    mask = torch.zeros(rows, 1, capacity, capacity, dtype=torch.bool)
    for row in range(rows):
        for query in range(capacity):
            family, segment = set(), int(segments[row, query])
            while segment >= 0:
                family.add(segment)
                segment = int(parents[segment])
            for key in range(query + 1):
                mask[row, 0, query, key] = key == query or int(segments[row, key]) in family
    return mask


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_mask_is_what_the_words_say(data):
    """Random forests of segments, chains of parents included, in rows with gaps."""
    capacity, rows, parents, table = 10, data.draw(st.integers(1, 3)), [], []
    for _ in range(rows):
        row, here = [], []
        while len(row) < capacity and data.draw(st.booleans()):
            length = data.draw(st.integers(1, capacity - len(row)))
            if data.draw(st.integers(0, 4)) == 0:
                row += [-1] * length
                continue
            parents.append(data.draw(st.sampled_from([-1, *here])))
            here.append(len(parents) - 1)
            row += [here[-1]] * length
        table.append(row + [-1] * (capacity - len(row)))
    segments, above = torch.tensor(table, dtype=torch.int32), torch.tensor(parents, dtype=torch.int32)
    assert torch.equal(packed_mask(segments, above), by_words(segments, above))


def test_every_slot_sees_something():
    """A row of a softmax without a single True would be NaN, and NaN spreads through the values of later layers."""
    mask = packed_mask(torch.full((2, 5), -1), torch.zeros(0, dtype=torch.int32))
    assert torch.equal(mask[0, 0], torch.eye(5, dtype=torch.bool))


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="parents of all segments"):
        packed_mask(torch.tensor([[0, 1]]), torch.tensor([-1]))
    with pytest.raises(ValueError, match="circle"):
        packed_mask(torch.tensor([[0, 1]]), torch.tensor([1, 0]))

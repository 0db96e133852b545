"""Plans against plain lists: whatever the parts and the assignment, units arrive in the order that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.actors.plans import CallPlan, Composed, Layout, Slices, merge_outlines
from rolecall.protocols import CallError, Scores


def scores(keys: list[int], counts: list[int]) -> Scores:
    """Scores whose values tell which unit and sibling they are of."""
    values = [key + sibling / 100 for key, count in zip(keys, counts, strict=True) for sibling in range(count)]
    return Scores(
        keys=np.array(keys, np.int64),
        counts=np.array(counts, np.int32),
        values=np.array(values, np.float32),
        status=np.zeros(len(values), np.uint8),
    )


@st.composite
def parted(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[int]]:
    """Parts (each a list of seen units), the samples of each seen unit, and the units to ask for."""
    total = draw(st.integers(1, 12))
    seen = draw(st.permutations(range(total)))
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=3)))
    parts = [list(seen[low:high]) for low, high in zip([0, *cuts], [*cuts, total], strict=True)]
    counts = draw(st.lists(st.integers(0, 3), min_size=total, max_size=total))
    asked = draw(st.lists(st.sampled_from(range(total)), min_size=1, unique=True))
    return [part for part in parts if part], counts, asked


@settings(deadline=None, max_examples=150)
@given(parted())
def test_slices_collect_exactly_the_asked_units_in_order(case: tuple[list[list[int]], list[int], list[int]]) -> None:
    parts, counts, asked = case
    messages = [scores([unit * 10 for unit in part], [counts[unit] for unit in part]) for part in parts]
    layout = Layout.of([len(part) for part in parts], [np.array(part) for part in parts])
    sent: list[int] = []

    def number(part: int) -> int:
        sent.append(part)
        return len(sent) - 1

    slices = layout.slices(np.array(asked), number)
    got = slices.collect([messages[part] for part in sent])
    assert isinstance(got, Scores)
    assert got.keys.tolist() == [unit * 10 for unit in asked]
    assert got.values.tolist() == scores([unit * 10 for unit in asked], [counts[unit] for unit in asked]).values.tolist()


@settings(deadline=None, max_examples=100)
@given(parted())
def test_merged_outline_is_that_of_the_whole(case: tuple[list[list[int]], list[int], list[int]]) -> None:
    parts, counts, _ = case
    total = sum(map(len, parts))
    outlines = [scores(list(part), [counts[unit] for unit in part]).outline() for part in parts]
    layout = Layout.of([len(part) for part in parts], [np.array(part) for part in parts])
    merged, whole = merge_outlines(outlines, layout), scores(list(range(total)), counts).outline()
    assert merged.keys.tolist() == whole.keys.tolist()
    assert merged.counts.tolist() == whole.counts.tolist()
    assert merged.sizes.tolist() == whole.sizes.tolist()
    assert merged.lengths.tolist() == whole.lengths.tolist()


def test_a_unit_answered_twice_or_not_at_all_is_refused() -> None:
    with pytest.raises(CallError, match="each unit once"):
        Layout.of([1, 1], [np.array([0]), np.array([0])])
    with pytest.raises(CallError, match="each unit once"):
        Layout.of([1], [np.array([0, 1])])


def test_a_part_that_is_used_whole_is_not_copied() -> None:
    whole = scores([1, 2, 3], [1, 1, 1])
    slices = Layout.of([3]).slices(np.arange(3), lambda part: part)
    assert slices.collect([whole]) is whole


def test_composed_arguments_are_made_at_the_member() -> None:
    made = Composed(lambda left, right, *, scale: (left.keys.tolist(), right * scale), (Slices((0,), (None,)), 3), {"scale": 2})
    plan = CallPlan("verb", (made,))
    assert plan.resolve([scores([7], [1])]) == ((([7], 6),), {})

"""Cutting arrays at units and laying them end to end again: what `take` and `join` of the messages are made of.

Units stand in order, each with a run of samples, each sample with a run of tokens. Neighbouring units therefore are one
slice of every array; only where the order changes is something copied, a slice at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from rolecall.protocols.errors import MessageError

Array = np.ndarray
Value = TypeVar("Value")
Ranges = list[tuple[int, int]]  # half-open


def offsets(lengths: Array) -> Array:
    """Where each of several runs begins, and where the last one ends: [N] → int64[N+1]."""
    found = np.empty(len(lengths) + 1, np.int64)
    found[0] = 0
    found[1:] = lengths
    return found.cumsum(out=found)  # in place: with a cast on the way it is ten times slower


def ranges(units: Sequence[int] | Array, count: int, message: str) -> Ranges:
    """Numbers of units as half-open ranges of neighbours: [4, 5, 6, 2] → [(4, 7), (2, 3)]; a mask is taken as well.

    Raises:
        MessageError: a number is not from 0 to `count` - 1, or they are no whole numbers.
    """
    if isinstance(units, range) and units.step == 1 and 0 <= units.start < units.stop <= count:
        return [(units.start, units.stop)]
    found = np.asarray(units)
    if found.dtype == bool and found.shape == (count,):
        found = found.nonzero()[0]
    if found.size == 0:
        return [(0, 0)]
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise MessageError(f"{message}.take wants whole numbers of units in one row, not {found.dtype} of shape {found.shape}")
    found = found.astype(np.int64, copy=False)
    begin, end = int(found[0]), int(found[-1]) + 1
    if begin >= 0 and end <= count and end - begin == len(found) and (found[1:] - found[:-1] == 1).all():
        return [(begin, end)]
    if found.min() < 0 or found.max() >= count:
        raise MessageError(f"{message}.take: units run from 0 to {count - 1}, asked {int(found.min())} to {int(found.max())}")
    breaks = ((found[1:] - found[:-1]) != 1).nonzero()[0]
    first = found[np.concatenate(([0], breaks + 1))]
    last = found[np.concatenate((breaks, [len(found) - 1]))]
    return list(zip(first.tolist(), (last + 1).tolist(), strict=True))


def below(ranges: Ranges, bounds: Array) -> Ranges:
    """Ranges of units as ranges of what the units hold, by their offsets."""
    return [(int(bounds[start]), int(bounds[stop])) for start, stop in ranges]


def cut_offsets(bounds: Array, ranges: Ranges) -> Array:
    """Offsets of these ranges of units, counted from their new start."""
    if len(ranges) == 1:
        start, stop = ranges[0]
        found: Array = bounds[start : stop + 1] - bounds[start]
        return found
    return offsets(np.concatenate([bounds[start + 1 : stop + 1] - bounds[start:stop] for start, stop in ranges]))


def cut(array: Array, ranges: Ranges) -> Array:
    """These ranges of an array end to end; one range is a view, not a copy."""
    if len(ranges) == 1:
        return array[ranges[0][0] : ranges[0][1]]
    return np.concatenate([array[start:stop] for start, stop in ranges])


def cut_tuple(values: tuple[Value, ...], ranges: Ranges) -> tuple[Value, ...]:
    """As `cut`, of a tuple."""
    if len(ranges) == 1:
        return values[ranges[0][0] : ranges[0][1]]
    return tuple(value for start, stop in ranges for value in values[start:stop])


def cut_columns(columns: Mapping[str, tuple[Value, ...]], ranges: Ranges) -> dict[str, tuple[Value, ...]]:
    """As `cut`, of each column."""
    return {name: cut_tuple(values, ranges) for name, values in columns.items()}


def cut_spans(starts: Array, versions: Array, ranges: Ranges) -> tuple[Array, Array]:
    """Version spans of these ranges of tokens end to end, counted from their new start; neighbours that a cut made equal become one."""
    if len(ranges) == 1 and ranges[0][0] < ranges[0][1]:
        start, stop = ranges[0]
        first, last = starts.searchsorted(start, "right") - 1, starts.searchsorted(stop, "left")
        own = starts[first:last] - start
        own[0] = 0
        return own, versions[first:last]
    new_starts, new_versions, position = [], [], 0
    for start, stop in ranges:
        if stop > start:
            first, last = starts.searchsorted(start, "right") - 1, starts.searchsorted(stop, "left")
            new_starts.append(np.maximum(starts[first:last], start) - start + position)
            new_versions.append(versions[first:last])
        position += stop - start
    return merge_spans(new_starts, new_versions)


def merge_spans(starts: Sequence[Array], versions: Sequence[Array]) -> tuple[Array, Array]:
    """Spans end to end, a span that goes on with the version before it dropped."""
    if not starts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    all_starts, all_versions = joined(starts), joined(versions)
    if len(all_starts) == 1:
        return all_starts, all_versions
    kept = np.ones(len(all_starts), bool)
    kept[1:] = all_versions[1:] != all_versions[:-1]
    return all_starts[kept], all_versions[kept]


def joined(arrays: Sequence[Array]) -> Array:
    """Arrays end to end; a single one stays as it is."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def joined_columns(parts: Sequence[tuple[int, Mapping[str, tuple[Any, ...]]]], message: str, field: str) -> dict[str, tuple[Any, ...]]:
    """Columns end to end; each part is (how many rows, columns), and those with rows must have the same columns.

    Raises:
        MessageError: a column is there in one part and not in another.
    """
    full = [columns for rows, columns in parts if rows] or [columns for _, columns in parts[:1]]
    for columns in full[1:]:
        if columns.keys() != full[0].keys():
            raise MessageError(f"{message}.join: {field} are {sorted(full[0])} in one part and {sorted(columns)} in another")
    return {name: tuple(value for columns in full for value in columns[name]) for name in full[0]}


def agreed(values: Sequence[Value], message: str, field: str) -> Value:
    """The one value that all parts have.

    Raises:
        MessageError: they differ, so the parts are not of one batch; or there are no parts.
    """
    if not values:
        raise MessageError(f"{message}.join needs at least one part")
    for value in values[1:]:
        if value != values[0]:
            raise MessageError(f"{message}.join: {field} is {values[0]!r} in one part and {value!r} in another")
    return values[0]

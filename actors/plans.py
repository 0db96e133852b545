"""What a call sends to one member: plain values, and which units of which objects make up each message argument.

Pure numpy and msgspec; both sides import it. The objects themselves travel as Ray references beside the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from rolecall.protocols import CallError, Divisible, Message, Outline

Array = np.ndarray


class Slices(msgspec.Struct, frozen=True, eq=False):
    """A message argument as references: object number and its units (None: all), then the order to lay them in."""

    objects: tuple[int, ...]  # numbers of the call's references
    units: tuple[Array | None, ...]
    order: Array | None = None  # permutation of the joined units, None when they are in order already
    many: bool = False  # messages that can't be joined: hand over the list, even of one

    def collect(self, messages: Sequence[Message]) -> Message | list[Message]:
        """The argument itself, from the call's decoded messages."""
        chosen = [messages[number] for number in self.objects]
        divisible = [message for message in chosen if isinstance(message, Divisible)]
        if len(divisible) < len(chosen):
            return chosen if self.many else chosen[0]
        taken = [message if units is None else message.take(units) for message, units in zip(divisible, self.units, strict=True)]
        joined = taken[0] if len(taken) == 1 else type(taken[0]).join(taken)
        return joined if self.order is None else joined.take(self.order)


@dataclass(frozen=True)
class Composed:
    """An argument that the member itself makes from other arguments, so that the controller never holds it."""

    make: Any  # (*arguments, **options) -> message
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class CallPlan:
    """One call to one member."""

    verb: str
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    step: int = 0

    def resolve(self, messages: Sequence[Message]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for the role's method."""

        def one(value: Any) -> Any:
            if isinstance(value, Slices):
                return value.collect(messages)
            if isinstance(value, Composed):
                return value.make(*map(one, value.arguments), **{name: one(option) for name, option in value.options.items()})
            return value

        return tuple(map(one, self.arguments)), {name: one(option) for name, option in self.options.items()}


@dataclass(frozen=True)
class Layout:
    """Where the units of a message in parts lie, in the order that the controller sees them: `[u] -> (part, unit)`."""

    part: Array  # [U] int
    unit: Array  # [U] int
    offsets: Array  # [parts + 1] units before each part

    @classmethod
    def of(cls, units_per_part: Sequence[int], assignment: Sequence[Array] | None = None) -> Layout:
        """The layout of parts with so many units each; `assignment[p]` says which seen units part p holds."""
        counts = np.asarray(units_per_part, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        part = np.repeat(np.arange(len(counts)), counts)
        unit = np.arange(offsets[-1]) - offsets[part]
        if assignment is None:
            return cls(part, unit, offsets)
        seen = np.concatenate([np.asarray(units, dtype=np.int64) for units in assignment])
        if len(seen) != len(part) or len(np.unique(seen)) != len(seen):
            raise CallError(f"{len(part)} units came back for {len(seen)} that were sent: a verb must answer each unit once.")
        back = np.argsort(seen, kind="stable")
        return cls(part[back], unit[back], offsets)

    def in_part_order(self) -> bool:
        """Whether joining the parts gives the seen units, all of them and in order."""
        return len(self.part) == self.offsets[-1] and bool((np.diff(self.offsets[self.part] + self.unit) == 1).all())

    def between(self, start: int, stop: int) -> Layout:
        """The layout of the seen units start .. stop-1 alone."""
        return Layout(self.part[start:stop], self.unit[start:stop], self.offsets)

    def slices(self, units: Array, number: Callable[[int], int]) -> Slices:
        """How to collect these seen units, in this order; `number(part)` is called for each part that is needed."""
        part, unit = self.part[units], self.unit[units]
        first = int(part[0]) if len(part) else 0
        if len(part) == self.offsets[first + 1] - self.offsets[first] and (part == first).all() and (unit[1:] > unit[:-1]).all():
            return Slices((number(first),), (None,))  # one whole part, as it lies: by far the commonest, and by far the quickest
        by_part = np.argsort(part, kind="stable")
        used = np.unique(part)
        chosen: list[Array | None] = []
        for one in used:
            here = unit[part == one]
            whole = len(here) == self.offsets[one + 1] - self.offsets[one] and bool((np.diff(here) == 1).all())
            chosen.append(None if whole else here)
        order = None if bool((np.diff(by_part) == 1).all()) else np.argsort(by_part, kind="stable")
        return Slices(tuple(number(int(one)) for one in used), tuple(chosen), order)


def merge_outlines(outlines: Sequence[Outline], layout: Layout) -> Outline:
    """The outline of all parts, in the order that the controller sees them."""
    joined = layout.offsets[layout.part] + layout.unit
    counts = np.concatenate([outline.counts for outline in outlines])
    lengths = np.concatenate([outline.lengths for outline in outlines])
    if not layout.in_part_order():
        starts = np.concatenate([[0], np.cumsum(counts)])[:-1][joined]
        chosen = counts[joined]
        within = np.arange(int(chosen.sum())) - np.repeat(np.cumsum(chosen) - chosen, chosen)
        lengths = lengths[np.repeat(starts, chosen) + within]
    return Outline(
        keys=np.concatenate([outline.keys for outline in outlines])[joined],
        sizes=np.concatenate([outline.sizes for outline in outlines])[joined],
        counts=counts[joined],
        lengths=lengths,
    )

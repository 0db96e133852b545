"""What all messages have in common, and what those can do that are cut into units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Self

import msgspec
import numpy as np
from rolecall.protocols.arrays import Spec

Array = np.ndarray


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, eq=False, forbid_unknown_fields=True):
    """Base of all messages; subclasses are known by their class name."""

    def faults(self) -> Iterator[tuple[str, str]]:
        """(field, what is wrong with it) for all that the Specs can't say; asked once the Specs are found to hold."""
        return iter(())


class Outline(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a controller may know of a divisible message without holding it. Small; travels in the receipt."""

    keys: Annotated[Array, Spec("int64", "P")]  # which unit (the stream index of its prompt)
    sizes: Annotated[Array, Spec("int64", "P")]  # tokens of each unit; what `split` balances
    counts: Annotated[Array, Spec("int32", "P")]  # samples of each unit
    lengths: Annotated[Array, Spec("int32", "N")]  # trainable (completion) tokens of each sample; 0 where there are none

    def __reduce__(self) -> tuple[Any, ...]:
        """As four byte strings: numpy's own way takes four times as long for arrays of this size, in every receipt."""
        return _outline, tuple((array.dtype.str, array.tobytes()) for array in (self.keys, self.sizes, self.counts, self.lengths))


def _outline(*parts: tuple[str, bytes]) -> Outline:
    keys, sizes, counts, lengths = (np.frombuffer(data, dtype) for dtype, data in parts)
    return Outline(keys=keys, sizes=sizes, counts=counts, lengths=lengths)


class Divisible(Message, frozen=True, kw_only=True, eq=False):
    """A message that `split` can cut between units and that parts can be joined to again."""

    def outline(self) -> Outline:
        """Keys, sizes, counts and lengths of the units."""
        raise NotImplementedError

    def take(self, chosen: Sequence[int] | Array) -> Self:
        """The message of these units alone, in the given order; neighbouring units are views, not copies.

        Raises:
            MessageError: a number is out of range.
        """
        raise NotImplementedError

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """One message of all parts, in order.

        Raises:
            MessageError: no parts, or parts that differ in what holds for a whole message (tokenizer, temperature, ...).
        """
        raise NotImplementedError

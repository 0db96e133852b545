"""Packed rows: the message that models are trained and measured on. Shape letters as in messages.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Self

import msgspec
import numpy as np
from rolecall.protocols import sense, units
from rolecall.protocols.arrays import Spec
from rolecall.protocols.base import Divisible, Outline
from rolecall.protocols.errors import MessageError

Array = np.ndarray
FLAT = ("targets", "weights", "samples", "old", "advantages", "reference")  # one value a trained token, besides `sources`
NatsK = Annotated[np.ndarray, Spec("float32", "K", "nats")]


class PackedBatch(Divisible, frozen=True, kw_only=True, eq=False):
    """To the policy: rows of fixed capacity, and the flat list of tokens to train. A unit is a row.

    A segment attends to itself (causally) and to its parent segment, if it has one: the completions of one prompt are
    segments whose parent is the prompt, so a prompt is computed once however many completions it has. Segments are
    numbered as they lie. Trained token k is `targets[k]`, predicted from the hidden state at slot `sources[k]`; the tokens
    of one sample stand together, those of a row before those of the next. What only reinforcement learning knows may be
    missing.
    """

    capacity: int  # C
    keys: Annotated[Array, Spec("int64", "R")]  # which row, unique within a stream
    costs: Annotated[Array, Spec("int64", "R")]  # what computing a row takes, in tokens; what `split` balances
    tokens: Annotated[Array, Spec("int32", "L")]
    positions: Annotated[Array, Spec("int32", "L")]  # position within prompt + completion; 0 in unused slots
    segments: Annotated[Array, Spec("int32", "L")]  # number of the segment, -1 in unused slots
    parents: Annotated[Array, Spec("int32", "S")]  # segment that this one continues, -1 for none
    sources: Annotated[Array, Spec("int64", "K")]
    targets: Annotated[Array, Spec("int32", "K")]
    weights: Annotated[Array, Spec("float32", "K", "finite")]  # of each token in the loss; to train, they sum to 1 over all members
    samples: Annotated[Array, Spec("int32", "K")]  # which sample, in the order of what was packed
    old: NatsK | None = None  # logprob when sampled
    advantages: Annotated[Array, Spec("float32", "K", "finite")] | None = None
    reference: NatsK | None = None  # logprob under the reference model
    temperature: float = 1.0
    tokenizer: str = ""  # identity hash, "" where it isn't known

    def faults(self) -> Iterator[tuple[str, str]]:
        """What the Specs can't say: whole rows, segments that tile, parents, sources and targets in range and order."""
        return sense.packed(self)

    def runs(self) -> tuple[Array, Array]:
        """The samples of the batch in order: the row that each lies in, int64[N], and its trained tokens, int64[N]."""
        rows = self.sources // self.capacity
        fresh = np.flatnonzero((np.diff(self.samples, prepend=-1) != 0) | (np.diff(rows, prepend=-1) != 0))
        return rows[fresh], np.diff(fresh, append=len(rows))

    def outline(self) -> Outline:
        """A row's size is its cost, its counts are the samples that are trained in it, their lengths the trained tokens."""
        rows, lengths = self.runs()
        counts = np.bincount(rows, minlength=len(self.keys)).astype(np.int32)
        return Outline(keys=self.keys, sizes=self.costs, counts=counts, lengths=lengths.astype(np.int32))

    def take(self, chosen: Sequence[int] | Array) -> Self:
        """These rows alone. Segments are numbered anew; samples keep their numbers."""
        pieces = [self._rows(*each) for each in units.ranges(chosen, len(self.keys), "PackedBatch")]
        return pieces[0] if len(pieces) == 1 else self._joined(pieces, [0] * len(pieces))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All rows of these parts, which must be of one capacity, temperature and tokenizer.

        Samples keep their numbers, as those of parts of one batch must; where two parts share a number, all are numbered on.
        """
        for name in ("capacity", "temperature", "tokenizer"):
            units.agreed([getattr(part, name) for part in parts], "PackedBatch", name)
        own = [part.samples[np.flatnonzero(np.diff(part.samples, prepend=-1))] for part in parts]
        apart = len(np.unique(units.joined(own))) == sum(map(len, own))
        counts = np.array([0 if apart else values.max(initial=-1) + 1 for values in own])
        return cls._joined(parts, units.offsets(counts)[:-1])

    def _rows(self, start: int, stop: int) -> Self:
        """Rows start .. stop-1: views, but for what counts from the first row."""
        slots = slice(start * self.capacity, stop * self.capacity)
        low, high = np.searchsorted(self.sources // self.capacity, [start, stop])
        used = self.segments[slots]
        used = used[used >= 0]
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        return msgspec.structs.replace(
            self,
            keys=self.keys[start:stop],
            costs=self.costs[start:stop],
            tokens=self.tokens[slots],
            positions=self.positions[slots],
            segments=_shifted(self.segments[slots], -first),
            parents=_shifted(self.parents[first:last], -first),
            sources=self.sources[low:high] - slots.start,
            **{name: None if (values := getattr(self, name)) is None else values[low:high] for name in FLAT},
        )

    @classmethod
    def _joined(cls, parts: Sequence[Self], shifts: Sequence[int] | Array) -> Self:
        """Parts end to end, the samples of each counted from its shift."""
        capacity = parts[0].capacity
        rows = units.offsets(np.array([len(part.keys) for part in parts]))
        segments = units.offsets(np.array([len(part.parents) for part in parts]))

        def flat(name: str) -> Array | None:
            values = [getattr(part, name) for part in parts if len(part.targets)] or [getattr(parts[0], name)]
            if any((one is None) != (values[0] is None) for one in values):
                raise MessageError(f"PackedBatch.join: some parts have {name!r} and some have not")
            return None if values[0] is None else units.joined(values)

        return msgspec.structs.replace(
            parts[0],
            tokens=units.joined([part.tokens for part in parts]),
            keys=units.joined([part.keys for part in parts]),
            costs=units.joined([part.costs for part in parts]),
            positions=units.joined([part.positions for part in parts]),
            segments=units.joined([_shifted(part.segments, shift) for part, shift in zip(parts, segments, strict=False)]),
            parents=units.joined([_shifted(part.parents, shift) for part, shift in zip(parts, segments, strict=False)]),
            sources=units.joined([part.sources + shift * capacity for part, shift in zip(parts, rows, strict=False)]),
            samples=units.joined([_shifted(part.samples, shift) for part, shift in zip(parts, shifts, strict=True)]),
            **{name: flat(name) for name in FLAT if name != "samples"},
        )


def _shifted(values: Array, by: int) -> Array:
    """`values` plus `by`, where they are not -1."""
    return np.where(values >= 0, values + np.int32(by), np.int32(-1)) if by else values

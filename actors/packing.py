"""`pack` and `weigh`: a training batch that the members put together themselves, from references and a few numbers a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from rolecall.actors.pending import Pending
from rolecall.actors.plans import Layout
from rolecall.protocols import DataError, Logprobs, Message, Outline, PackedBatch, Samples
from rolecall.roles.packing import pack_samples, token_mean
from rolecall.roles.packing import weigh as weigh_rows


class Mean(Protocol):
    """What a token counts in the loss, as those of kernels/aggregation.py: (lengths [N], kept=[N] bool) → [N] float32."""

    def __call__(self, lengths: np.ndarray, *, kept: np.ndarray | None = None) -> np.ndarray:
        """Weight of each token of each sample."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Assembly:
    """An argument that each member makes for itself, of its units; `split` divides it as the message it is made from."""

    base: Pending[Any]  # the message whose units are divided
    options: dict[str, Any] = field(default_factory=dict)  # keywords of `make`

    make: ClassVar[Callable[..., Message]]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """For `make`, all units."""
        return self.part(np.arange(len(self.outline.counts)))

    def part(self, units: np.ndarray) -> tuple[Any, ...]:
        """For `make`, these units alone."""
        raise NotImplementedError

    @property
    def outline(self) -> Outline:
        """Of the base."""
        return self.base.outline

    @property
    def layout(self) -> Layout:
        """Of the base."""
        return self.base.layout

    @property
    def origin(self) -> Pending[Any]:
        """Of the base."""
        return self.base.origin

    @property
    def settled(self) -> bool:
        """Of the base."""
        return self.base.settled

    def samples_of(self, units: np.ndarray) -> np.ndarray:
        """Numbers of the samples of these units."""
        counts = self.outline.counts
        starts = np.cumsum(counts) - counts
        return np.concatenate([np.arange(starts[unit], starts[unit] + counts[unit]) for unit in units] or [np.zeros(0, np.int64)])


@dataclass(frozen=True, eq=False, kw_only=True)
class Packing(Assembly):
    """Samples, advantages and reference logprobs, not yet packed; give it to `policy.split.accumulate`."""

    base: Pending[Samples]
    advantages: np.ndarray  # [N] float32, in the order of the samples
    weights: np.ndarray  # [N] float32, of each trained token of the sample
    reference: Pending[Logprobs] | None

    make = staticmethod(pack_samples)

    def part(self, units: np.ndarray) -> tuple[Any, ...]:
        """For `make`, the samples of these units alone."""
        chosen = self.samples_of(units)
        return self.base, self.advantages[chosen], self.weights[chosen], self.reference


@dataclass(frozen=True, eq=False, kw_only=True)
class Weighing(Assembly):
    """Rows with the weight of each sample's tokens, not yet multiplied; give it to `policy.split.accumulate`."""

    base: Pending[PackedBatch]
    weights: np.ndarray  # [N] float32, of each trained token of the sample

    make = staticmethod(weigh_rows)

    def part(self, units: np.ndarray) -> tuple[Any, ...]:
        """For `make`, these rows alone."""
        return self.base, self.weights[self.samples_of(units)]


def pack(
    samples: Pending[Samples],
    *,
    advantages: np.ndarray,
    reference: Pending[Logprobs] | None = None,
    keep: np.ndarray | None = None,
    mean: Mean = token_mean,
    row_tokens: int = 1024,
) -> Packing:
    """Say how samples are to be trained. Nothing is fetched: each member packs its share.

    Args:
        samples: from `rollout.split.generate`.
        advantages: [N] float32, one a sample, in the order of the samples.
        reference: from `reference.split.logprobs(samples)`, for a KL term in the loss.
        keep: [N] bool, samples to train on; all without it. Those left out count in no mean.
        mean: how the loss is averaged: a function of kernels/aggregation.py; over all trained tokens without it.
        row_tokens: capacity of a packed row.

    Raises:
        DataError: as many advantages as samples are needed.
    """
    lengths = samples.outline.lengths
    if len(advantages) != len(lengths):
        raise DataError("advantages don't match the samples.", ask=f"{len(advantages)} advantages", have=f"{len(lengths)} samples")
    weights = mean(lengths, kept=keep)
    return Packing(
        base=samples,
        advantages=np.asarray(advantages, np.float32),
        weights=weights,
        reference=reference,
        options={"capacity": row_tokens},
    )


def weigh(rows: Pending[PackedBatch], *, mean: Mean = token_mean, over: Sequence[Pending[PackedBatch]] = ()) -> Weighing:
    """Say what each trained token of packed rows counts in the loss: with the default the same, 1 / (tokens of the update).

    The weights come from the lengths in the outlines of *all* rows, before they are divided: so the gradient is that of one
    big batch, however many members share the rows, and however unequally. Nothing is fetched.

    Args:
        rows: from a data role.
        mean: how the loss is averaged: a function of kernels/aggregation.py; over all trained tokens without it.
        over: all batches of the update, where `accumulate` is called several times before it; `rows` alone without it.
    """
    batches = list(over) or [rows]
    lengths = [batch.outline.lengths for batch in batches]
    at = next((number for number, batch in enumerate(batches) if batch is rows), -1)
    if at < 0:
        raise DataError("The rows to weigh are not among the batches of the update.", remedy="give all of them as over=[…]")
    start = sum(map(len, lengths[:at]))
    return Weighing(base=rows, weights=mean(np.concatenate(lengths))[start : start + len(lengths[at])])

"""`pack`: a training batch that the members put together themselves, from references and a few numbers a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from rolecall.actors.pending import Pending
from rolecall.actors.plans import Layout
from rolecall.protocols import DataError, Logprobs, Outline, Samples
from rolecall.roles.packing import pack_samples, token_mean


class Mean(Protocol):
    """What a token counts in the loss, as those of kernels/aggregation.py: (lengths [N], kept=[N] bool) → [N] float32."""

    def __call__(self, lengths: np.ndarray, *, kept: np.ndarray | None = None) -> np.ndarray:
        """Weight of each token of each sample."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Samples, advantages and reference logprobs, not yet packed; give it to `policy.split.accumulate`."""

    samples: Pending[Samples]
    advantages: np.ndarray  # [N] float32, in the order of the samples
    weights: np.ndarray  # [N] float32, of each trained token of the sample
    reference: Pending[Logprobs] | None
    options: dict[str, Any]

    make = staticmethod(pack_samples)

    @property
    def outline(self) -> Outline:
        """Of the samples."""
        return self.samples.outline

    @property
    def layout(self) -> Layout:
        """Of the samples."""
        return self.samples.layout

    @property
    def origin(self) -> Pending[Any]:
        """Of the samples."""
        return self.samples.origin

    @property
    def arguments(self) -> tuple[Any, ...]:
        """For `make`, all samples."""
        return self.samples, self.advantages, self.weights, self.reference

    def part(self, units: np.ndarray) -> tuple[Any, ...]:
        """For `make`, the samples of these units alone."""
        counts = self.outline.counts
        starts = np.cumsum(counts) - counts
        chosen = np.concatenate([np.arange(starts[unit], starts[unit] + counts[unit]) for unit in units])
        return self.samples, self.advantages[chosen], self.weights[chosen], self.reference


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
    return Packing(samples, np.asarray(advantages, np.float32), weights, reference, {"capacity": row_tokens})

"""The forward pass over packed rows, shared by all roles that compute logprobs of given tokens.

R rows, C slots of a row, D hidden size, K trained tokens, L = R x C, S segments.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from rolecall.kernels.attention import Packed
from rolecall.kernels.logprobs import token_logprobs
from rolecall.protocols.messages import Logprobs, PackedBatch, Samples
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.packing import pack_samples, scatter, take_rows
from torch import Tensor


def passes(batch: PackedBatch, rows_per_pass: int) -> Iterator[PackedBatch]:
    """Cut a batch into what the model computes at a time: a few rows, as wide as the longest of them is filled.

    The dense mask of a pass has rows x width x width entries: that is what `rows_per_pass` bounds.
    """
    rows = len(batch.tokens) // batch.capacity
    for start in range(0, rows, rows_per_pass):
        part = take_rows(batch, start, min(rows, start + rows_per_pass))
        if len(part.targets):
            yield part


def packed_logprobs(model: CausalModel, part: PackedBatch) -> tuple[Tensor, Tensor]:
    """Logprob and entropy of each trained token of a pass.

    Returns:
        logprobs [K], entropy [K], at the batch's temperature, in nats, float32 (float64 for a float64 model).
    """
    model.check_length(int(part.positions.max()) + 1)
    model.check_tokens(int(part.tokens.min()), int(part.tokens.max()))
    width = part.capacity
    tokens, positions, segments = (
        on_device(values, model.device).view(-1, width) for values in (part.tokens, part.positions, part.segments)
    )
    where = Packed(segments, on_device(part.parents, model.device), positions)
    hidden = model.hidden(tokens.long(), positions.long(), where)
    picked = hidden.reshape(-1, hidden.shape[-1])[on_device(part.sources, model.device)]
    head = model.head if len(model.head) == model.spec.vocab else model.head[: model.spec.vocab]
    return token_logprobs(picked, head, on_device(part.targets, model.device), temperature=part.temperature)


@torch.no_grad()
def sample_logprobs(model: CausalModel, samples: Samples, *, row_tokens: int, rows_per_pass: int, version: int) -> Logprobs:
    """Logprobs of all completion tokens, in the order of the samples; without gradient.

    Args:
        row_tokens: capacity of the rows; longer where one sample alone needs more.
        version: of the model's weights.
    """
    longest = int(np.diff(samples.cu_seqlens).max(initial=1))
    batch = pack_samples(samples, capacity=max(row_tokens, longest))
    found = [packed_logprobs(model, part)[0].float().cpu().numpy() for part in passes(batch, rows_per_pass)]
    values = np.concatenate(found) if found else np.zeros(0, np.float32)
    return Logprobs(
        keys=samples.keys,
        counts=samples.counts,
        logprobs=scatter(batch, values, samples),
        cu_seqlens=samples.cu_seqlens,
        version=version,
    )


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device; arrays of messages may be read-only views of the object store."""
    return torch.tensor(values, device=device)

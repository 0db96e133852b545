"""The forward pass over packed rows, shared by all roles that compute logprobs of given tokens.

R rows, C slots of a row, D hidden size, K trained tokens, L = R x C, S segments.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from rolecall.kernels.attention import Packed
from rolecall.kernels.cross_entropy import linear_cross_entropy
from rolecall.kernels.logprobs import token_logprobs
from rolecall.protocols.messages import Logprobs, PackedBatch, Samples
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.packing import pack_samples, scatter, take_rows
from torch import Tensor

IGNORED = -100  # target of a slot that predicts nothing


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
    states = _states(model, part)[on_device(part.sources, model.device)]
    return token_logprobs(
        states,
        model.head,
        on_device(part.targets, model.device),
        temperature=part.temperature,
        vocab=model.spec.vocab,
        softcap=model.spec.logit_softcap,
        scale=model.spec.logit_scale,
    )


def packed_nll(model: CausalModel, part: PackedBatch) -> Tensor:
    """Sum of weight x negative logprob over the trained tokens of a pass, at temperature 1; a scalar as wide as `packed_logprobs`.

    Head and loss are one: gradients of the logits are made where the logits are, once.
    """
    states = _states(model, part)
    if (np.diff(part.sources) > 0).all():  # a slot predicts one token at most: states stay where they are
        targets, weights = np.full(len(states), IGNORED, np.int32), np.zeros(len(states), np.float32)
        targets[part.sources], weights[part.sources] = part.targets, part.weights
    else:
        states, targets, weights = states[on_device(part.sources, model.device)], part.targets, part.weights
    return linear_cross_entropy(
        states,
        model.head,
        on_device(targets, model.device),
        weights=on_device(weights, model.device),
        ignore=IGNORED,
        vocab=model.spec.vocab,
        softcap=model.spec.logit_softcap,
        scale=model.spec.logit_scale,
    )


def _states(model: CausalModel, part: PackedBatch) -> Tensor:
    """[L, D] hidden states of all slots of a pass."""
    model.check_length(int(part.positions.max()) + 1)
    for ids in (part.tokens, part.targets):  # a GPU that is asked for a row that is not there takes the process down
        model.check_tokens(int(ids.min(initial=0)), int(ids.max(initial=0)))
    shape = -1, part.capacity
    # Where segments lie is found out on the host: the device is not asked, so the host can run ahead of it.
    segments, parents, positions = (torch.tensor(values) for values in (part.segments, part.parents, part.positions))
    where = Packed(segments.view(shape), parents, positions.view(shape))
    tokens, places = (on_device(values, model.device).view(shape).long() for values in (part.tokens, part.positions))
    return model.hidden(tokens, places, where).flatten(0, 1)


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
    """A copy on the device; arrays of messages may be read-only views of the object store. A GPU is not waited for."""
    copy = torch.tensor(values)
    return copy.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else copy.to(device)

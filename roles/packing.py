"""From samples to the rows that a model computes, and back.

The completions of one prompt share it: the prompt is a segment, and each completion is a segment that continues it, so
that a prompt is computed once however many completions it has. The first token of a completion is predicted from the
prompt's last slot; nothing is predicted from the last token of a completion, so that one takes no slot.

N samples, P prompts, T tokens of all samples, K trained (completion) tokens, R rows, C capacity, S segments.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from rolecall.kernels.aggregation import token_mean
from rolecall.kernels.balancing import balance
from rolecall.kernels.packing import pack_rows
from rolecall.protocols.errors import DataError, MessageError
from rolecall.protocols.messages import Logprobs, PackedBatch, Samples

# two are from the kernels: the shell may not import those itself
__all__ = ["balance", "pack_samples", "scatter", "take_rows", "token_mean", "weigh"]

Int64 = npt.NDArray[np.int64]
ROUND, WIDTHS = 16, 64  # `take_rows` cuts rows to a multiple of 16 slots, and to so many widths at most: each may be compiled apart


class _Segments(NamedTuple):
    """The segments of a batch, all [S] int64, ordered by where they lie."""

    source: Int64  # offset of the first token in Samples.tokens
    length: Int64
    slot: Int64  # where the segment starts, counted through all rows
    position: Int64  # of the first token within prompt + completion
    parent: Int64


def pack_samples(
    samples: Samples,
    advantages: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | None = None,
    reference: Logprobs | None = None,
    *,
    capacity: int,
) -> PackedBatch:
    """Pack completions with their shared prompts into rows of `capacity` slots.

    Trained tokens (K) are ordered by row, those of one sample together. A prompt is copied into as many rows as it needs. There are
    no rows where no sample is left.

    Args:
        samples: what was sampled.
        advantages: [N] float, of each sample; None means 0.
        weights: [N] float, what *each token* of a sample counts in the loss (kernels/aggregation.py); None means 1. Samples
            of weight 0 are left out, as are those without a completion.
        reference: logprobs of the same samples under the reference model.
        capacity: slots of a row; a prompt and any one of its completions need at most that.

    Raises:
        DataError: a sample is too long for a row; advantages or weights are not N finite numbers.
        MessageError: samples of a prompt differ in it or have none; `reference` answers other samples.
    """
    advantage = _per_sample("advantages", advantages, 0.0, len(samples.prompt_lengths))
    weight = _per_sample("weights", weights, 1.0, len(samples.prompt_lengths))
    _check_reference(samples, reference)
    starts, prompts = samples.cu_seqlens[:-1], samples.prompt_lengths.astype(np.int64)
    trained = np.diff(samples.cu_seqlens) - prompts
    kept = np.flatnonzero((weight != 0) & (trained > 0))
    group = np.repeat(np.arange(len(samples.counts)), samples.counts)
    _check_prompts(samples, group, prompts)
    _check_lengths(prompts, trained, kept, capacity)
    segments, order, first_source, own_slot = _lay_out(kept, group, starts, prompts, trained, capacity)
    lengths, within = trained[order], _ranges(trained[order])  # of each completion; of each token within it
    sample = np.repeat(order, lengths)
    token = (starts + prompts)[sample] + within
    which, inside = np.repeat(np.arange(len(segments.length)), segments.length), _ranges(segments.length)
    slots = segments.slot[which] + inside
    costs = np.bincount(slots // capacity)
    filled = len(costs) * capacity
    sources = np.where(within == 0, np.repeat(first_source, lengths), np.repeat(own_slot, lengths) + within - 1)
    return PackedBatch(
        capacity=capacity,
        keys=np.arange(len(costs)),
        costs=costs,
        tokens=_placed(filled, slots, samples.tokens[segments.source[which] + inside], 0),
        positions=_placed(filled, slots, segments.position[which] + inside, 0),
        segments=_placed(filled, slots, which, -1),
        parents=segments.parent.astype(np.int32),
        sources=sources,
        targets=samples.tokens[token].astype(np.int32),
        weights=weight[sample],
        samples=sample.astype(np.int32),
        old=samples.logprobs[token].astype(np.float32),
        advantages=advantage[sample],
        reference=None if reference is None else reference.logprobs[token].astype(np.float32),
        temperature=samples.temperature,
    )


def scatter(packed: PackedBatch, values: npt.ArrayLike, samples: Samples) -> npt.NDArray[np.float32]:
    """Values of the trained tokens of `packed`, laid out as the samples it was packed from.

    Args:
        packed: what `pack_samples(samples, ...)` made.
        values: [K] float, one for each trained token.
        samples: those samples.

    Returns:
        [T] float32; 0 at prompt tokens and in samples that were left out.
    """
    flat = np.zeros(len(samples.tokens), dtype=np.float32)
    sample = packed.samples.astype(np.int64)
    fresh = np.flatnonzero(np.diff(sample, prepend=-1))  # where the tokens of a sample begin
    runs = np.diff(np.append(fresh, len(sample)))
    flat[samples.cu_seqlens[sample] + samples.prompt_lengths[sample] + _ranges(runs)] = np.asarray(values, dtype=np.float32)
    return flat


def take_rows(packed: PackedBatch, start: int, stop: int) -> PackedBatch:
    """Rows start .. stop-1 as a batch of its own, cut to about the slots in use: what one pass computes.

    Its rows and segments are numbered from 0; trained tokens keep their order and their sample numbers.
    """
    part = packed.take(range(start, stop))
    capacity = part.capacity
    used = np.flatnonzero((part.segments.reshape(-1, capacity) >= 0).any(axis=0))
    step = max(ROUND, capacity // WIDTHS)
    width = min(capacity, -(-(int(used[-1]) + 1) // step) * step) if len(used) else capacity
    if width == capacity:
        return part
    row, slot = np.divmod(part.sources, capacity)
    narrow = {name: getattr(part, name).reshape(-1, capacity)[:, :width].ravel() for name in ("tokens", "positions", "segments")}
    return msgspec.structs.replace(part, capacity=width, sources=row * width + slot, **narrow)


def weigh(packed: PackedBatch, weights: npt.ArrayLike) -> PackedBatch:
    """The batch with each trained token's weight multiplied by that of its sample.

    Args:
        packed: rows whose weights are relative: 1 a token where all count the same.
        weights: [N] float, for the samples as they lie in the batch (the order of its outline's `lengths`).

    Raises:
        DataError: they are not N finite numbers.
    """
    _, lengths = packed.runs()
    each = _per_sample("weights", weights, 1.0, len(lengths))
    return msgspec.structs.replace(packed, weights=packed.weights * np.repeat(each, lengths))


def _check_reference(samples: Samples, reference: Logprobs | None) -> None:
    if reference is not None and not np.array_equal(reference.cu_seqlens, samples.cu_seqlens):
        raise MessageError(
            f"Logprobs.cu_seqlens differs from Samples.cu_seqlens: the reference answers other samples "
            f"({len(reference.logprobs)} tokens, not {len(samples.tokens)}). Compute its logprobs from the samples that are packed."
        )


def _lay_out(
    kept: Int64, group: Int64, starts: Int64, prompts: Int64, trained: Int64, capacity: int
) -> tuple[_Segments, Int64, Int64, Int64]:
    """Segments of all rows; the kept samples in their order there; the slot that each one's first token is predicted
    from, and the slot where its own segment starts."""
    needs = trained - 1
    pieces = _pieces(kept, group, prompts, needs, capacity)
    sizes = [int(prompts[piece[0]] + needs[piece].sum()) for piece in pieces]
    table: list[tuple[int, int, int, int, int]] = []  # rows of _Segments
    order: list[int] = []
    first_source: list[int] = []
    own_slot: list[int] = []
    for row, chosen in enumerate(pack_rows(sizes, capacity)):
        slot = row * capacity
        for number in sorted(chosen):
            piece = pieces[number].tolist()
            prompt = int(prompts[piece[0]])
            parent = len(table)
            table.append((int(starts[piece[0]]), prompt, slot, 0, -1))
            slot += prompt
            last = slot - 1
            for sample in piece:
                order.append(sample)
                first_source.append(last)
                own_slot.append(slot)
                if needs[sample]:
                    table.append((int(starts[sample]) + prompt, int(needs[sample]), slot, prompt, parent))
                    slot += int(needs[sample])
    columns = np.asarray(table, dtype=np.int64).reshape(-1, 5).T
    return _Segments(*columns), np.asarray(order, np.int64), np.asarray(first_source, np.int64), np.asarray(own_slot, np.int64)


def _pieces(kept: Int64, group: Int64, prompts: Int64, needs: Int64, capacity: int) -> list[Int64]:
    """Kept samples of each prompt, in parts that fit a row together with their prompt."""
    pieces: list[Int64] = []
    for members in np.split(kept, np.flatnonzero(np.diff(group[kept])) + 1) if len(kept) else []:
        room = capacity - int(prompts[members[0]])
        if int(needs[members].sum()) <= room:
            pieces.append(members)
        else:
            pieces.extend(members[sorted(row)] for row in pack_rows(needs[members], room))
    return pieces


def _per_sample(name: str, given: npt.ArrayLike | None, default: float, number: int) -> npt.NDArray[np.float32]:
    values = np.full(number, default, np.float32) if given is None else np.asarray(given, dtype=np.float32)
    if values.shape != (number,) or not np.isfinite(values).all():
        raise DataError(
            f"The {name} of a batch are one finite number a sample.",
            ask=f"{name} of shape {values.shape}, {int((~np.isfinite(values)).sum())} of them not finite",
            have=f"{number} samples",
            remedy=f"give {name} [N] for all samples, with 0 for those without a score",
        )
    return values


def _check_prompts(samples: Samples, group: Int64, prompts: Int64) -> None:
    """Samples of one prompt must begin with the same, non-empty prompt: its slots are shared."""
    fresh = np.diff(group, prepend=-1) > 0
    leader = np.flatnonzero(fresh)[np.cumsum(fresh) - 1]  # first sample of the same prompt
    starts = samples.cu_seqlens[:-1]
    wrong = (prompts != prompts[leader]) | (prompts < 1)
    if not wrong.any():
        offsets = _ranges(prompts)
        own, shared = (samples.tokens[np.repeat(begin, prompts) + offsets] for begin in (starts, starts[leader]))
        wrong[np.repeat(np.arange(len(prompts)), prompts)[own != shared]] = True
    if wrong.any():
        sample = int(np.flatnonzero(wrong)[0])
        raise MessageError(
            f"Samples.tokens: sample {sample} is said to continue prompt {int(group[sample])}, but begins with other tokens than "
            "its siblings, or with none. Samples of one prompt must share one prompt of at least one token."
        )


def _check_lengths(prompts: Int64, trained: Int64, kept: Int64, capacity: int) -> None:
    size = prompts[kept] + trained[kept] - 1
    if not len(kept) or int(size.max()) <= capacity:
        return
    sample = int(kept[size.argmax()])
    raise DataError(
        f"{int((size > capacity).sum())} samples are too long for a row.",
        ask=f"sample {sample}: a prompt of {int(prompts[sample])} tokens and a completion of {int(trained[sample])}",
        have=f"rows of {capacity} slots",
        remedy=f"set row_tokens={int(size.max())} or more, or use shorter prompts or fewer max_tokens",
    )


def _ranges(lengths: Int64) -> Int64:
    """0 .. length-1 for each length, end to end."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def _placed(size: int, slots: Int64, values: npt.NDArray[np.integer], empty: int) -> npt.NDArray[np.int32]:
    """[size] int32 with `values` at `slots` and `empty` elsewhere."""
    flat = np.full(size, empty, dtype=np.int32)
    flat[slots] = values
    return flat

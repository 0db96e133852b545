"""From encoded records to packed rows, a block of records at a time.

A block is packed by itself, so what its rows are depends on its records alone: not on who packs it, nor on how many do. A
sequence of n tokens takes at most n - 1 slots, since nothing is predicted from its last token; what stands after its last trained
token takes none. The two answers of a preference share their beginning, as a segment that both continue, in one row.

K trained tokens, C capacity, N samples (sequences: one a record, two a preference), S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from rolecall.kernels.packing import pack_rows
from rolecall.protocols.errors import DataError
from rolecall.protocols.messages import PackedBatch
from rolecall.roles.data.encode import Encoded, Pair
from rolecall.roles.data.report import Report

TooLong = Literal["refuse", "cut", "split", "drop"]
TOO_LONG: tuple[TooLong, ...] = ("refuse", "cut", "split", "drop")
ROWS = 1 << 32  # keys of a block's rows begin at block x ROWS

Int64 = npt.NDArray[np.int64]


class _Span(NamedTuple):
    """A run of tokens, whose first `inputs` take a slot each."""

    tokens: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    inputs: int
    begin: int  # position of the first token
    follows: bool  # whether it goes on from the prompt of its document; then its first token can be trained
    sample: int  # -1 for a prompt, of which nothing is trained


class _Document(NamedTuple):
    """What must lie in one row together."""

    spans: tuple[_Span, ...]
    slots: int


def pack_block(
    encoded: Sequence[Encoded | Pair],
    *,
    capacity: int,
    block: int = 0,
    longest: int = 0,
    too_long: TooLong = "cut",
    square: float = 0.0,
    report: Report | None = None,
    tokenizer: str = "",
) -> PackedBatch:
    """Pack the records of a block into as few rows as best-fit decreasing finds.

    Rows are ordered by their earliest record, so that long records don't all come first. Samples are numbered in the order of
    the records: those of preference p are 2 p (chosen) and 2 p + 1 (rejected). Every trained token has weight 1.

    Args:
        encoded: the records; all of them preferences, or none.
        capacity: slots of a row.
        block: number of the block: the keys of its rows are block x ROWS + 0, 1, 2, …
        longest: slots that a record may take, where that is less than a row (the model's context); 0 for a row.
        too_long: what to do with a record that needs more slots: "cut" its end off, "split" it into rows of its own (the
            pieces don't see each other), "drop" it, or "refuse" the data. Preferences can't be split.
        square: cost of a row is its tokens + square x (sum of its sequences' lengths squared); see `attention_share`.
        report: where it is counted what became of each record.
        tokenizer: identity hash that the batch carries.

    Raises:
        DataError: a record is too long, and is to be refused.
    """
    report = Report() if report is None else report
    limit = min(capacity, longest or capacity)
    fitted = [_fit(each, limit, too_long, report) for each in encoded]
    documents: list[_Document] = []
    sample = 0
    for pieces in fitted:
        for piece in pieces:
            documents.append(_document(piece, sample))
            sample += 2 if isinstance(piece, Pair) else 1
    rows = [sorted(row) for row in pack_rows([document.slots for document in documents], capacity)]
    return _laid_out(documents, sorted(rows), capacity, block, square, tokenizer)


def attention_share(width: int, layers: int, parameters: int) -> float:
    """The `square` of `pack_block` for a model: what attention to one earlier token costs, in tokens of everything else.

    A token's matrices take 2 x parameters FLOPs forward; attending takes 4 x width FLOPs a layer for each token that is seen,
    and a token of a sequence of s sees s / 2 of them on average.

    Args:
        width: heads x size of a head.
        layers: how many.
        parameters: those of matrices that every token goes through, the head's included.
    """
    return width * layers / parameters


def _fit(each: Encoded | Pair, capacity: int, too_long: TooLong, report: Report) -> list[Encoded | Pair]:
    """The record as one or more that fit a row, counted in the report."""
    one = each.chosen if isinstance(each, Pair) else each
    if _slots(each) == 0:
        report.add("dropped", "no trained token", place=one.place)
        return []
    if _slots(each) <= capacity:
        report.add("used", place=one.place)
        return [each]
    if too_long == "refuse" or (too_long == "split" and isinstance(each, Pair)):
        raise DataError(
            f"{one.place or 'a record'} is too long for a row.",
            ask=f"{_slots(each)} slots",
            have=f"room for {capacity} (a row, or the model's context)",
            remedy='raise row_tokens, or set too_long="cut" or "drop"' + ("" if isinstance(each, Pair) else ' or "split"'),
        )
    pieces: list[Encoded | Pair] = []
    if too_long == "cut":
        short = _cut_pair(each, capacity) if isinstance(each, Pair) else _part(each, 0, capacity + 1)
        pieces = [short] if 0 < _slots(short) <= capacity else []
    elif too_long == "split" and isinstance(each, Encoded):
        starts = range(0, _slots(each), capacity)  # pieces share a token: the last of one is what the next begins with
        pieces = [piece for piece in (_part(each, start, start + capacity + 1) for start in starts) if _slots(piece)]
    done: Literal["dropped", "cut", "split"] = "dropped" if not pieces or too_long == "drop" else "cut" if too_long == "cut" else "split"
    report.add(done, "too long", place=one.place)
    if done != "dropped":
        report.add("used", place=one.place)
    return pieces


def _slots(each: Encoded | Pair) -> int:
    """Slots that a record takes; 0 where nothing can be trained (of a preference: on either side)."""
    if isinstance(each, Encoded):
        return _last(each.trained)
    ends = _last(each.chosen.trained), _last(each.rejected.trained)
    return sum(ends) - each.shared if min(ends) > 0 else 0


def _last(trained: npt.NDArray[np.bool_]) -> int:
    """Place of the last trained token that something comes before; 0 where there is none."""
    reverse = trained[:0:-1]
    last = int(reverse.argmax()) if len(reverse) else 0
    return len(reverse) - last if len(reverse) and reverse[last] else 0


def _part(each: Encoded, start: int, stop: int) -> Encoded:
    return replace(each, tokens=each.tokens[start:stop], trained=each.trained[start:stop])


def _cut_pair(pair: Pair, capacity: int) -> Pair:
    """Both answers cut so that together they fit; one that needs less than half of the room stays whole."""
    room = capacity - pair.shared
    ends = [_last(side.trained) - pair.shared for side in (pair.chosen, pair.rejected)]
    keep = [min(own, max(room // 2, room - other)) for own, other in zip(ends, reversed(ends), strict=True)]
    sides = [_part(side, 0, pair.shared + max(0, end) + 1) for side, end in zip((pair.chosen, pair.rejected), keep, strict=True)]
    return replace(pair, chosen=sides[0], rejected=sides[1])


def _document(each: Encoded | Pair, sample: int) -> _Document:
    if isinstance(each, Encoded):
        return _Document((_span(each, 0, sample, follows=False),), _slots(each))
    shared, follows = each.shared, each.shared > 0
    spans = [_span(each.chosen, shared, sample, follows=follows), _span(each.rejected, shared, sample + 1, follows=follows)]
    if follows:
        spans.insert(0, _Span(each.chosen.tokens[:shared], each.chosen.trained[:shared], shared, 0, False, -1))
    return _Document(tuple(spans), _slots(each))


def _span(each: Encoded, begin: int, sample: int, *, follows: bool) -> _Span:
    last = _last(each.trained)
    return _Span(each.tokens[begin : last + 1], each.trained[begin : last + 1], last - begin, begin, follows, sample)


def _laid_out(
    documents: Sequence[_Document], rows: Sequence[Sequence[int]], capacity: int, block: int, square: float, tokenizer: str
) -> PackedBatch:
    """The batch, from which documents lie in which row."""
    spans = [span for chosen in rows for number in chosen for span in documents[number].spans]
    table, costs, filled = _table(documents, rows, capacity, square)
    slots, firsts, numbers, parents = table
    inputs, begins, samples = (np.array([span[at] for span in spans], np.int64) for at in (2, 3, 5))
    tokens, trained = _joined([span.tokens for span in spans], np.int32), _joined([span.trained for span in spans], np.bool_)
    lengths = np.array([len(span.tokens) for span in spans], np.int64)
    starts = np.cumsum(lengths) - lengths
    trained[[start for start, span in zip(starts.tolist(), spans, strict=True) if not span.follows and len(span.tokens)]] = False
    targets = np.flatnonzero(trained)
    which = np.repeat(np.arange(len(spans)), lengths)[targets]
    within = targets - starts[which]
    before = np.cumsum(inputs) - inputs
    flat = (  # of all slots that are filled
        _joined([span.tokens[: span.inputs] for span in spans], np.int32),
        np.arange(int(inputs.sum()), dtype=np.int32) + np.repeat((begins - before).astype(np.int32), inputs),
        np.repeat(numbers.astype(np.int32), inputs),
    )
    laid = [_in_rows(values, filled, capacity, empty) for values, empty in zip(flat, (0, 0, -1), strict=True)]
    return PackedBatch(
        capacity=capacity,
        keys=block * ROWS + np.arange(len(rows)),
        costs=np.rint(costs).astype(np.int64),
        tokens=laid[0],
        positions=laid[1],
        segments=laid[2],
        parents=parents[numbers >= 0].astype(np.int32),
        sources=np.where(within > 0, slots[which] + within - 1, firsts[which]),
        targets=tokens[targets].astype(np.int32, copy=False),
        weights=np.ones(len(targets), np.float32),
        samples=samples[which].astype(np.int32),
        tokenizer=tokenizer,
    )


def _table(
    documents: Sequence[_Document], rows: Sequence[Sequence[int]], capacity: int, square: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], list[int]]:
    """Of each span: its slot, the slot its first token is predicted from, its segment, its parent, [4, spans]; of each row: cost and
    how many slots are filled."""
    table: list[tuple[int, int, int, int]] = []
    costs, filled = np.zeros(len(rows)), []
    segment = 0
    for row, chosen in enumerate(rows):
        slot = row * capacity
        for number in chosen:
            prompt, parent = -1, -1
            for span in documents[number].spans:
                table.append((slot, prompt if span.follows else slot - 1, segment if span.inputs else -1, parent if span.follows else -1))
                if span.sample < 0:
                    prompt, parent = slot + span.inputs - 1, segment
                slot += span.inputs
                segment += span.inputs > 0
                costs[row] += span.inputs + square * ((span.begin + span.inputs) ** 2 - span.begin**2)
        filled.append(slot - row * capacity)
    return np.asarray(table, np.int64).reshape(-1, 4).T, costs, filled


def _joined(parts: list[npt.NDArray[Any]], kind: Any) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, kind)


def _in_rows(values: npt.NDArray[np.int32], filled: Sequence[int], capacity: int, empty: int) -> npt.NDArray[np.int32]:
    """Values laid end to end as the beginnings of rows, each filled so far; `empty` behind them."""
    laid = np.full(len(filled) * capacity, empty, np.int32)
    begin = 0
    for row, size in enumerate(filled):
        laid[row * capacity : row * capacity + size] = values[begin : begin + size]
        begin += size
    return laid

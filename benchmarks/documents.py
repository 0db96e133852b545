"""Random documents of lognormal length, laid into rows, and the forms in which each contender of the training benchmarks takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from rolecall.kernels.packing import OpenRows
from rolecall.protocols.messages import PackedBatch

SHORTEST = 2  # a document has something to predict


@dataclass(frozen=True)
class Law:
    """Lengths exp(normal(mean, sigma)), `cap` at most. Sigma 0 with `cap` as mean: every document has `cap` tokens."""

    mean: float
    sigma: float
    cap: int

    def draw(self, random: np.random.Generator, number: int) -> np.ndarray:
        """[number] int64."""
        return np.clip(random.lognormal(self.mean, self.sigma, number), SHORTEST, self.cap).astype(np.int64)

    def __str__(self) -> str:
        return f"lognormal({self.mean:g}, {self.sigma:g}) capped at {self.cap}" if self.sigma else f"{self.cap} each"


def whole(size: int) -> Law:
    """Every document fills a row."""
    return Law(float(np.log(size)) + 1.0, 0.0, size)


@dataclass(frozen=True, eq=False)
class Rows:
    """Documents in rows of fixed capacity.

    Attributes:
        documents: for each row its documents, [n] int32 tokens each.
        capacity: slots of a row.
    """

    documents: list[list[np.ndarray]]
    capacity: int

    @property
    def lengths(self) -> np.ndarray:
        """Of all documents, int64."""
        return np.array([len(each) for row in self.documents for each in row], dtype=np.int64)

    @property
    def shuffled(self) -> list[np.ndarray]:
        """The documents in an order of their own, as a stream brings them."""
        flat = [each for row in self.documents for each in row]
        return [flat[number] for number in np.random.default_rng(0).permutation(len(flat)).tolist()]

    @property
    def tokens(self) -> int:
        """In documents: what throughput counts. Unused slots are not among them."""
        return int(self.lengths.sum())

    @property
    def trained(self) -> int:
        """Tokens with something to predict them from: all but the first of each document."""
        return self.tokens - len(self.lengths)

    def packed(self) -> PackedBatch:
        """What the data role hands to the policy: a segment a document, every token but its first one trained with weight 1 / K."""
        rows, capacity = len(self.documents), self.capacity
        tokens, positions = np.zeros((2, rows * capacity), np.int32)
        segments = np.full(rows * capacity, -1, np.int32)
        sources, targets, samples, number = [], [], [], 0
        for row, documents in enumerate(self.documents):
            slot = row * capacity
            for each in documents:
                stop = slot + len(each)
                tokens[slot:stop], positions[slot:stop], segments[slot:stop] = each, np.arange(len(each)), number
                sources.append(np.arange(slot, stop - 1))
                targets.append(each[1:])
                samples.append(np.full(len(each) - 1, number, np.int32))
                slot, number = stop, number + 1
        return PackedBatch(
            capacity=capacity,
            keys=np.arange(rows, dtype=np.int64),
            costs=np.array([sum(map(len, documents)) for documents in self.documents], dtype=np.int64),
            tokens=tokens,
            positions=positions,
            segments=segments,
            parents=np.full(number, -1, np.int32),
            sources=np.concatenate(sources).astype(np.int64),
            targets=np.concatenate(targets).astype(np.int32),
            weights=np.full(self.trained, 1 / self.trained, np.float32),
            samples=np.concatenate(samples),
        )

    def flattened(self, rows: int) -> list[dict[str, Any]]:
        """What transformers' flattening collator makes of `rows` rows at a time: padding-free, tensors on the CPU."""
        from transformers import DataCollatorWithFlattening

        collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        parts = [self.documents[start : start + rows] for start in range(0, len(self.documents), rows)]
        return [collate([{"input_ids": each} for row in part for each in row]) for part in parts]

    def padded(self, documents: int) -> list[dict[str, Any]]:
        """The documents as they come, so many at a time, each batch padded on the right to its longest one, as trainers do by default."""
        import torch

        flat, made = self.shuffled, []
        for start in range(0, len(flat), documents):
            part = flat[start : start + documents]
            ids = np.zeros((len(part), max(map(len, part))), np.int64)
            mask = np.zeros_like(ids)
            for row, each in enumerate(part):
                ids[row, : len(each)], mask[row, : len(each)] = each, 1
            made.append(
                {
                    "input_ids": torch.from_numpy(ids),
                    "attention_mask": torch.from_numpy(mask),
                    "labels": torch.from_numpy(np.where(mask == 1, ids, -100)),
                }
            )
        return made


def rows_of(law: Law, rows: int, capacity: int, vocab: int, seed: int) -> Rows:
    """Random documents of a law in the rows that on-line best fit closes one after the other, once as many as it keeps open are filled.

    So rows have long and short documents as the stream has them; of rows packed off-line, the last ones have all that are short.
    """
    random = np.random.default_rng(seed)
    packer, closed, lengths = OpenRows(capacity), list[list[int]](), list[int]()
    while len(closed) < rows + packer.open_rows:
        for length in law.draw(random, 1000).tolist():
            closed += packer.add(length, len(lengths))
            lengths.append(length)
    kept = closed[packer.open_rows : packer.open_rows + rows]
    return Rows([[random.integers(4, vocab, lengths[each], dtype=np.int32) for each in row] for row in kept], capacity)

"""Roles that the tests of the shell play: each shows one behaviour of a member, good or bad."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from rolecall.protocols import DataError, Metrics, PackedBatch, Prompts, Samples, Scores
from rolecall.roles.base import Member, Role


def prompts_of(lengths: list[int], first: int = 0) -> Prompts:
    """Prompts of these lengths; token values tell which prompt they are of."""
    keys = np.arange(first, first + len(lengths), dtype=np.int64)
    return Prompts(
        keys=keys,
        ids=tuple(f"p{key}" for key in keys),
        tokens=np.repeat(keys, lengths).astype(np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        texts=tuple(f"prompt {key}" for key in keys),
    )


class Echo(Role):
    """Answers every prompt with completions that repeat its key."""

    def generate(self, prompts: Prompts, *, per_prompt: int = 1, length: int = 3) -> Samples:
        lengths = np.diff(prompts.cu_seqlens)
        counts = np.full(len(prompts.keys), per_prompt, np.int32)
        each = np.repeat(lengths + length, per_prompt)
        self.meter.add("tokens", float(len(prompts.keys) * per_prompt * length))
        return Samples(
            keys=prompts.keys,
            ids=prompts.ids,
            texts=prompts.texts,
            counts=counts,
            tokens=np.repeat(np.repeat(prompts.keys, per_prompt), each).astype(np.int32),
            logprobs=np.zeros(int(each.sum()), np.float32),
            cu_seqlens=np.concatenate([[0], np.cumsum(each)]).astype(np.int64),
            prompt_lengths=np.repeat(lengths, per_prompt).astype(np.int32),
            siblings=np.tile(np.arange(per_prompt, dtype=np.int32), len(counts)),
            finish=np.zeros(len(each), np.uint8),
            completions=tuple(f"{key}.{sibling}" for key in prompts.keys for sibling in range(per_prompt)),
            span_starts=np.zeros(1, np.int64),
            span_versions=np.full(1, self.version, np.int64),
        )

    def score(self, samples: Samples) -> Scores:
        values = np.array([float(text) for text in samples.completions], np.float32)
        return Scores(keys=samples.keys, counts=samples.counts, values=values, status=np.zeros(len(values), np.uint8))

    def accumulate(self, batch: PackedBatch) -> Metrics:
        return Metrics(sums={"weight": (float(batch.weights.sum()), 1.0), "trained": (float(len(batch.targets)), 1.0)})

    def whoami(self) -> tuple[int, int]:
        return self.member.rank, os.getpid()

    def seen(self, prompts: Prompts) -> int:
        return len(prompts.tokens)


class Faulty(Role):
    """Fails in the ways that members fail."""

    def __init__(self, bad_setup: bool = False) -> None:
        self.bad_setup = bad_setup

    def setup(self, member: Member) -> None:
        super().setup(member)
        if self.bad_setup:
            raise DataError("there is nothing to read.", remedy="give it a file")

    def late(self, prompts: Prompts, other: Prompts | None = None) -> Prompts:
        """What it was given, after a while."""
        time.sleep(0.3)
        return prompts

    def lose(self, prompts: Prompts) -> Prompts:
        """One unit fewer than it was given."""
        return prompts.take(range(len(prompts.keys) - 1))

    def explode(self, text: str) -> None:
        raise KeyError(text)

    def refuse(self) -> None:
        raise DataError("this prompt is too long.", ask="9 tokens", have="room for 8", remedy="shorten it")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def die(self) -> None:
        os.abort()

    def meet(self, mine: str, other: str) -> bool:
        """Comes back once the other's file is there, so two of these end only if they run at the same time."""
        Path(mine).touch()
        for _ in range(600):
            if Path(other).exists():
                return True
            time.sleep(0.05)
        return False

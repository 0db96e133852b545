"""Samples for tests of rewards: what a rollout would hand over."""

from __future__ import annotations

import numpy as np
from rolecall.protocols import Samples

PROMPT = 3  # tokens of each prompt


def samples_of(completions: list[str], per_prompt: int = 1, **columns: tuple) -> Samples:
    """Samples whose tokens are the completion's characters."""
    prompts = len(completions) // per_prompt
    lengths = np.array([PROMPT + len(text) for text in completions])
    return Samples(
        keys=np.arange(prompts, dtype=np.int64),
        ids=tuple(f"p{number}" for number in range(prompts)),
        texts=tuple(f"question {number}" for number in range(prompts)),
        columns=columns,
        counts=np.full(prompts, per_prompt, np.int32),
        tokens=np.concatenate([[0] * PROMPT + [ord(letter) for letter in text] for text in completions]).astype(np.int32),
        logprobs=np.zeros(int(lengths.sum()), np.float32),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=np.full(len(completions), PROMPT, np.int32),
        siblings=np.tile(np.arange(per_prompt, dtype=np.int32), prompts),
        finish=np.zeros(len(completions), np.uint8),
        completions=tuple(completions),
        span_starts=np.zeros(1, np.int64),
        span_versions=np.zeros(1, np.int64),
    )

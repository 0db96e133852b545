"""A small batch that the tests of this folder bend and break."""

from __future__ import annotations

import numpy as np
import pytest
from rolecall.protocols import Samples


@pytest.fixture
def batch() -> Samples:
    """Two prompts with one and two samples of two tokens each."""
    return Samples(
        keys=np.array([10, 11]),
        ids=("a", "b"),
        texts=("one?", "two?"),
        columns={"answer": (1, "two")},
        counts=np.array([1, 2], np.int32),
        tokens=np.array([5, 6, 7, 8, 7, 9], np.int32),
        logprobs=np.array([0, -0.5, 0, -0.25, 0, -0.125], np.float32),
        cu_seqlens=np.array([0, 2, 4, 6]),
        prompt_lengths=np.array([1, 1, 1], np.int32),
        siblings=np.array([0, 0, 1], np.int32),
        finish=np.array([0, 1, 2], np.uint8),
        completions=("x", "y", "z"),
        span_starts=np.array([0, 3]),
        span_versions=np.array([1, 2]),
        temperature=0.75,
    )

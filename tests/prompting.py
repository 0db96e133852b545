"""Prompts made of texts or token ids, for tests of roles that read them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rolecall.protocols.messages import Prompts


def prompts_of(rows: Sequence[Sequence[int]], *, ids: Sequence[str] = (), keys: Sequence[int] = (), tokenizer: str = "") -> Prompts:
    """A Prompts message of token ids; ids default to "p0", "p1", …; keys to 0, 1, …"""
    return Prompts(
        keys=np.array(list(keys) or range(len(rows)), dtype=np.int64),
        ids=tuple(ids) or tuple(f"p{number}" for number in range(len(rows))),
        tokens=np.array([token for row in rows for token in row], dtype=np.int32),
        cu_seqlens=np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64),
        texts=tuple(f"text {number}" for number in range(len(rows))),
        columns={"answer": tuple(range(len(rows)))},
        tokenizer=tokenizer,
    )


def random_rows(lengths: Sequence[int], *, low: int = 4, high: int = 260, seed: int = 0) -> list[list[int]]:
    """Rows of random token ids of these lengths, none of them special in the tiny tokenizer."""
    generator = np.random.default_rng(seed)
    return [generator.integers(low, high, length).tolist() for length in lengths]

"""Parts of texts and their tokens: told apart by their bytes and length, however their places collide and the table grows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.roles.data import parts
from rolecall.roles.data.parts import KEEP, PAD, Parts


def spelled(texts: list[str]) -> list[list[int]]:
    """A tokenizer whose tokens are the bytes of a text, none for an x."""
    return [[byte for byte in text.encode() if byte != ord("x")] for text in texts]


def looked_up(known: Parts, texts: list[str]) -> tuple[list[int], list[int]]:
    raw = [text.encode() for text in texts]
    tokens, after = known.tokens(b"".join(raw) + PAD, np.cumsum([0, *map(len, raw)]))
    return tokens.tolist(), after.tolist()


some = st.text("ab\0é中x", min_size=1, max_size=20) | st.sampled_from(["x", "a" * 15, "a" * 16, "a" * 15 + "\0", "b" * (KEEP + 1)])


@settings(deadline=None)
@given(batches=st.lists(st.lists(some, max_size=12), max_size=5), collide=st.booleans())
def test_tokens_are_those_of_each_part(batches: list[list[str]], collide: bool):
    with pytest.MonkeyPatch.context() as patch:
        if collide:
            patch.setattr(parts, "_hash", lambda keys, size: np.full(keys.shape[1], size - 1))
        known = Parts(spelled)
        for texts in batches:
            tokens, after = looked_up(known, texts)
            own = spelled(texts)
            assert tokens == [token for each in own for token in each]
            assert after == np.cumsum([0, *map(len, own)]).tolist()


def test_each_part_is_encoded_once_but_for_the_longest():
    asked: list[str] = []

    def noted(texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return spelled(texts)

    known = Parts(noted)
    for _ in range(3):
        looked_up(known, ["a", " a", "b" * 40, "a", "c" * (KEEP + 1)])
    assert asked == ["a", " a", "b" * 40, *["c" * (KEEP + 1)] * 3]
    known.forget()
    looked_up(known, ["a"])
    assert asked[-1] == "a"


def test_the_table_grows():
    known = Parts(spelled)
    texts = [f" {number}" for number in range(20_000)]
    for start in range(0, len(texts), 3_000):
        looked_up(known, texts[start : start + 3_000])
    assert looked_up(known, texts)[0] == list("".join(texts).encode())
    assert len(known) == len(texts)

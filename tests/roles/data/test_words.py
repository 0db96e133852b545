"""Looking words up gives the ids that the tokenizer gives: on random texts, for the expressions of well-known models."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from chats import CORPUS, SPECIAL
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.roles.data.parts import KEEP
from rolecall.roles.data.tokenizer import Tokenizer
from rolecall.roles.data.words import _TRICKY, Words

LLAMA = (  # and Qwen's, nearly
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OSS = (  # of GPT-4o and GPT-OSS
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ("gpt2", "smollm", "llama3", "qwen", "gptoss")
MARKS = SPECIAL[:6]


@lru_cache
def backend(kind: str):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence, Split

    raw = Tokenizer(models.BPE())
    letters = ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = {
        "gpt2": ByteLevel(add_prefix_space=False),
        "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
        "llama3": Sequence([Split(Regex(LLAMA), "isolated"), letters]),
        "qwen": Sequence([Split(Regex(LLAMA.replace("{1,3}", "")), "isolated"), letters]),
        "gptoss": Sequence([Split(Regex(OSS), "isolated"), letters]),
        "prefix": ByteLevel(add_prefix_space=True),
        "whole": letters,
        "metaspace": Metaspace(),
    }[kind]
    if kind == "qwen":
        raw.normalizer = normalizers.NFC()
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=list(MARKS), initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([*CORPUS, _TRICKY], trainer)
    return raw


@lru_cache
def words(kind: str) -> Words:
    found = Words.of(backend(kind))
    assert found is not None
    return found


letters = st.text("abS'sl19 \n\t\r/.,-_(){}<|>im\u00a0\u3000éÉ\u0301中文😀\x1c\ufdd1K²Ⅷ \n", max_size=30)
texts = st.lists(
    letters | st.sampled_from(MARKS) | st.sampled_from([" ", "  ", "\n", "\n\n", " \n", "'s", " a", "user\n"]), max_size=12
).map("".join)


@settings(deadline=None, max_examples=80)
@given(lines=st.lists(texts | st.text(max_size=20), min_size=1, max_size=4), kind=st.sampled_from(KINDS))
def test_ids_are_those_of_the_tokenizer(lines: list[str], kind: str):
    assert words(kind).check(lines)


@settings(deadline=None, max_examples=60)
@given(line=texts, kind=st.sampled_from(KINDS), data=st.data())
def test_a_cut_falls_where_the_tokens_say(line: str, kind: str, data: st.DataObject):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(line)), max_size=3)))
    found = words(kind).encode([line, "a b"], [cuts, []])
    if found.cuts[0] is None:  # it can't be cut there: nothing is said, and the next text is not disturbed
        assert found.starts.tolist()[1] == 0
    else:
        encoding = backend(kind).encode(line, add_special_tokens=False)
        assert found.tokens[: found.starts[1]].tolist() == encoding.ids
        for cut, place in zip(cuts, found.cuts[0], strict=True):
            # NFC and bytes of one letter don't matter here: no token stands on both sides, none on the wrong one
            assert all(stop <= cut for _, stop in encoding.offsets[:place])
            assert all(start >= cut for start, _ in encoding.offsets[place:])
    assert found.tokens[found.starts[1] :].tolist() == backend(kind).encode("a b", add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_headers_end_where_a_text_may_be_cut(kind: str):
    for header in ("user\n", f"{MARKS[0]}\n\n" if kind not in ("gpt2", "smollm") else "a\n"):
        for said in ("Hello", "1", "*bold*", "中文", '{"a": 1}'):
            assert words(kind).encode([header + said], [[len(header)]]).cuts[0] is not None


@pytest.mark.parametrize("kind", ["prefix", "whole", "metaspace"])
def test_other_tokenizers_do_it_themselves(kind: str):
    assert Words.of(backend(kind)) is None


def test_added_tokens_that_take_blanks_are_left_to_the_tokenizer():
    from tokenizers import AddedToken, Tokenizer

    raw = Tokenizer.from_str(backend("gpt2").to_str())
    raw.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    assert Words.of(raw) is None


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch):
    found = Words.of(backend("gpt2"))
    monkeypatch.setattr("rolecall.roles.data.words.LIMIT", 50)
    for number in range(40):
        assert found.check([" ".join(f"w{number}x{other}" for other in range(20)), "y" * (KEEP + 1)])
        assert len(found.parts) <= 100


def test_texts_without_blanks_are_not_piled_up(monkeypatch: pytest.MonkeyPatch):
    found = Words.of(backend("llama3"))
    assert found is not None
    monkeypatch.setattr("rolecall.roles.data.words.HELD", 1000)
    for number in range(30):
        text = f"{number}中文" * 50
        assert found.encode([text], [[]]).tokens.tolist() == backend("llama3").encode(text).ids
        assert found.parts.held < 1000 + 50 * 12


def test_other_ids_are_noticed_and_the_tokenizer_does_it_all():
    from transformers import PreTrainedTokenizerFast

    ours = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend("gpt2")))
    assert ours._words is not None
    ours._words._ids(["hello"])
    ours.encode(["hello world"], [[]])
    ours._words.parts._tokens[:] = 7  # damage
    with pytest.warns(UserWarning, match="Looking words up gives other ids"):
        ((ids, _),) = ours.encode(["hello world"], [[]])
    assert ids.tolist() == backend("gpt2").encode("hello world").ids
    assert ours._words is None


def test_every_letter_of_unicode_beside_blanks():
    """One text with each code point between blanks, doubled, and after a line break."""
    points = [chr(number) for number in [*range(0x20), *range(0x20, 0x3100), *range(0xFE00, 0x10000), *range(0x1F300, 0x1F700)]]
    points = [point for point in points if not 0xD800 <= ord(point) < 0xE000]
    lines = [
        "".join(f"a {point}b{point} {point}\n{point} 1" for point in points[start : start + 100]) for start in range(0, len(points), 100)
    ]
    for kind in KINDS:
        assert words(kind).check(lines), kind


def test_spans_become_masks_in_both_ways():
    from transformers import PreTrainedTokenizerFast

    ours = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend("gpt2")))
    lines = [f"{MARKS[3]}user\nhi{MARKS[4]}\n{MARKS[3]}assistant\n{said}{MARKS[4]}\n" for said in ("Hello you", " blank", "中 文")]
    spans = [[(line.index("assistant\n") + 10, len(line) - 1)] for line in lines]
    quick, slow = ours.encode(lines, spans), ours._aligned(lines, spans, False)
    for (ids, mine), (theirs, own) in zip(quick, slow, strict=True):
        assert np.array_equal(ids, theirs)
        assert np.array_equal(mine, own)

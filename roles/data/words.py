"""Token ids by looking up what stands between blanks: the same ids as the tokenizer's, several times faster.

A byte-level BPE tokenizer first cuts a text at its added tokens, then by a regular expression into words that are encoded one by
one. A word never runs from a letter or sign into a blank behind it, so a text may be cut at every single blank between two
characters that are no white space, and the ids of the parts laid end to end are the ids of the text. Parts come again and again:
each is encoded once, by the tokenizer itself, and looked up afterwards. `Words.of` gives None for tokenizers of other kinds, and
for those whose ids differ on a text made to differ; `check` compares further texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rolecall.roles.data.parts import PAD, Bytes, Int32, Int64, Parts

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

LIMIT = 400_000  # parts remembered at most: some 40 MB
HELD = 1 << 24  # tokens of parts held at most: 64 MB; in scripts without blanks a part is a whole text
_SPACES = [*"\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"]  # beyond ASCII
_WIDE = np.array([int.from_bytes(each.encode()) for each in _SPACES], np.uint32)  # three bytes each
_NARROW = np.array([0xC285, 0xC2A0], np.uint32) << 8  # U+0085 and U+00A0, two bytes each
_LEADS = np.array([0xC2, 0xE1, 0xE2, 0xE3], np.uint8)  # the first bytes of all these
_TRICKY = (
    "a b  c   d\n e \n\n f\t g\r\nh \u00a0 i\u3000j \u2003k l1 23 4567 8,9 it's IT'S we'll 'tis a' b x_y --z - - ...! ?\n/path //\n\n/x"
    " (a) [b] {c} <d> <|e|> é e\u0301 a \u0301b 中文 字 かな 😀 👩‍👩‍👧 \x1c\x1d \x85 \u200b Ⅷ ² ½ ﬁ ǅ K end "
)


MANY = 64  # added tokens from which on they are not looked for one by one
_BRACKETS = re.compile(r"<[^<>\s]+>")


class Found(NamedTuple):
    """The tokens of several texts."""

    tokens: Int32  # [T] of all texts, end to end
    starts: Int64  # [N+1] where each text begins in them
    cuts: list[list[int] | None]  # of each text: how many of its tokens come before each of its cuts; None: it can't be cut there


class _Whole(NamedTuple):
    """Of a text, in characters."""

    begins: list[int]  # where parts begin whatever stands there: at added tokens, behind them, at cuts
    closed: list[int]  # where added tokens with blanks in them begin and end, in turn


class Words:
    """Looks parts of texts up. Made by `Words.of`."""

    def __init__(self, backend: Backend, added: Sequence[str]) -> None:
        self._backend = backend
        self._added, self._marks = _finder(added), frozenset(added)
        self.parts = Parts(self._ids)
        halves = [(before, after) for before in ("a\n\n", ".\n\n\n", " \n\n") for after in ("b", "1", "*", "é", "中")]
        alone = self._ids([half for pair in halves for half in pair])
        whole = self._ids([before + after for before, after in halves])
        self._breaks = all(alone[2 * number] + alone[2 * number + 1] == whole[number] for number in range(len(halves)))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    @classmethod
    def of(cls, backend: Backend) -> Words | None:
        """For a byte-level BPE tokenizer whose added tokens stand for themselves; else None."""
        rules = json.loads(backend.to_str())
        added = [token for token in rules.get("added_tokens") or [] if token["content"]]
        normal = rules.get("normalizer")
        normalises = normal is not None and (normal.get("type"), normal.get("normalizers")) != ("Sequence", [])
        if not _is_byte_level(rules) or (normalises and normal.get("type") != "NFC") or not _can_be_found(added, normalises):
            return None
        words = cls(backend, [token["content"] for token in added])
        marks = [token["content"] for token in added[:3]]
        texts = [_TRICKY, _TRICKY[::-1], *(f"x{mark} y{mark}{mark}\nz{mark[:-1]} w" for mark in marks)]
        return words if words.check(texts) else None

    def check(self, texts: Sequence[str]) -> bool:
        """Whether these texts get the ids that the tokenizer gives them."""
        found = self.encode(texts, [[]] * len(texts))
        theirs = self._backend.encode_batch(list(texts), add_special_tokens=False)
        pairs = zip(found.starts[:-1].tolist(), found.starts[1:].tolist(), theirs, strict=True)
        return all(found.tokens[start:stop].tolist() == their.ids for start, stop, their in pairs)

    def encode(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> Found:
        """The tokens of texts, and where cuts between characters fall.

        Args:
            texts: any.
            cuts: of each text, in characters, ascending.
        """
        if len(self.parts) > LIMIT or self.parts.held > HELD:
            self.parts.forget()
        begins: list[int] = []  # of parts, in characters of all texts
        marks: list[int] = []  # where each text begins and is cut, likewise
        closed: list[int] = []  # where added tokens with blanks in them begin and end, in turn
        wholes = [self._whole(text, own) for text, own in zip(texts, cuts, strict=True)]
        position = 0
        for text, own, whole in zip(texts, cuts, wholes, strict=True):
            marks.append(position)
            if whole is not None:
                begins += [position + each for each in whole.begins]
                marks += [position + each for each in own]
                closed += [position + each for each in whole.closed]
                position += len(text)
        data = "".join(text for text, whole in zip(texts, wholes, strict=True) if whole is not None).encode("utf-8", "surrogatepass")
        place = _places(data, position)
        bounds = _bounds(data, place(begins), place(closed))
        tokens, after = self.parts.tokens(data + PAD, bounds)
        counts = iter(after[np.searchsorted(bounds, place(marks))].tolist())
        starts = np.zeros(len(texts) + 1, np.int64)
        starts[-1] = len(tokens)
        found: list[list[int] | None] = []
        for number, (own, whole) in enumerate(zip(cuts, wholes, strict=True)):
            starts[number] = start = next(counts)
            found.append(None if whole is None else [next(counts) - start for _ in own])
        return Found(tokens, starts, found)

    def _whole(self, text: str, cuts: Sequence[int]) -> _Whole | None:
        """What is known of a text before its blanks are looked at; None where a cut may not be made."""
        begins, closed = [0], []
        position = done = 0  # characters before this piece, cuts before it
        for number, piece in enumerate(self._pieces(text)):
            end = position + len(piece)
            while done < len(cuts) and cuts[done] < end:
                cut = cuts[done]
                if cut > position:
                    if number % 2 or not self._may_cut(text, cut):
                        return None
                    begins.append(cut)
                done += 1
            if number % 2 and " " in piece:
                closed += [position, end]
            begins.append(end)
            position = end
        return _Whole(begins, closed)

    def _pieces(self, text: str) -> list[str]:
        """What stands between added tokens, with the tokens themselves at odd places."""
        if self._added is None:
            return [text]
        pieces = self._added.split(text)
        if self._marks.issuperset(pieces[1::2]):
            return pieces
        kept = pieces[:1]  # some only look like added tokens
        for mark, after in zip(pieces[1::2], pieces[2::2], strict=True):
            if mark in self._marks:
                kept += [mark, after]
            else:
                kept[-1] += mark + after
        return kept

    def _may_cut(self, text: str, place: int) -> bool:
        """Whether the parts before and after a place can be encoded apart: it stands before a single blank, or it follows a line
        break and no blank comes next. (The slash: GPT-OSS takes one that follows a line break into the word before.)
        """
        if text[place] == " ":
            return not (text[place - 1].isspace() or text[place + 1 : place + 2].isspace()) and place + 1 < len(text)
        if text[place - 1] != "\n" or text[place].isspace() or text[place] == "/":
            return False
        return self._breaks or not text[place - 2 : place - 1].isspace()


def _can_be_found(added: list[dict[str, Any]], normalises: bool) -> bool:
    """Whether one search finds added tokens as the tokenizer does, which looks for those of normalised text after the others."""
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] or (normalises and token["normalized"]) for token in added):
        return False
    others = [token for token in added if not _BRACKETS.fullmatch(token["content"])]  # two of the form <…> never overlap
    apart = not any("<" in token["content"] or ">" in token["content"] for token in others)
    if len({token["normalized"] for token in added}) > 1 and not (apart and len({token["normalized"] for token in others}) < 2):
        return False
    return apart or len(added) <= MANY


def _finder(added: Sequence[str]) -> re.Pattern[str] | None:
    """What finds added tokens, or may be one. Thousands of them (semantic ids) are found by the form <…> that they share."""
    words = sorted(added, key=len, reverse=True)
    alike = [word for word in words if _BRACKETS.fullmatch(word)] if len(words) > MANY else []
    others = [re.escape(word) for word in words if word not in set(alike)]
    patterns = ([_BRACKETS.pattern] if alike else []) + others
    return re.compile(f"({'|'.join(patterns)})") if patterns else None


def _places(data: bytes, characters: int) -> Callable[[list[int]], Int64]:
    """From characters of UTF-8 to its bytes."""
    if len(data) == characters:
        return lambda places: np.array(places, np.int64)
    begins = np.append(np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80), len(data))
    return lambda places: begins[np.array(places, np.int64)]


def _wide(letters: Bytes) -> list[int]:
    """Where white space beyond ASCII begins."""
    leads = np.flatnonzero(letters[:-2] >= 0xC2)
    leads = leads[np.isin(letters[leads], _LEADS)]
    codes = letters[leads].astype(np.uint32) << 16 | letters[leads + 1].astype(np.uint32) << 8
    found: list[int] = leads[np.isin(codes | letters[leads + 2], _WIDE) | np.isin(codes, _NARROW)].tolist()
    return found


def _bounds(data: bytes, begins: Int64, closed: Int64) -> Int64:
    """Where parts begin, and the end of all: at these bytes, and at single blanks between others that are no white space.

    Args:
        data: UTF-8.
        begins: ascending.
        closed: where parts begin and end, in turn, in which blanks stand.
    """
    letters = np.frombuffer(data, np.uint8)
    starts = np.zeros(len(data) + 1, np.bool_)
    if len(data) > 2:
        full = letters > 32
        for at in _wide(letters):
            full[at : at + 3] = False
        starts[1:-2] = full[:-2] & (letters[1:-1] == 32) & full[2:]
    for begin, end in closed.reshape(-1, 2).tolist():
        starts[begin:end] = False
    starts[begins] = True
    starts[-1] = True
    return np.flatnonzero(starts)


def _is_byte_level(rules: dict[str, Any]) -> bool:
    """Byte-level BPE whose words are found by ByteLevel's own expression, or by one that is known to stop at blanks."""
    model, before = rules.get("model") or {}, rules.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    steps = before.get("pretokenizers", []) if before.get("type") == "Sequence" else [before]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return False
    splits = [step for step in steps[:-1] if step.get("type") == "Split"]
    digits = [step for step in steps[:-1] if step.get("type") == "Digits"]
    if len(splits) + len(digits) != len(steps) - 1:
        return False
    regular = all(step.get("behavior") == "Isolated" and not step.get("invert") and "Regex" in step.get("pattern", {}) for step in splits)
    return regular and (bool(splits) or bool(steps[-1].get("use_regex")))

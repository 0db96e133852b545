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
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

SHORT = 12  # characters of a piece that is looked up as a whole
KEEP = 100  # characters of a part that is remembered; longer ones hardly come again
LIMIT = 400_000  # parts remembered at most: some 60 MB
_HIDDEN = "\ufdd1"  # stands for the blanks of a run of white space while a text is cut; Unicode keeps it free for such uses
_RUN = re.compile(r"\s{2,}")
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


class _Known(dict[str, int]):
    """Part → its number. A new one gets the next number and waits to be encoded."""

    def __init__(self, waiting: list[str], numbers: list[int], lead: str) -> None:
        self._waiting, self._numbers, self._lead = waiting, numbers, lead

    def __missing__(self, part: str) -> int:
        number = self.alone(self._lead + part.replace(_HIDDEN, " "))
        if len(part) <= KEEP:
            self[part] = number
        return number

    def alone(self, part: str) -> int:
        """The number of a part that is not remembered."""
        number = self._numbers[0]
        self._numbers[0] += 1
        self._waiting.append(part)
        return number


class Words:
    """Looks parts of texts up. Made by `Words.of`."""

    def __init__(self, backend: Backend, added: Sequence[str]) -> None:
        self._backend = backend
        self._added, self._marks = _finder(added), frozenset(added)
        self._tokens: Int32 = np.zeros(1 << 16, np.int32)  # of all parts, end to end
        self._starts: Int64 = np.zeros(1 << 14, np.int64)
        self._lengths: Int64 = np.zeros(1 << 14, np.int64)
        self._forget()
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
        if self._count[0] > LIMIT:
            self._forget()
        units: list[int] = []
        ends: list[int] = [0]  # units up to the end of each text
        places: list[list[int] | None] = []
        for text, own in zip(texts, cuts, strict=True):
            places.append(self._units(text, own, units))
            if places[-1] is None:
                del units[ends[-1] :]
            ends.append(len(units))
        self._learn()
        which = np.array(units, dtype=np.int64)
        lengths = self._lengths[which]
        after = np.concatenate([[0], np.cumsum(lengths)])
        within = np.arange(int(after[-1])) - np.repeat(after[:-1], lengths)
        tokens = self._tokens[np.repeat(self._starts[which], lengths) + within]
        starts: Int64 = after[ends]
        found = [own and (after[own] - start).tolist() for own, start in zip(places, starts[:-1], strict=True)]
        return Found(tokens, starts, found)

    def _units(self, text: str, cuts: Sequence[int], units: list[int]) -> list[int] | None:
        """Append the parts of a text to `units`; the number of units before each cut, or None where one may not be made."""
        places: list[int] = []
        position = done = 0  # characters before this piece, cuts before it
        for number, piece in enumerate(self._pieces(text)):
            end, begin = position + len(piece), 0
            while done < len(cuts) and cuts[done] < end:
                cut = cuts[done] - position
                if cut > begin:
                    if number % 2 or not self._may_cut(text, cuts[done]):
                        return None
                    self._split(piece[begin:cut], units)
                    begin = cut
                places.append(len(units))
                done += 1
            if number % 2:
                units.append(self._first[piece])
            elif piece:
                self._split(piece[begin:] if begin else piece, units)
            position = end
        return places + [len(units)] * (len(cuts) - done)

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

    def _split(self, piece: str, units: list[int]) -> None:
        if piece.isascii():
            if len(piece) <= SHORT:
                units.append(self._first[piece])
                return
            if "  " in piece or "\n " in piece or " \n" in piece or "\t" in piece or "\r" in piece or "\v" in piece or "\f" in piece:
                piece = _RUN.sub(_hide, piece)
        elif _HIDDEN in piece:
            units.append(self._first.alone(piece))
            return
        else:
            piece = _RUN.sub(_hide, piece)
        parts = piece.split(" ")
        if parts[0]:
            units.append(self._first[parts[0]])
        if len(parts) > 1:
            units.extend(map(self._rest.__getitem__, parts[1:]))

    def _learn(self) -> None:
        """Let the tokenizer encode the parts that are new."""
        if not self._waiting:
            return
        ids = self._ids(self._waiting)
        lengths = np.array([len(each) for each in ids], dtype=np.int64)
        flat = np.fromiter((token for each in ids for token in each), np.int32, int(lengths.sum()))
        first, last = self._count[0] - len(ids), self._count[0]
        used = self._used
        self._tokens = _room(self._tokens, used + len(flat))
        self._starts, self._lengths = _room(self._starts, last), _room(self._lengths, last)
        self._tokens[used : used + len(flat)] = flat
        self._lengths[first:last] = lengths
        self._starts[first:last] = used + np.cumsum(lengths) - lengths
        self._used += len(flat)
        self._waiting.clear()

    def _forget(self) -> None:
        self._waiting: list[str] = []
        self._count = [0]
        self._used = 0
        self._first = _Known(self._waiting, self._count, "")  # parts at the start of a piece, and added tokens
        self._rest = _Known(self._waiting, self._count, " ")  # parts after a blank, without it


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


def _hide(run: re.Match[str]) -> str:
    return run.group().replace(" ", _HIDDEN)


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


def _room(values: Any, size: int) -> Any:
    """The array itself, or a copy with room for twice as many."""
    if size <= len(values):
        return values
    grown = np.zeros(2 * size, values.dtype)
    grown[: len(values)] = values
    return grown

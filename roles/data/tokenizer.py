"""A thin class over AutoTokenizer, which stays the only source of token ids."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rolecall.protocols.errors import ConfigError
from rolecall.roles.data.spans import Span, Spans
from rolecall.roles.data.turns import Template
from rolecall.roles.data.words import Words
from rolecall.roles.tokens import identity, load_tokenizer, require_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST, EVERY = 32, 997  # texts that are encoded in both ways: the first ones, then every so-manieth
_MARK = re.compile(r"<[|｜]\S+[|｜]>|\[/?[A-Z_]+\]")
Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]


class Tokenizer:
    """What a tokenizer does not say itself: which tokens are the assistant's, what ends a turn, what may fill a row.

    Args:
        tokenizer: AutoTokenizer's, whatever its backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.hf = tokenizer
        self._fast: Any = _own(tokenizer.backend_tokenizer) if getattr(tokenizer, "is_fast", False) else None
        self._words = None if self._fast is None else Words.of(self._fast)
        self._encoded = 0  # texts so far
        self._templates: dict[str, Spans] = {}

    @classmethod
    def load(cls, path: str) -> Tokenizer:
        """That of a model folder or hub name.

        Raises:
            ModelError: there is none, or it can't be read.
        """
        return cls(load_tokenizer(path))

    @cached_property
    def identity(self) -> str:
        """Hash by which roles know that they mean the same tokens."""
        return identity(self.hf)

    @property
    def eos(self) -> int | None:
        """The token that ends a text."""
        given: int | None = self.hf.eos_token_id
        return given

    @property
    def bos(self) -> int | None:
        """The token that begins a text."""
        given: int | None = self.hf.bos_token_id
        return given

    @property
    def pad(self) -> int:
        """What fills unused slots: the pad token, else the end of text, else 0. Nothing attends to it and nothing trains it."""
        given = self.hf.pad_token_id
        given = self.eos if given is None else given
        return 0 if given is None else int(given)

    @cached_property
    def added(self) -> tuple[str, ...]:
        """Added tokens, special or not: <|im_end|>, <think>, …"""
        found = [token.content for _, token in sorted(self.hf.added_tokens_decoder.items())]
        if self._fast is None:  # SentencePiece models may hold such words among the others
            found += [word for word in self.hf.get_vocab() if _MARK.fullmatch(word)]
        return tuple(dict.fromkeys(found))

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """Tokens at which a generation ends: the tokenizer's eos and those of the model's generation_config.json."""
        found = [self.hf.eos_token]
        try:
            config = json.loads((Path(self.hf.name_or_path) / "generation_config.json").read_text())
            ids = config.get("eos_token_id")
            found += self.hf.convert_ids_to_tokens([each for each in (ids if isinstance(ids, list) else [ids]) if isinstance(each, int)])
        except (OSError, ValueError):
            pass  # many folders have none
        return tuple(dict.fromkeys(each for each in found if each))

    def spans(self, tools: bool = False) -> Spans:
        """The chat template's view of conversations (there may be another template for those with tools).

        Raises:
            ModelError: there is no chat template.
        """
        templates = self.hf.chat_template
        require_chat_template(self.hf)
        name = "tool_use" if tools and isinstance(templates, dict) and "tool_use" in templates else "default"
        if name not in self._templates:
            source = templates[name] if isinstance(templates, dict) else templates
            self._templates[name] = Spans(Template(self.hf, source), self.added, self.stops, self.hf.bos_token or "")
        return self._templates[name]

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[Span]], *, special: bool = False) -> list[tuple[Int32, Bool]]:
        """Tokens of texts, and which of them lie in the spans.

        A token that a span's start cuts is trained where only blanks stand before the cut and more than blanks after it.

        Args:
            texts: any.
            spans: of each text, in characters, ascending.
            special: let the tokenizer add what begins and ends a text (bos); templates write that themselves.
        """
        if special and self._around is None:
            return self._aligned(texts, spans, special)
        self._compare(texts)
        if self._words is None:
            return self._aligned(texts, spans, special)
        if special and self._around != ([], []):
            return [self._wrapped(*pair) for pair in self.encode(texts, spans)]
        found = self._words.encode(texts, [[cut for span in own for cut in span] for own in spans])
        trained = np.zeros(len(found.tokens), dtype=np.bool_)
        result: list[tuple[Int32, Bool]] = []
        for start, stop, cuts in zip(found.starts[:-1].tolist(), found.starts[1:].tolist(), found.cuts, strict=True):
            for first, last in zip((cuts or [])[::2], (cuts or [])[1::2], strict=True):
                trained[start + first : start + last] = True
            result.append((found.tokens[start:stop], trained[start:stop]))
        rest = [number for number, cuts in enumerate(found.cuts) if cuts is None]
        for number, pair in zip(rest, self._aligned([texts[each] for each in rest], [spans[each] for each in rest], False), strict=True):
            result[number] = pair
        return result

    @cached_property
    def _around(self) -> tuple[list[int], list[int]] | None:
        """What the tokenizer puts before and after every text, or None where it does more than that."""
        if self._fast is None:
            return None
        around = self._fast.encode("", add_special_tokens=True).ids
        for text in ("a b", "Zürich, 2 x", "\n"):
            inner, whole = (self._fast.encode(text, add_special_tokens=special).ids for special in (False, True))
            cuts = [cut for cut in range(len(around) + 1) if around[:cut] + inner + around[cut:] == whole]
            if not cuts:
                return None
        return around[: cuts[0]], around[cuts[0] :]

    def _wrapped(self, tokens: Int32, trained: Bool) -> tuple[Int32, Bool]:
        before, after = self._around or ([], [])
        whole = np.concatenate([np.array(before, np.int32), tokens, np.array(after, np.int32)])
        return whole, np.concatenate([np.zeros(len(before), np.bool_), trained, np.zeros(len(after), np.bool_)])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self.hf.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _compare(self, texts: Sequence[str]) -> None:
        """Now and then a text is encoded in both ways: looking words up must give the tokenizer's ids, or it is given up."""
        chosen = [text for number, text in enumerate(texts, start=self._encoded) if number < FIRST or number % EVERY == 0]
        self._encoded += len(texts)
        if chosen and self._words is not None and not self._words.check(chosen):
            warnings.warn(
                f"Looking words up gives other ids than the tokenizer of {self.hf.name_or_path}: it does all itself.", stacklevel=2
            )
            self._words = None

    def _aligned(self, texts: Sequence[str], spans: Sequence[Sequence[Span]], special: bool) -> list[tuple[Int32, Bool]]:
        """By the tokenizer itself, which says of which characters each token is made."""
        if self._fast is None:
            return [self._slow(text, own, special) for text, own in zip(texts, spans, strict=True)]
        found = []
        for encoding, text, own in zip(self._fast.encode_batch(list(texts), add_special_tokens=special), texts, spans, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            trained = np.zeros(len(ids), dtype=np.bool_)
            for start, stop in own:
                first, last = _token_at(encoding, start, text), _token_at(encoding, stop, text)
                if first < len(ids):
                    begin, end = encoding.token_to_chars(first)
                    first += begin < start and (bool(text[begin:start].strip()) or not text[start:end].strip())
                trained[first:last] = True
            found.append((ids, trained))
        return found

    def _slow(self, text: str, spans: Sequence[Span], special: bool) -> tuple[Int32, Bool]:
        """For tokenizers that give no offsets: where a span begins and ends is found by decoding beginnings."""
        ids = self.hf(text, add_special_tokens=special)["input_ids"]
        trained = np.zeros(len(ids), dtype=np.bool_)
        for start, stop in spans:
            first, last = (self._tokens_of(ids, text[:cut]) for cut in (start, stop))
            trained[first:last] = True
        return np.array(ids, dtype=np.int32), trained

    def _tokens_of(self, ids: list[int], beginning: str) -> int:
        """How many tokens, decoded, make this beginning of the text: found by halving, as decoded beginnings only grow."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            if len(self.decode(ids[:middle])) < len(beginning):
                low = middle + 1
            else:
                high = middle
        return low


def _own(backend: Any) -> Any:
    """A copy that neither cuts nor fills texts: a tokenizer's file, or somebody's last call, may have set it to."""
    copy = type(backend).from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def semantic_ids(sizes: Sequence[int], form: str = "<|{level}_{code}|>") -> list[str]:
    """Words for semantic ids: items described by one code a level, as recommenders do. To be added by `extend_model`.

    Args:
        sizes: codes of each level: [256, 256, 256].
        form: of a word, with {level} and {code}, both from 0; it must begin with < and end with >, so that texts don't hold it.

    Raises:
        ConfigError: the form gives two codes the same word, or a word that stands in usual texts.
    """
    words = [form.format(level=level, code=code) for level, size in enumerate(sizes) for code in range(size)]
    if len(set(words)) < len(words) or any(not (word.startswith("<") and word.endswith(">")) or " " in word for word in words):
        raise ConfigError("These words can't be those of semantic ids.", ask=repr(form), remedy='give a form such as "<|{level}_{code}|>"')
    return words


def _token_at(encoding: Any, position: int, text: str) -> int:
    """The first token that holds the character at `position` or one after it."""
    while position < len(text):
        token = encoding.char_to_token(position)
        if token is not None:
            return int(token)
        position += 1
    return len(encoding.ids)

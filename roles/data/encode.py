"""From records to tokens, each with the knowledge whether it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from rolecall.protocols.errors import DataError
from rolecall.roles.data.chat import THOUGHTS, Messages
from rolecall.roles.data.records import Completion, Conversation, Preference, Question, Record, Text, Words
from rolecall.roles.data.report import Report, reason
from rolecall.roles.data.spans import Span
from rolecall.roles.data.tokenizer import Bool, Int32, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Train = Literal["assistant", "last", "each", "all"]
TRAIN: tuple[Train, ...] = ("assistant", "last", "each", "all")
_Chat = Conversation | Completion | Preference


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """The tokens of a record. A trained token is one that the model is to predict from those before it."""

    tokens: Int32  # [n]
    trained: Bool  # [n]; all False for a question
    id: str = ""
    place: str = ""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A preference: two answers that begin alike. `chosen.tokens[:shared]` equals `rejected.tokens[:shared]`, and none of
    these is trained: they can be one parent segment with two continuations."""

    chosen: Encoded
    rejected: Encoded
    shared: int  # tokens

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected) - self.shared


class Encoder:
    """Turns records into tokens.

    Args:
        tokenizer: of the model; AutoTokenizer's, or ours.
        train: what is trained of a conversation: what the assistant says ("assistant"), only its last turn ("last"), each turn in
            a record of its own ("each": where a template takes the thinking out of earlier turns, every turn is then trained as it
            was sampled), or the whole text ("all").
        plain: take prompts and completions that are texts as they are; False puts them into the chat template as messages of the
            user and the assistant.
        suffix: appended to the last message of every prompt of a question.
        system: said before every conversation that brings no system message.
        options: further variables of the chat template, for all records: {"enable_thinking": False, "today": "2026-01-31"}. A
            record's own come before them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | Tokenizer,
        *,
        train: Train = "assistant",
        plain: bool = False,
        suffix: str = "",
        system: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.options = dict(options or {})
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer(tokenizer)
        self.train, self.plain, self.suffix, self.system = train, plain, suffix, system

    def encode(self, record: Record) -> Encoded | Pair:
        """The tokens of one record (of its first turn, where each is a record of its own).

        Raises:
            DataError: the template refuses it, or no token of it is trained; it says where the record is from.
            ModelError: it needs a chat template, and there is none.
        """
        return self.encode_all([record])[0]

    def encode_all(self, records: Sequence[Record], report: Report | None = None) -> list[Encoded | Pair]:
        """The tokens of many records, faster than one by one.

        Args:
            records: any of the five kinds.
            report: where records that can't be encoded are counted as dropped; they are left out. None raises at the first.

        Raises:
            DataError: as `encode`, where there is no report.
            ModelError: as `encode`.
        """
        drafts: list[tuple[Record, tuple[_Draft, ...]]] = []
        for record in records:
            try:
                drafts.append((record, self._drafts(record)))
            except DataError as error:
                _drop(report, error, record.place)
        flat = [draft for _, own in drafts for draft in own]
        done: dict[int, tuple[Int32, Bool]] = {}
        for special in (False, True):
            chosen = [number for number, draft in enumerate(flat) if draft.special == special]
            texts, spans = [flat[number].text for number in chosen], [flat[number].spans for number in chosen]
            done.update(zip(chosen, self.tokenizer.encode(texts, spans, special=special), strict=True))
        found: list[Encoded | Pair] = []
        number = 0
        for record, own in drafts:
            sides = [self._finished(record, draft, *done[number + place]) for place, draft in enumerate(own)]
            number += len(own)
            try:
                wholes = [_whole(record, [side]) for side in sides] if isinstance(record, Conversation) else [_whole(record, sides)]
            except DataError as error:
                _drop(report, error, record.place)
                continue
            found += wholes
            if report is not None:
                _note(report, record, own)
        return found

    def _drafts(self, record: Record) -> tuple[_Draft, ...]:
        """The texts that a record is made of: one, or two for a preference."""
        if isinstance(record, Text):
            return (_Draft(record.text, [(0, len(record.text))], True, True),)
        if isinstance(record, Conversation):
            turns = [len(record.messages)]
            if self.train == "each":
                said = [number for number, each in enumerate(record.messages, start=1) if each["role"] == "assistant"]
                turns = [number for number in said if record.messages[number - 1].get("weight", 1) != 0] or turns
            return tuple(self._templated(record, record.messages[:turn], self.train) for turn in turns)
        if isinstance(record, Question):
            return (self._question(record),)
        answers = (record.completion,) if isinstance(record, Completion) else (record.chosen, record.rejected)
        if isinstance(record.prompt, str) and self.plain:
            start = len(record.prompt)
            return tuple(_Draft(record.prompt + str(answer), [(start, start + len(answer))], True, True) for answer in answers)
        prompt = _said("user", record.prompt)
        return tuple(self._after(record, prompt, _said("assistant", answer)) for answer in answers)

    def _after(self, record: Completion | Preference, prompt: Messages, answer: Messages) -> _Draft:
        """A prompt and what is said after it: only the assistant's turns of the latter are trained."""
        before = tuple(message | {"weight": 0} if message["role"] == "assistant" else message for message in prompt)
        return self._templated(record, (*before, *answer), "assistant")

    def _question(self, record: Question) -> _Draft:
        if isinstance(record.prompt, str) and self.plain:
            return _Draft(record.prompt + self.suffix, [], True, False)
        messages = [dict(message) for message in self._with_system(_said("user", record.prompt))]
        messages[-1]["content"] += self.suffix
        spans = self.tokenizer.spans(record.tools is not None)
        rendered = spans.render(messages, record.tools, prompt=True, options={**self.options, **record.options}, place=record.place)
        return _Draft(rendered.text, [], False, False)

    def _templated(self, record: _Chat, messages: Messages, train: Train) -> _Draft:
        spans = self.tokenizer.spans(record.tools is not None)
        messages = self._with_system(messages)
        options, chosen = {**self.options, **record.options}, "last" if train == "each" else train
        rendered, own = spans.find(messages, record.tools, train=chosen, options=options, place=record.place)
        return _Draft(rendered.text, own, False, False, tuple(_notes(messages, rendered.text, self.tokenizer.stops)))

    def _with_system(self, messages: Messages) -> Messages:
        if self.system is None or messages[0]["role"] in ("system", "developer"):
            return messages
        return ({"role": "system", "content": self.system}, *messages)

    def _finished(self, record: Record, draft: _Draft, tokens: Int32, trained: Bool) -> Encoded:
        eos = self.tokenizer.eos
        if draft.ends and eos is not None:
            if not len(tokens) or tokens[-1] != eos:
                tokens, trained = np.append(tokens, np.int32(eos)), np.append(trained, True)
            trained[-1] = True  # also where the tokenizer has put it there
        return Encoded(tokens, trained, record.id, record.place)


class _Draft(NamedTuple):
    """A text on its way to tokens."""

    text: str
    spans: list[Span]
    special: bool  # the tokenizer adds what begins a text
    ends: bool  # the end of text is added and trained
    notes: tuple[str, ...] = ()  # what is worth knowing


def _said(role: str, words: Words) -> Messages:
    return ({"role": role, "content": words},) if isinstance(words, str) else words


def _whole(record: Record, sides: list[Encoded]) -> Encoded | Pair:
    """What a record became.

    Raises:
        DataError: nothing of it is trained, or it is empty.
    """
    for side in sides:
        if not len(side):
            raise DataError(f"{record.place}: the record has no token.", remedy="take it out", why="no token")
        side.trained[0] = False  # nothing comes before the first token to predict it from
        if not isinstance(record, Question) and not side.trained.any():
            raise DataError(
                f"{record.place}: no token of the record is trained.",
                have=f"{len(side)} tokens, none of them the assistant's",
                remedy="take out conversations in which the assistant says nothing",
                why="no trained token",
            )
    if len(sides) == 1:
        return sides[0]
    chosen, rejected = sides
    length = min(len(chosen), len(rejected))
    same = (chosen.tokens[:length] == rejected.tokens[:length]) & ~chosen.trained[:length] & ~rejected.trained[:length]
    return Pair(chosen, rejected, int(np.argmin(same)) if not same.all() else length)


def _notes(messages: Messages, text: str, stops: Sequence[str]) -> Iterator[str]:
    """What became of a conversation that its reader may not expect."""
    if any(stop in message["content"] for stop in stops for message in messages):
        yield "a token that ends turns within a message"
    for message in messages:
        if message["role"] == "assistant":
            thought = message.get(THOUGHTS[0]) or message["content"].rpartition("</think>")[0].partition("<think>")[2]
            if isinstance(thought, str) and thought.strip() and thought.strip() not in text:
                yield "thinking that the template leaves out"
                break


def _note(report: Report, record: Record, drafts: tuple[_Draft, ...]) -> None:
    for note in {note for draft in drafts for note in draft.notes}:
        report.add("noted", note, place=record.place)
    if isinstance(record, Conversation) and len(drafts) > 1:
        report.add("split", "a record for each turn", place=record.place)


def _drop(report: Report | None, error: DataError, place: str) -> None:
    if report is None:
        raise error
    report.add("dropped", reason(error, place), place=place)

"""Records in one form, whatever columns they came in: conversations, completions, texts, preferences, questions.

`recognise` looks at the names of the columns once and gives a `Layout`; `Layout.read` turns each record into one of the
five structs. What a message may look like is in `chat.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, get_args

import msgspec
from rolecall.protocols.errors import DataError
from rolecall.roles.data.chat import Messages, Tools, is_messages, messages_of, options_of, split_shared, tools_of

Kind = Literal["preference", "conversation", "completion", "text", "question"]
Words = str | Messages  # a plain text, or messages for the chat template


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """A whole conversation; what the assistant says in it is trained."""

    messages: Messages
    tools: Tools | None = None
    options: dict[str, Any] = {}  # further variables of the chat template: {"enable_thinking": False}
    id: str = ""  # the record's own, where it has one
    place: str = ""  # where it was read, for errors: "file.jsonl:3"


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and the completion that is trained."""

    prompt: Words
    completion: Words
    tools: Tools | None = None
    options: dict[str, Any] = {}
    id: str = ""
    place: str = ""


class Text(msgspec.Struct, frozen=True, kw_only=True):
    """A plain text, trained from its first token to its last; no template touches it."""

    text: str
    id: str = ""
    place: str = ""


class Preference(msgspec.Struct, frozen=True, kw_only=True):
    """Two answers to one prompt, the better one and the worse one. Both are of the same form as the prompt."""

    prompt: Words
    chosen: Words
    rejected: Words
    tools: Tools | None = None
    options: dict[str, Any] = {}
    id: str = ""
    place: str = ""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt for a rollout, and the columns that rewards read."""

    prompt: Words
    columns: dict[str, Any] = {}
    tools: Tools | None = None
    options: dict[str, Any] = {}
    id: str = ""
    place: str = ""


Record = Conversation | Completion | Text | Preference | Question

_NEEDS: dict[Kind, tuple[str, ...]] = {  # in this order: the first kind whose columns are all there
    "preference": ("chosen", "rejected"),
    "conversation": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "question": ("prompt",),
}
_MORE = ("prompt", "input", "system", "tools", "options", "id")  # columns that any kind may have besides
NAMES = ("messages", "prompt", "completion", "text", "chosen", "rejected", "input", "system", "tools", "options", "id")
_ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("conversations", "conversation", "dialog", "dialogue"),
    "prompt": ("instruction", "question", "query", "problem"),
    "completion": ("response", "output"),
    "chosen": ("chosen_response", "accepted"),
    "rejected": ("rejected_response",),
    "tools": ("functions",),
    "system": ("system_prompt",),
    "options": ("chat_template_kwargs",),
    "id": ("uuid",),
}


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What the columns of a dataset mean. Made by `recognise`."""

    kind: Kind
    columns: dict[str, str]  # our name → the dataset's

    def read(self, record: Mapping[str, Any], place: str = "") -> Record:
        """One record in our form.

        Raises:
            DataError: a column is missing or of a wrong type, a conversation is empty or only a system message; it says where.
        """
        for name in _NEEDS[self.kind]:
            self._value(record, name, place)
        common: dict[str, Any] = {"place": place, "id": str(self._maybe(record, "id") or "")}
        if self.kind == "text":
            return Text(text=_text(self._value(record, "text", place), self.columns["text"], place), **common)
        common["tools"] = tools_of(self._maybe(record, "tools"), place)
        common["options"] = options_of(self._maybe(record, "options"), place)
        if self.kind == "conversation":
            messages = messages_of(self._value(record, "messages", place), place, self.columns["messages"], common["tools"])
            return Conversation(messages=self._with_system(record, messages, place), **common)
        if self.kind == "preference":
            return self._preference(record, place, common)
        prompt = self._prompt(record, place, common["tools"])
        if self.kind == "completion":
            completion = self._words(record, "completion", place, common["tools"], role="assistant")
            prompt, completion = _alike(prompt, completion)
            return Completion(prompt=prompt, completion=completion, **common)
        used = set(self.columns.values())
        if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            raise DataError(
                f"{place}: the prompt does not end with something to answer.",
                remedy="end it with a message of the user",
                why="a prompt that ends with the assistant",
            )
        return Question(prompt=prompt, columns={name: value for name, value in record.items() if name not in used}, **common)

    def _preference(self, record: Mapping[str, Any], place: str, common: dict[str, Any]) -> Preference:
        """With a prompt, or with conversations that begin alike: then their shared messages are the prompt."""
        chosen = self._words(record, "chosen", place, common["tools"], role="assistant")
        rejected = self._words(record, "rejected", place, common["tools"], role="assistant")
        chosen, rejected = _alike(chosen, rejected, role="assistant")
        prompt: Words | None = self._prompt(record, place, common["tools"]) if self._maybe(record, "prompt") is not None else None
        if prompt is not None:
            prompt, chosen = _alike(prompt, chosen)
            _, rejected = _alike(prompt, rejected)
        prompt, chosen, rejected = split_shared(prompt, chosen, rejected, place)
        if chosen == rejected:
            raise DataError(
                f"{place}: the chosen answer and the rejected one are the same.",
                remedy="take the record out",
                why="two answers that are the same",
            )
        return Preference(prompt=prompt, chosen=chosen, rejected=rejected, **common)

    def _prompt(self, record: Mapping[str, Any], place: str, tools: Tools | None) -> Words:
        prompt = self._words(record, "prompt", place, tools, role="user")
        more = self._maybe(record, "input")  # of instruction records: what the instruction is about
        if more and isinstance(prompt, str):
            prompt = f"{prompt}\n\n{_text(more, self.columns['input'], place)}"
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise DataError(f"{place}: the prompt is empty.", remedy="take the record out, or give it a prompt", why="an empty prompt")
        words: Words = self._with_system(record, prompt, place)
        return words

    def _with_system(self, record: Mapping[str, Any], words: Words, place: str) -> Any:
        system = self._maybe(record, "system")
        if not system:
            return words
        messages = words if not isinstance(words, str) else ({"role": "user", "content": words},)
        said = {"role": "system", "content": _text(system, self.columns["system"], place)}
        return messages if messages[0]["role"] == "system" else (said, *messages)

    def _words(self, record: Mapping[str, Any], name: str, place: str, tools: Tools | None, *, role: str) -> Words:
        value = self._value(record, name, place)
        if isinstance(value, str):
            return value
        if isinstance(value, dict):
            value = [value]
        if is_messages(value):
            return messages_of(value, place, self.columns[name], tools)
        raise DataError(
            f"{place}: the column {self.columns[name]!r} is neither a text nor a list of messages.",
            have=f"{type(value).__name__} {str(value)[:60]!r}",
            remedy=f'write "…" or [{{"role": "{role}", "content": "…"}}], or map {name!r} to another column',
            why="a column of a wrong type",
        )

    def _value(self, record: Mapping[str, Any], name: str, place: str) -> Any:
        column = self.columns[name]
        value = record.get(column)
        if value is None:
            state = "is empty (null)" if column in record else "is missing"
            have = ", ".join(map(str, record)) or "no column at all"
            raise DataError(f"{place}: the column {column!r} {state}.", have=have, remedy=_remedy(column, record), why=f"no {column}")
        return value

    def _maybe(self, record: Mapping[str, Any], name: str) -> Any:
        column = self.columns.get(name)
        return None if column is None else record.get(column)


def recognise(columns: Iterable[str], mapping: Mapping[str, str] | None = None, want: Collection[Kind] = ()) -> Layout:
    """What the columns of a dataset mean.

    Where several layouts fit, the first of these is taken: chosen + rejected; messages (or ShareGPT's conversations);
    prompt + completion (or response, output); text; prompt.

    Args:
        columns: their names, as the dataset has them.
        mapping: our name → the dataset's, for columns of other names: {"prompt": "question", "completion": "answer"}. Our names
            are messages, prompt, completion, text, chosen, rejected, input, system, tools, options, id.
        want: the kinds that the caller can use; () means any.

    Raises:
        DataError: no layout fits, or the mapping names what is not there; it shows the names there are and the nearest.
    """
    have = [str(name) for name in columns]
    given = dict(mapping or {})
    for ours, theirs in given.items():
        if ours not in NAMES:
            raise DataError(f"There is no column called {ours!r} to map to.", have=", ".join(NAMES), remedy=_remedy(ours, NAMES))
        if theirs not in have:
            raise DataError(
                f"The dataset has no column {theirs!r} (mapped as {ours!r}).",
                have=", ".join(have) or "no column at all",
                remedy=_remedy(theirs, have),
            )
    found = _found(have, given)
    kinds = [kind for kind in _NEEDS if kind in (want or get_args(Kind))]
    fitting = [kind for kind in kinds if all(name in found for name in _NEEDS[kind])]
    named = [kind for kind in fitting if any(name in given for name in _NEEDS[kind])]  # a mapping tells what is meant
    if "question" in kinds and not fitting and "messages" in found:
        found["prompt"] = found.pop("messages")  # prompts written as conversations, up to where the assistant answers
        fitting = ["question"]
    if not fitting:
        raise _unknown(have, kinds)
    kind = max(named, key=lambda each: sum(name in given for name in _NEEDS[each])) if named else fitting[0]
    keep = {*_NEEDS[kind], *(_MORE if kind != "text" else ("id",))}
    if kind == "conversation":
        keep -= {"prompt", "input"}
    elif found.get("prompt") != "instruction" and "input" not in given:
        keep.discard("input")
    return Layout(kind=kind, columns={name: column for name, column in found.items() if name in keep})


def _found(have: list[str], given: Mapping[str, str]) -> dict[str, str]:
    """Our name → the dataset's, for every name of ours that can be told."""
    found = dict(given)
    for name in NAMES:
        if name not in found:
            column = next((each for each in (name, *_ALIASES.get(name, ())) if each in have and each not in given.values()), None)
            if column is not None:
                found[name] = column
    return found


def _unknown(have: list[str], kinds: list[Kind]) -> DataError:
    wanted = [" + ".join(_NEEDS[kind]) for kind in kinds]
    names = {name for kind in kinds for name in _NEEDS[kind]}
    near = [(column, match[0]) for column in have if (match := difflib.get_close_matches(column, sorted(names), n=1))]
    first = f"map {near[0][1]!r} to {near[0][0]!r}" if near else f"map the columns: columns={{{wanted[0].split(' + ')[0]!r}: …}}"
    return DataError(
        "The columns of the dataset are of no layout that can be used here.",
        ask=" or ".join(wanted),
        have=", ".join(have) or "no column at all",
        remedy=first,
    )


def _alike(first: Words, second: Words, role: str = "user") -> tuple[Any, Any]:
    """Both as texts or both as messages: a text beside messages becomes a message."""
    if isinstance(first, str) and not isinstance(second, str):
        return ({"role": role, "content": first},), second
    if isinstance(second, str) and not isinstance(first, str):
        return first, ({"role": "assistant", "content": second},)
    return first, second


def _text(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{place}: the column {column!r} holds no text.",
            have=f"{type(value).__name__} {str(value)[:60]!r}",
            remedy="make it a text, or map another column",
            why="a column of a wrong type",
        )
    return value


def _remedy(word: str, words: Iterable[Any]) -> str:
    near = difflib.get_close_matches(word, [str(each) for each in words], n=1)
    return f"use {near[0]!r}, or map the columns" if near else "map the columns to the names that are meant"

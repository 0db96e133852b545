"""Which characters of a templated conversation are the assistant's.

What a turn of the assistant holds after its header is what the model has to say: thinking, text, tool calls, and the token that
ends the turn. The header is what the template writes to make the model begin (`add_generation_prompt`), so training sees a turn
as sampling does. Where a template marks what is generated (`{% generation %}`), its marks are taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rolecall.protocols.errors import DataError, ModelError
from rolecall.roles.data.turns import Piece, Rendered, Template

if TYPE_CHECKING:
    from rolecall.roles.data.chat import Messages, Tools

Span = tuple[int, int]  # characters: start, stop
_ASK, _ANSWER = "Say the word.", "Rutabaga"  # of the probe; the answer occurs in no template


class _Headers(NamedTuple):
    """How the assistant's turns begin under some options of the template."""

    prompt: str  # what the generation prompt adds
    base: str  # what it has in common with the turns of a finished conversation


class Spans:
    """Finds the assistant's part of conversations in one chat template.

    Args:
        template: of the tokenizer.
        added: the tokenizer's added tokens: <|im_end|>, …
        stops: those of them that end a generation.
        beginning: the token that begins a text (bos), "" where there is none.
    """

    def __init__(self, template: Template, added: Sequence[str], stops: Sequence[str], beginning: str = "") -> None:
        self.template = template
        self._added = tuple(sorted({*added, *stops} - {beginning, ""}, key=len, reverse=True))
        self._stops, self._beginning = tuple(stop for stop in stops if stop), beginning
        self._headers: dict[tuple[bool, str], _Headers] = {}
        self._in_parts = False  # whether the template takes content as [{"type": "text", "text": …}] only
        self.ends = self._ends()

    def find(
        self,
        messages: Messages,
        tools: Tools | None = None,
        *,
        train: Literal["assistant", "last", "all"] = "assistant",
        options: dict[str, Any] | None = None,
        place: str = "",
    ) -> tuple[Rendered, list[Span]]:
        """The templated text and the spans of it that are trained, ascending and apart.

        Args:
            messages: of the conversation. A message of the assistant with "weight": 0 is not trained.
            tools: that may be called.
            train: all turns of the assistant, its last one, or the whole text.
            options: further variables of the template.
            place: where the record is from.

        Raises:
            DataError: the template refuses the conversation, leaves something out, or its turns can't be told apart.
        """
        rendered = self.render(messages, tools, options=options, place=place)
        if train == "all":
            return rendered, [(0, len(rendered.text))]
        chosen = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        chosen = [number for number in (chosen[-1:] if train == "last" else chosen) if messages[number].get("weight", 1) != 0]
        turns = _turns(rendered, messages, place)
        self._check_whole(rendered, messages, turns, place)
        headers = self._headers_of(tools, options or {}, place)
        if self.template.generations:
            spans = self._marked(rendered, set(chosen), headers)
        else:
            spans = []
            for number in chosen:
                if number in turns:
                    again = partial(self.render, messages[:number], tools, prompt=True, options=options, place=place)
                    spans.append(self._turn(rendered.text, turns[number], headers, again, f"{place}: message {number + 1}"))
        return rendered, [span for span in spans if span[0] < span[1]]

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Tools | None = None,
        *,
        prompt: bool = False,
        options: dict[str, Any] | None = None,
        place: str = "",
    ) -> Rendered:
        """As Template.render, with content in parts where the template wants it so."""
        if self._in_parts:
            messages = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
        return self.template.render(messages, tools, prompt=prompt, options=options, place=place)

    def _check_whole(self, rendered: Rendered, messages: Messages, turns: dict[int, Span], place: str) -> None:
        """Refuse what a template would do silently: leave out what the assistant says or the tools it calls, or write the answer of
        a tool into the assistant's turn (where the template does not mark what is generated)."""
        marked = bool(self.template.generations)
        for number, message in enumerate(messages):
            text = rendered.text[slice(*turns[number])] if number in turns else ""
            if message["role"] == "assistant":
                self._check_said(message, text, f"{place}: ", number + 1)
            elif number and not text and not marked and message["content"].strip() and _within(rendered.text, turns, messages, number):
                raise DataError(
                    f"{place}: the chat template writes message {number + 1} ({message['role']}) into the assistant's turn before it.",
                    remedy="use a chat template with {% generation %} around what the assistant says",
                    why="a message within the assistant's turn",
                )

    def _check_said(self, message: dict[str, Any], text: str, place: str, number: int) -> None:
        said = message["content"].rpartition("</think>")[2].strip()
        calls = message.get("tool_calls", ())
        if said and said not in text and not calls:
            raise DataError(
                f"{place}the chat template leaves out or changes what the assistant says in message {number}.",
                ask=repr(said[:60]),
                have=repr(text[:60]),
                remedy="use another chat template, or take such records out",
                why="words of the assistant that the template leaves out",
            )
        rest = text.replace(said, " ") if said else text
        for token in self._added if calls else ():
            rest = rest.replace(token, " ")  # <start_of_turn> holds an f, but calls no f
        for call in calls:
            if not re.search(rf"(?<!\w){re.escape(call['function']['name'])}(?!\w)", rest):
                raise DataError(
                    f"{place}the chat template leaves the tool call of message {number} out.",
                    have=f"a call of {call['function']['name']}",
                    remedy="use a model or a template that knows tools, or take such records out",
                    why="a tool call that the template leaves out",
                )

    def _marked(self, rendered: Rendered, chosen: set[int], headers: _Headers) -> list[Span]:
        """The template's own spans, without a header in them, and the token that ends the turn where it follows one."""
        spans: list[Span] = []
        for piece in rendered.pieces:
            if piece.generated and (piece.message in chosen or piece.message < 0):
                fitting = (header for header in headers if rendered.text.startswith(header, piece.start, piece.stop))
                head = len(next(fitting, ""))
                spans.append((piece.start + head, self._with_end(rendered.text, piece.start + head, piece.stop)))
        return spans

    def _turn(self, text: str, turn: Span, headers: _Headers, again: Callable[[], Rendered], place: str) -> Span:
        """The part of a turn that follows its header; `again` renders the prompt that the turn answers."""
        start, stop = turn
        if text.startswith(headers.prompt, start, stop):
            begin = start + len(headers.prompt)
        elif headers.base and text.startswith(headers.base, start, stop):
            begin = start + len(headers.base)
        elif text.endswith(headers.prompt, 0, start):
            begin = start  # the header stands at the end of what came before
        elif text.startswith(asked := again().text) and start <= len(asked) < stop:
            begin = len(asked)
        else:
            raise DataError(
                f"{place} begins otherwise than the template's generation prompt, so what is the assistant's can't be told.",
                ask=repr(headers.prompt),
                have=repr(text[start : start + 40]),
                remedy="use a chat template with {% generation %} around what the assistant says",
                why="a turn that begins otherwise than the generation prompt",
            )
        return begin, self._with_end(text, begin, stop)

    def _with_end(self, text: str, start: int, stop: int) -> int:
        """Where a turn ends that begins at `start` and is written up to `stop`: after its last token that ends something, without
        the line break behind it; or after a token that stops a generation and stands right behind it."""
        core = text[start:stop].rstrip()
        while self._beginning and core.endswith(self._beginning) and not core.endswith(self._stops):
            core = core[: -len(self._beginning)].rstrip()
        if core.endswith(self._added):
            return start + len(core)
        for stopper in self._stops:
            if text.startswith(stopper, stop):
                return stop + len(stopper)
        return stop

    def _headers_of(self, tools: Tools | None, options: dict[str, Any], place: str) -> _Headers:
        key = (tools is not None, repr(sorted(options.items())) if options else "")
        if key not in self._headers:
            self._headers[key] = self._probe(tools, options, place)
        return self._headers[key]

    def _probe(self, tools: Tools | None, options: dict[str, Any], place: str) -> _Headers:
        user, answer = {"role": "user", "content": _ASK}, {"role": "assistant", "content": _ANSWER}
        without = self.render([user], tools, options=options, place=place).text
        prompted = self.render([user], tools, prompt=True, options=options, place=place).text
        prompt = prompted[self._whole(prompted, _alike(without, prompted)) :]
        talk = [dict(user), dict(answer), dict(user), dict(answer)]
        rendered = self.render(talk, tools, options=options, place=place)
        turns = _turns(rendered, tuple(talk), place)
        if 1 not in turns or 3 not in turns:
            raise ModelError(
                "The chat template gives no sign of which message it is writing.",
                have=repr(rendered.text[:80]),
                remedy="use a template with a loop over messages, or with {% generation %} around what the assistant says",
            )
        befores = [rendered.text[slice(*turns[number])].partition(_ANSWER)[0] for number in (1, 3)]
        base = prompt[: min(_alike(prompt, before) for before in befores)]
        return _Headers(prompt, base[: self._whole(base, len(base))] if prompt else "")

    def _whole(self, text: str, cut: int) -> int:
        """A place to cut a text at or before `cut` that lies in no added token, whole or begun."""
        for token in (*self._added, self._beginning):
            for back in range(1, min(len(token), cut + 1)):
                if token and text.startswith(token[: len(text) - cut + back], cut - back) and len(token) > back:
                    return self._whole(text, cut - back)
        return cut

    def _ends(self) -> bool:
        """Whether the assistant's turns end with a token: else the model is never taught to stop."""
        talk = ({"role": "user", "content": _ASK}, {"role": "assistant", "content": _ANSWER})
        for self._in_parts in (False, True):
            try:
                rendered, spans = self.find(talk)
                return bool(spans) and rendered.text[slice(*spans[-1])].endswith((*self._added, *self._stops))
            except DataError:
                continue
        self._in_parts = False
        return False


def _alike(first: str, second: str) -> int:
    """How many characters two texts share at the beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((number for number, (one, other) in pairs if one != other), min(len(first), len(second)))


def _turns(rendered: Rendered, messages: Messages, place: str) -> dict[int, Span]:
    """What was written for each message, as one span (blank parts at its edges left out if they are apart)."""
    found: dict[int, Span] = {}
    for piece in rendered.pieces:
        if piece.message < 0 or not rendered.text[piece.start : piece.stop].strip():
            continue
        before = found.get(piece.message)
        if before is not None and before[1] != piece.start and not _own(rendered, piece, before):
            raise DataError(
                f"{place}: the chat template writes message {piece.message + 1} in two places.",
                have=f"messages of {', '.join(message['role'] for message in messages)}",
                remedy="use a chat template that writes each message once",
            )
        found[piece.message] = (piece.start if before is None else before[0], piece.stop)
    return found


def _own(rendered: Rendered, piece: Piece, before: Span) -> bool:
    """Whether only blanks of nobody else stand between two parts of a message."""
    return not rendered.text[before[1] : piece.start].strip()


def _within(text: str, turns: dict[int, Span], messages: Messages, number: int) -> bool:
    """Whether what a message says stands in a turn of the assistant before it."""
    said = messages[number]["content"]
    earlier = [each for each in turns if each < number and messages[each]["role"] == "assistant" and said not in messages[each]["content"]]
    return any(said in text[slice(*turns[each])] for each in earlier)

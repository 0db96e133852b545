"""The chat template of a tokenizer, with the knowledge which part of the text came from which message.

The prefix method (render one message less and compare) is wrong for templates that rewrite what came before: Qwen3 takes the
thinking out of earlier turns, GPT-OSS ends the last turn otherwise. So the template itself is asked: its syntax tree gets a call
at the start of each `for` body and after each loop, which says which message is in hand, and writes one mark where that
changes. Nothing else of the template changes, so the text without its marks is what transformers renders. Templates with
`{% generation %}` say themselves what is generated; their blocks are marked in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, NamedTuple

from rolecall.protocols.errors import DataError, ModelError

if TYPE_CHECKING:
    from jinja2 import nodes
    from transformers import PreTrainedTokenizerBase

MARK = "\ufdd0"  # a code point that Unicode keeps free for such uses
NOBODY = -1
_RECORDER = "rolecall_recorder"


class Piece(NamedTuple):
    """A part of the rendered text."""

    start: int  # characters
    stop: int
    message: int  # which message it came from; -1: none
    generated: bool  # within {% generation %}


class Rendered(NamedTuple):
    """A templated conversation."""

    text: str
    pieces: list[Piece]  # they tile the text


class _Recorder:
    """Follows the loops of a template while it renders."""

    def __init__(self, messages: Sequence[dict[str, Any]]) -> None:
        self.states: list[tuple[int, bool]] = []  # (message, generated) after each mark
        self._number = {id(message): number for number, message in enumerate(messages)}
        self._loops: list[tuple[int, int]] = []  # (loop, message) of the loops over messages that are open
        self._generated = False

    def begin(self, item: object, loop: int) -> str:
        message = self._number.get(id(item), NOBODY)
        if message == NOBODY:
            return ""
        if len(self._loops) == 1 and self._loops[0][0] == loop:  # as nearly always
            self._loops[0] = loop, message
        else:
            self._leave(loop)
            self._loops.append((loop, message))
        self.states.append((message, self._generated))
        return MARK

    def end(self, loop: int) -> str:
        return self._mark() if self._leave(loop) else ""

    def generation(self, inside: bool) -> str:
        self._generated = inside
        return self._mark()

    def _leave(self, loop: int) -> bool:
        for depth, (number, _) in enumerate(self._loops):
            if number == loop:
                del self._loops[depth:]
                return True
        return False

    def _mark(self) -> str:
        self.states.append((self._loops[-1][1] if self._loops else NOBODY, self._generated))
        return MARK


class Template:
    """One chat template, ready to render.

    Args:
        tokenizer: whose special tokens the template may name.
        source: the template's text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        from jinja2 import Template as Compiled
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._special = dict(tokenizer.special_tokens_map)
        try:
            environment = _compile_jinja_template(source).environment
            tree = environment.parse(source)
            self.generations = _instrument(tree)  # how many {% generation %} blocks it has
            tree.set_environment(environment)
            for name, method in (("begin", _Recorder.begin), ("end", _Recorder.end), ("generation", _Recorder.generation)):
                environment.filters[f"rolecall_{name}"] = _of_recorder(method)
            _quicken(environment)
            code = environment.compile(tree)
            self._template = Compiled.from_code(environment, code, environment.make_globals(None))
            self._template.globals = dict(self._template.globals)  # a chain of dictionaries is copied slowly, at each rendering
        except TemplateError as error:
            raise ModelError(
                f"The chat template of {tokenizer.name_or_path} is broken: {error}.",
                remedy="repair chat_template.jinja in the model folder",
            ) from error

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        prompt: bool = False,
        options: dict[str, Any] | None = None,
        place: str = "",
    ) -> Rendered:
        """The text of a conversation, and which message each part of it is from.

        Args:
            messages: all distinct objects.
            tools: that may be called.
            prompt: add the beginning of the assistant's next turn.
            options: further variables of the template; with "today" (an ISO date), templates that write the date write this one.
            place: where the record is from.

        Raises:
            DataError: the template refuses the messages, or fails at them.
        """
        recorder = _Recorder(messages)
        context = {**self._special, **(options or {}), "messages": list(messages), "tools": None if tools is None else list(tools)}
        if options and "today" in options:
            context["strftime_now"] = _date(options["today"]).strftime
        try:
            marked = self._template.render({**context, "documents": None, "add_generation_prompt": prompt, _RECORDER: recorder})
        except Exception as error:  # the template's own code runs here: it may raise anything
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"{place}: the chat template refuses the conversation: {type(error).__name__}: {error}.",
                have=f"messages of {roles}",
                remedy="bring the messages into the order that the template wants, or take the record out",
                why="refused by the chat template",
            ) from error
        parts = marked.split(MARK)
        if len(parts) != len(recorder.states) + 1:
            raise DataError(
                f"{place}: the conversation holds the character U+FDD0, which is no text.",
                remedy="take it out",
                why="a character that is no text",
            )
        return _tile(parts, recorder.states)


def _of_recorder(method: Callable[..., str]) -> Callable[..., str]:
    """A method of the recorder of this rendering, as a filter of the template."""
    from jinja2 import pass_context

    @pass_context
    def call(context: Any, *arguments: Any) -> str:
        return method(context.parent[_RECORDER], *arguments)

    return call


def _date(given: Any) -> date:
    try:
        return date.fromisoformat(given)
    except (TypeError, ValueError) as error:
        raise DataError("The option today is no date.", ask=repr(given), remedy='write it as "2026-01-31"', why="no date") from error


def _quicken(environment: Any) -> None:
    """Spare the sandbox its long look at `loop.first` and the like; its answer is the same."""
    from jinja2.runtime import LoopContext

    thorough = environment.getattr

    def quick(item: Any, name: str) -> Any:
        if type(item) is LoopContext and not name.startswith("_") and hasattr(item, name):
            return getattr(item, name)
        return thorough(item, name)

    environment.getattr = quick


def _tile(parts: list[str], states: list[tuple[int, bool]]) -> Rendered:
    pieces: list[Piece] = []
    position = begin = 0
    before = (NOBODY, False)
    for part, state in zip(parts, [before, *states], strict=True):
        if part:
            if state != before and position > begin:
                pieces.append(Piece(begin, position, *before))
                begin = position
            before = state
            position += len(part)
    if position > begin:
        pieces.append(Piece(begin, position, *before))
    return Rendered("".join(parts), pieces)


def _instrument(tree: nodes.Template) -> int:
    """Put the calls into a syntax tree; the number of {% generation %} blocks found.

    What is captured (macros, {% set %} blocks, filter blocks) is left alone: marks there could be cut, counted or thrown away.
    """
    from jinja2 import nodes

    found = 0
    loops = 0

    def say(name: str, value: nodes.Expr, *arguments: nodes.Expr) -> nodes.Output:
        return nodes.Output([nodes.Filter(value, name, list(arguments), [], None, None)])  # a filter: the sandbox does not slow it

    def walk(node: Any) -> None:
        nonlocal found, loops
        for field in ("body", "else_", "elif_"):
            block = getattr(node, field, None)
            if not isinstance(block, list):
                continue
            changed: list[nodes.Node] = []
            for each in block:
                if _is_generation(each):
                    found += 1
                    inside = nodes.Scope(each.body)
                    walk(inside)
                    changed += [say("rolecall_generation", nodes.Const(True)), inside, say("rolecall_generation", nodes.Const(False))]
                    continue
                if isinstance(each, nodes.Macro | nodes.AssignBlock | nodes.CallBlock | nodes.FilterBlock):
                    changed.append(each)
                    continue
                walk(each)
                changed.append(each)
                if isinstance(each, nodes.For) and isinstance(each.target, nodes.Name):
                    loops += 1
                    each.body.insert(0, say("rolecall_begin", nodes.Name(each.target.name, "load"), nodes.Const(loops)))
                    changed.append(say("rolecall_end", nodes.Const(loops)))
            setattr(node, field, changed)

    walk(tree)
    for node in tree.find_all(nodes.Node):
        if node.lineno is None:
            node.lineno = 1
    return found


def _is_generation(node: Any) -> bool:
    call = getattr(node, "call", None)
    return type(node).__name__ == "CallBlock" and getattr(getattr(call, "node", None), "name", "") == "_generation_support"

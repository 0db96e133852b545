"""Messages in one form: OpenAI's, ShareGPT's, with content in parts, tool calls as text or objects, tools as text or objects.

What vLLM's chat server does to messages before it templates them is done here too, so that training sees the ids that serving
does: parts of text are joined by line breaks, content that is null becomes "", arguments of tool calls become objects.
"""

from __future__ import annotations

from typing import Any

import msgspec
from rolecall.protocols.errors import DataError

Messages = tuple[dict[str, Any], ...]
Tools = tuple[dict[str, Any], ...]

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_ROLES |= {"observation": "tool", "function_response": "tool", "tool_response": "tool"}
_CALLS = ("function_call", "tool_call")  # ShareGPT's "from" of a turn that is a call
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # what templates call what the assistant thinks
_WHO, _WHAT = ("role", "from", "speaker"), ("content", "value", "text")


def is_messages(value: Any) -> bool:
    """Whether a value can be meant as a list of messages: a list (or array) of objects."""
    listed = isinstance(value, list | tuple) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1)
    return listed and len(value) > 0 and all(isinstance(each, dict) for each in value)


def messages_of(value: Any, place: str, column: str, tools: Tools | None = None) -> Messages:
    """The messages of a record, in one form.

    Args:
        value: a list of objects with role and content, or from and value; or such a list as JSON.
        place: where the record is from.
        column: what it is called there.
        tools: what may be called; tells which null arguments are only the filling of a table.

    Raises:
        DataError: it is no such list, it is empty, or a message has no role, no content, or content that is no text.
    """
    value = _from_json(value, place, column) if isinstance(value, str) else value
    if _is_empty(value) and not isinstance(value, dict):
        raise DataError(f"{place}: the conversation in {column!r} is empty.", remedy="take the record out", why="an empty conversation")
    if not is_messages(value):
        raise DataError(
            f"{place}: {column!r} holds no list of messages.",
            have=f"{type(value).__name__} {str(value)[:60]!r}",
            remedy='write [{"role": "user", "content": "…"}, …]',
            why="no list of messages",
        )
    messages = tuple(_plain(each) or _message(each, f"{place}, message {number}", tools) for number, each in enumerate(value, start=1))
    if all(message["role"] in ("system", "developer") for message in messages):
        raise DataError(
            f"{place}: the conversation in {column!r} holds only a system message.",
            remedy="take the record out",
            why="only a system message",
        )
    return messages


def tools_of(value: Any, place: str) -> Tools | None:
    """The tools of a record as JSON schemas of functions; None where there are none. They may come as JSON.

    Raises:
        DataError: they are no list of objects with a name.
    """
    value = _from_json(value, place, "tools") if isinstance(value, str) and value.strip() else value
    if value is None or _is_empty(value):
        return None
    if isinstance(value, dict):
        value = [value]
    if not is_messages(value):
        raise DataError(
            f"{place}: the tools are no list of objects.", have=f"{type(value).__name__} {str(value)[:60]!r}", why="tools of a wrong type"
        )
    return tuple(_tool(_without_nulls(each), place) for each in value)


def split_shared(prompt: Any, chosen: Any, rejected: Any, place: str) -> tuple[Any, Any, Any]:
    """The prompt of two answers and the two answers, where prompt may be None or be repeated at the start of both.

    Raises:
        DataError: there is no prompt and the two conversations don't begin alike, or one says nothing after it.
    """
    texts = isinstance(chosen, str)
    shared = 0
    if not texts:
        same = [one == other for one, other in zip(chosen, rejected, strict=False)]
        shared = next((number for number, equal in enumerate(same) if not equal), len(same))
        while shared and (chosen[shared - 1]["role"] == "assistant" or shared == min(len(chosen), len(rejected))):
            shared -= 1  # the answer itself, however it begins, belongs to the two sides
    if prompt is None:
        if not texts and shared == 0:
            raise DataError(
                f"{place}: there is no prompt, and the chosen and the rejected conversation don't begin with the same message.",
                remedy="add a column prompt, or begin both with the user's message",
                why="no prompt",
            )
        prompt, begin = ("", 0) if texts else (chosen[:shared], shared)
    else:
        begin = 0 if texts else _repeated(prompt, chosen, rejected)
        prompt = prompt if texts or begin <= len(prompt) else chosen[:begin]
    chosen, rejected = chosen[begin:], rejected[begin:]
    if not chosen or not rejected:
        side = "rejected" if chosen else "chosen"
        raise DataError(f"{place}: the {side} answer is empty.", remedy="take the record out, or give both answers", why="an empty answer")
    return prompt, chosen, rejected


def _repeated(prompt: Messages, chosen: Messages, rejected: Messages) -> int:
    """How many messages of both sides only repeat the prompt (a system message before it may be in the prompt alone)."""
    for start in range(len(prompt)):
        rest = prompt[start:]
        if all(prompt[before]["role"] == "system" for before in range(start)) and chosen[: len(rest)] == rest == rejected[: len(rest)]:
            return len(rest)
    return 0


def _plain(given: dict[str, Any]) -> dict[str, Any] | None:
    """A message that has the form already, as most have; None where it must be looked at."""
    role, content = given.get("role"), given.get("content")
    if len(given) == 2 and type(role) is str and type(content) is str and role not in _ROLES and role not in _CALLS:
        return {"role": role, "content": content}
    return None


def _message(given: dict[str, Any], place: str, tools: Tools | None) -> dict[str, Any]:
    who = next((name for name in _WHO if given.get(name) is not None), None)
    if who is None or not isinstance(given[who], str):
        raise DataError(
            f"{place}: it has no role.",
            have=", ".join(map(str, given)) or "no field at all",
            remedy='give it a "role"',
            why="a message without a role",
        )
    what = next((name for name in _WHAT if given.get(name) is not None), None)
    role, content = given[who], None if what is None else given[what]
    more = {name: value for name, value in given.items() if name not in (who, *_WHAT) and value is not None}
    if role in _CALLS:
        role, content, more["tool_calls"] = "assistant", "", _from_json(content, place, "value") if isinstance(content, str) else content
    calls = _calls(more.pop("tool_calls", None), place, tools)
    thought = next((more[name] for name in THOUGHTS if isinstance(more.get(name), str) and more[name]), None)
    if thought is not None:
        more |= dict.fromkeys(THOUGHTS, thought)  # whichever name the template knows
    if content is None and not calls and thought is None:
        raise DataError(
            f"{place}: it has no content.", have=", ".join(map(str, given)), remedy='give it a "content"', why="a message without content"
        )
    message = {"role": _ROLES.get(role, role), "content": _content(content, place), **more}
    if calls:
        message["tool_calls"] = calls
    return message


def _content(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, dict):
        content = [content]
    if is_messages(content):
        other = {str(part.get("type", "?")) for part in content if not isinstance(part.get("text"), str)}
        if not other:
            return "\n".join(part["text"] for part in content)
        raise DataError(
            f"{place}: its content has parts that are no text.",
            have=", ".join(sorted(other)),
            remedy="take images and sounds out",
            why="content that is no text",
        )
    if _is_empty(content):
        return ""
    raise DataError(
        f"{place}: its content is no text.",
        have=f"{type(content).__name__} {str(content)[:60]!r}",
        remedy="make it a text",
        why="content that is no text",
    )


def _calls(given: Any, place: str, tools: Tools | None) -> list[dict[str, Any]]:
    given = _from_json(given, place, "tool_calls") if isinstance(given, str) else given
    if given is None or _is_empty(given):
        return []
    if isinstance(given, dict):
        given = [given]
    if not is_messages(given):
        raise DataError(
            f"{place}: its tool calls are no list of objects.",
            have=f"{type(given).__name__} {str(given)[:60]!r}",
            why="tool calls of a wrong type",
        )
    declared = {tool["function"].get("name"): tool["function"].get("parameters") or {} for tool in tools or ()}
    found = []
    for call in given:
        function = call["function"] if isinstance(call.get("function"), dict) else call
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise DataError(
                f"{place}: a tool call names no function.", have=str(call)[:80], remedy='give it a "name"', why="a tool call without a name"
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _from_json(arguments, place, "arguments") if arguments.strip() else {}
        elif isinstance(arguments, dict) and name in declared:  # a table gives every call the arguments of all functions
            known = declared[name].get("properties") or {}
            arguments = {key: value for key, value in arguments.items() if value is not None or key in known}
        more = {key: value for key, value in call.items() if key in ("id", "type") and value is not None}
        found.append({"type": "function", **more, "function": {"name": name, "arguments": {} if arguments is None else arguments}})
    return found


def _tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    """As vLLM's chat server hands it to the template: these fields in this order, null where there is none, others left out."""
    function = tool.get("function") if isinstance(tool.get("function"), dict) else tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{place}: a tool has no name.", have=str(tool)[:80], remedy='write {"name": …, "parameters": …}', why="a tool without a name"
        )
    fields: dict[str, Any] = {"name": None, "description": None, "parameters": None}
    fields |= {name: value for name, value in function.items() if name in (*fields, "strict")}
    return {"type": "function", "function": fields}


def _without_nulls(value: Any) -> Any:
    """Without the nulls that a table fills in where a field is missing."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    if isinstance(value, list | tuple) or hasattr(value, "tolist"):
        return [_without_nulls(each) for each in value]
    return value


def _is_empty(value: Any) -> bool:
    """Whether a value is a list (or array, object, text) without anything in it."""
    return hasattr(value, "__len__") and len(value) == 0


def options_of(value: Any, place: str) -> dict[str, Any]:
    """Further variables of the chat template, from an object or from JSON; nulls are left out.

    Raises:
        DataError: they are no object.
    """
    value = _from_json(value, place, "options") if isinstance(value, str) and value.strip() else value
    if value is None or _is_empty(value):
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise DataError(
            f"{place}: the options of the chat template are no object.", have=f"{type(value).__name__}", why="options of a wrong type"
        )
    return {name: each for name, each in value.items() if each is not None}


def _from_json(text: str, place: str, column: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise DataError(
            f"{place}: {column!r} is a text that is no JSON: {error}.", have=repr(text[:60]), why="no JSON in a column"
        ) from error

"""TOML for configurations: on which line each key stands, and how to write a struct."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import msgspec
from rolecall.actors.config.fields import NONE, Path


def key_lines(text: str) -> dict[Path, int]:
    """Path of every key and list item in a valid TOML text → its line, from 1."""
    found: dict[Path, int] = {}
    counts: dict[Path, int] = {}  # tables seen so far of each [[array of tables]]
    prefix: Path = ()
    lines = iter(enumerate(text.split("\n"), 1))
    for number, line in lines:
        bare = line.strip()
        if not bare or bare.startswith("#"):
            continue
        if bare.startswith("["):
            is_array = bare.startswith("[[")
            *parents, last = _only_path(tomllib.loads(line))
            prefix = (*_indexed(tuple(parents), counts), last)
            if is_array:
                counts[prefix] = counts.get(prefix, 0) + 1
                found.setdefault(prefix, number)
            prefix = _indexed_last(prefix, counts)
            for size in range(1, len(prefix) + 1):
                found.setdefault(prefix[:size], number)
            continue
        statement = line
        while (parsed := _parsed(statement)) is None:  # a value over several lines
            statement += "\n" + next(lines)[1]
        for path in _paths(parsed):
            found.setdefault(prefix + path, number)
    return found


def _parsed(statement: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(statement)
    except tomllib.TOMLDecodeError:
        return None


def _only_path(header: dict[str, Any]) -> Path:
    path: Path = ()
    value: Any = header
    while value:
        value = value[0] if isinstance(value, list) else value
        if value:
            name, value = next(iter(value.items()))
            path = (*path, name)
    return path


def _indexed(path: Path, counts: dict[Path, int]) -> Path:
    """`path` with the index of the newest table after the name of each array of tables."""
    result: Path = ()
    for name in path:
        result = _indexed_last((*result, name), counts)
    return result


def _indexed_last(path: Path, counts: dict[Path, int]) -> Path:
    return (*path, counts[path] - 1) if path in counts else path


def _paths(value: Any) -> Iterator[Path]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in items:
        yield (name,)
        yield from ((name, *rest) for rest in _paths(each))


def written(value: msgspec.Struct) -> str:
    """The struct as TOML: single values first, then a table for each struct, `[[...]]` for lists of structs."""
    return "\n".join(_table(value, "")).strip() + "\n"


def _table(value: msgspec.Struct, name: str) -> Iterator[str]:
    later: list[tuple[str, Any]] = []
    for field in value.__struct_fields__:
        item = getattr(value, field)
        if isinstance(item, msgspec.Struct) or _is_struct_list(item):
            later.append((field, item))
        else:
            yield f"{field} = {_inline(item)}"
    for field, item in later:
        path = f"{name}.{field}" if name else field
        for each in [item] if isinstance(item, msgspec.Struct) else item:
            yield f"\n[{path}]" if isinstance(item, msgspec.Struct) else f"\n[[{path}]]"
            yield from _table(each, path)


def _is_struct_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(each, msgspec.Struct) for each in value)


def _inline(value: Any) -> str:
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_inline(each) for each in value) + "]"
    if isinstance(value, msgspec.Struct):
        value = {name: getattr(value, name) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(name)} = {_inline(each)}" for name, each in value.items()) + "}"
    return _inline(msgspec.to_builtins(value))


def _text(value: str) -> str:
    # JSON's escapes are TOML's too, but for DEL, which TOML wants escaped.
    return re.sub("\x7f", r"\\u007f", json.dumps(value, ensure_ascii=False))

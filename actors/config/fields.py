"""What a configuration struct says of its fields: their types, in words too, and their documentation."""

from __future__ import annotations

import difflib
import inspect
import io
import re
import tokenize
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo, fields

Path = tuple[str | int, ...]  # of a value in the tree: field names, keys and list indices
NONE = "none"  # stands for None in TOML and on the command line, for fields that may be None


def unwrap(hint: Any) -> tuple[Any, bool]:
    """`hint` without Annotated and without `| None`; and whether it had `| None`."""
    optional = False
    while True:
        origin = get_origin(hint)
        if origin is Annotated:
            hint = get_args(hint)[0]
        elif origin in (Union, types.UnionType) and type(None) in get_args(hint):
            rest = [each for each in get_args(hint) if each is not type(None)]
            hint, optional = (rest[0] if len(rest) == 1 else Union[tuple(rest)]), True  # noqa: UP007
        else:
            return hint, optional


def is_struct(hint: Any) -> bool:
    """Whether the type is a msgspec Struct: a group of fields."""
    return isinstance(hint, type) and issubclass(hint, msgspec.Struct)


def item_type(hint: Any) -> Any:
    """Type of the items of a list type, or tuple of any length; None for every other type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is list or (origin is tuple and len(arguments) == 2 and arguments[1] is ...):
        return arguments[0]
    return Any if hint in (list, tuple) else None


def is_list_of_structs(hint: Any) -> bool:
    """Whether the type is a list or tuple of Structs, such as `tuple[Pool, ...]`."""
    item = item_type(hint)
    return item is not None and is_struct(unwrap(item)[0])


def field_map(kind: type[msgspec.Struct]) -> dict[str, FieldInfo]:
    """Field name → what msgspec knows of it, in order."""
    return {field.name: field for field in fields(kind)}


def default_of(field: FieldInfo) -> Any:
    """The field's default as a plain value (Structs as dicts); the field must have one."""
    return msgspec.to_builtins(field.default_factory() if field.default is msgspec.NODEFAULT else field.default)


def defaults(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Field name → default, of the fields that have one."""
    return {name: default_of(field) for name, field in field_map(kind).items() if not field.required}


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "a table", Any: "a value"}
PLURALS = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}


def words(hint: Any) -> str:
    """The type as a user may read it: "a whole number", "a list of texts"."""
    hint, optional = unwrap(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        said = "one of " + ", ".join(repr(each) for each in arguments)
    elif (item := item_type(hint)) is not None:
        said = "a list" if item is Any else f"a list of {PLURALS.get(unwrap(item)[0], 'tables' if is_list_of_structs(hint) else 'values')}"
    elif origin is tuple:
        said = f"a list of {len(arguments)}: " + ", ".join(words(each) for each in arguments)
    elif origin in (Union, types.UnionType):
        said = " or ".join(words(each) for each in arguments)
    elif origin is dict or is_struct(hint):
        said = "a table"
    else:
        said = WORDS.get(hint, getattr(hint, "__name__", str(hint)))
    return f'{said}, or "{NONE}"' if optional else said


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`; "" where none is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), "")


def leaves(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, FieldInfo, type[msgspec.Struct]]]:
    """Every field under `kind` as (dotted name, field, struct it is in); `<name>` stands for an item of a list."""
    for name, field in field_map(kind).items():
        hint, _ = unwrap(field.type)
        if is_struct(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        elif is_list_of_structs(hint):
            yield from leaves(unwrap(item_type(hint))[0], f"{prefix}{name}.<name>.")
        else:
            yield f"{prefix}{name}", field, kind


def described(kind: type[msgspec.Struct]) -> dict[str, str]:
    """Field name → its line of documentation.

    Taken from `Annotated[..., msgspec.Meta(description=...)]`, else from "Args:" in the struct's docstring, else from the
    comment after the field.
    """
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_struct(base) and base is not msgspec.Struct:
            texts.update(_comments(base))
    texts.update(_docstring_arguments(inspect.getdoc(kind) or ""))
    for name, field in field_map(kind).items():
        for extra in get_args(field.type)[1:] if get_origin(field.type) is Annotated else ():
            if isinstance(extra, msgspec.Meta) and extra.description:
                texts[name] = extra.description
    return texts


def _comments(kind: type[msgspec.Struct]) -> dict[str, str]:
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return {}
    texts: dict[str, str] = {}
    name = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc(source)).readline):
            if token.type == tokenize.NEWLINE:
                name = ""
            elif token.type == tokenize.NAME and not name:
                name = token.string
            elif token.type == tokenize.COMMENT and name:
                texts.setdefault(name, token.string.lstrip("# ").strip())
    except (tokenize.TokenError, IndentationError):
        return {}
    return texts


def _docstring_arguments(text: str) -> dict[str, str]:
    _, found, section = text.partition("\nArgs:\n")
    texts: dict[str, str] = {}
    name, margin = "", None
    for line in section.splitlines() if found else ():
        indent = len(line) - len(line.lstrip())
        margin = indent if margin is None else margin
        if line.strip() and indent < margin:
            break
        if entry := re.match(r"\s*(\w+):\s*(.*)", line) if indent == margin else None:
            name, texts[entry[1]] = entry[1], entry[2]
        elif name and line.strip():
            texts[name] += " " + line.strip()
    return texts


def dotted(path: Path) -> str:
    """A path as users write it: `policy.learning_rate`, `pools.0.members`."""
    return ".".join(str(part) for part in path)

"""What a message type looks like, boiled down to 64 bits: two programs that disagree on a message notice before it is read.

The fingerprint of a type is a hash of its name, its fields with their types, Specs and whether they may be left out, and
its code lists (`FINISH`, `STATUS`). It does not depend on the Python version or on where the class is defined.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
import xxhash
from rolecall.protocols.arrays import Spec
from rolecall.protocols.base import Message

PROTOCOL = 2  # raised by hand whenever a message of ours changes; only a word for people, the fingerprint decides


@dataclass(frozen=True, slots=True)
class Declared:
    """One field with a Spec."""

    name: str
    spec: Spec
    form: str  # "array", "tuple" or "columns" (a dict of tuples)
    optional: bool
    dtype: np.dtype[Any] | None  # of an array
    letters: tuple[tuple[str, int], ...]  # of each dimension: letter and what is added to it; ("", size) for a fixed size


@cache
def declared(kind: type) -> tuple[Declared, ...]:
    """The fields of a message type that carry a Spec, in order.

    Raises:
        TypeError: a field of the class is an array without a Spec (a mistake in the class, not in a message).
    """
    found = []
    for name, hint in _hints(kind).items():
        options = typing.get_args(hint) if _is_union(hint) else (hint,)
        spec = next((item for option in (hint, *options) for item in getattr(option, "__metadata__", ()) if isinstance(item, Spec)), None)
        bare = [typing.get_args(option)[0] if typing.get_origin(option) is Annotated else option for option in options]
        if spec is None and np.ndarray in bare:
            raise TypeError(f"{kind.__name__}.{name} is an array without a Spec: annotate it with its dtype and shape letters")
        if spec is not None:
            form = "array" if np.ndarray in bare else "columns" if any(typing.get_origin(item) is dict for item in bare) else "tuple"
            letters = tuple(
                ("", int(word)) if word.isdigit() else (word.removesuffix("+1"), int(word.endswith("+1"))) for word in spec.shape.split()
            )
            dtype = np.dtype(spec.dtype) if form == "array" else None
            found.append(Declared(name, spec, form, types.NoneType in bare, dtype, letters))
    return tuple(found)


@cache
def fingerprint(kind: type) -> int:
    """64-bit hash of what `describe` says."""
    return xxhash.xxh3_64_intdigest(describe(kind).encode())


@cache
def describe(kind: type) -> str:
    """A message type in one canonical line: the text that is hashed, and the one to compare when two sides disagree."""
    required = {field.name: field.required for field in msgspec.structs.fields(kind)}
    fields = [f"{name}{'' if required[name] else '?'}:{_word(hint)}" for name, hint in _hints(kind).items()]
    codes = [f"{name}={value!r}" for name, value in sorted(_codes(kind).items())]
    return f"{kind.__name__}({', '.join(fields + codes)})"


def find(wanted: int) -> type[Message] | None:
    """The message type known here under this fingerprint."""
    if wanted not in _known:
        _known.update({fingerprint(kind): kind for kind in _kinds(Message)})
    return _known.get(wanted)


def named(name: str) -> type[Message] | None:
    """The message type known here under this name."""
    return next((kind for kind in reversed(_kinds(Message)) if kind.__name__ == name), None)


_known: dict[int, type[Message]] = {}


def _kinds(base: type[Message]) -> list[type[Message]]:
    found: list[type[Message]] = []
    for kind in base.__subclasses__():
        found += [kind, *_kinds(kind)]
    return found


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in msgspec.structs.fields(kind)}


def _codes(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {name: getattr(kind, name) for name, hint in hints.items() if typing.get_origin(hint) is ClassVar and name.isupper()}


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _word(hint: Any) -> str:
    """One type in canonical words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        specs = [f"@{item.dtype}[{item.shape}]{item.rule}" for item in hint.__metadata__ if isinstance(item, Spec)]
        return _word(args[0]) + "".join(specs)
    if _is_union(hint):
        return "|".join(sorted(_word(item) for item in args))
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return f"[{_word(args[0])}]"
    if origin is not None:
        return f"{origin.__name__}<{','.join(_word(item) for item in args)}>"
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return describe(hint)
    words: dict[Any, str] = {types.NoneType: "null", Any: "any", np.ndarray: "array"}
    return words[hint] if hint in words else str(getattr(hint, "__name__", repr(hint)))

"""Does a message make sense? First what its Specs say of dtypes, sizes and rules, then what the message itself knows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from rolecall.protocols.base import Message
from rolecall.protocols.errors import MessageError
from rolecall.protocols.schema import Declared, declared

Array = np.ndarray
Sizes = dict[str, tuple[int, str]]  # letter → (size, field that said so)

ABOVE_ZERO = 1e-3  # nats: a logprob is at most 0, but rounding in an engine may lift it a little


def check(message: Message) -> None:
    """Verify a message whose fields have their declared Python types (as decoding makes sure of).

    Raises:
        MessageError: names the message, the field (`field`) and what is wrong.
    """
    name = type(message).__name__
    sizes: Sizes = {}
    for field in declared(type(message)):
        value = getattr(message, field.name)
        if value is not None or not field.optional:
            _field(name, field, value, sizes)
    for where, fault in message.faults():
        raise wrong(name, where, fault)


def wrong(message: str, field: str, fault: str) -> MessageError:
    """The error for a field; its text begins with message and field."""
    return MessageError(f"{message}.{field} {fault}.", kind=message, field=field)


def _field(message: str, field: Declared, value: Any, sizes: Sizes) -> None:
    if field.form == "array":
        if not isinstance(value, np.ndarray):
            raise wrong(message, field.name, f"is a {type(value).__name__}, must be a numpy array")
        if value.dtype != field.dtype and value.dtype.newbyteorder("=") != field.dtype:
            raise wrong(message, field.name, f"is {value.dtype}, must be {field.dtype}: convert it where you know that nothing is lost")
        _sizes(message, field.name, field, value.shape, sizes)
        if field.spec.rule:
            _rule(message, field, value)
    elif field.form == "tuple":
        _sizes(message, field.name, field, (len(value),), sizes)
    else:
        for name, column in value.items():
            _sizes(message, f"{field.name}[{name!r}]", field, (len(column),), sizes)


def _sizes(message: str, name: str, field: Declared, shape: tuple[int, ...], sizes: Sizes) -> None:
    """Unify the sizes of a field with those of the fields before it."""
    if len(field.letters) != len(shape):
        raise wrong(message, name, f"has {len(shape)} dimensions, must have {len(field.letters)} ({field.spec.shape})")
    for (letter, more), size in zip(field.letters, shape, strict=True):
        known, source = sizes.setdefault(letter, (size - more, name)) if letter else (0, "its Spec")
        if size != known + more or known < 0:
            raise wrong(message, name, f"has {size} entries, but {source} says that there are {known + more} ({field.spec.shape})")


def _rule(message: str, field: Declared, value: Array) -> None:
    if field.spec.rule == "offsets":
        if len(value) == 0 or value[0] != 0 or (value[1:] < value[:-1]).any():
            raise wrong(message, field.name, "are no offsets: they must start at 0 and never fall")
    elif value.size:
        low, high = value.min(), value.max()  # NaN if there is one; quicker than `isfinite` of each, and nothing is allocated
        if not (low > -math.inf and high < math.inf):
            raise wrong(message, field.name, f"has {int((~np.isfinite(value)).sum())} entries that are not finite")
        if field.spec.rule == "nats" and high > ABOVE_ZERO:
            raise wrong(message, field.name, f"has logprobs above 0 (up to {float(high):.4g})")

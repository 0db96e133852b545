"""Plain data: what messages can carry between processes (numbers, texts, lists, dictionaries)."""

from __future__ import annotations

from typing import Any

import msgspec


def plain(value: object) -> object:
    """Encoding hook of msgspec: numpy's scalars and arrays as Python's.

    Raises:
        NotImplementedError: `value` is something else that msgspec can't write.
    """
    if isinstance(value, str):  # numpy.str_
        return str.__str__(value)
    convert = getattr(value, "tolist", None)
    if convert is None:
        raise NotImplementedError(f"a value of type {type(value).__name__}")
    return convert()


def as_plain(value: Any) -> Any:
    """`value` as it looks after a journey between processes: tuples and sets become lists.

    Raises:
        TypeError: something in it is no plain data.
    """
    try:
        return msgspec.msgpack.decode(msgspec.msgpack.encode(value, enc_hook=plain), strict=False)
    except (TypeError, ValueError, OverflowError, NotImplementedError, RecursionError) as error:
        raise TypeError(str(error)) from error

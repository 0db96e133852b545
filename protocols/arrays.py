"""Array fields of messages: the declared dtype and shape letters of each, and where its bytes lie in a frame.

A field is annotated with a `Spec`: `tokens: Annotated[np.ndarray, Spec("int32", "T")]`. A letter stands for one size
within a message, so `logprobs: Spec("float32", "T")` must have as many entries as `tokens`; `"N+1"` is one more than N.
The header of a frame describes each array by a `Blob`; its bytes travel beside the header.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np


class Blob(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where an array lies in a frame."""

    dtype: str  # numpy name; the bytes are little-endian
    shape: tuple[int, ...]
    buffer: int  # number of the buffer in the frame


@dataclass(frozen=True, slots=True)
class Spec:
    """Declared dtype and shape of a field.

    Args:
        dtype: numpy dtype name, or "" for a tuple (or a dict of tuples) of which only the length is declared.
        shape: sizes divided by blanks; a letter, a letter plus one ("N+1"), or a number.
        rule: "finite" (no NaN, no infinity), "nats" (logprobs: finite, and above 0 only by rounding),
            "offsets" (starts at 0, never falls), "" (none).
    """

    dtype: str
    shape: str
    rule: str = ""


Int32T = Annotated[np.ndarray, Spec("int32", "T")]
NatsT = Annotated[np.ndarray, Spec("float32", "T", "nats")]
Offsets = Annotated[np.ndarray, Spec("int64", "N+1", "offsets")]

"""The wire form of a message: a small msgpack header that describes it, and its arrays as they are beside it.

A frame is a head (magic, schema fingerprint, protocol, number of buffers, header length, buffer lengths, header, checksum)
and its buffers. The checksum (xxh3-64) covers all of the head before it and every byte of the buffers. Within Ray
the buffers travel out of band (pickle protocol 5), so a reader in the object store sees them without a copy;
written contiguously each begins at a multiple of 64 bytes.

Nothing is allocated from a length that a frame claims: lengths are compared with the bytes that are there.
"""

from __future__ import annotations

import os
import pickle
import secrets
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, TypeVar

import msgspec
import numpy as np
import xxhash
from rolecall.protocols.arrays import Blob
from rolecall.protocols.base import Message
from rolecall.protocols.checks import check, wrong
from rolecall.protocols.errors import FrameError, MessageError, SchemaError
from rolecall.protocols.schema import PROTOCOL, declared, find, fingerprint, named

M = TypeVar("M", bound=Message)

MAGIC = b"\x93RCL\r\n\x1a\n"  # not text, and damaged by whatever takes it for text
ALIGNMENT = 64
QUOTED = 300  # characters of foreign text that an error repeats
_PREAMBLE = struct.Struct("<8sQIIQ")  # magic, fingerprint, protocol, buffers, bytes of the header
_CHECKSUM = struct.Struct("<Q")
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
)}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}  # dtype.name is slow


class Frame:
    """A message on its way.

    Args:
        header: the head, checksum included.
        buffers: the bytes of the arrays; anything with the buffer protocol. They are not copied: an array changed after
            `encode` no longer fits the checksum.
        sensible: `encode` made this frame, here or in a process of the same cluster, so the sense of its message has been
            checked; its bytes are still held to the checksum. Bytes from a file or a socket never say this of themselves.
    """

    __slots__ = ("buffers", "header", "sensible")

    def __init__(self, header: bytes, buffers: Sequence[Any] = (), sensible: bool = False) -> None:
        self.header = bytes(header)
        self.buffers = tuple(_view(buffer) for buffer in buffers)
        self.sensible = sensible

    @property
    def nbytes(self) -> int:
        """Bytes of head and buffers, padding aside."""
        return len(self.header) + sum(buffer.nbytes for buffer in self.buffers)

    @property
    def contiguous_nbytes(self) -> int:
        """Bytes that `write_into` and `to_bytes` fill, padding included."""
        position = len(self.header)
        for buffer in self.buffers:
            position += -position % ALIGNMENT + buffer.nbytes
        return position

    def write_into(self, memory: Any) -> int:
        """Write the frame in one piece to the front of writable memory (shared memory, say): one copy in all.

        Returns:
            How many bytes it takes.

        Raises:
            ValueError: the memory is too small; nothing is written.
        """
        target = np.frombuffer(memory, np.uint8)
        if not target.flags.writeable or target.nbytes < self.contiguous_nbytes:
            raise ValueError(f"the frame needs {self.contiguous_nbytes} writable bytes, the memory has {target.nbytes}")
        position = 0
        for part in (memoryview(self.header), *self.buffers):
            start = position + -position % ALIGNMENT
            target[position:start] = 0
            position = start + part.nbytes
            target[start:position] = np.frombuffer(part, np.uint8) if part.nbytes else ()
        return position

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """Buffers go out of band where the pickler allows it (protocol 5), else as bytes."""
        if protocol.__index__() >= 5:
            return Frame, (self.header, tuple(pickle.PickleBuffer(buffer) for buffer in self.buffers), self.sensible)
        return Frame, (self.header, tuple(bytes(buffer) for buffer in self.buffers), self.sensible)


def encode(message: Message) -> Frame:
    """Check a message and frame it; its arrays are shared, not copied, unless they aren't contiguous or little-endian.

    Raises:
        MessageError: a field has another type, dtype or size than declared, or the message makes no sense.
    """
    message = _settled(message)
    own = {id(getattr(message, field.name)) for field in declared(type(message)) if field.form == "array"}
    arrays: list[np.ndarray] = []

    def hook(value: Any) -> Any:
        if id(value) in own:
            arrays.append(value)
            return Blob(dtype=_NAMES.get(value.dtype) or value.dtype.name, shape=value.shape, buffer=len(arrays) - 1)
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"a {type(value).__name__} can't travel in a column; arrays have fields of their own")

    name = type(message).__name__
    try:
        header = msgspec.msgpack.encode(message, enc_hook=hook)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise MessageError(f"{name} can't be encoded: {str(error)[:QUOTED]}", kind=name) from error
    _typed(header, type(message), _placeholder)
    check(message)
    buffers = [_bytes_of(array) for array in arrays]
    lengths = struct.pack(f"<{len(buffers)}Q", *(buffer.nbytes for buffer in buffers))
    head = _PREAMBLE.pack(MAGIC, fingerprint(type(message)), PROTOCOL, len(buffers), len(header)) + lengths + header
    return Frame(head + _CHECKSUM.pack(_digest(head, buffers)), buffers, sensible=True)


def decode(frame: Frame, kind: type[M] | None = None) -> M:
    """The message of a frame; its arrays are read-only views of the frame's buffers.

    Args:
        frame: as `encode`, `from_bytes` or the object store gave it.
        kind: what is expected: this message or one derived from it; None for any that is known.

    Raises:
        FrameError: the bytes are not whole and untouched.
        SchemaError: another message, or another version of it, than this side knows or expects.
        MessageError: the message makes no sense.
    """
    print_, protocol, header = _verified(frame)
    found = find(print_) if kind is None or fingerprint(kind) != print_ else kind
    if found is None or (kind is not None and not issubclass(found, kind)):
        raise _mismatch(print_, protocol, header, kind)
    arrays = _Arrays(frame.buffers)
    message = _typed(header, found, arrays)
    if sorted(arrays.used) != list(range(len(frame.buffers))):
        raise MessageError(f"{found.__name__} must use each of its {len(frame.buffers)} buffers once, uses {sorted(arrays.used)}.")
    if not frame.sensible:
        check(message)
    return message  # type: ignore[return-value]  # found is kind or derived from it


def to_bytes(frame: Frame) -> bytes:
    """The frame in one piece: head, then each buffer at the next multiple of 64 bytes, zeros between."""
    parts: list[bytes | memoryview] = [frame.header]
    position = len(frame.header)
    for buffer in frame.buffers:
        padding = -position % ALIGNMENT
        parts += [bytes(padding), buffer]
        position += padding + buffer.nbytes
    return b"".join(parts)


def from_bytes(data: Any) -> Frame:
    """The frame in these bytes (anything with the buffer protocol), without a copy of its buffers.

    Lengths, padding and the total are verified here, the checksum by `decode`.

    Raises:
        FrameError: the bytes are no frame, or not just one whole frame.
    """
    view = _view(data)
    _, _, count, lengths, size = _preamble(view)
    position = _PREAMBLE.size + 8 * count + size + _CHECKSUM.size
    head = bytes(view[:position])
    buffers = []
    for length in lengths:
        padding = -position % ALIGNMENT
        if position + padding + length > view.nbytes:
            raise FrameError(f"The frame is cut short: {view.nbytes} bytes, and a buffer ends at byte {position + padding + length}.")
        if any(view[position : position + padding]):
            raise FrameError(f"The frame is damaged: the padding at byte {position} is not zero.")
        position += padding + length
        buffers.append(view[position - length : position])
    if position != view.nbytes:
        raise FrameError(f"The frame ends at byte {position}, but there are {view.nbytes} bytes.")
    return Frame(head, buffers)


def write_file(frame: Frame, path: str | Path) -> None:
    """Write the frame aside and rename it into place, so that a reader never finds half of one.

    Raises:
        OSError: the file can't be written; what was there before is untouched.
    """
    target = Path(path)
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with aside.open("xb") as file:
            file.write(to_bytes(frame))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def read_file(path: str | Path) -> Frame:
    """The frame in a file; `decode` verifies its checksum.

    Raises:
        FrameError: the file is no frame.
        OSError: it can't be read.
    """
    return from_bytes(Path(path).read_bytes())


class _Arrays:
    """Turns the Blobs of a header into arrays over the buffers of its frame."""

    def __init__(self, buffers: tuple[memoryview, ...]) -> None:
        self.buffers = buffers
        self.used: list[int] = []

    def __call__(self, kind: type, value: Any) -> Any:
        blob = msgspec.convert(value, Blob)
        if blob.dtype not in _DTYPES or not 0 <= blob.buffer < len(self.buffers):
            raise ValueError(f"no such dtype or buffer: {blob.dtype!r}, {blob.buffer}")
        flat = np.frombuffer(self.buffers[blob.buffer], _DTYPES[blob.dtype])
        if len(blob.shape) != 1 or blob.shape[0] != len(flat):
            if any(size < 0 for size in blob.shape):
                raise ValueError(f"no such shape: {blob.shape}")
            flat = flat.reshape(blob.shape)
        self.used.append(blob.buffer)
        return flat


def _placeholder(kind: type, value: Any) -> Any:
    """Stands for arrays where only the other fields are to be typed."""
    return _EMPTY


_EMPTY = np.zeros(0, np.uint8)


def _typed(header: bytes | memoryview, kind: type[Message], arrays: Callable[[type, Any], Any]) -> Message:
    """The header as a message of this kind."""
    try:
        return msgspec.msgpack.decode(header, type=kind, dec_hook=arrays)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        raise MessageError(f"{kind.__name__} can't be read: {str(error)[:QUOTED]}", kind=kind.__name__) from error


def _settled(message: Message) -> Message:
    """The message with contiguous, little-endian arrays of numpy's own class."""
    if not isinstance(message, Message) or type(message) is Message:
        raise MessageError(f"A {type(message).__name__} is no message; messages derive from rolecall.protocols.Message.")
    changed = {}
    for field in declared(type(message)):
        value = getattr(message, field.name)
        if field.form != "array" or not isinstance(value, np.ndarray):
            continue
        if isinstance(value, np.ma.MaskedArray):
            raise wrong(type(message).__name__, field.name, "is a masked array, and its mask would be lost")
        if not value.flags.c_contiguous or value.dtype.byteorder == ">":
            changed[field.name] = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return msgspec.structs.replace(message, **changed) if changed else message


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data.toreadonly()


def _view(buffer: Any) -> memoryview:
    """Plain read-only bytes of whatever this is."""
    view = memoryview(buffer)
    if view.ndim != 1 or view.format != "B":
        view = view.cast("B") if view.nbytes else memoryview(b"")
    return view.toreadonly()


def _digest(head: bytes | memoryview, buffers: Sequence[memoryview]) -> int:
    state = xxhash.xxh3_64(head)
    for buffer in buffers:
        state.update(buffer)
    return state.intdigest()


def _preamble(view: memoryview) -> tuple[int, int, int, tuple[int, ...], int]:
    """Fingerprint, protocol, number of buffers, their lengths, bytes of the header: of a head that is all there."""
    if view.nbytes < _PREAMBLE.size or view[: len(MAGIC)] != MAGIC:
        raise FrameError(f"The bytes ({view.nbytes}) are no frame: they don't begin as one.")
    _, print_, protocol, count, size = _PREAMBLE.unpack_from(view)
    if _PREAMBLE.size + 8 * count + size + _CHECKSUM.size > view.nbytes:
        raise FrameError(f"The frame is cut short: its head alone claims more than the {view.nbytes} bytes that there are.")
    return print_, protocol, count, struct.unpack_from(f"<{count}Q", view, _PREAMBLE.size), size


def _verified(frame: Frame) -> tuple[int, int, memoryview]:
    """Fingerprint, protocol and msgpack header of a frame whose lengths and checksum hold."""
    view = memoryview(frame.header)
    print_, protocol, count, lengths, size = _preamble(view)
    end = _PREAMBLE.size + 8 * count + size
    if view.nbytes != end + _CHECKSUM.size or lengths != tuple(buffer.nbytes for buffer in frame.buffers):
        raise FrameError("The frame is damaged: the lengths in its head are not those of its parts.")
    (claimed,) = _CHECKSUM.unpack_from(view, end)
    if _digest(view[:end], frame.buffers) != claimed:
        raise FrameError("The frame is damaged: its checksum does not fit its bytes.")
    return print_, protocol, view[_PREAMBLE.size + 8 * count : end]


class _Tag(msgspec.Struct):
    """Just enough of any message to name it."""

    type: str


def _mismatch(print_: int, protocol: int, header: memoryview, kind: type[Message] | None) -> SchemaError:
    """Name both sides of a disagreement."""
    try:
        theirs = msgspec.msgpack.decode(header, type=_Tag).type[:QUOTED]
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise FrameError("The frame holds no message: its header can't be read.") from error
    ours = kind or named(theirs)
    known = "knows no message of that name" if ours is None else f"has {ours.__name__} {fingerprint(ours):016x}"
    remedy = "Run the same version of Rolecall and of your message classes on both sides."
    if ours is not None and ours.__name__ != theirs:
        remedy = f"A {ours.__name__} is expected here."
    return SchemaError(
        f"The frame holds {theirs} {print_:016x} (protocol {protocol}); this side {known} (protocol {PROTOCOL}). {remedy}",
        theirs=theirs,
        ours="" if ours is None else ours.__name__,
    )

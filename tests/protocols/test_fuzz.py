"""Whatever comes in, one of our typed errors comes out, in bounded memory, and never a message that was not sent."""

from __future__ import annotations

import pickle
import struct
import tracemalloc
from typing import Any

import mail
import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.protocols import (
    Frame,
    FrameError,
    Message,
    MessageError,
    ProtocolError,
    Samples,
    SchemaError,
    decode,
    encode,
    from_bytes,
    to_bytes,
)
from rolecall.protocols.schema import PROTOCOL, fingerprint

MAGIC = b"\x93RCL\r\n\x1a\n"
ROOM = 2**20  # bytes that reading a small, hostile frame may take at most


def seal(header: bytes, buffers: list[Any], kind: int, **claims: Any) -> Frame:
    """A frame with a checksum that fits, whatever it holds: written from the format's description, not with our code."""
    lengths = claims.get("lengths", [memoryview(buffer).nbytes for buffer in buffers])
    count, size = claims.get("count", len(buffers)), claims.get("size", len(header))
    head = struct.pack("<8sQIIQ", MAGIC, kind, PROTOCOL, count, size) + struct.pack(f"<{len(lengths)}Q", *lengths) + header
    digest = xxhash.xxh3_64_intdigest(head + b"".join(bytes(buffer) for buffer in buffers))
    return Frame(head + struct.pack("<Q", digest), buffers)


def opened(message: Message) -> tuple[bytes, list[Any], int]:
    """Header, buffers and fingerprint of a message's frame, to be bent and sealed again."""
    frame = encode(message)
    return frame.header[32 + 8 * len(frame.buffers) : -8], list(frame.buffers), fingerprint(type(message))


def read(data: Any) -> Message:
    return decode(from_bytes(data))


def test_the_format_is_as_described(batch: Samples) -> None:
    assert to_bytes(seal(*opened(batch))) == to_bytes(encode(batch))


@given(data=st.binary(max_size=200) | st.binary(max_size=200).map(lambda tail: MAGIC + tail))
@settings(deadline=None, max_examples=300)
def test_arbitrary_bytes_are_no_frame(data: bytes) -> None:
    with pytest.raises(FrameError):
        read(data)
    with pytest.raises(FrameError):
        decode(Frame(data, [data]))


@given(message=mail.ANY, data=st.data())
@settings(deadline=None, max_examples=100)
def test_a_cut_or_lengthened_frame_is_refused(message: Message, data: st.DataObject) -> None:
    whole = to_bytes(encode(message))
    for _ in range(8):
        with pytest.raises(FrameError):
            read(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(FrameError):
        read(whole + data.draw(st.binary(min_size=1, max_size=100)))


def test_every_single_bit_counts(batch: Samples) -> None:
    whole = to_bytes(encode(batch))
    for place in range(8 * len(whole)):
        bent = bytearray(whole)
        bent[place // 8] ^= 1 << place % 8
        with pytest.raises(FrameError):
            read(bent)


@given(message=mail.ANY, data=st.data())
@settings(deadline=None, max_examples=150)
def test_changed_bytes_are_refused(message: Message, data: st.DataObject) -> None:
    whole = bytearray(to_bytes(encode(message)))
    before = bytes(whole)
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    if bytes(whole) == before:
        return
    with pytest.raises(FrameError):
        read(whole)


@given(message=mail.ANY, data=st.data())
@settings(deadline=None, max_examples=300)
def test_a_header_bent_byte_by_byte_under_a_fitting_checksum(message: Message, data: st.DataObject) -> None:
    header, buffers, kind = opened(message)
    bent = bytearray(header)
    for place in data.draw(st.lists(st.integers(0, len(bent) - 1), min_size=1, max_size=3)):
        bent[place] = data.draw(st.integers(0, 255))
    error_or_sound(seal(bytes(bent), buffers, kind))


@given(message=mail.ANY, data=st.data())
@settings(deadline=None, max_examples=300)
def test_a_field_of_another_kind_under_a_fitting_checksum(message: Message, data: st.DataObject) -> None:
    header, buffers, kind = opened(message)
    fields = msgspec.msgpack.decode(header)
    name = data.draw(st.sampled_from(sorted(fields)))
    blob = st.lists(st.sampled_from(["int32", "float32", "object", "O", "int32,int32", "<U9"]), min_size=1, max_size=1).flatmap(
        lambda dtype: st.tuples(st.just(dtype[0]), st.lists(st.integers(-2, 2**62), max_size=3), st.integers(-1, 12))
    )
    fields[name] = data.draw(mail.VALUES | blob | st.sampled_from(sorted(fields.values(), key=repr)))
    error_or_sound(seal(msgspec.msgpack.encode(fields), buffers, kind))


@given(message=mail.ANY, data=st.data())
@settings(deadline=None, max_examples=200)
def test_other_buffers_under_a_fitting_checksum(message: Message, data: st.DataObject) -> None:
    header, buffers, kind = opened(message)
    bend = data.draw(st.sampled_from(["drop", "add", "swap", "bytes"]))
    if bend == "add" or not buffers:
        buffers.append(data.draw(st.binary(max_size=16)))
    elif bend == "drop":
        buffers.pop(data.draw(st.integers(0, len(buffers) - 1)))
    elif bend == "swap":
        buffers = data.draw(st.permutations(buffers))
    else:
        buffers[data.draw(st.integers(0, len(buffers) - 1))] = data.draw(st.binary(max_size=64))
    error_or_sound(seal(header, buffers, kind))


def error_or_sound(frame: Frame) -> None:
    """Reading gives exactly one typed, picklable error, or a message that makes sense and can be sent again."""
    try:
        found = read(to_bytes(frame))
    except (MessageError, FrameError) as error:
        sent = error
    else:
        assert mail.differences(decode(encode(found)), found) == []
        return
    again = pickle.loads(pickle.dumps(sent))
    assert (type(again), str(again)) == (type(sent), str(sent))


GIANT = b"\xff\xff\xff\xff"
HOSTILE = {
    "array of 4 G in a tuple": b"\xdd" + GIANT + b"\xa0",
    "map of 4 G": b"\xdf" + GIANT + b"\xa0",
    "string of 4 GB": b"\xdb" + GIANT + b"x",
    "bytes of 4 GB": b"\xc6" + GIANT + b"x",
    "array of 4 G in a map": b"\x81\xa1x\xdd" + GIANT + b"\x01",
    "arrays 100,000 deep": b"\x91" * 100_000,
    "maps 100,000 deep": b"\x81\xa1x" * 100_000,
    "arrays 100,000 deep, whole": b"\x81\xa1x" + b"\x91" * 100_000 + b"\xc0",
    "no UTF-8": b"\x91\xa2\xff\xfe",
    "no UTF-8 as key": b"\x81\xa2\xff\xfe\x90",
    "a map as key": b"\x81\xa1x\x91\x81\x80\xc0",
    "never used byte": b"\xc1",
    "extension": b"\xc7\x04\x05abcd",
    "a time that is none": b"\x81\xa1x\x91\xc7\x0c\xff" + b"\xff" * 12,
}


@pytest.mark.parametrize("place", ["columns", "ids", "tokens", "temperature", "unknown", "type"])
@pytest.mark.parametrize("bytes_", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_cost_little(batch: Samples, place: str, bytes_: bytes) -> None:
    header, buffers, kind = opened(batch)
    fields = {name: msgspec.Raw(msgspec.msgpack.encode(value)) for name, value in msgspec.msgpack.decode(header).items()}
    frame = seal(msgspec.msgpack.encode({**fields, place: msgspec.Raw(bytes_)}), buffers, kind)
    for known in (kind, kind ^ 1):
        frame = seal(frame.header[32 + 8 * len(buffers) : -8], buffers, known)
        tracemalloc.start()
        with pytest.raises(ProtocolError) as caught:
            decode(frame)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < ROOM + 20 * len(bytes_)
        assert len(str(caught.value)) < 500
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    "claims", [{"count": 2**32 - 1}, {"size": 2**64 - 1}, {"lengths": [2**64 - 1] * 10}, {"lengths": [2**40] + [0] * 9}]
)
def test_claimed_lengths_are_compared_with_what_is_there(batch: Samples, claims: dict[str, Any]) -> None:
    frame = seal(*opened(batch), **claims)
    tracemalloc.start()
    for attempt in (lambda: decode(frame), lambda: read(to_bytes(frame))):
        with pytest.raises(FrameError):
            attempt()
    assert tracemalloc.get_traced_memory()[1] < ROOM
    tracemalloc.stop()


@pytest.mark.parametrize("shape", [[2**62], [2**32, 2**32], [-1], [2**70], [0, 2**62], [], [1] * 100, [6.0]])
def test_claimed_shapes_are_compared_with_what_is_there(batch: Samples, shape: list[Any]) -> None:
    header, buffers, kind = opened(batch)
    fields = msgspec.msgpack.decode(header)
    packed = b"\xcf" + b"\xff" * 8 if shape == [2**70] else msgspec.msgpack.encode(shape[0] if shape == [2**70] else shape)
    fields["tokens"] = [fields["tokens"][0], msgspec.Raw(packed), fields["tokens"][2]]
    with pytest.raises(MessageError):
        decode(seal(msgspec.msgpack.encode(fields), buffers, kind))


def test_an_unknown_field_is_refused(batch: Samples) -> None:
    header, buffers, kind = opened(batch)
    fields = msgspec.msgpack.decode(header)
    with pytest.raises(MessageError, match="rewards"):
        decode(seal(msgspec.msgpack.encode({**fields, "rewards": 1}), buffers, kind))


def test_a_header_without_a_name_is_no_message(batch: Samples) -> None:
    header, buffers, kind = opened(batch)
    with pytest.raises(FrameError, match="no message"):
        decode(seal(b"\x80", buffers, kind ^ 1))
    with pytest.raises(SchemaError, match="Samples"):
        decode(seal(header, buffers, kind ^ 1))


def test_not_finite_numbers_under_a_fitting_checksum(batch: Samples) -> None:
    header, buffers, kind = opened(batch)
    at = next(number for number, buffer in enumerate(buffers) if bytes(buffer) == batch.logprobs.tobytes())
    for odd in (np.nan, np.inf, -np.inf):
        buffers[at] = np.where(np.arange(6) == 5, odd, batch.logprobs).astype(np.float32).tobytes()
        with pytest.raises(MessageError, match=r"Samples\.logprobs has 1 entries that are not finite"):
            decode(seal(header, buffers, kind))

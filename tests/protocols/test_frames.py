"""What is written is what is read, through every form of a frame."""

from __future__ import annotations

import datetime
import pickle
from pathlib import Path

import mail
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from rolecall.protocols import (
    Frame,
    FrameError,
    Message,
    MessageError,
    Metrics,
    Prompts,
    Samples,
    Scores,
    decode,
    encode,
    from_bytes,
    read_file,
    write_file,
)
from rolecall.protocols import to_bytes as contiguous

MANY = settings(deadline=None, max_examples=150)


@given(message=mail.ANY)
@MANY
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    frame = encode(message)
    forms = {
        "frame": frame,
        "contiguous": from_bytes(contiguous(frame)),
        "writable bytes": from_bytes(bytearray(contiguous(frame))),
        "pickle 5": pickle.loads(pickle.dumps(frame, protocol=5)),
        "pickle 4": pickle.loads(pickle.dumps(frame, protocol=4)),
    }
    for form, found in forms.items():
        assert mail.differences(decode(found), message) == [], form
        assert mail.differences(decode(found, type(message)), message) == [], form


@given(message=mail.ANY)
@MANY
def test_a_frame_has_one_spelling(message: Message) -> None:
    data = contiguous(encode(message))
    assert contiguous(from_bytes(data)) == data
    assert contiguous(encode(decode(from_bytes(data)))) == data


def test_buffers_lie_at_multiples_of_64_and_are_shared_not_copied(batch: Samples) -> None:
    frame = encode(batch)
    assert np.shares_memory(decode(frame).tokens, batch.tokens)
    data = np.frombuffer(contiguous(frame), np.uint8)
    found = decode(from_bytes(data))
    for name in ("tokens", "logprobs", "cu_seqlens", "finish"):
        array = getattr(found, name)
        assert np.shares_memory(array, data)
        assert (array.ctypes.data - data.ctypes.data) % 64 == 0
        assert not array.flags.writeable


def test_wire_is_little_more_than_the_arrays(batch: Samples) -> None:
    long = msgspec.structs.replace(
        batch,
        tokens=np.zeros(400_000, np.int32),
        logprobs=np.zeros(400_000, np.float32),
        cu_seqlens=np.array([0, 100_000, 200_000, 400_000]),
    )
    assert len(contiguous(encode(long))) < 1.001 * 2 * 4 * 400_000


def test_pickle_5_takes_buffers_out_of_band(batch: Samples) -> None:
    apart: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(encode(batch), protocol=5, buffer_callback=apart.append)
    assert len(apart) == 10
    assert len(stream) < 1500
    found = decode(pickle.loads(stream, buffers=apart))
    assert np.shares_memory(found.tokens, batch.tokens)


def test_strided_and_big_endian_arrays_are_put_in_order(batch: Samples) -> None:
    doubled = np.repeat(batch.tokens, 2)[::2]
    assert not doubled.flags.c_contiguous
    odd = msgspec.structs.replace(batch, tokens=doubled, logprobs=batch.logprobs.astype(">f4"))
    found = decode(from_bytes(contiguous(encode(odd))))
    assert mail.differences(found, batch) == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("tokens", np.zeros(6, np.int64), "Samples.tokens is int64, must be int32"),
        ("logprobs", np.zeros(6, np.float64), "Samples.logprobs is float64, must be float32"),
        ("logprobs", np.ma.masked_array(np.zeros(6, np.float32)), "mask would be lost"),
        ("tokens", [1, 2, 3, 4, 5, 6], "Samples.tokens is a list, must be a numpy array"),
        ("tokens", np.zeros((2, 3), np.int32), "Samples.tokens has 2 dimensions"),
        ("tokens", np.array([None] * 6), "is object"),
        ("completions", (b"a", "b", "c"), "completions"),
        ("completions", None, "completions"),
        ("temperature", "hot", "temperature"),
        ("columns", {"answer": (np.zeros(3),) * 2}, "ndarray can't travel in a column"),
        ("columns", {"answer": (object(), 1)}, "object can't travel in a column"),
        ("columns", {"answer": (2**70, 1)}, "can't be encoded"),
        ("ids", ("\ud800", "b"), "can't be encoded"),
    ],
)
def test_what_the_receiver_would_refuse_is_refused_at_the_sender(batch: Samples, field: str, value: object, said: str) -> None:
    with pytest.raises(MessageError, match=said):
        encode(msgspec.structs.replace(batch, **{field: value}))


def test_numbers_of_numpy_in_columns_become_plain_numbers(batch: Samples) -> None:
    found = decode(encode(msgspec.structs.replace(batch, columns={"answer": (np.int64(3), np.float32(0.5))})))
    assert found.columns == {"answer": (3, 0.5)}
    assert [type(value) for value in found.columns["answer"]] == [int, float]


def test_columns_hold_what_json_says_and_bytes_and_dates(batch: Samples) -> None:
    date = datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC)
    found = decode(encode(msgspec.structs.replace(batch, columns={"a": (b"\0\xff", date), "b": ((1, 2), {"x": None})})))
    assert found.columns == {"a": (b"\0\xff", date), "b": ([1, 2], {"x": None})}  # an inner tuple arrives as a list


def test_an_array_used_for_two_fields_arrives_twice(batch: Samples) -> None:
    same = np.arange(3, dtype=np.int32) * 0
    message = msgspec.structs.replace(
        batch, counts=np.array([1, 2], np.int32), siblings=np.array([0, 0, 1], np.int32), prompt_lengths=same, tokens=np.zeros(6, np.int32)
    )
    assert mail.differences(decode(encode(message)), message) == []


def test_an_array_changed_after_encode_is_noticed(batch: Samples) -> None:
    frame = encode(batch)
    batch.tokens[0] += 1
    with pytest.raises(FrameError, match="checksum"):
        decode(frame)


def test_only_messages_are_encoded() -> None:
    for thing in ({"type": "Samples"}, None, Message()):
        with pytest.raises(MessageError, match="is no message"):
            encode(thing)  # type: ignore[arg-type]


def test_a_file_holds_one_whole_frame_and_is_replaced_in_one_go(tmp_path: Path, batch: Samples) -> None:
    path = tmp_path / "batch.frame"
    write_file(encode(batch), path)
    write_file(encode(Metrics(sums={"loss": (1.0, 2.0)})), path)
    assert decode(read_file(path), Metrics).sums == {"loss": (1.0, 2.0)}
    assert [entry.name for entry in tmp_path.iterdir()] == ["batch.frame"]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(FrameError, match="ends at byte"):
        read_file(path)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none")


def test_empty_messages_travel() -> None:
    nothing = np.zeros(0, np.int64)
    prompts = Prompts(keys=nothing, ids=(), tokens=np.zeros(0, np.int32), cu_seqlens=np.zeros(1, np.int64), texts=())
    values = Scores(keys=nothing, counts=np.zeros(0, np.int32), values=np.zeros(0, np.float32), status=np.zeros(0, np.uint8))
    for message in (prompts, values):
        assert mail.differences(decode(from_bytes(contiguous(encode(message)))), message) == []


def test_a_frame_is_written_into_memory_that_is_there(batch: Samples) -> None:
    frame = encode(batch)
    whole = contiguous(frame)
    memory = bytearray(b"\xff" * (len(whole) + 10))
    assert frame.write_into(memory) == frame.contiguous_nbytes == len(whole)
    assert bytes(memory) == whole + b"\xff" * 10
    for too_little in (bytearray(len(whole) - 1), bytes(len(whole))):
        with pytest.raises(ValueError, match="writable bytes"):
            frame.write_into(too_little)


def test_sense_is_checked_where_bytes_come_from_elsewhere_and_bytes_always() -> None:
    """A frame of `encode` was checked there; the same bytes from a file or a socket are checked once more."""
    keys, values = np.array([4, 9], np.int64), np.array([1.0, 0.5], np.float32)
    made = encode(Scores(keys=keys, counts=np.array([1, 1], np.int32), values=values, status=np.zeros(2, np.uint8)))
    assert pickle.loads(pickle.dumps(made, protocol=5)).sensible
    assert not from_bytes(contiguous(made)).sensible
    damaged = Frame(made.header, [bytes(buffer)[:-1] + b"\x07" for buffer in made.buffers], sensible=True)
    with pytest.raises(FrameError, match="checksum"):
        decode(damaged)

"""A changed schema is recognised, by accident or not, and the error names both sides."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar

import mail
import msgspec
import numpy as np
import pytest
import xxhash
from rolecall.protocols import (
    Divisible,
    Frame,
    Logprobs,
    Message,
    Metrics,
    PackedBatch,
    Prompts,
    Samples,
    SchemaError,
    Scores,
    Spec,
    Weights,
    decode,
    describe,
    encode,
    fingerprint,
    read_file,
    write_file,
)
from rolecall.protocols.schema import declared

GOLDEN = Path(__file__).parent / "samples.frame"

# Whoever changes a message on purpose writes its new fingerprint here, raises PROTOCOL in schema.py, and writes samples.frame anew
# (`write_file(encode(batch), GOLDEN)`).
FINGERPRINTS = {
    Prompts: 0xD0D0A1E616F68CC5,
    Samples: 0x4A7C7852ECB363FB,
    Scores: 0xEA33E80E2AE9DC77,
    Logprobs: 0x76474790C75EB1FA,
    PackedBatch: 0x9A715542123D37F8,
    Weights: 0x9FF0C8DBEBCC880F,
    Metrics: 0xA75DD7D293CCFEC5,
}


@pytest.mark.parametrize("kind", FINGERPRINTS)
def test_no_message_changed_by_accident(kind: type[Message]) -> None:
    assert f"{fingerprint(kind):016x}" == f"{FINGERPRINTS[kind]:016x}", f"changed: {describe(kind)}"


def test_a_frame_of_the_past_is_still_read(batch: Samples, tmp_path: Path) -> None:
    frame = read_file(GOLDEN)
    assert mail.differences(decode(frame), batch) == []
    write_file(encode(batch), tmp_path / "now")
    assert (tmp_path / "now").read_bytes() == GOLDEN.read_bytes()


def test_fingerprints_do_not_depend_on_the_process() -> None:
    code = "from rolecall.protocols import Samples, fingerprint; print(fingerprint(Samples))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(said.stdout) == fingerprint(Samples)


def table(**body: Any) -> type[Message]:
    """A message named Table with one array field, or as `body` has it."""
    hints = {"cells": Annotated[np.ndarray, Spec("int32", "A")], "title": str}
    fields: dict[str, Any] = {"__annotations__": {**hints, **body.pop("hints", {})}, "__module__": __name__, **body}
    return type(Message)("Table", (Message,), fields, frozen=True, kw_only=True, eq=False)


CHANGES = {
    "dtype": table(hints={"cells": Annotated[np.ndarray, Spec("int64", "A")]}),
    "letter": table(hints={"cells": Annotated[np.ndarray, Spec("int32", "B")]}),
    "rule": table(hints={"cells": Annotated[np.ndarray, Spec("int32", "A", "offsets")]}),
    "type": table(hints={"title": int}),
    "optional": table(hints={"title": str | None}),
    "default": table(title="none"),
    "one more": table(hints={"level": int}),
    "renamed": table(hints={"level": int}, title=""),
    "codes": table(hints={"CODES": ClassVar[tuple[str, ...]]}, CODES=("a", "b")),
    "other codes": table(hints={"CODES": ClassVar[tuple[str, ...]]}, CODES=("b", "a")),
}


def test_every_change_changes_the_fingerprint() -> None:
    assert len({fingerprint(kind) for kind in (table(), *CHANGES.values())}) == len(CHANGES) + 1
    assert fingerprint(table()) == fingerprint(table())


def test_the_error_names_both_sides(batch: Samples) -> None:
    theirs, ours = table(), CHANGES["dtype"]
    frame = encode(theirs(cells=np.zeros(2, np.int32), title="t"))
    with pytest.raises(SchemaError) as caught:
        decode(frame, ours)
    for word in ("Table", f"{fingerprint(theirs):016x}", f"{fingerprint(ours):016x}", "same version", "protocol 2"):
        assert word in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(SchemaError, match=r"holds Samples .* has Scores .* A Scores is expected here"):
        decode(encode(batch), Scores)


def test_an_unknown_message_is_named() -> None:
    frame = encode(table()(cells=np.zeros(0, np.int32), title=""))
    head = bytearray(frame.header)
    renamed = bytes(head).replace(b"\xa5Table", b"\xa5Tabel")
    body = b"".join(bytes(buffer) for buffer in frame.buffers)
    unknown = renamed[:8] + struct.pack("<Q", 12345) + renamed[16:-8]
    sealed = Frame(unknown + struct.pack("<Q", xxhash.xxh3_64_intdigest(unknown + body)), frame.buffers)
    with pytest.raises(SchemaError, match=r"holds Tabel 0000000000003039 .* knows no message of that name"):
        decode(sealed)


def test_a_base_class_may_be_expected(batch: Samples) -> None:
    assert type(decode(encode(batch), Divisible)) is Samples
    with pytest.raises(SchemaError, match="A Divisible is expected"):
        decode(encode(Metrics()), Divisible)


def test_an_array_without_a_spec_is_a_mistake_of_its_class() -> None:
    class Bare(Message, frozen=True, kw_only=True, eq=False):
        cells: np.ndarray

    with pytest.raises(TypeError, match=r"Bare\.cells is an array without a Spec"):
        declared(Bare)


def test_all_messages_are_frozen_and_known_by_name() -> None:
    for kind in FINGERPRINTS:
        config = kind.__struct_config__
        assert (config.frozen, config.kw_only if hasattr(config, "kw_only") else True, config.tag) == (True, True, kind.__name__)
        assert config.forbid_unknown_fields
        assert msgspec.structs.fields(kind)

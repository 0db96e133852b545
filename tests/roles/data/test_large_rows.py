"""Rows of tables that are too large or no text: refused with file and row, or skipped and counted, like lines."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rolecall.protocols import DataError
from rolecall.roles.data import Files, Mix, Stream
from rolecall.roles.data.report import Report

KINDS = ("parquet", "arrow")
HUGE = 100 << 20


def write(folder: Path, kind: str, table: pa.Table) -> Path:
    file = folder / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return file


def read(file: Path, report: Report | None = None, **settings: object) -> list[dict]:
    mix = Mix({"a": Files(str(file), **settings)}, epochs={"a": 1}, shuffle=False)
    return [raw.columns for raw in Stream(mix, report=report).at()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_of_100_megabytes(tmp_path: Path, kind: str):
    said = [{"role": "user", "content": "x" * HUGE}]
    small = [{"role": "user", "content": "x"}]
    file = write(tmp_path, kind, pa.table({"n": [0, 1, 2], "messages": [small, said, small]}))
    with pytest.raises(DataError, match=rf"a\.{kind}: row 1: the record is longer than 16777216 bytes.*longest.*on_error"):
        read(file)
    report = Report()
    assert [record["n"] for record in read(file, report, on_error="skip")] == [0, 2]
    assert report.counts == {("read", ""): 3, ("dropped", "too long a record"): 1}
    assert report.first["dropped", "too long a record"] == f"{file}: row 1"
    assert [len(record["messages"][0]["content"]) for record in read(file, longest=1 << 27)] == [1, HUGE, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_large_tables_of_small_rows_and_values_that_are_chosen_from_many(tmp_path: Path, kind: str):
    texts = [f"{number}" * 2000 for number in range(100)]
    table = pa.table({"n": list(range(100)), "text": texts, "word": pa.array(texts).dictionary_encode()})
    file = write(tmp_path, kind, table)
    assert [record["word"] for record in read(file, longest=20_000)] == texts
    with pytest.raises(DataError, match="row 0: the record is longer than 3000 bytes"):
        read(file, longest=3000)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_not_utf_8(tmp_path: Path, kind: str):
    raw = pa.array([b"good", b"caf\xe9", b"fine"]).cast(pa.binary())
    text = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])  # nobody looks at what is in it
    file = write(tmp_path, kind, pa.table({"n": [0, 1, 2], "text": text}))
    with pytest.raises(DataError, match=rf"a\.{kind}: row 1: a text is not UTF-8.*write the file anew"):
        read(file)
    report = Report()
    assert [record["text"] for record in read(file, report, on_error="skip")] == ["good", "fine"]
    assert report.counts == {("read", ""): 3, ("dropped", "malformed"): 1}

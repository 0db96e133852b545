"""Files: all formats and compressions give the same records with their places, and everything that can't be used is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from itertools import takewhile
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.protocols import DataError
from rolecall.roles.data import Files, Mix, Stream
from rolecall.roles.data.report import Report
from rolecall.roles.data.sources.lines import Long, Piece, split_lines

RECORDS = [
    {
        "prompt": f'question {number}\nwith, "two" lines',
        "answer": str(number),
        "messages": [{"role": "user", "content": "é" * (number % 7)}],
    }
    for number in range(1000)
]
PLAIN = [{"prompt": record["prompt"], "answer": record["answer"]} for record in RECORDS]  # what a table of texts can hold


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def lines(records: list[dict]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def table(records: list[dict], tabbed: bool = False) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), delimiter="\t" if tabbed else ",")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def columns(source: Files) -> list[dict]:
    return [record for _, record in source.records(repeats=False)]


def streamed(source: Files) -> list[dict]:
    """The records of the first epoch, sorted."""
    found = [raw.columns for raw in takewhile(lambda raw: raw.epoch == 0, Stream(source).at())]
    return sorted(found, key=lambda record: int(record["answer"]))


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize(("kind", "write", "expected"), [(".jsonl", lines, RECORDS), (".csv", table, PLAIN)])
def test_lines_and_tables_compressed_or_not(tmp_path: Path, ending: str, kind: str, write, expected: list[dict]):
    file = tmp_path / f"data{kind}{ending}"
    file.write_bytes(PACKERS[ending](write(expected)))
    assert columns(Files(str(file))) == expected
    assert streamed(Files(str(file))) == expected
    one = next(iter(Files(str(file)).records(repeats=False)))
    assert one[0] == (f"{file}:1" if kind == ".jsonl" else f"{file}:2")


def test_tabs_and_windows_line_ends_and_byte_order_marks(tmp_path: Path):
    (tmp_path / "a.tsv").write_bytes(table(PLAIN[:5], tabbed=True))
    assert columns(Files(str(tmp_path / "a.tsv"))) == PLAIN[:5]
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert columns(Files(str(tmp_path / "b.jsonl"))) == [{"text": "a"}, {"text": "b"}]
    (tmp_path / "c.csv").write_bytes(b'\xef\xbb\xbfname,text\r\n"1","a\r\nb"\r\n')
    assert columns(Files(str(tmp_path / "c.csv"))) == [{"name": "1", "text": "a\r\nb"}]


@pytest.mark.parametrize("groups", [7, 400, 5000])
def test_parquet(tmp_path: Path, groups: int):
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "data.parquet", row_group_size=groups)
    source = Files(str(tmp_path / "data.parquet"))
    assert columns(source) == RECORDS
    stream = Stream(Mix({"a": source}, window=100, together=3))
    places = {raw.place: raw.columns for raw in stream.at(0, len(RECORDS))}
    assert places == {f"{tmp_path}/data.parquet: row {number}": record for number, record in enumerate(RECORDS)}


@pytest.mark.parametrize("kind", ["file", "stream", "feather"])
def test_arrow(tmp_path: Path, kind: str):
    whole, path = pa.Table.from_pylist(RECORDS), tmp_path / "data.arrow"
    if kind == "feather":
        pa.feather.write_feather(whole, path, compression="lz4", chunksize=64)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(path, whole.schema) as writer:
            writer.write_table(whole, max_chunksize=64)
    source = Files(str(path))
    assert columns(source) == RECORDS
    assert streamed(source) == RECORDS
    # as it is read where it can't be mapped
    remote = Files(f"memory://{kind}/data.arrow")
    import fsspec

    fsspec.filesystem("memory").pipe_file(f"/{kind}/data.arrow", path.read_bytes())
    assert columns(remote) == RECORDS


def test_folders_globs_and_lists_of_files_come_in_the_order_of_their_names(tmp_path: Path):
    for number in (2, 0, 1):
        (tmp_path / "parts" / f"{number}").mkdir(parents=True)
        (tmp_path / "parts" / f"{number}" / "x.jsonl").write_text(f'{{"n": {number}}}\n')
    (tmp_path / "parts" / "README.md").write_text("not data")
    (tmp_path / "parts" / ".hidden.jsonl").write_text("not data")
    (tmp_path / "parts" / "dataset_info.json").write_text("not data")
    assert [record["n"] for record in columns(Files(str(tmp_path / "parts")))] == [0, 1, 2]
    assert [record["n"] for record in columns(Files(f"file://{tmp_path}/parts/*/x.jsonl"))] == [0, 1, 2]
    files = [f"{tmp_path}/parts/{number}/x.jsonl" for number in (2, 0)]
    assert [record["n"] for record in columns(Files(files))] == [2, 0]


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line), max_size=20),
    st.lists(st.integers(0, 150), max_size=5),
    st.data(),
)
def test_pieces_of_a_file_hold_each_line_once(texts: list[bytes], cuts: list[int], data: st.DataObject):
    whole = b"\n".join(texts) + (b"\n" if data.draw(st.booleans()) else b"")
    if whole.startswith(b"\xef\xbb\xbf"):
        whole = b"a" + whole
    block = data.draw(st.integers(1, 30))
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(whole)})]
    found = []
    for number, start in enumerate(edges):
        piece = Piece(0, start, edges[number + 1] if number + 1 < len(edges) else None)
        begin = max(start - 1, 0)
        found += split_lines((whole[at : at + block] for at in range(begin, len(whole), block)), 1000, piece)
    assert found == whole.split(b"\n")[: None if not whole.endswith(b"\n") and whole else -1]


def test_a_place_is_the_number_of_the_line_in_whatever_piece(tmp_path: Path):
    file = tmp_path / "big.jsonl"
    file.write_bytes(b"".join(b'{"n": %d, "pad": "%s"}\n' % (number, b"x" * 200) for number in range(20_000)))
    stream = Stream(str(file))
    assert stream._walks[0].table.pieces == 5
    found = list(stream.at(0, 20_000))
    assert all(raw.place == f"{file}:{raw.columns['n'] + 1}" for raw in found)
    assert sorted(raw.columns["n"] for raw in found) == list(range(20_000))


BAD = [
    (b'{"n": 1}\n{"n": \n{"n": 3}\n', "malformed", r"a\.jsonl:2: this is no JSON.*There is: \{\"n\": .*skip such lines"),
    (b'{"n": 1}\n["x"]\n{"n": 3}\n', "malformed", r"a\.jsonl:2: a record must be an object with columns, not list"),
    (b'{"n": 1}\n{"n": "\xff"}\n{"n": 3}\n', "malformed", r"a\.jsonl:2: this is no JSON: it is not UTF-8.*encoding=\"latin-1\""),
    (
        b'{"n": 1}\n{"n": "' + b"x" * 3000 + b'"}\n{"n": 3}\n',
        "too long a record",
        r"a\.jsonl:2: the record is longer than 2000 bytes.*longest",
    ),
    (b'{"n": 1}\n' + b"[" * 1900 + b'\n{"n": 3}\n', "malformed", r"a\.jsonl:2: this is no JSON line.*one long array can't be streamed"),
]


@pytest.mark.parametrize(("content", "why", "message"), BAD)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_bad_line_is_refused_with_file_and_line_or_skipped_and_counted(
    tmp_path: Path, content: bytes, why: str, message: str, ending: str
):
    file = tmp_path / f"a.jsonl{ending}"
    file.write_bytes(PACKERS[ending](content))
    message = message.replace(r"a\.jsonl", rf"a\.jsonl{ending}")
    with pytest.raises(DataError, match=message):
        list(Stream(Files(str(file), longest=2000)).at(0, 3))
    report = Report()
    found = list(Stream(Files(str(file), longest=2000, on_error="skip"), report=report).at(0, 3))
    assert sorted(raw.columns["n"] for raw in found) == [1, 3]
    assert report.counts == {("read", ""): 3, ("dropped", why): 1}
    assert report.first["dropped", why] == f"{file}:2"


def test_the_line_of_a_bad_record_is_right_in_every_piece(tmp_path: Path):
    file = tmp_path / "big.jsonl"
    texts = [b'{"n": %d, "pad": "%s"}\n' % (number, b"x" * 200) for number in range(20_000)]
    texts[17_123] = b"{oh\n"
    file.write_bytes(b"".join(texts))
    with pytest.raises(DataError, match=r"big\.jsonl:17124: this is no JSON"):
        list(Stream(str(file)).at(0, 20_000))


def test_other_encodings(tmp_path: Path):
    (tmp_path / "latin.jsonl").write_bytes('{"text": "café"}\n'.encode("latin-1"))
    assert columns(Files(str(tmp_path / "latin.jsonl"), encoding="latin-1")) == [{"text": "café"}]
    (tmp_path / "wide.jsonl").write_bytes('{"text": "café"}\n'.encode("utf-16"))
    with pytest.raises(DataError, match=r"wide\.jsonl:1: the file is not UTF-8 but looks like UTF-16.*iconv"):
        columns(Files(str(tmp_path / "wide.jsonl")))


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_without_its_ending_is_recognised(tmp_path: Path, ending: str):
    file = tmp_path / "a.jsonl"
    file.write_bytes(PACKERS[ending](lines(RECORDS)))
    with pytest.raises(DataError, match=r"a\.jsonl:1: this is no JSON but looks like (\w+)\..*compression=\"\1\""):
        columns(Files(str(file)))


def test_rows_of_a_table_with_too_few_cells(tmp_path: Path):
    file = tmp_path / "a.csv"
    file.write_text('name,text\n1,"a\nb"\n2\n3,c\n')
    with pytest.raises(DataError, match=r"a\.csv:4: this row has 1 cells in a table of 2 columns \(name, text\)"):
        columns(Files(str(file)))
    report = Report()
    found = list(Stream(Mix({"a": Files(str(file), on_error="skip")}, shuffle=False), report=report).at(0, 5))
    assert [raw.columns["name"] for raw in found] == ["1", "3"]
    assert report.first["dropped", "malformed"] == f"{file}:4"


def test_a_gzip_bomb_is_refused_and_never_in_memory(tmp_path: Path):
    file = tmp_path / "bomb.jsonl.gz"
    with gzip.open(file, "wb", compresslevel=9) as out:
        for _ in range(90):
            out.write(b"0" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz expands to more than \d+ MiB from \d+ KiB.*at most 200 times.*expansion"):
        columns(Files(str(file)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 << 20  # a line of 16 MiB at most is held, twice while it grows
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz:1: the record is longer than"):
        columns(Files(str(file), expansion=2000))


def test_a_record_of_100_megabytes_is_refused_by_its_line_and_read_if_that_is_wished(tmp_path: Path):
    file = tmp_path / "huge.jsonl"
    with open(file, "wb") as out:
        out.write(b'{"n": 1}\n{"n": "')
        for _ in range(100):
            out.write(b"x" * (1 << 20))
        out.write(b'"}\n{"n": 3}\n')
    with pytest.raises(DataError, match=r"huge\.jsonl:2: the record is longer than 16777216 bytes.*raise longest"):
        columns(Files(str(file)))
    assert [record["n"] for record in columns(Files(str(file), on_error="skip"))] == [1, 3]
    found = columns(Files(str(file), longest=1 << 27))
    assert [len(str(record["n"])) for record in found] == [1, 100 << 20, 1]


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_and_cut_off_files(tmp_path: Path, ending: str):
    packed = PACKERS[ending](lines(RECORDS))
    file = tmp_path / f"a.jsonl{ending}"
    file.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=rf"a\.jsonl\{ending} is damaged or no \w+ file"):
        columns(Files(str(file)))
    file.write_bytes(lines(RECORDS))
    with pytest.raises(DataError, match=rf"a\.jsonl\{ending} is damaged or no \w+ file"):
        columns(Files(str(file)))


def test_damaged_parquet_and_arrow(tmp_path: Path):
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"this is no such file at all")
        with pytest.raises(DataError, match=rf"{name} can't be read as (parquet|arrow)"):
            columns(Files(str(tmp_path / name)))


def test_what_can_not_be_a_source(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.jsonl can't be read: no such file"):
        columns(Files(str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match=r"none/\*\.jsonl names no file of records"):
        columns(Files(str(tmp_path / "none/*.jsonl")))
    with pytest.raises(DataError, match=r"names no file of records.*nothing that matches"):
        columns(Files(str(tmp_path)))
    (tmp_path / "a.xyz").write_text("{}")
    with pytest.raises(DataError, match=r"a\.xyz has no ending that tells its format.*format=\"jsonl\""):
        columns(Files(str(tmp_path / "a.xyz")))
    assert columns(Files(str(tmp_path / "a.xyz"), format="jsonl")) == [{}]
    with pytest.raises(DataError, match="no format 'json'"):
        columns(Files(str(tmp_path / "a.xyz"), format="json"))
    with pytest.raises(DataError, match="no compression 'zip'"):
        columns(Files(str(tmp_path / "a.xyz"), compression="zip"))
    (tmp_path / "b.jsonl").write_text("{}")
    (tmp_path / "b.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match=r"of one format.*csv, jsonl"):
        columns(Files([str(tmp_path / "b.jsonl"), str(tmp_path / "b.csv")]))
    (tmp_path / "c.parquet.gz").write_text("")
    with pytest.raises(DataError, match="compressed as a whole"):
        columns(Files(str(tmp_path / "c.parquet.gz")))


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(RECORDS) * 30)
    stream = Stream(str(file))
    reading = stream.at(0)
    next(reading)
    file.write_bytes(lines(RECORDS))
    with pytest.raises(DataError, match=r"a\.jsonl can't be read: .*the file has changed, or was cut off"):
        list(zip(reading, range(100_000), strict=False))


def test_long_lines_keep_only_their_beginning():
    blocks = iter([b"ab\n" + b"x" * 50, b"x" * 5000, b"x\ncd\n"])
    found = list(split_lines(blocks, 100, Piece(0)))
    assert found == [b"ab", b"x" * 60, b"cd"]
    assert [isinstance(line, Long) for line in found] == [False, True, False]

"""Files that are elsewhere: web servers with and without ranges, an S3 server; slow, broken and vanished ones."""

from __future__ import annotations

import gzip
import io
import json
import os
import time
from collections.abc import Iterator
from itertools import takewhile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rolecall.protocols import DataError
from rolecall.roles.data import Files, Mix, Stream
from rolecall.roles.data.sources.patience import Patience
from web import Web

RECORDS = [{"n": number, "text": "x" * (number % 50)} for number in range(60_000)]
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)  # 3 MB: three pieces
QUICK = Patience(deadline=1.0, attempts=3, pause=0.01)


@pytest.fixture(params=[True, False], ids=["ranges", "whole"])
def web(request) -> Iterator[Web]:
    with Web(ranges=request.param) as server:
        server.files = {"/a.jsonl": LINES, "/a.jsonl.gz": gzip.compress(LINES)}
        yield server


@pytest.fixture
def ranged() -> Iterator[Web]:
    with Web() as server:
        server.files = {"/a.jsonl": LINES}
        yield server


def numbers(source: Files | str) -> list[int]:
    return sorted(raw.columns["n"] for raw in takewhile(lambda raw: raw.epoch == 0, Stream(source).at()))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_web_server_with_and_without_ranges(web: Web, name: str):
    assert numbers(f"{web.url}/{name}") == list(range(len(RECORDS)))
    assert any(asked[1] for asked in web.asked)  # it was asked for parts; one that can't is read from front to back


def test_a_broken_connection_is_tried_again_and_nothing_is_lost_or_doubled(web: Web):
    source = Files(f"{web.url}/a.jsonl", patience=QUICK)
    stream = Stream(source)
    web.faults = ["cut", "error"]
    assert sorted(raw.columns["n"] for raw in stream.at(0, len(RECORDS))) == list(range(len(RECORDS)))
    assert not web.faults


def test_a_server_that_keeps_failing_is_named_with_its_tries(ranged: Web):
    stream = Stream(Files(f"{ranged.url}/a.jsonl", patience=QUICK))
    ranged.faults = ["error"] * 50
    with pytest.raises(DataError, match=rf"{ranged.url}/a\.jsonl can't be read \(tried 3 times\).*503"):
        next(stream.at())
    assert len(ranged.faults) == 47


def test_a_slow_server_is_waited_for_no_longer_than_the_deadline(ranged: Web):
    stream = Stream(Files(f"{ranged.url}/a.jsonl", patience=Patience(deadline=0.3, attempts=2, pause=0.01)))
    ranged.faults = ["hang"] * 50
    started = time.monotonic()
    with pytest.raises(DataError, match=r"tried 2 times\): no answer within 0\.3 s.*raise the deadline"):
        next(stream.at())
    assert time.monotonic() - started < ranged.hang  # it was not waited for


def test_a_slow_answer_is_waited_for_and_then_used(ranged: Web):
    ranged.hang = 0.5
    stream = Stream(Files(f"{ranged.url}/a.jsonl", patience=Patience(deadline=20.0)))
    ranged.faults = ["hang"]
    assert next(stream.at()).position == 0


def test_a_file_that_vanishes_is_named_at_once(ranged: Web):
    stream = Stream(Files(f"{ranged.url}/a.jsonl", patience=QUICK))
    ranged.files.clear()
    with pytest.raises(DataError, match=r"a\.jsonl can't be read: no such file.*still there"):
        next(stream.at())
    with pytest.raises(DataError, match=r"a\.jsonl can't be read: no such file"):
        Stream(Files(f"{ranged.url}/a.jsonl", patience=QUICK))


def test_a_file_that_changes_while_it_is_read_is_refused(ranged: Web):
    stream = Stream(Files(f"{ranged.url}/a.jsonl", patience=QUICK))
    ranged.files["/a.jsonl"] = LINES[:1000]
    with pytest.raises(DataError, match=r"a\.jsonl can't be read"):
        next(stream.at())


def test_parquet_by_ranges_reads_parts_and_by_a_server_without_them_is_refused(web: Web):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS[:5000]), buffer, row_group_size=500)
    web.files["/a.parquet"] = buffer.getvalue()
    if web.ranges:
        assert numbers(f"{web.url}/a.parquet") == list(range(5000))
    else:
        with pytest.raises(DataError, match=r"a\.parquet can't be read in parts.*download"):
            Stream(f"{web.url}/a.parquet")


def test_members_who_take_blocks_of_a_parquet_file_read_their_own_row_groups(ranged: Web):
    buffer = io.BytesIO()
    wide = [{"n": number, "text": os.urandom(200).hex()} for number in range(4000)]
    pq.write_table(pa.Table.from_pylist(wide), buffer, row_group_size=250, compression="none")
    ranged.files["/a.parquet"] = buffer.getvalue()
    mix = Mix({"a": Files(f"{ranged.url}/a.parquet")}, window=500, together=2)
    read, found = [], []
    for rank in range(4):
        stream = Stream(mix)
        ranged.asked.clear()
        for block in range(rank, 8, 4):
            found += [raw.columns["n"] for raw in stream.at(500 * block, 500 * (block + 1))]
        read.append(sum(1 + int(stop) - int(start) for start, stop in (asked[1][6:].split("-") for asked in ranged.asked)))
    assert sorted(found) == list(range(4000))
    assert sum(read) < 1.3 * len(buffer.getvalue())  # every byte by one member, and the footer by all


def test_an_unknown_kind_of_url_names_the_package_that_is_missing():
    with pytest.raises(DataError, match=r"gs://bucket/a\.jsonl can't be read.*gcsfs for gs"):
        Stream(Files("gs://bucket/a.jsonl", patience=QUICK))
    with pytest.raises(DataError, match=r"nowhere://a\.jsonl can't be read.*Protocol not known"):
        Stream(Files("nowhere://a.jsonl", patience=QUICK))


@pytest.fixture(scope="module")
def s3() -> Iterator[dict]:
    """An S3 server on this machine, and the options to reach it."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {"key": "a", "secret": "b", "endpoint_url": f"http://{host}:{port}"}
    server.stop()


def test_s3(s3: dict):
    import s3fs

    system = s3fs.S3FileSystem(**s3)
    system.mkdir("bucket")
    half = len(RECORDS) // 2
    system.pipe_file("bucket/deep/a.jsonl", b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS[:half]))
    system.pipe_file("bucket/deep/b.jsonl", b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS[half:]))
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS), buffer, row_group_size=7000)
    system.pipe_file("bucket/a.parquet", buffer.getvalue())
    for url in ("s3://bucket/deep", "s3://bucket/deep/*.jsonl", "s3://bucket/a.parquet"):
        assert numbers(Files(url, options=s3, patience=Patience(deadline=60.0, attempts=2))) == list(range(len(RECORDS)))
    places = {raw.place for raw in Stream(Mix({"a": Files("s3://bucket/deep/a.jsonl", options=s3)}, shuffle=False)).at(0, 2)}
    assert places == {"s3://bucket/deep/a.jsonl:1", "s3://bucket/deep/a.jsonl:2"}
    with pytest.raises(DataError, match=r"s3://bucket/none\.jsonl can't be read: no such file"):
        Stream(Files("s3://bucket/none.jsonl", options=s3))

"""Streams larger than memory: the records are all given, once, and memory does not grow with their number."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MEMORY = 400 << 20  # bytes above what the imports take: windows of three sources, a table of a row group, what is not freed yet
LINE = b'{"n": %d, "messages": [{"role": "user", "content": "What is %d plus one?"}, {"role": "assistant", "content": "It is %d."}]}\n'

READ = """
import json, sys, time
import numpy as np
import pyarrow.parquet
from rolecall.roles.data import Files, Mix, Stream

folder, epochs = sys.argv[1], float(sys.argv[2])


def memory(word):
    # kilobytes of this process alone: getrusage still counts the process that started it
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(word)))


base = memory("VmRSS:")
sources = {"lines": folder + "/*.jsonl", "packed": folder + "/*.jsonl.gz", "table": folder + "/*.parquet"}
started = time.perf_counter()
stream = Stream(Mix(sources, epochs=dict.fromkeys(sources, epochs)), seed=3)
seen = np.zeros(stream.length, np.uint8)
for raw in stream.at():
    seen[raw.columns["n"]] += 1
print(json.dumps({
    "records": stream.length, "once": int((seen == 1).sum()), "grown": (memory("VmHWM:") - base) * 1024, "array": seen.nbytes,
    "seconds": round(time.perf_counter() - started, 1),
}))
"""


def write(folder: Path, count: int) -> None:
    """`count` records: six tenths as lines in three files, a tenth compressed, three tenths as a table in three files."""

    def lines(start: int, stop: int) -> bytes:
        return b"".join(LINE % (number, number, number + 1) for number in range(start, stop))

    tenth = count // 10
    for part in range(3):
        with open(folder / f"{part}.jsonl", "wb") as out:
            for start in range(2 * part * tenth, 2 * (part + 1) * tenth, 100_000):
                out.write(lines(start, min(start + 100_000, 2 * (part + 1) * tenth)))
    with gzip.open(folder / "6.jsonl.gz", "wb", compresslevel=1) as out:
        for start in range(6 * tenth, 7 * tenth, 100_000):
            out.write(lines(start, min(start + 100_000, 7 * tenth)))
    for part in range(7, 10):
        numbers = pa.array(range(part * tenth, (part + 1) * tenth))
        texts = pa.array(["What is one plus this number?"] * tenth)
        pq.write_table(pa.table({"n": numbers, "prompt": texts}), folder / f"{part}.parquet", row_group_size=100_000)


def read(folder: Path) -> dict:
    run = subprocess.run([sys.executable, "-c", READ, str(folder), "1"], capture_output=True, text=True, timeout=3000)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def check(found: dict, count: int) -> None:
    assert found["records"] == found["once"] == count, found
    assert found["grown"] - found["array"] < MEMORY, found


def test_a_hundred_thousand_records_in_bounded_memory(tmp_path: Path):
    write(tmp_path, 100_000)
    check(read(tmp_path), 100_000)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_million_records_in_bounded_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path, 10_000_000)
    found = read(tmp_path)
    with capsys.disabled():
        print(f"\n10 million records: {found}")
    check(found, 10_000_000)

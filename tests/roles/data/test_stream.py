"""The stream: the same records at the same positions whoever reads them, from wherever, before and after a restart."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rolecall.protocols import DataError
from rolecall.roles.data import Files, Mix, ReasoningGym, Stream

LENGTH = 6000  # positions that are compared


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Mix:
    """Sources of every kind: large and small files, compressed, with lines that are skipped; a list and a task."""
    folder = tmp_path_factory.mktemp("mix")
    with open(folder / "lines.jsonl", "wb") as out:
        for number in range(9000):
            out.write(b'{"n": %d, "pad": "%s"}\n' % (number, b"x" * 300) if number % 50 else b"{broken\n\n")
    for part in range(5):
        rows = "".join(json.dumps({"n": number}) + "\n" for number in range(100 * part, 100 * part + 60 + part))
        (folder / f"packed-{part}.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    pq.write_table(pa.table({"n": list(range(2500))}), folder / "table.parquet", row_group_size=300)
    (folder / "cells.csv").write_text("n,text\n" + "".join(f'{number},"a\nb"\n' for number in range(80)))
    sources = {
        "lines": Files(str(folder / "lines.jsonl"), on_error="skip"),
        "packed": str(folder / "packed-*.jsonl.gz"),
        "table": str(folder / "table.parquet"),
        "cells": str(folder / "cells.csv"),
        "list": [{"n": number} for number in range(37)],
        "task": ReasoningGym("chain_sum", {"max_terms": 2}, size=50),
    }
    weights = {"lines": 5, "packed": 2, "table": 2, "cells": 0.5, "list": 0.3, "task": 0.2}
    return Mix(sources, curriculum={0: weights, 30: {**weights, "lines": 1}}, records_per_step=100, ramp=True, window=700, together=3)


@pytest.fixture(scope="module")
def whole(mix: Mix) -> dict[int, str]:
    """Position → what stands there, read in one go."""
    return told(Stream(mix, seed=11).at(0, LENGTH))


def told(raws) -> dict[int, str]:
    found: dict[int, str] = {}
    for raw in raws:
        assert raw.position not in found, "a position was given twice"
        found[raw.position] = f"{raw.source} {raw.epoch} {raw.place} {json.dumps(raw.columns)}"
    return found


def test_what_stands_where(whole: dict[int, str]):
    assert 0.9 * LENGTH < len(whole) < LENGTH  # skipped lines, blank ones and heads of tables leave gaps
    assert list(whole) == sorted(whole)
    assert {text.split()[0] for text in whole.values()} == {"lines", "packed", "table", "cells", "list", "task"}
    assert len(set(whole.values())) == len(whole)  # nothing twice in an epoch


def test_resumed_at_20_random_points_with_other_numbers_of_members_the_stream_is_the_same(mix: Mix, whole: dict[int, str]):
    """A run of many restarts: each time other members take every so-manieth position, up to the next restart."""
    choose = random.Random(5)
    points = sorted({0, *(choose.randrange(1, LENGTH) for _ in range(20)), LENGTH})
    found: dict[int, str] = {}
    state = Stream(mix, seed=11).state(0)
    for start, stop in itertools.pairwise(points):
        world = choose.randint(1, 5)
        states = []
        for rank in range(world):
            stream = Stream(mix, seed=11)
            assert stream.restore(json.loads(json.dumps(state))) == start
            part = told(stream.at(start + rank, stop, step=world))
            assert not part.keys() & found.keys()
            found |= part
            states.append(stream.state(stop))
        state = choose.choice(states)  # any member's will do
        assert all(isinstance(value, int) for value in state.values())
        assert len(state) == 4 + 4 * len(mix.sources)
    assert dict(sorted(found.items())) == whole


@pytest.mark.parametrize("world", [2, 3, 7])
def test_blocks_and_steps_divide_the_stream_without_overlap(mix: Mix, whole: dict[int, str], world: int):
    by_step: dict[int, str] = {}
    by_block: dict[int, str] = {}
    for rank in range(world):
        by_step |= told(Stream(mix, seed=11).at(rank, LENGTH, step=world))
        stream = Stream(mix, seed=11)
        for block in range(rank, LENGTH // 250, world):
            by_block |= told(stream.at(250 * block, 250 * (block + 1)))
    assert dict(sorted(by_step.items())) == dict(sorted(by_block.items())) == whole


def test_going_back_gives_the_same(mix: Mix, whole: dict[int, str]):
    stream = Stream(mix, seed=11)
    for start in (4000, 100, 5900, 0, 2345):
        assert told(stream.at(start, start + 50)) == {at: text for at, text in whole.items() if start <= at < start + 50}


def test_what_was_skipped_is_in_the_report(mix: Mix, whole: dict[int, str]):
    stream = Stream(mix, seed=11)
    found = sum(1 for _ in stream.at(0, LENGTH))
    counts = stream.report.counts
    assert counts["read", ""] == found + counts["dropped", "malformed"]
    assert counts["dropped", "malformed"] > 20
    said = stream.report.summary()
    place = next(word for word in said if word.startswith("dropped: malformed (first: "))
    assert "lines.jsonl:" in place


def test_a_state_of_another_mix_seed_or_data_is_refused(mix: Mix, tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 1}\n' * 9)
    base = Stream(str(file), seed=1)
    state = base.state(5)
    for other, message in (
        (Stream(str(file), seed=2), "seed differs"),
        (Stream(Mix({"data": str(file)}, window=5), seed=1), "data differs"),
        (Stream(str(file), seed=1, held_out=5), "held_out differs"),
    ):
        with pytest.raises(DataError, match=message):
            other.restore(state)
    assert Stream(str(file), seed=1).restore(state) == 5
    file.write_text('{"n": 1}\n' * 10)
    with pytest.raises(DataError, match="data differs"):
        Stream(str(file), seed=1).restore(state)
    with pytest.raises(DataError, match="position"):
        base.restore({**state, "position": -1})
    with pytest.raises(DataError, match="read forward"):
        next(base.at(-1))


def test_held_out_records_never_come_in_the_stream_and_are_the_same_for_every_seed():
    records = [{"n": number} for number in range(500)]
    aside = Stream(records, seed=1, held_out=10).held_out(30)
    assert [raw.position for raw in aside] == [-1 - number for number in range(30)]
    assert [raw.columns for raw in Stream(records, seed=2, held_out=10).held_out(30)] == [raw.columns for raw in aside]
    stream = Stream(records, seed=1, held_out=10)
    given = [raw.columns["n"] for raw in stream.at(0, 500)]
    everything = [raw.columns["n"] for raw in stream.held_out(500 - len(given))]
    assert sorted(given + everything) == list(range(500))
    assert 30 <= len(everything) <= 70  # 50 are due
    assert stream.report.counts["dropped", "held out"] == len(everything)
    with pytest.raises(DataError, match=rf"not held out.*Asked: 500.*There is: {len(everything)}"):
        stream.held_out(500)
    with pytest.raises(DataError, match="not held out"):
        Stream(records).held_out(1)


def test_the_end_of_a_stream():
    stream = Stream(Mix({"a": [{"n": number} for number in range(7)]}, epochs={"a": 2}))
    assert stream.length == 14
    assert sorted(raw.columns["n"] for raw in stream.at()) == sorted([*range(7), *range(7)])
    assert list(stream.at(14)) == []
    assert [raw.position for raw in stream.at(10, 99, step=3)] == [10, 13]
    assert Stream([{"n": 1}]).length is None

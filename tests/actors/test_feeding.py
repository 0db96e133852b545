"""Rows from a data group on real Ray: one order, whoever makes them; balanced over the members that train; waits seen."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from rolecall.actors import Run, RunArgs, weigh
from rolecall.actors.feeding import Feed
from rolecall.placement import Pool, place
from rolecall.protocols import ConfigError, DataError, Metrics, PackedBatch, RoleFailed, UserError
from rolecall.roles.base import Role
from rolecall.roles.data.encode import Encoded
from rolecall.roles.data.packer import ROWS, pack_block

CAPACITY = 64
ROWS_OF = (5, 1, 7, 3, 4, 6)  # of each block; then the data ends
WAIT_SHARE = 0.02  # of a step: what training may wait for data


class Blocks(Role):
    """Blocks of so many full rows, made slowly."""

    name = "data"

    def __init__(self, seconds: float = 0.0, bad: int = -1, square: float = 0.01, halves: bool = False) -> None:
        self.seconds, self.bad, self.square, self.halves = seconds, bad, square, halves

    def batch(self, block: int) -> PackedBatch:
        if block == self.bad:
            raise DataError("this block is bad.")
        time.sleep(self.seconds)
        rows = ROWS_OF[block] if block < len(ROWS_OF) else 0
        rng = np.random.default_rng(block)
        sizes = [size for row in range(rows) for size in ([CAPACITY // 2] * 2 if self.halves and row % 2 else [CAPACITY])]
        full = [Encoded(rng.integers(0, 99, size + 1).astype(np.int32), rng.random(size + 1) < 0.5) for size in sizes]
        for each in full:
            each.trained[-1] = True
        return pack_block(full, capacity=CAPACITY, block=block, square=self.square)

    def state(self, block: int = 0, row: int = 0) -> dict[str, int]:
        return {"block": block, "row": row, "rank": self.member.rank}

    def restore(self, state: dict[str, int]) -> None:
        self.meter.add("restored", state["row"])


class Trainer(Role):
    """Remembers what it was given."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.given: list[tuple[list[int], float, int]] = []

    def accumulate(self, batch: PackedBatch) -> Metrics:
        time.sleep(self.seconds)
        self.given.append((batch.keys.tolist(), float(batch.weights.astype(np.float64).sum()), len(batch.targets)))
        return Metrics(sums={"tokens": (float(len(batch.targets)), 1.0)})

    def seen(self) -> list[tuple[list[int], float, int]]:
        return self.given

    def save(self, folder: str) -> str:
        Path(folder).mkdir()
        (Path(folder) / "given.json").write_text(json.dumps(len(self.given)))
        return folder

    def restore(self, folder: str) -> None:
        self.given = [([], 0.0, 0)] * json.loads((Path(folder) / "given.json").read_text())


@pytest.fixture(scope="module")
def pools() -> Iterator[Any]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with place([Pool("data", members=3, cpus=0.1), Pool("train", members=2, cpus=0.1)]) as placed:
        yield placed
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run(RunArgs(name="run", runs=str(tmp_path))) as made:
        yield made


EVERY = [block * ROWS + row for block, rows in enumerate(ROWS_OF) for row in range(rows)]


@pytest.mark.parametrize(("members", "rows"), [(1, 4), (3, 4), (2, 26), (3, 100)])
def test_rows_come_in_one_order(pools: Any, run: Run, members: int, rows: int) -> None:
    data = run.spawn(Blocks(), on=pools["data"], members=members)
    keys = [batch.result().keys.tolist() for _, batch in run.batches(data, 100, rows=rows)]
    assert [key for step in keys for key in step] == EVERY
    assert {len(step) for step in keys[:-1]} <= {rows}
    run.log(1)


def test_a_feed_begins_anywhere_and_asks_for_no_more_than_it_needs(pools: Any, run: Run) -> None:
    data = run.spawn(Blocks(), on=pools["data"], members=2)
    feed = Feed(data, ahead=2, block=2, row=3)
    first = feed.take(5, 4)
    assert first is not None
    assert first.result().keys.tolist() == [2 * ROWS + row for row in (3, 4, 5, 6)] + [3 * ROWS]
    assert (feed.block, feed.row) == (3, 1)
    second = feed.take(4, 0)
    assert second is not None
    assert second.outline.keys.tolist() == [3 * ROWS + 1, 3 * ROWS + 2, 4 * ROWS, 4 * ROWS + 1]
    assert feed._next <= 6, "blocks that nobody needs are not made"


def test_rows_are_shared_by_cost_and_weigh_the_same_over_the_whole_batch(pools: Any, run: Run) -> None:
    data, train = run.spawn(Blocks(), on=pools["data"]), run.spawn(Trainer(), on=pools["train"])
    trained = 0
    for step, batch in run.batches(data, 2, rows=10):
        trained += int(batch.outline.lengths.sum())
        train.split.accumulate(weigh(batch))
        assert run.log(step)["trainer/tokens"] == pytest.approx(batch.outline.lengths.sum() / 2)
    given = train.all.seen().result()
    for step in range(2):
        keys = [member[step][0] for member in given]
        assert sorted(key for own in keys for key in own) == EVERY[10 * step : 10 * step + 10]
        assert [len(own) for own in keys] == [5, 5], "rows of one cost are shared equally, wherever they were made"
        assert sum(member[step][1] for member in given) == pytest.approx(1.0, rel=1e-6)
    assert sum(member[step][2] for member in given for step in range(2)) == trained
    each = {round(member[0][1] / member[0][2], 9) for member in given}
    assert len(each) == 1, "a token counts the same in every member"


def test_rows_that_cost_more_are_shared_by_what_they_cost(pools: Any, run: Run) -> None:
    """Equally many tokens a row, but attention to one long document costs nearly twice what two short ones do."""
    data, train = run.spawn(Blocks(square=10.0, halves=True), on=pools["data"]), run.spawn(Trainer(), on=pools["train"])
    ((step, batch),) = run.batches(data, 1, rows=6)
    costs = dict(zip(batch.outline.keys.tolist(), batch.outline.sizes.tolist(), strict=True))
    assert max(costs.values()) > 1.9 * min(costs.values())
    train.split.accumulate(weigh(batch))
    run.log(step)
    loads = [sum(costs[key] for key in member[0][0]) for member in train.all.seen().result()]
    assert sorted(key for member in train.all.seen().result() for key in member[0][0]) == sorted(costs)
    best = min(max(sum(part), sum(costs.values()) - sum(part)) for count in range(7) for part in combinations(costs.values(), count))
    assert max(loads) == best


def test_batches_of_one_update_share_its_weight(pools: Any, run: Run) -> None:
    data, train = run.spawn(Blocks(), on=pools["data"], members=1), run.spawn(Trainer(), on=pools["train"], members=1)
    both = [batch for _, batch in run.batches(data, 2, rows=3)]
    for batch in both:
        train.split.accumulate(weigh(batch, over=both))
    weights = [(total, tokens) for _, total, tokens in train.one(0).seen().result()]
    assert sum(total for total, _ in weights) == pytest.approx(1.0, rel=1e-6)
    assert weights[0][0] / weights[0][1] == pytest.approx(weights[1][0] / weights[1][1], rel=1e-6)
    with pytest.raises(DataError, match="not among the batches"):
        weigh(both[0], over=both[1:])


def test_blocks_are_made_while_training(pools: Any, run: Run) -> None:
    """A block takes as long as a step: made in time, training waits for next to nothing after the first step."""
    data, train = run.spawn(Blocks(0.2), on=pools["data"], members=2), run.spawn(Trainer(0.3), on=pools["train"], members=1)
    shares = []
    for step, batch in run.batches(data, 5, rows=4):
        train.split.accumulate(weigh(batch))
        shares.append(run.log(step)["data/wait_share"])
    assert shares[0] > 0.3, "the first block is waited for"
    assert np.median(shares[1:]) < WAIT_SHARE


def test_a_bad_block_ends_the_run_with_its_own_words(pools: Any, run: Run) -> None:
    data = run.spawn(Blocks(bad=1), on=pools["data"], members=2)
    with pytest.raises(RoleFailed, match=r"data\[1\] .*'batch'.*this block is bad"):
        for _ in run.batches(data, 5, rows=4):
            pass


def test_checkpoints_say_where_the_data_was(pools: Any, run: Run, tmp_path: Path) -> None:
    data, train = run.spawn(Blocks(), on=pools["data"]), run.spawn(Trainer(), on=pools["train"])
    keys: list[int] = []
    for step, batch in run.batches(data, 2, rows=4):
        train.split.accumulate(weigh(batch))
        keys += batch.outline.keys.tolist()
        run.log(step)
        saved = run.save(step, train, data)
    assert json.loads((Path(saved) / "run.json").read_text())["states"] == {"data": [{"block": 2, "row": 2, "rank": 0}]}
    for given in (saved, str(run.folder)):
        with Run(RunArgs(name=f"again{len(given)}", runs=str(tmp_path), resume=given)) as again:
            data, train = again.spawn(Blocks(), on=pools["data"], members=1), again.spawn(Trainer(), on=pools["train"])
            assert again.resume(train, data) == 2
            rest = [(step, batch.outline.keys.tolist()) for step, batch in again.batches(data, 100, rows=4)]
            assert [step for step, _ in rest] == list(range(3, 3 + len(rest)))
            assert keys + [key for _, own in rest for key in own] == EVERY
            assert again.log(9)["data/restored"] == 2.0
            assert [len(member) for member in train.all.seen().result()] == [2, 2]
            with pytest.raises(ConfigError, match="has nothing of the group 'other'"):
                again.resume(again.spawn(Blocks(), on=pools["data"], name="other", members=1))
    with pytest.raises(UserError, match="no verb 'save'"):
        run.save(3, run.spawn(Blocks(), on=pools["data"], name="other", members=1))
    with pytest.raises(ConfigError, match="no checkpoint"):
        Run(RunArgs(name="none", runs=str(tmp_path), resume=str(tmp_path / "run" / "logs")))
    (Path(saved) / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        Run(RunArgs(name="bad", runs=str(tmp_path), resume=saved))
    assert not any((tmp_path / name).exists() for name in ("none", "bad")), "nothing was begun"

"""Groups on real Ray: order, balance, forwarding, overlap, and every way a call can fail."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cast
import numpy as np
import pytest
import ray
from rolecall.actors import Run, RunArgs, gather, pack, spawn
from rolecall.actors.pending import TRAFFIC
from rolecall.placement import Pool, place
from rolecall.protocols import CallError, DataError, DeadlineExceeded, Frame, MemberLost, RoleFailed, UserError
from rolecall.roles import Reward

MEMBERS = 3
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def pool() -> Iterator[Any]:
    ray.cloudpickle.register_pickle_by_value(sys.modules["cast"])
    with place([Pool("echo", members=MEMBERS, cpus=0.25)]) as pools:
        yield pools["echo"]


@pytest.fixture(scope="module")
def echo(pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return spawn(cast.Echo(), on=pool, folder=tmp_path_factory.mktemp("run"))


def test_split_divides_by_tokens_and_answers_in_the_order_of_the_input(echo: Any) -> None:
    lengths = [50, 1, 1, 1, 60, 1, 1, 55, 1]
    pending = echo.split.generate(cast.prompts_of(lengths), per_prompt=2)
    samples = pending.result()
    assert samples.keys.tolist() == list(range(9))
    assert samples.completions[:4] == ("0.0", "0.1", "1.0", "1.1")
    by_part = [sum(lengths[unit] for unit in units) for units in pending.assignment]
    assert len(by_part) == MEMBERS
    assert max(by_part) <= 62, "the three long prompts must be on three members"


def test_all_one_and_any(echo: Any) -> None:
    ranks = echo.all.whoami().result()
    assert [rank for rank, _ in ranks] == [0, 1, 2]
    assert len({pid for _, pid in ranks}) == MEMBERS
    assert echo.one(2).whoami().result() == ranks[2]
    assert echo.any.whoami().result() in ranks
    assert echo.all.seen(cast.prompts_of([5, 5])).result() == [10, 10, 10]


def test_any_takes_the_member_with_the_fewest_open_calls(pool: Any) -> None:
    group = spawn(cast.Faulty(), on=pool, name="idle")
    group.all.sleep(0).wait()
    open_ = [group.any.sleep(1.0) for _ in range(MEMBERS)]
    assert sorted(pending.parts[0].rank for pending in open_) == [0, 1, 2]
    group.close()


def test_fewer_units_than_members(echo: Any) -> None:
    pending = echo.split.generate(cast.prompts_of([4]))
    assert len(pending.parts) == 1
    assert pending.result().completions == ("0.0",)


def test_what_is_only_forwarded_is_never_fetched(echo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    get = ray.get

    def counting(refs: Any, **options: Any) -> Any:
        found = get(refs, **options)
        fetched.extend(one.nbytes for one in (found if isinstance(found, list) else [found]) if isinstance(one, Frame))
        return found

    monkeypatch.setattr(ray, "get", counting)
    before = TRAFFIC.forwarded
    samples = echo.split.generate(cast.prompts_of([100_000] * 6), per_prompt=2)
    scores = echo.split.score(samples).result()
    echo.split.accumulate(pack(samples, advantages=scores.values, row_tokens=300_000)).wait()
    assert TRAFFIC.forwarded - before > 8 * MEGABYTE, "the batch went by reference"
    assert sum(fetched) < 0.01 * (TRAFFIC.forwarded - before), "the controller fetched the scores alone"


def test_scores_come_back_in_the_order_of_the_prompts_whoever_scored_them(echo: Any) -> None:
    samples = echo.split.generate(cast.prompts_of([1, 90, 1, 1, 80, 1, 1]), per_prompt=3, length=5)
    (scores,) = gather(echo.split.score(samples))
    assert np.allclose(scores.result().values, [key + sibling / 10 for key in range(7) for sibling in range(3)])


def test_pack_gives_every_kept_token_the_same_weight_over_all_members(echo: Any) -> None:
    samples = echo.split.generate(cast.prompts_of([3, 4, 5, 6]), per_prompt=2, length=4)
    keep = np.array([True] * 7 + [False])
    echo.drain()
    echo.split.accumulate(pack(samples, advantages=np.ones(8, np.float32), keep=keep, row_tokens=64)).wait()
    total, parts = echo.metrics["weight"]
    assert parts == MEMBERS
    assert total == pytest.approx(1.0, abs=1e-6)
    assert echo.metrics["trained"][0] == 7 * 4
    with pytest.raises(DataError, match="advantages"):
        pack(samples, advantages=np.ones(3, np.float32))


def test_messages_about_different_prompts_are_refused(echo: Any) -> None:
    left, right = echo.split.generate(cast.prompts_of([3, 3])), echo.split.generate(cast.prompts_of([3, 3], first=5))
    with pytest.raises(DataError, match="different prompts"):
        echo.split.score(left, right)


def test_a_split_call_that_follows_from_another_is_sent_before_that_one_has_answered(pool: Any) -> None:
    group = spawn(cast.Faulty(), on=pool, name="chain", members=2)
    group.all.sleep(0).wait()
    prompts = cast.prompts_of([3, 3, 3, 3])
    first = group.split.late(prompts)
    second = group.split.late(first)
    assert first.parts[0].found is not None, "a call is split by the sizes of its first argument, so they must be there"
    both = group.split.late(first, second)
    assert second.parts[0].found is None, "its units are known without its answer"
    assert both.result().keys.tolist() == prompts.keys.tolist()
    group.close()


def test_a_verb_that_loses_a_unit_is_named(pool: Any) -> None:
    group = spawn(cast.Faulty(), on=pool, name="loser", members=2)
    lost = group.split.lose(cast.prompts_of([3, 3, 3, 3]))
    for _ in range(2):
        with pytest.raises(CallError, match=r"loser\[0\].*1 units for 2.*each unit once"):
            lost.wait()
    group.close()


def test_calls_to_different_groups_overlap(pool: Any, tmp_path: Path) -> None:
    left, right = (spawn(cast.Faulty(), on=pool, name=name, members=1) for name in ("left", "right"))
    files = str(tmp_path / "a"), str(tmp_path / "b")
    here, there = gather(left.any.meet(*files), right.any.meet(*reversed(files)))
    assert here.result()
    assert there.result()
    left.close()
    right.close()


def test_a_raising_role_is_named_with_its_traceback_and_log(pool: Any, tmp_path: Path) -> None:
    group = spawn(cast.Faulty(), on=pool, name="faulty", folder=tmp_path)
    group.step = 7
    with pytest.raises(RoleFailed) as caught:
        group.one(1).explode("the key").result()
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.role, error.rank, error.verb, error.step, error.kind) == ("faulty", 1, "explode", 7, "KeyError")
    assert "raise KeyError(text)" in error.remote
    assert "the key" in Path(error.log).read_text()
    assert group.one(1).sleep(0).result() is None, "a member that raised goes on"
    with pytest.raises(RoleFailed) as refused:
        group.any.refuse().result()
    assert isinstance(refused.value.__cause__, DataError)
    assert "shorten it" in str(refused.value)
    group.close()


def test_a_failed_setup_is_told_at_the_first_call_and_again(pool: Any) -> None:
    group = spawn(cast.Faulty(bad_setup=True), on=pool, name="unready")
    for _ in range(2):
        with pytest.raises(RoleFailed, match="give it a file"):
            group.any.sleep(0).result()
    group.close()


def test_a_wait_has_a_deadline_and_names_whom_it_waits_for(pool: Any, tmp_path: Path) -> None:
    group = spawn(cast.Faulty(), on=pool, name="slow", folder=tmp_path, deadline=60.0)
    group.all.sleep(0).wait()
    group.deadline = 0.5
    with pytest.raises(DeadlineExceeded) as caught:
        group.one(2).sleep(30.0).result()
    for word in ("slow[2]", "'sleep'", "step 0", "slow-2.log"):
        assert word in str(caught.value)
    assert isinstance(caught.value, TimeoutError)
    group.close(seconds=0.1)


def test_a_dead_member_is_named(pool: Any) -> None:
    group = spawn(cast.Faulty(), on=pool, name="mortal")
    group.all.sleep(0).wait()
    pending = group.one(1).die()
    with pytest.raises(MemberLost, match=r"mortal\[1\]"):
        pending.result()
    with pytest.raises(MemberLost):
        group.one(1).sleep(0).result()
    assert group.one(0).sleep(0).result() is None
    group.close()


def test_measurements_of_all_members_come_as_means(echo: Any) -> None:
    echo.drain()
    echo.split.generate(cast.prompts_of([2, 2, 2]), length=4)
    means = echo.drain()
    assert means["echo/tokens"] == 4.0
    assert means["time/echo.generate_s"] > 0
    assert "echo/tokens" not in echo.drain()


def test_another_reward_in_the_middle_of_a_run(pool: Any, tmp_path: Path) -> None:
    def lenient(completion: str) -> float:
        return 1.0

    def strict(completion: str) -> float:
        return float(completion.endswith(".0"))

    with Run(RunArgs(name="swap", runs=str(tmp_path))) as run:
        rollout = run.spawn(cast.Echo(), on=pool, name="swapping")
        reward = run.spawn(Reward(lenient), on=pool)
        samples = rollout.split.generate(cast.prompts_of([3, 3, 3]), per_prompt=2)
        first = run.log(1, scores=reward.split.score(samples).result())
        reward.close()
        reward = run.spawn(Reward(strict), on=pool, name="strict")
        samples = rollout.split.generate(cast.prompts_of([3, 3, 3]), per_prompt=2)
        second = run.log(2, scores=reward.split.score(samples).result())
        reward.close()
        rollout.close()
    assert (first["reward/mean"], second["strict/mean"]) == (1.0, 0.5)
    assert "strict/mean" not in first
    assert second["reward/mean"] == 0.5, "the word for the scores of the step, whoever gave them"
    assert {path.name for path in (run.folder / "logs").iterdir()} >= {"reward-0.log", "strict-0.log"}


def test_mistakes_at_the_call(echo: Any, pool: Any) -> None:
    with pytest.raises(AttributeError, match=r"no verb 'generat'; it has: accumulate, generate"):
        echo.all.generat()
    with pytest.raises(UserError, match="members 0 to 2"):
        echo.one(3)
    with pytest.raises(UserError, match=r"use \.all"):
        echo.split.whoami()
    with pytest.raises(UserError, match="give the pool more members"):
        spawn(cast.Echo(), on=pool, members=4)
    with pytest.raises(UserError, match="wants a role"):
        spawn(cast.Echo, on=pool)
    group = spawn(cast.Echo(), on=pool, name="shut")
    group.close()
    with pytest.raises(CallError, match="closed"):
        group.any.whoami()

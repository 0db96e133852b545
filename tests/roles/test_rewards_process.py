"""Rewards: the child process: deadlines, crashes, what it keeps, and that it leaves nothing behind."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rolecall.roles.base import Member
from rolecall.roles.rewards import Reward, last_number
from samples import samples_of

PATIENCE = 20.0  # seconds to wait for a process to vanish, on a busy machine


def gone(pid: int) -> bool:
    """Whether a process ends within PATIENCE (or is only waiting to be reaped)."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def closing():
    """Rewards that are closed at the end, whatever happens."""
    made = []

    def make(*args, **kwargs) -> Reward:
        made.append(Reward(*args, **kwargs))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def hanging(completion: str) -> float:
    if completion == "hang":
        while True:
            time.sleep(60)
    return 1.0


def test_a_hanging_sample_is_stopped_the_rest_goes_on_and_so_does_the_next_call(closing):
    reward = closing(hanging, deadline=0.5)
    scores = reward.score(samples_of(["a", "hang", "b", "hang", "c"]))
    assert scores.status.tolist() == [0, 1, 0, 1, 0]
    assert scores.values.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert scores.reasons[1] == "did not return within its deadline of 0.5 s and was stopped"
    assert reward.score(samples_of(["a", "b"])).status.tolist() == [0, 0]


def test_a_batched_function_has_the_deadline_times_the_samples(closing):
    def batched(completions: list[str]) -> list[float]:
        time.sleep(0.4 if len(completions) == 4 else 60)
        return [1.0] * len(completions)

    reward = closing(batched, deadline=0.25)
    assert reward.score(samples_of(["a"] * 4)).status.tolist() == [0] * 4
    late = reward.score(samples_of(["a"] * 2))
    assert set(late.reasons.values()) == {"did not return within its deadline of 0.5 s and was stopped"}
    assert reward.meter.drain()["all_failed_alike"] == (1.0, 2.0)


def test_a_scorer_that_ends_its_process_costs_one_sample(closing):
    def deadly(completion: str) -> float:
        if completion == "exit":
            os._exit(7)
        if completion == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        return 1.0

    scores = closing(deadly).score(samples_of(["a", "exit", "b", "crash", "c"]))
    assert scores.status.tolist() == [0, 1, 0, 1, 0]
    assert scores.reasons == {
        1: "took its process down: it ended with exit code 7",
        3: "took its process down: it was ended by SIGSEGV",
    }


def test_state_is_kept_between_calls_and_samples(closing):
    calls: list[str] = []

    def counting(completion: str) -> float:
        calls.append(completion)
        return float(len(calls))

    reward = closing(counting)
    assert reward.score(samples_of(["a", "b"])).values.tolist() == [1.0, 2.0]
    assert reward.score(samples_of(["a"])).values.tolist() == [3.0]
    assert calls == []  # in the child, not here


def test_a_child_that_died_between_two_calls_is_replaced(closing):
    reward = closing(hanging)
    reward.setup(Member(role="reward"))
    os.kill(reward._child.pid, signal.SIGKILL)
    assert gone(reward._child.pid)
    assert reward.score(samples_of(["a"])).status.tolist() == [0]


def test_a_large_batch_does_not_block(closing):
    text = "x" * 20_000
    scores = closing(lambda completion: len(completion)).score(samples_of([text] * 200))
    assert scores.values.tolist() == [20_000.0] * 200


def test_what_it_prints_goes_to_the_members_output(closing, capfd):
    def chatty(completion: str) -> float:
        print(f"looking at {completion}")
        if completion == "hang":
            time.sleep(60)
        return 1.0

    closing(chatty, deadline=0.5).score(samples_of(["one", "hang"]))
    assert capfd.readouterr().out == "looking at one\nlooking at hang\n"


def test_close_ends_the_child_and_the_programs_that_it_started(closing, tmp_path: Path):
    def starting(completion: str) -> float:
        (tmp_path / "pid").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
        return 1.0

    reward = closing(starting)
    reward.score(samples_of(["a"]))
    child, program = reward._child.pid, int((tmp_path / "pid").read_text())
    reward.close()
    assert gone(child)
    assert gone(program)


PARENT = """
import os, signal, sys, time
sys.path[:0] = {path!r}
from samples import samples_of
from rolecall.roles.base import Member
from rolecall.roles.rewards import Reward

def hang(completion):
    print(os.getpid(), flush=True)
    time.sleep(600)

Reward(hang, deadline=600).score(samples_of(["a"]))
"""


def test_a_hanging_child_dies_with_its_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(path=[str(Path(__file__).parents[1])])], stdout=subprocess.PIPE, text=True
    )
    try:
        child = int(parent.stdout.readline())
        parent.kill()
        assert gone(child)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def test_the_child_holds_no_connection_of_its_parent(closing):
    import socket

    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    reward = closing(hanging)
    reward.score(samples_of(["a"]))
    accepted.close()
    client.settimeout(PATIENCE)
    assert client.recv(1) == b""  # would wait for ever if the child held the other end
    client.close()
    server.close()


def test_a_reward_travels_without_its_process(closing):
    reward = closing(last_number)
    samples = samples_of(["it is 4"], answer=("4",))
    reward.score(samples)
    copy = pickle.loads(pickle.dumps(reward))
    assert copy._child is None
    assert copy.score(samples).values.tolist() == [1.0]
    copy.close()


def test_prepare_is_called_once_before_the_child_starts(closing):
    calls = []

    def prepared(completion: str) -> float:
        return float(len(calls))

    prepared.prepare = lambda: calls.append("prepared")
    reward = closing(prepared)
    reward.setup(Member(role="reward"))
    assert reward.score(samples_of(["a", "b"])).values.tolist() == [1.0, 1.0]
    assert calls == ["prepared"]

"""Runs that are ended from outside, as processes: by a signal, or by the loss of their cluster. Nothing is left of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import running
from rolecall.placement.reaper import marked

START = 150.0  # seconds until the first step is done: 20 on a quiet machine
LIMIT = 60.0  # seconds until a run that can't go on has told so, and until everything is gone
MEMBERS = 5

pytestmark = pytest.mark.timeout(START + 3 * LIMIT)


class Driver:
    """A run of GRPO without end, in a process of its own."""

    def __init__(self, folder: Path, model: str, temporary: str) -> None:
        self.run, self.temporary = folder / "run", Path(temporary)
        self._said, self._errors = folder / "said", folder / "errors"
        command = [sys.executable, "-m", "rolecall.examples.grpo", *running.arguments(folder, model, "--steps", "100000")]
        environment = {**os.environ, "TMPDIR": temporary}
        with self._said.open("w") as said, self._errors.open("w") as errors:
            self.process = subprocess.Popen(command, stdout=said, stderr=errors, env=environment)

    def until(self, happened: Callable[[], object]) -> None:
        """Wait for something while the run goes on."""
        end = time.monotonic() + START
        while not happened():
            assert self.process.poll() is None, self.errors
            assert time.monotonic() < end, self.errors
            time.sleep(0.1)

    @property
    def said(self) -> str:
        return self._said.read_text(errors="replace")

    @property
    def errors(self) -> str:
        return self._errors.read_text(errors="replace")

    def clusters(self) -> list[Path]:
        """Folders of the run's own Ray."""
        return list(self.temporary.glob("rc-*"))

    def processes(self) -> dict[int, str]:
        """Process id → command of everything that belongs to the run's own Ray."""
        found = {}
        for folder in self.clusters():
            for pid in marked(str(folder)):
                try:
                    found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
                except OSError:
                    continue  # it has just ended
        return found

    def members(self) -> list[int]:
        """Process ids of the members."""
        return [pid for pid, command in self.processes().items() if "MemberActor" in command]

    def ended(self) -> int:
        """The exit code, after everything is gone: processes and the cluster's files."""
        known = list(self.processes())
        self.process.wait(LIMIT)
        end = time.monotonic() + LIMIT
        while self.clusters() or any(running_still(pid) for pid in known):
            assert time.monotonic() < end, (self.clusters(), self.processes())
            time.sleep(0.1)
        return self.process.returncode


def running_still(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def driver(tiny: str, tmp_path: Path) -> Iterator[Driver]:
    temporary = tempfile.mkdtemp(prefix="rt-", dir="/tmp")  # short: Ray's sockets are in it
    made = Driver(tmp_path, tiny, temporary)
    yield made
    made.process.kill()
    made.process.wait()
    shutil.rmtree(temporary, ignore_errors=True)


def test_sigkill_in_mid_run_leaves_nothing_but_the_run_folder(driver: Driver) -> None:
    driver.until(lambda: "step 2/" in driver.said)
    assert len(driver.members()) >= MEMBERS
    driver.process.send_signal(signal.SIGKILL)
    assert driver.ended() == -signal.SIGKILL
    assert [line["step"] for line in running.metrics(driver.run) if "step" in line][:2] == [1, 2]


def test_ctrl_c_while_members_set_up_is_130_and_a_sentence(driver: Driver) -> None:
    driver.until(lambda: len(driver.members()) >= MEMBERS)
    driver.process.send_signal(signal.SIGINT)
    assert driver.ended() == 130, driver.errors
    assert "interrupted" in driver.errors
    assert "Traceback" not in driver.errors
    assert (driver.run / "config.toml").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["gcs_server", "raylet", "SIGINT"])
def test_a_run_that_loses_its_cluster_in_mid_run_says_so_in_time(driver: Driver, victim: str) -> None:
    driver.until(lambda: "step 2/" in driver.said)
    if victim == "SIGINT":
        driver.process.send_signal(signal.SIGINT)
        assert driver.ended() == 130
    else:
        os.kill(next(pid for pid, command in driver.processes().items() if command.endswith(victim)), signal.SIGKILL)
        assert driver.ended() == 1
        assert "MemberLost: " in driver.errors
    if victim == "gcs_server":
        assert "The Ray cluster at 127.0.0.1:" in driver.errors
        assert "Do: start it again" in driver.errors
    assert "Traceback" not in driver.errors
    assert len(running.metrics(driver.run)) >= 2

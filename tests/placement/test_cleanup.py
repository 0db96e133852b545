"""Nothing outlives a run: drivers that end in every way, and what is left of their clusters."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rolecall.placement.reaper import NOW, marked

DRIVER = Path(__file__).with_name("driver.py")
START = 150.0  # seconds: Ray starts in 5, but these tests share two cores with all others
LIMIT = 25.0  # seconds until everything is gone: Ray's own shutdown, 3 s of grace, the sweep


def start(how):
    process = subprocess.Popen([sys.executable, str(DRIVER), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    words = process.stdout.readline().split()
    assert len(words) == 4, process.communicate()[1][-2000:]
    return process, words[0], int(words[1]), words[2]


def wait_until_gone(folder, child, name):
    end = time.monotonic() + LIMIT
    while True:
        left = {
            "processes": marked(folder),
            "folder": os.path.exists(folder),
            "child": os.path.exists(f"/proc/{child}"),
            "shared memory": os.path.exists(f"/dev/shm/{name}"),
        }
        if not any(left.values()):
            return
        assert time.monotonic() < end, left
        time.sleep(0.1)


@pytest.mark.timeout(START + 2 * LIMIT)
@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM],  # tests/actors/test_run_ends.py sends it too
    ids=lambda number: number.name,
)
def test_nothing_is_left_after_a_signal(number):
    process, folder, child, name = start("wait")
    try:
        assert marked(folder), "the cluster runs, and the mark finds it"
        time.sleep(2.5)  # the watcher looks at the shared memory in use every 2 s
        process.send_signal(number)
        process.wait(LIMIT)
        assert process.returncode != 0
        wait_until_gone(folder, child, name)
    finally:
        process.kill()


@pytest.mark.timeout(START + 2 * LIMIT)
@pytest.mark.parametrize(("how", "status"), [("raise", 1), pytest.param("return", 0, marks=pytest.mark.slow)])
def test_nothing_is_left_after_the_block(how, status):
    process, folder, child, name = start(how)
    try:
        _, errors = process.communicate(timeout=2 * LIMIT)
        assert process.returncode == status, errors
        assert ("the controller's own mistake" in errors) == (how == "raise")
        assert not os.path.exists(folder), "the driver itself waits for the end"
        wait_until_gone(folder, child, name)
    finally:
        process.kill()


def test_a_watcher_without_a_cluster_just_removes_the_folder(tmp_path):
    folder = tmp_path / "cluster"
    folder.mkdir()
    command = [sys.executable, "-m", "rolecall.placement.reaper", str(folder)]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    watcher.stdin.write(NOW)
    assert watcher.stdout.read(1) == NOW, "it has started, and looked"
    watcher.send_signal(signal.SIGINT)  # ignored: a Ctrl-C is the driver's business
    orphan = subprocess.Popen(["sleep", "600"], start_new_session=True, env={**os.environ, "ROLECALL_CLUSTER": str(folder)})
    bystander = subprocess.Popen(["sleep", "600"], env={**os.environ, "ROLECALL_CLUSTER": f"{folder}-other"})
    try:
        watcher.stdin.close()
        watcher.wait(30)
        assert orphan.wait(5) == -signal.SIGKILL
        assert not folder.exists()
        assert bystander.poll() is None, "another cluster's processes are left alone"
    finally:
        orphan.kill()
        bystander.kill()
        bystander.wait()

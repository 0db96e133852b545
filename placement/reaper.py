"""The watcher process: nothing of a local cluster outlives its driver, even after SIGKILL.

`python -m rolecall.placement.reaper FOLDER`, standard input a pipe from the driver. The processes of the cluster are known
by the mark in their environment (`ROLECALL_CLUSTER=FOLDER`, inherited by workers and by whatever those start, in
whatever session), or by the folder in their command line. Linux only: it reads /proc.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

STOP, NOW = b"s", b"n"  # what the driver says: it has stopped the cluster; look now
LOOK = 2.0  # seconds between two looks at the shared memory in use
GRACE = 3.0  # seconds that processes get to end by themselves after an orderly stop
LIMIT = 15.0  # seconds after which the watcher gives up


def marked(folder: str) -> list[int]:
    """Process ids that belong to the cluster in `folder`, this process aside."""
    mark, path, found = f"ROLECALL_CLUSTER={folder}".encode(), f"{folder}/".encode(), []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
                environ, command = (Path("/proc", entry, name).read_bytes() for name in ("environ", "cmdline"))
                if mark in environ.split(b"\0") or path in command:
                    found.append(int(entry))
    return found


def shared_memory(pids: list[int]) -> set[str]:
    """Files in /dev/shm that these processes have mapped."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path("/proc", str(pid), "maps").read_text(errors="replace").splitlines():
                path = line.partition("/dev/shm/")  # noqa: S108
                if path[1] and not line.endswith(" (deleted)"):
                    found.add("/dev/shm/" + path[2])  # noqa: S108
    return found


def watch(folder: str) -> bool:
    """Wait until the driver is gone or done. Returns whether it stopped in order."""
    driver, used = os.getppid(), set[str]()
    while os.getppid() == driver:  # where the driver is gone and the pipe is not, a forked child of it holds it open
        said = os.read(sys.stdin.fileno(), 1) if select.select([sys.stdin], [], [], LOOK)[0] else None
        if said in (STOP, b""):
            sweep(folder, used, GRACE if said == STOP else 0.0)
            return said == STOP
        used |= shared_memory(marked(folder))
        if said:
            os.write(sys.stdout.fileno(), said)
    sweep(folder, used, 0.0)
    return False


def sweep(folder: str, used: set[str], grace: float) -> None:
    """End what is left of the cluster, then remove its shared memory and its folder."""
    start, quiet = time.monotonic(), 0
    while quiet < 3 and time.monotonic() - start < LIMIT:
        left = marked(folder)
        used |= shared_memory(left)
        quiet = 0 if left else quiet + 1  # a process between fork and exec shows neither mark
        if time.monotonic() - start >= grace:
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    for path in used - shared_memory([int(entry) for entry in os.listdir("/proc") if entry.isdigit()]):
        with contextlib.suppress(OSError):
            os.unlink(path)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when its driver does
    watch(sys.argv[1])

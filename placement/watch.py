"""The driver's end of the watcher process (`reaper.py`): a pipe whose end is the driver's death."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from pathlib import Path

from rolecall.placement.reaper import NOW, STOP

FINISH = 20.0  # seconds the watcher may take at the end; it gives the cluster's processes 3 of them to end by themselves


class Watch:
    """A watcher over one local cluster: when this process dies, however, it kills what is left and removes the folder."""

    def __init__(self, folder: Path) -> None:
        """Start it, before the cluster, so that nothing of the cluster is ever unwatched."""
        self.process = subprocess.Popen(  # noqa: S603 (our own interpreter and module)
            [sys.executable, "-m", "rolecall.placement.reaper", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C at a terminal goes to the whole process group
        )
        pipes = [pipe.fileno() for pipe in (self.process.stdin, self.process.stdout) if pipe is not None]
        self._told, self._answers = pipes

    def look(self) -> None:
        """Have it note the shared memory in use now; to be called before processes are ended in order."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._told, NOW)
            select.select([self._answers], [], [], FINISH)

    def close(self) -> None:
        """The cluster was stopped in order: let the watcher sweep up what did not end, and wait for it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.communicate(STOP, FINISH)

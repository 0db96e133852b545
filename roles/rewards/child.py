"""A process that can be killed: forked from the member, so that a function from `__main__` or a closure needs no pickling."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import stat
import time
from collections.abc import Sequence

import msgspec
from rolecall.protocols.errors import RewardError
from rolecall.protocols.messages import Verdict
from rolecall.roles.plain import plain
from rolecall.roles.rewards.signatures import Scorer
from rolecall.roles.rewards.work import Task, answers, flush

_PR_SET_PDEATHSIG = 1
_SEND = 30.0  # seconds for handing a task to a child that only waits for one
_EXIT = 2.0  # seconds between closing its end and being gone
_REAP = 10.0  # seconds for a killed process to be gone
_CHUNK = 1 << 16  # bytes read at once


class ChildDied(Exception):  # noqa: N818 - an event between two of our modules, not an error of the user's
    """The process ended by itself; the text says how."""


class Child:
    """A forked process that scores the tasks it is sent. Dies with its parent."""

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        ours, theirs = socket.socketpair()
        self._socket, self._buffer = ours, bytearray()
        self._decoder = msgspec.msgpack.Decoder(list[Verdict])
        self._process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(theirs, ours, tuple(scorers), os.getpid()), daemon=True, name="rolecall-reward"
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return int(self._process.pid or 0)

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    def send(self, task: Task) -> None:
        """Hand it a task.

        Raises:
            ChildDied: it is not there any more.
            RewardError: a column holds what is no plain data.
        """
        try:
            body = msgspec.msgpack.encode(task, enc_hook=plain)
        except (TypeError, ValueError, OverflowError, NotImplementedError) as error:
            raise RewardError(f"The data's columns can't be handed to the reward: {error}.", remedy="keep to plain values") from error
        try:
            self._socket.settimeout(_SEND)
            self._socket.sendall(_framed(body))
        except OSError as error:
            raise self._death() from error

    def receive(self, seconds: float) -> list[Verdict]:
        """The next verdicts.

        Raises:
            TimeoutError: none came within `seconds`.
            ChildDied: the process ended.
        """
        until = time.monotonic() + seconds
        while True:
            body = _take(self._buffer)
            if body is not None:
                return self._decoder.decode(body)
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(_CHUNK)
            except TimeoutError:
                raise
            except OSError:
                data = b""
            if not data:
                raise self._death()
            self._buffer += data

    def kill(self) -> None:
        """End the process and whatever it started."""
        # its group first (programs that the function started); until it is reaped the number can't be anybody else's
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(_REAP)
        self._socket.close()

    def _death(self) -> ChildDied:
        """How it ended, after it closed its end."""
        self._process.join(_EXIT)
        status = self._process.exitcode
        self.kill()
        if status is None:
            return ChildDied("closed its connection")
        return ChildDied(f"ended with exit code {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}")


def _framed(body: bytes) -> bytes:
    return len(body).to_bytes(8, "little") + body


def _take(buffer: bytearray) -> bytes | None:
    """Cut the first whole frame from `buffer`, if there is one."""
    if len(buffer) < 8:
        return None
    size = int.from_bytes(buffer[:8], "little")
    if len(buffer) < 8 + size:
        return None
    body = bytes(buffer[8 : 8 + size])
    del buffer[: 8 + size]
    return body


def _serve(pipe: socket.socket, parents: socket.socket, scorers: tuple[Scorer, ...], parent: int) -> None:
    """The child's main loop: ends when the parent closes its end."""
    _settle(parent)
    parents.close()
    _drop_connections(keep=pipe.fileno())
    pipe.settimeout(None)
    buffer, decoder, encoder = bytearray(), msgspec.msgpack.Decoder(Task), msgspec.msgpack.Encoder()
    while True:
        body = _take(buffer)
        if body is None:
            data = pipe.recv(1 << 20)
            if not data:
                return
            buffer += data
            continue
        task = decoder.decode(body)
        for verdicts in answers(scorers[task.scorer], task):
            flush()
            pipe.sendall(_framed(encoder.encode(verdicts)))


def _settle(parent: int) -> None:
    """Die with the parent, lead a process group of its own, and undo the parent's signal handlers."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)


def _drop_connections(keep: int) -> None:
    """Let go of the parent's sockets and pipes, so that its peers see them close when the parent closes them.

    Their numbers are kept busy with /dev/null: objects copied from the parent may still close them by number.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number <= 2 or number in (keep, null):
            continue
        with contextlib.suppress(OSError):  # the listing's own
            mode = os.fstat(number).st_mode
            if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode):
                os.dup2(null, number)
    os.close(null)

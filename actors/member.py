"""The Ray actor around a role: decodes what comes in, calls the verb, encodes what goes out, measures, keeps a log."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import ray
from rolecall.actors.plans import CallPlan
from rolecall.protocols import Divisible, Frame, Message, Metrics, Receipt, RolecallError, RoleFailed, decode, encode
from rolecall.roles.base import Member, Role


class MemberActor:
    """One member. Made by `spawn`; its methods are called by `Group` alone."""

    def __init__(self, role: Role, member: Member, log: str) -> None:
        os.environ["OMP_NUM_THREADS"] = str(member.threads)
        self.log = log
        if log:
            _log_to(Path(log))
        self.role, self.member = role, member
        self.broken: RolecallError | None = None

    def rendezvous(self) -> str:
        """Where the members' collective group meets: this process's node and a port that is free there."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def setup(self, rendezvous: str) -> Receipt:
        """Let the role take its place; what fails here fails every later call in the same words."""
        started = time.perf_counter()
        try:
            node = ray.util.get_node_ip_address()
            self.member = replace(self.member, rendezvous=rendezvous, node=node)
            self.role.setup(self.member)
        except Exception as error:
            self.broken = self._failure("setup", 0, error)
            raise self.broken from None
        return self._receipt("setup", started, started)

    @ray.method(num_returns=2)
    def call(self, plan: CallPlan, *frames: Frame) -> tuple[Receipt, Frame | None]:
        """Run one verb: the receipt goes to the controller, the frame stays in the object store."""
        if self.broken is not None:
            raise self.broken
        arrived = time.perf_counter()
        try:
            arguments, options = plan.resolve([decode(frame) for frame in frames])
            started = time.perf_counter()
            answer = getattr(self.role, plan.verb)(*arguments, **options)
            receipt, frame = self._answer(plan.verb, arrived, started, answer)
        except Exception as error:
            raise self._failure(plan.verb, plan.step, error) from None
        return receipt, frame

    def ping(self) -> int:
        """This process's id."""
        return os.getpid()

    def close(self) -> None:
        """Let the role give back what it took."""
        if self.broken is None:
            self.role.close()
        sys.stdout.flush()

    def _answer(self, verb: str, arrived: float, started: float, answer: Any) -> tuple[Receipt, Frame | None]:
        if isinstance(answer, Metrics):
            for name, (total, weight) in answer.sums.items():
                if weight:
                    self.role.meter.add(name, total / weight, weight)
        elif isinstance(answer, Message):
            receipt = self._receipt(verb, arrived, started)
            frame = encode(answer)
            outline = answer.outline() if isinstance(answer, Divisible) else None
            return msgspec.structs.replace(receipt, kind=type(answer).__name__, nbytes=frame.nbytes, outline=outline), frame
        receipt = self._receipt(verb, arrived, started)
        return (receipt if isinstance(answer, Metrics) else msgspec.structs.replace(receipt, value=answer)), None

    def _receipt(self, verb: str, arrived: float, started: float) -> Receipt:
        member = self.member
        now = time.perf_counter()
        return Receipt(
            role=member.role,
            rank=member.rank,
            node=member.node,
            verb=verb,
            seconds=now - started,
            waited=started - arrived,
            kind="",
            metrics=self.role.meter.drain(),
            version=self.role.version,
        )

    def _failure(self, verb: str, step: int, error: Exception) -> RolecallError:
        remote = traceback.format_exc()
        print(remote, file=sys.stderr, flush=True)
        member = self.member
        where = f"{member.role}[{member.rank}] on {member.node} failed in {verb!r} at step {step} (weights version {self.role.version})"
        return RoleFailed(
            f"{where}: {type(error).__name__}: {error}\n  log: {self.log or 'none'}",
            role=member.role,
            rank=member.rank,
            node=member.node,
            verb=verb,
            step=step,
            version=self.role.version,
            log=self.log,
            remote=remote,
            kind=type(error).__name__,
            cause=error if isinstance(error, RolecallError) else None,
        )


def _log_to(path: Path) -> None:
    """Send this process's output, that of C libraries and of children included, to the member's own file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        return  # a node that doesn't share the run folder: Ray's own log of this worker keeps the output
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)

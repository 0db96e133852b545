"""What a call returns at once: a handle to the parts that the members are still making."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from rolecall.actors.plans import Layout, merge_outlines
from rolecall.protocols import CallError, DeadlineExceeded, Divisible, MemberLost, Message, Outline, Receipt, RolecallError, decode

if TYPE_CHECKING:
    from rolecall.actors.group import Group

M = TypeVar("M")
SLICE = 5.0  # seconds between two looks at whether the cluster is still there


@dataclass
class Traffic:
    """Bytes of messages that this controller fetched, and that it only forwarded."""

    fetched: int = 0
    forwarded: int = 0


TRAFFIC = Traffic()


@dataclass(eq=False)
class Part:
    """One member's answer: its receipt and its frame, both references until they are asked for."""

    group: Group
    rank: int
    verb: str
    step: int
    receipt_ref: Any
    frame_ref: Any
    keys: np.ndarray | None = None  # of the units that it must answer; None where the call was not split
    found: Receipt | None = None
    forwards: int = 0  # how often its frame was passed on before its size was known

    def keep(self, receipt: Receipt) -> None:
        """Take the receipt, once.

        Raises:
            CallError: it answers other units than were asked.
        """
        if self.found is not None:
            return
        if self.keys is not None and receipt.outline is not None and not np.array_equal(receipt.outline.keys, self.keys):
            raise self.error(
                CallError,
                f"it answered {len(receipt.outline.keys)} units for {len(self.keys)}, or others than it was given.",
                "A verb called by .split must answer each unit once, in order.",
            )
        self.found = receipt
        self.group.absorb(receipt)
        TRAFFIC.forwarded += self.forwards * receipt.nbytes

    def forward(self) -> Any:
        """The reference of its frame, to be passed on; the bytes are counted."""
        if self.found is None:
            self.forwards += 1
        else:
            TRAFFIC.forwarded += self.found.nbytes
        return self.frame_ref

    def who(self) -> str:
        """The words that an error names this member with."""
        group = self.group
        return (
            f"{group.name}[{self.rank}] on {group.node(self.rank)}, verb {self.verb!r}, step {self.step}, weights version {group.version}"
        )

    def error(self, kind: type[CallError], why: str, remedy: str) -> CallError:
        """A typed error that says whom the call was waiting for."""
        log = self.group.log(self.rank)
        return kind(
            f"{self.who()}: {why} {remedy}\n  log: {log or 'none'}",
            role=self.group.name,
            rank=self.rank,
            node=self.group.node(self.rank),
            verb=self.verb,
            step=self.step,
            version=self.group.version,
            log=log,
            remote="",
        )


@dataclass(eq=False)
class Pending(Generic[M]):
    """A call's answer, in parts. Give it to another call to forward it; `result()` fetches it.

    Attributes:
        many: whether the call went to several members (`all`, `split`) or to one (`any`, `one`).
        assignment: for `split`, which units of the input each part answers.
        source: for `split`, the call whose units these are, in the same order: known before any member has answered.
        settled: whether its parts may stay with the members that hold them; else `split` balances its units anew.
        ahead: whether it was asked for before it is needed: the end of a step doesn't wait for it.
    """

    parts: tuple[Part, ...]
    many: bool
    deadline: float  # seconds from the call until its receipts must be there
    started: float = field(default_factory=time.monotonic)
    assignment: tuple[np.ndarray, ...] | None = None
    source: Pending[Any] | None = None
    settled: bool = True
    ahead: bool = False
    _outline: Outline | None = None
    _layout: Layout | None = None

    def wait(self) -> Pending[M]:
        """Wait until every member has answered.

        Raises:
            DeadlineExceeded: some have not in time; the error names each.
            RoleFailed, MemberLost: the first member that failed; its own error (WeightsError, DataError, …) is chained.
        """
        self.receipts()
        return self

    def done(self) -> bool:
        """Whether every member has answered (or failed) by now."""
        import ray

        open_ = [part.receipt_ref for part in self.parts if part.found is None]
        return not open_ or len(ray.wait(open_, num_returns=len(open_), timeout=0)[0]) == len(open_)

    def receipts(self) -> list[Receipt]:
        """The members' receipts, in rank order; waits as `wait` does."""
        missing = [part for part in self.parts if part.found is None]
        if missing:
            if missing[0].verb != "setup":
                for group in {part.group for part in missing}:
                    group.ready()
            self._collect(missing)
        return [part.found for part in self.parts if part.found is not None]

    def _collect(self, missing: Sequence[Part]) -> None:
        """Fetch receipts, all at once where all went well; else find out who failed and who is late."""
        import ray
        import ray.exceptions

        def left() -> float:
            return max(0.0, self.started + self.deadline - time.monotonic())

        refs = [part.receipt_ref for part in missing]
        while True:
            try:
                for part, receipt in zip(missing, ray.get(refs, timeout=min(SLICE, left())), strict=True):
                    part.keep(receipt)
                return
            except ray.exceptions.GetTimeoutError:
                missing[0].group.pool.connection.check(f"an answer of {missing[0].who()}")
                if not left():
                    break
            except ray.exceptions.RayError:
                break  # told apart below
        ready = set(_first_failure_or_all(refs, left()))
        failed = None
        for part in missing:
            if part.receipt_ref in ready:
                try:
                    part.keep(ray.get(part.receipt_ref))
                except Exception as error:
                    failed = failed or _typed(part, error)
        if failed is not None:
            raise failed from getattr(failed, "cause", None)
        late = [part for part in missing if part.found is None]
        if late:
            raise late[0].error(
                DeadlineExceeded,
                f"no answer within {self.deadline:.0f} s from: {'; '.join(part.who() for part in late)}.",
                "Look into the log for what it is doing; give the group a longer deadline if the work is just long.",
            )

    @property
    def outline(self) -> Outline:
        """Units, tokens and lengths of the message, without fetching it; waits for the receipts."""
        if self._outline is None:
            self._outline = merge_outlines([_outline_of(part) for part in self._answered()], self.layout)
        return self._outline

    @property
    def layout(self) -> Layout:
        """Which part holds which unit; waits for the receipts, but for those of a split call: there it was decided by the call."""
        if self._layout is None:
            if self.assignment is None:
                self._layout = Layout.of([len(_outline_of(part).keys) for part in self._answered()])
            else:
                self._layout = Layout.of([len(units) for units in self.assignment], self.assignment)
        return self._layout

    @property
    def origin(self) -> Pending[Any]:
        """Where its units come from: calls of one origin are about the same units in the same order."""
        return self if self.source is None else self.source

    def _answered(self) -> tuple[Part, ...]:
        self.receipts()
        return self.parts

    def result(self) -> M:
        """Fetch the answer: one message (parts joined, in the order of the input) or value; a list of them where several
        members answered and the answers can't be joined."""
        import ray

        receipts = self.receipts()
        if not receipts:
            raise CallError("nothing was sent, so there is no answer: the message that was split had no units.")
        if not receipts[0].kind:
            values = [receipt.value for receipt in receipts]
            return values if self.many else values[0]  # type: ignore[return-value]
        left = max(1.0, self.started + self.deadline - time.monotonic())
        messages: list[Message] = []
        for part, receipt in zip(self.parts, receipts, strict=True):
            try:
                messages.append(decode(ray.get(part.frame_ref, timeout=left)))
            except Exception as error:
                raise _typed(part, error) from None
            TRAFFIC.fetched += receipt.nbytes
        if not isinstance(messages[0], Divisible):
            return messages if self.many else messages[0]  # type: ignore[return-value]
        joined = messages[0] if len(messages) == 1 else type(messages[0]).join(messages)  # type: ignore[arg-type]
        if not self.layout.in_part_order():
            joined = joined.take(self.layout.offsets[self.layout.part] + self.layout.unit)
        return joined  # type: ignore[return-value]


def gather(*pendings: Pending[Any]) -> tuple[Any, ...]:
    """Wait for several calls that run at the same time, then give them back (still unfetched)."""
    return tuple(pending.wait() for pending in pendings)


def stretch(pendings: Sequence[Pending[M]], start: int, stop: int) -> Pending[M]:
    """Units start .. stop-1 of several answers laid end to end, as one answer. Waits for their receipts, not for their bytes."""
    parts = tuple(part for pending in pendings for part in pending._answered())
    layout = Layout.of([len(_outline_of(part).keys) for part in parts]).between(start, stop)
    return Pending(parts, many=True, deadline=max(pending.deadline for pending in pendings), settled=False, _layout=layout)


def _outline_of(part: Part) -> Outline:
    if part.found is None or part.found.outline is None:
        kind = part.found.kind if part.found else ""
        raise part.error(CallError, f"its answer ({kind or 'a plain value'}) has no units to split.", "Use .all or .one for it.")
    return part.found.outline


def _first_failure_or_all(refs: Sequence[Any], seconds: float) -> list[Any]:
    """References that are ready: all of them, or those so far once one has failed or the time is up."""
    import ray

    ready: list[Any] = []
    rest = list(refs)
    end = time.monotonic() + seconds
    while rest:
        done, rest = ray.wait(rest, num_returns=1, timeout=max(0.0, end - time.monotonic()))
        ready += done
        if not done:
            break
        if rest:  # whoever else is there already costs no further round
            more, rest = ray.wait(rest, num_returns=len(rest), timeout=0)
            ready += more
        try:
            ray.get(done)
        except Exception:
            break
    return ready


def _typed(part: Part, error: Exception) -> RolecallError:
    """Ray's exception as one of ours."""
    import ray.exceptions as lost

    cause = getattr(error, "cause", None)
    if isinstance(error, lost.RayTaskError) and isinstance(cause, RolecallError):
        return cause
    if isinstance(error, RolecallError):
        return error  # found here, in what came back: units that were not asked for, a damaged frame
    if isinstance(error, lost.GetTimeoutError):
        return part.error(DeadlineExceeded, "its answer could not be fetched in time.", "Is the object store or the network overloaded?")
    if isinstance(
        error, lost.RayActorError | lost.ObjectLostError | lost.ActorUnavailableError | lost.WorkerCrashedError | lost.NodeDiedError
    ):
        short = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return part.error(
            MemberLost,
            f"its process or node is gone ({type(error).__name__}: {short}).",
            "Its state is lost: restart from the last checkpoint.",
        )
    return part.error(CallError, f"the call failed outside the role's code ({type(error).__name__}: {error}).", "See the traceback.")

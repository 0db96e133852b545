"""What a controller holds: all members of a role, called with `.all`, `.split`, `.any` or `.one(rank)`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rolecall.actors.packing import Assembly
from rolecall.actors.pending import Part, Pending
from rolecall.actors.plans import CallPlan, Composed, Slices
from rolecall.protocols import CallError, DataError, Divisible, Message, Receipt, UserError
from rolecall.roles.packing import balance

if TYPE_CHECKING:
    from rolecall.placement import PlacedPool

SLACK = 1.1  # parts this close to equal are left where they are: moving tokens costs more than the imbalance
SPLITTABLE = (Pending, Assembly, Divisible)


class Group:
    """All members of one role. Made by `spawn`.

    Attributes:
        world: number of members.
        called: whether anything was asked of a member yet.
        version: newest weights version that a member reported.
        step: of the controller's loop; named in errors.
    """

    def __init__(
        self, name: str, pool: PlacedPool, actors: list[Any], logs: list[Path | None], deadline: float, verbs: frozenset[str]
    ) -> None:
        self.name, self.pool, self.deadline, self.verbs = name, pool, deadline, verbs
        self.world, self.version, self.step, self.called = len(actors), 0, 0, False
        self.metrics: dict[str, tuple[float, float]] = {}
        self.seconds: dict[str, list[float]] = {}  # verb → seconds of each call in the role's own code
        self._actors, self._logs = actors, logs
        self._open: list[Pending[Any]] = []
        self._setup: Pending[Any] | None = None

    all = property(lambda self: Caller(self, "all"), doc="Every member, the same message.")
    split = property(lambda self: Caller(self, "split"), doc="The message divided over the members, balanced by tokens.")
    any = property(lambda self: Caller(self, "any"), doc="The member with the fewest open calls.")

    def one(self, rank: int) -> Caller:
        """The member of this rank."""
        if not 0 <= rank < self.world:
            raise UserError(f"group {self.name!r} has no member {rank}.", have=f"members 0 to {self.world - 1}")
        return Caller(self, "one", rank)

    def log(self, rank: int) -> str:
        """The member's log file; "" where it has none."""
        return str(self._logs[rank] or "")

    def node(self, rank: int) -> str:
        """The node that the member was placed on."""
        return self.pool.node(rank)

    def starting(self, setup: Pending[Any]) -> None:
        """Called by `spawn`: the members' set-up, which every other call waits for."""
        self._setup = setup

    def ready(self) -> None:
        """Wait until all members are set up; every wait for an answer passes here first.

        Raises:
            DeadlineExceeded, RoleFailed, MemberLost: as `Pending.wait`.
        """
        if self._setup is not None:
            setup, self._setup = self._setup, None
            try:
                setup.wait()
            except BaseException:  # Ctrl-C too
                self._setup = setup  # whoever asks next is told the same
                raise

    def absorb(self, receipt: Receipt) -> None:
        """Take a receipt's measurements into the group's own; called once for each receipt."""
        self.version = max(self.version, receipt.version)
        self.seconds.setdefault(receipt.verb, []).append(receipt.seconds)
        for name, (total, weight) in receipt.metrics.items():
            so_far = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (so_far[0] + total, so_far[1] + weight)

    def drain(self) -> dict[str, float]:
        """Wait for the open calls, then give the means of what was measured since the last drain, as `role/name`.

        Calls that run ahead of what needs them are not waited for; they count where they end.
        """
        for pending in self._open:
            if not pending.ahead or pending.done():
                pending.wait()
        self._open = [pending for pending in self._open if pending.ahead and not pending.done()]
        means = {f"{self.name}/{name}": total / weight for name, (total, weight) in self.metrics.items() if weight}
        for verb, seconds in self.seconds.items():
            means[f"time/{self.name}.{verb}_s"] = sum(seconds) / self.world
        self.metrics, self.seconds = {}, {}
        return means

    def load_of(self, rank: int) -> int:
        """Open calls of a member."""
        self._open = [pending for pending in self._open if not pending.done() or any(part.found is None for part in pending.parts)]
        return sum(part.rank == rank and part.found is None for pending in self._open if not pending.done() for part in pending.parts)

    def send(self, rank: int, plan: CallPlan, frames: list[Any]) -> Part:
        """Submit one call to one member; returns at once."""
        receipt, frame = self._actors[rank].call.remote(plan, *frames)
        return Part(self, rank, plan.verb, self.step, receipt, frame)

    def close(self, seconds: float = 10.0) -> None:
        """Let the roles give back what they took, then end the members; safe to call twice and after a failure."""
        import ray

        if not self._actors or not ray.is_initialized():
            return
        actors, self._actors = self._actors, []
        if self._setup is not None and not self._setup.done():
            seconds = 0.0  # still setting up, so it would not even hear of it: a long load must not hold up the end of a run
        try:
            goodbyes = [actor.close.remote() for actor in actors]
            ray.wait(goodbyes, num_returns=len(goodbyes), timeout=seconds)
        finally:
            for actor in actors:
                ray.kill(actor)


class Caller:
    """`group.split.generate(...)`: an adverb, then a verb of the role."""

    def __init__(self, group: Group, adverb: str, rank: int = -1) -> None:
        self._group, self._adverb, self._rank = group, adverb, rank

    def __getattr__(self, verb: str) -> Callable[..., Pending[Any]]:
        if verb.startswith("_") or verb not in self._group.verbs:
            known = ", ".join(sorted(self._group.verbs))
            raise AttributeError(f"role {self._group.name!r} has no verb {verb!r}; it has: {known}.")

        def call(*arguments: Any, **options: Any) -> Pending[Any]:
            return self._call(verb, arguments, options)

        return call

    def _call(self, verb: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Pending[Any]:
        group = self._group
        if not group._actors:
            raise CallError(
                f"group {group.name!r} is closed; {verb!r} can't be called any more.", role=group.name, rank=-1, verb=verb, remote=""
            )
        group.called = True
        if self._adverb == "split":
            pending = _split(group, verb, arguments, options)
        else:
            ranks = range(group.world) if self._adverb == "all" else [self._rank if self._adverb == "one" else _idlest(group)]
            parts = tuple(_submit(group, rank, verb, arguments, options, None) for rank in ranks)
            pending = Pending(parts, many=self._adverb == "all", deadline=group.deadline)
        group._open.append(pending)
        return pending


def _idlest(group: Group) -> int:
    return min(range(group.world), key=group.load_of)


def _split(group: Group, verb: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Pending[Any]:
    held = [value for value in (*arguments, *options.values()) if isinstance(value, SPLITTABLE)]
    if not held:
        raise UserError(f"{group.name}.split.{verb}: none of its arguments can be split.", remedy="use .all for a call without a batch")
    origins = {id(value.origin) if isinstance(value, Pending | Assembly) else id(value) for value in held}
    keys = [_keys(value) for value in (held if len(origins) > 1 else held[:1])]
    if any(len(other) != len(keys[0]) or bool((other != keys[0]).any()) for other in keys[1:]):
        raise DataError(
            f"{group.name}.split.{verb}: its messages are about different prompts ({', '.join(str(len(other)) for other in keys)} units).",
            remedy="pass messages that were made from the same prompts",
        )
    assignment = _assign(held[0], group.world)
    ranks = [rank for rank, units in enumerate(assignment) if len(units)]
    parts = tuple(_submit(group, rank, verb, arguments, options, assignment[rank]) for rank in ranks)
    chosen = tuple(assignment[rank] for rank in ranks)
    for part, units in zip(parts, chosen, strict=True):
        part.keys = keys[0][units]
    source = held[0].origin if isinstance(held[0], Pending | Assembly) else None
    return Pending(parts, many=True, deadline=group.deadline, assignment=chosen, source=source)


def _keys(value: Any) -> np.ndarray:
    outline = value.outline() if isinstance(value, Divisible) else value.outline
    return np.asarray(outline.keys)


def _assign(value: Any, world: int) -> list[np.ndarray]:
    """Units for each member: the parts as they lie where that is balanced, else by tokens."""
    sizes = (value.outline() if isinstance(value, Divisible) else value.outline).sizes
    if not isinstance(value, Divisible) and value.settled:
        layout = value.layout
        loads = np.bincount(layout.part, weights=sizes, minlength=world)
        if len(layout.offsets) - 1 == world and loads.max() <= SLACK * loads.mean():
            return [np.flatnonzero(layout.part == part) for part in range(world)]
    return [np.sort(units) for units in balance(sizes, world)]


def _submit(group: Group, rank: int, verb: str, arguments: tuple[Any, ...], options: dict[str, Any], units: np.ndarray | None) -> Part:
    frames: list[Any] = []

    def one(value: Any) -> Any:
        if isinstance(value, Assembly):
            given = value.arguments if units is None else value.part(units)
            return Composed(value.make, tuple(map(one, given)), value.options)
        if isinstance(value, Pending):
            return _reference(value, units, frames)
        if isinstance(value, Message):
            return _inline(value, units, frames)
        return value

    plan = CallPlan(verb, tuple(map(one, arguments)), {name: one(option) for name, option in options.items()}, group.step)
    return group.send(rank, plan, frames)


def _reference(pending: Pending[Any], units: np.ndarray | None, frames: list[Any]) -> Slices:
    def number(part: int) -> int:
        frames.append(pending.parts[part].forward())
        return len(frames) - 1

    if units is not None:
        return pending.layout.slices(units, number)
    return Slices(tuple(map(number, range(len(pending.parts)))), (None,) * len(pending.parts), None, pending.many)


def _inline(message: Message, units: np.ndarray | None, frames: list[Any]) -> Slices:
    from rolecall.protocols import encode

    cut = message.take(units) if units is not None and isinstance(message, Divisible) else message
    frames.append(encode(cut))
    return Slices((len(frames) - 1,), (None,))

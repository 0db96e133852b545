"""`spawn`: a role becomes a group of members in a placed pool."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rolecall.actors.group import Group
from rolecall.actors.pending import Part, Pending
from rolecall.protocols import UserError
from rolecall.roles.base import Member, Role

if TYPE_CHECKING:
    from rolecall.placement import PlacedPool

NOT_VERBS = {"setup", "close", "check"}


def spawn(
    role: Role,
    *,
    on: PlacedPool,
    name: str = "",
    members: int = 0,
    folder: Path | None = None,
    seed: int = 0,
    deadline: float = 600.0,
    start_deadline: float = 300.0,
) -> Group:
    """Start one actor for each member of the pool and hand each a copy of `role`. Returns before they are up.

    Args:
        role: made at the controller; its `setup` runs in each member.
        on: a pool from `place`.
        name: word for the group in logs, metrics and errors; the role's own without it.
        members: how many; as many as the pool has bundles without it.
        folder: of the run; member logs go to `folder/logs/<name>-<rank>.log`.
        seed: of the run.
        deadline: seconds that any call may take.
        start_deadline: seconds until a member must be set up.

    Raises:
        UserError: the role can't be played as it is set, or the pool has too few bundles.
    """
    if not isinstance(role, Role):
        remedy = "pass an instance of a subclass of rolecall.roles.base.Role"
        raise UserError(f"spawn wants a role, not {type(role).__name__}.", remedy=remedy)
    role.check()
    word = name or role.name or type(role).__name__.lower()
    world = members or on.members
    if world > on.members:
        remedy = "give the pool more members"
        raise UserError(f"{word}: {world} members asked of pool {on.pool.name!r}.", have=f"{on.members} bundles", remedy=remedy)
    if on.gpus > 1 and on.tenants:
        raise UserError(
            f"{word}: pool {on.pool.name!r} gives each member {on.gpus:g} GPUs, and a role has taken them.",
            remedy=f"give {word} a pool of its own, or one with shares={on.pool.name!r}",
        )
    logs = [folder.absolute() / "logs" / f"{word}-{rank}.log" if folder else None for rank in range(world)]
    device, backend = ("cuda:0", "nccl") if on.gpus else ("cpu", "gloo")
    common = Member(role=word, world=world, device=device, threads=on.threads, seed=seed, folder=folder, backend=backend)
    actors = _start(role, on, common, logs)
    group = Group(word, on, actors, logs, deadline, verbs_of(type(role)))
    meeting = actors[0].rendezvous.remote() if world > 1 else ""
    parts = tuple(Part(group, rank, "setup", 0, actor.setup.remote(meeting), None) for rank, actor in enumerate(actors))
    group.starting(Pending(parts, many=True, deadline=start_deadline))
    on.tenants.append(group.close)
    return group


def _start(role: Role, on: PlacedPool, common: Member, logs: list[Path | None]) -> list[Any]:
    """The members' actors, which Ray must never restart: they would come back without their weights."""
    import ray
    from rolecall.actors.member import MemberActor

    actors: list[Any] = []  # handles, whose methods Ray adds
    for rank, log in enumerate(logs):
        options: dict[str, Any] = {**on.options(rank), "max_restarts": 0, "max_task_retries": 0}
        actors.append(ray.remote(MemberActor).options(**options).remote(role, replace(common, rank=rank), str(log or "")))
    return actors


def verbs_of(kind: type[Role]) -> frozenset[str]:
    """Public methods of a role class, less those of the shell."""
    return frozenset(
        name for name, member in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_") and name not in NOT_VERBS
    )

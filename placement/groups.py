"""Pools made real: the plan is proved on the live cluster, then each pool gets its Ray placement group."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rolecall.placement.cluster import Connection, answers, connect, unhurried
from rolecall.placement.memory import Estimate, read_memory
from rolecall.placement.nodes import ACCELERATOR_LABEL, Node, live
from rolecall.placement.planner import Plan, fit
from rolecall.placement.pools import STEP, Pool, base_of, bundle_of, bundles, check_pools
from rolecall.protocols.errors import DeadlineExceeded, PlanError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup
    from rolecall.placement.memory import Estimate

SETTLE = 0.8  # seconds in which Ray may yet tell that something was given back
SLICE = 0.5  # seconds between two looks at whether the cluster is still there
NODE_LABEL = "ray.io/node-id"
TRACE = 0.001  # of a GPU


@dataclass(frozen=True)
class PlacedPool:
    """A pool with its place on the cluster: what actors are created with.

    Args:
        pool: what was asked.
        group: the placement group, or that of the pool whose bundles it shares.
        indices: of each member, the number of its bundle in `group`.
        nodes: of each member, the id of its node.
        hosts: of each member, the address of its node.
        connection: the cluster it is on.
        threads: CPU threads of each member: its own share's, or those of the pool it shares when it asks for no CPU itself.
        tenants: what to call before the groups are removed, newest first; `spawn` adds the closing of its group.
    """

    pool: Pool
    group: PlacementGroup
    indices: tuple[int, ...]
    nodes: tuple[str, ...]
    hosts: tuple[str, ...]
    connection: Connection = field(repr=False)
    threads: int = 1
    tenants: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        """Name of the pool."""
        return self.pool.name

    @property
    def members(self) -> int:
        """Number of processes."""
        return self.pool.members

    @property
    def gpus(self) -> float:
        """GPUs of each member."""
        return self.pool.gpus

    def bundle(self, rank: int) -> tuple[PlacementGroup, int]:
        """The placement group and the number of the bundle that member `rank` runs in."""
        return self.group, self.indices[rank]

    def node(self, rank: int) -> str:
        """Id of the node that member `rank` runs on, by the plan."""
        return self.nodes[rank]

    def options(self, rank: int) -> dict[str, Any]:
        """Ray actor options that put member `rank` into its bundle: `Actor.options(**placed.options(rank)).remote()`."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self.group, self.indices[rank], placement_group_capture_child_tasks=False)
        # The bundle is what is reserved; its tenants take next to nothing of it, so that several roles can live in one pool.
        # A trace of a GPU is enough for Ray to hand out the bundle's device. Whole GPUs can't be divided so.
        gpus = self.pool.gpus if self.pool.gpus > 1 else min(self.pool.gpus, TRACE)
        return {"scheduling_strategy": strategy, "num_cpus": 0, "num_gpus": gpus}


@contextlib.contextmanager
def place(
    pools: Sequence[Pool], *, address: str | None = None, deadline: float = 60.0, memory: Mapping[str, Any] | None = None
) -> Iterator[dict[str, PlacedPool]]:
    """The pools' placement groups for the time of the block: proved, made, and removed at the end however it ends.

    Args:
        pools: what the roles need; checked before Ray is even imported.
        address: as for `connect`: None starts a local Ray of its own, "host:port" or "auto" joins one.
        deadline: seconds in which all groups must be ready.
        memory: role → what it holds: an `Estimate`, or a table as `read_memory` takes it (a run's `[memory.ROLE]`).

    Raises:
        ConfigError: the pools or the memory tables make no sense. PlanError: they don't fit what is free now; nothing was made.
        DeadlineExceeded: a group was not ready in time. MemberLost: the cluster went away meanwhile.
    """
    check_pools(pools)
    given = dict(memory or {})
    tables = {role: table for role, table in given.items() if not isinstance(table, Estimate)}
    estimates = {**given, **read_memory(tables)}
    with connect(address) as connection:
        plan = _prove(pools, estimates)
        made: dict[str, PlacementGroup] = {}
        try:
            _make(plan, made)
            _wait(made, connection, deadline)
            placed = _placed(plan, made, connection)
            try:
                yield placed
            finally:
                with unhurried():
                    _dismiss(placed, connection)
        finally:
            with unhurried():
                _remove(made, connection)


def _prove(pools: Sequence[Pool], memory: Mapping[str, Estimate]) -> Plan:
    """A plan on what is free now. Ray's head hears of what was given back up to a second late, so a refusal that
    hangs on what others hold is thought over for `SETTLE`; one that does not is final at once."""
    end = time.monotonic() + SETTLE
    while True:
        try:
            return fit(pools, live(), memory=memory)
        except PlanError as error:
            fit(pools, live(free=False), memory=memory)  # raises where it would not fit even if all were free
            if time.monotonic() > end:
                text = f"{error} If nothing else ran, it would fit: wait for what holds the rest, or end it."
                raise PlanError(text, reasons=error.reasons, details=error.fields["details"]) from None
        time.sleep(0.05)


def _make(plan: Plan, made: dict[str, PlacementGroup]) -> None:
    """Ask Ray for the groups, in the plan's order, each bundle on the plan's node.

    Ray would choose nodes greedily, group by group, and could so take what a later pool needs; with a node for each bundle it can't.
    A node that dies takes its bundles with it; the run is then placed anew.
    """
    from ray.util.placement_group import placement_group

    asked = bundles(plan.pools)
    nodes = {node.name: node for node in plan.nodes}
    strategies = {pool.name: pool.strategy for pool in plan.pools}
    for name in plan.order:
        content = [{resource: _amount(resource, steps) for resource, steps in bundle.items()} for bundle in asked[name]]
        selectors = [_selector(nodes[node]) for node in plan.bundles[name]]
        made[name] = placement_group(content, strategy=strategies[name], bundle_label_selector=selectors)


def _amount(resource: str, steps: int) -> float:
    return float(steps) if resource == "memory" else steps / STEP


def _selector(node: Node) -> dict[str, str]:
    labels = {NODE_LABEL: node.name}
    if ACCELERATOR_LABEL in node.labels:
        labels[ACCELERATOR_LABEL] = node.labels[ACCELERATOR_LABEL]
    return labels


def _wait(made: Mapping[str, PlacementGroup], connection: Connection, deadline: float) -> None:
    import ray

    end = time.monotonic() + deadline
    waiting = {group.ready(): name for name, group in made.items()}
    while waiting:
        left = end - time.monotonic()
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=max(0.0, min(SLICE, left)))
        for reference in ready:
            del waiting[reference]
        if waiting and left <= 0:
            raise _late(made, sorted(waiting.values()), connection, deadline)
        if waiting:
            connection.check(f"the placement of pool {', '.join(map(repr, waiting.values()))}")


def _late(made: Mapping[str, PlacementGroup], names: list[str], connection: Connection, deadline: float) -> DeadlineExceeded:
    from ray.util.placement_group import placement_group_table

    lines = []
    for name in names:
        table = placement_group_table(made[name])
        lines.append(f"pool {name!r} waits for {table['bundles']} (Ray says {table['stats']['scheduling_state']})")
    return DeadlineExceeded(
        f"Not all pools were ready within {deadline:g} s on the Ray cluster at {connection.address}: {'; '.join(lines)}. "
        "They did fit when the plan was made, so something else took the place. "
        "Do: see `ray status`, end what holds the resources, or give a longer deadline.",
        role=", ".join(names),
        rank=-1,
        node=connection.address,
        verb="place",
        remote="",
    )


def _placed(plan: Plan, made: Mapping[str, PlacementGroup], connection: Connection) -> dict[str, PlacedPool]:
    by_name = {pool.name: pool for pool in plan.pools}
    hosts = {node.name: node.address for node in plan.nodes}
    placed = {}
    for pool in plan.pools:
        base = base_of(pool, by_name).name
        indices = tuple(bundle_of(pool, rank, by_name) for rank in range(pool.members))
        nodes = tuple(plan.bundles[base][index] for index in indices)
        paying = pool if pool.cpus or not pool.shares else by_name[base]
        placed[pool.name] = PlacedPool(pool, made[base], indices, nodes, tuple(hosts[node] for node in nodes), connection, paying.threads)
    return placed


def _dismiss(placed: Mapping[str, PlacedPool], connection: Connection) -> None:
    """Let whoever lives in the pools leave in order, while there is a cluster to tell."""
    if answers(connection.address):
        with contextlib.ExitStack() as stack:
            for pool in placed.values():
                for tenant in pool.tenants:
                    stack.callback(tenant)


def _remove(made: Mapping[str, PlacementGroup], connection: Connection) -> None:
    """Give the groups back, and wait until Ray has; a cluster that is gone has none."""
    from ray.util.placement_group import placement_group_table, remove_placement_group

    if not made or not answers(connection.address):
        return
    if connection.watch:
        connection.watch.look()  # removing a group ends its actors
    for group in made.values():
        remove_placement_group(group)
    end = time.monotonic() + 5.0
    while time.monotonic() < end and any(placement_group_table(group).get("state") != "REMOVED" for group in made.values()):
        time.sleep(0.02)

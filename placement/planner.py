"""`fit`: the proof that pools fit a cluster, or every reason why they don't. Pure: no Ray, no clock, no files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
from rolecall.placement.memory import Estimate
from rolecall.placement.nodes import Node
from rolecall.placement.pools import STEP, Pool, base_of, bundle_of, bundles, check_pools
from rolecall.placement.search import Answer, Counts, Demand, Item, Solution, State, solve
from rolecall.protocols.errors import ConfigError

UNKNOWN = 1 << 62  # memory of a node that nobody told


class Plan(msgspec.Struct, frozen=True):
    """Where every bundle goes.

    Args:
        pools, nodes: as given to `fit`.
        bundles: pool with bundles of its own → name of the node of each.
        left: name of the node → what is free on it then.
        order: in which the placement groups are to be made (see search.py).
        memory: role → estimate, as given.
    """

    pools: tuple[Pool, ...]
    nodes: tuple[Node, ...]
    bundles: dict[str, tuple[str, ...]]
    left: dict[str, Node]
    order: tuple[str, ...]
    memory: dict[str, Estimate] = {}

    def node(self, pool: str, rank: int) -> str:
        """Name of the node that member `rank` of `pool` runs on."""
        by_name = {entry.name: entry for entry in self.pools}
        return self.bundles[base_of(by_name[pool], by_name).name][bundle_of(by_name[pool], rank, by_name)]


@dataclass(frozen=True)
class Setting:
    """Pools and nodes in the search's terms."""

    pools: tuple[Pool, ...]
    nodes: tuple[Node, ...]
    resources: tuple[str, ...]  # plain ones, in the order of State.plain
    types: tuple[Node, ...]  # one node of each type
    members: dict[State, list[int]]  # state when nothing is placed → numbers of the nodes in it
    items: tuple[Item, ...]
    memory: Mapping[str, Estimate]

    @property
    def counts(self) -> Counts:
        """Nodes by state."""
        return {state: len(numbers) for state, numbers in self.members.items()}

    def solve(self, *, steps: int | None = None) -> Answer:
        """Search for a placement of all items."""
        return solve(self.items, self.counts) if steps is None else solve(self.items, self.counts, steps=steps)

    def changed(self, pools: Sequence[Pool]) -> Setting:
        """The same cluster asked for other pools (of the same resources)."""
        return replace(self, pools=tuple(pools), items=itemise(pools, self.types, self.resources, self.memory))

    def only(self, names: Sequence[str]) -> Setting:
        """The same with these base pools alone."""
        return replace(self, items=tuple(item for item in self.items if item.name in names))


def fit(pools: Sequence[Pool], nodes: Sequence[Node], *, memory: Mapping[str, Estimate] | None = None) -> Plan:
    """A place for every bundle of every pool, found for all pools together.

    Exact where at most 64 bundles are asked and the search ends within its 20,000 steps (clusters of the size
    a person describes); beyond that a placement is found by several greedy passes, and where they fail the error says that
    it is not proven. Ray itself looks at one group at a time, so it may fail where this finds a place; `place` therefore tells Ray
    which node each bundle is for.

    Args:
        pools: what is asked.
        nodes: what there is (`read_cluster`, or `live` for what is free now).
        memory: role → estimate of what it holds; `Estimate.pool` says in which pool (the role's own name by default). The roles
            of a bundle together must fit its share of GPU memory and of main memory, on nodes that tell theirs.

    Raises:
        ConfigError: the pools make no sense by themselves, or a role is in none of them.
        PlanError: they don't fit; `reasons` has every reason with ask, have and the smallest change that would fit.
    """
    for role, estimate in (memory or {}).items():
        if (estimate.pool or role) not in [pool.name for pool in pools]:
            names = ", ".join(repr(pool.name) for pool in pools)
            remedy = "set `pool` of its estimate to one of them"
            raise ConfigError(f"Role {role!r} is in no pool.", ask=repr(estimate.pool or role), have=names, remedy=remedy)
    setting = prepare(check_pools(pools), tuple(nodes), memory or {})
    answer = setting.solve()
    if answer.solution is None:
        from rolecall.placement.reasons import refuse

        raise refuse(setting, proven=answer.proven)
    return _plan(setting, answer.solution)


def prepare(pools: tuple[Pool, ...], nodes: tuple[Node, ...], memory: Mapping[str, Estimate]) -> Setting:
    """Count equal nodes together and turn pools into items."""
    asked = demands(pools, memory)
    names = sorted({name for pool in asked.values() for bundle in pool for name in bundle} - {"GPU"})
    types: list[Node] = []
    known: dict[tuple[object, ...], int] = {}
    members: dict[State, list[int]] = {}
    for number, node in enumerate(nodes):
        has = node.steps()
        plain = tuple([has.get(name, UNKNOWN if name == "memory" and not node.memory_gb else 0) for name in names])
        key = (node.accelerator, plain, has["GPU"], node.gpu_memory_gb)
        if key not in known:
            known[key] = len(types)
            types.append(node)
        devices, part = divmod(has["GPU"], STEP)
        members.setdefault(State(known[key], plain, devices, (part,) if part else ()), []).append(number)
    items = itemise(pools, tuple(types), tuple(names), memory)
    return Setting(pools, nodes, tuple(names), tuple(types), members, items, memory)


def itemise(pools: Sequence[Pool], types: Sequence[Node], names: Sequence[str], memory: Mapping[str, Estimate]) -> tuple[Item, ...]:
    """The base pools in the search's terms. `names` are the plain resources."""
    by_name = {pool.name: pool for pool in pools}
    items = []
    for name, entries in demands(pools, memory).items():
        same = {id(bundle): bundle for bundle in entries}
        sizes: Counter[Demand] = Counter()
        for number, count in Counter(map(id, entries)).items():
            sizes[demand_of(same[number], names)] += count
        kinds = frozenset(kind for kind, node in enumerate(types) if allowed(by_name[name], node) and roomy(name, node, pools, memory))
        largest = tuple(sorted(sizes.items(), key=lambda pair: (pair[0].gpu, pair[0].plain), reverse=True))
        items.append(Item(name, largest, by_name[name].strategy, kinds))
    return tuple(items)


def demand_of(bundle: Mapping[str, int], names: Sequence[str]) -> Demand:
    """A bundle in the search's terms."""
    return Demand(tuple([bundle.get(name, 0) for name in names]), bundle.get("GPU", 0))


def allowed(pool: Pool, node: Node) -> bool:
    """Whether the node has the accelerator that the pool wants."""
    return not pool.accelerator or node.accelerator == pool.accelerator


def needs(base: str, bundle: int, pools: Sequence[Pool], memory: Mapping[str, Estimate]) -> tuple[float, float, float]:
    """What the roles in a bundle of a base pool need: GB of device memory, the GPUs it lies in, GB of main memory."""
    by_name = {pool.name: pool for pool in pools}
    device = gpus = host = 0.0
    for pool in pools:
        if base_of(pool, by_name).name == base:
            copies = sum(bundle_of(pool, rank, by_name) == bundle for rank in range(pool.members))
            here = [estimate for role, estimate in memory.items() if (estimate.pool or role) == pool.name]
            device += copies * sum(estimate.device_gb for estimate in here)
            host += copies * sum(estimate.host_gb for estimate in here)
            gpus += copies * pool.gpus
    return device, gpus, host


def roomy(base: str, node: Node, pools: Sequence[Pool], memory: Mapping[str, Estimate]) -> bool:
    """Whether the device memory of the roles in the fullest bundle, the first, fits its share of this node's GPUs."""
    if not memory or not node.gpu_memory_gb:
        return True
    device, gpus, _ = needs(base, 0, pools, memory)
    return not gpus or device <= gpus * node.gpu_memory_gb


def demands(pools: Sequence[Pool], memory: Mapping[str, Estimate]) -> dict[str, list[dict[str, int]]]:
    """As `bundles`, with main memory raised to what the roles are estimated to need."""
    asked = bundles(pools)
    shared = {pool.shares for pool in pools}
    for name, entries in asked.items() if memory else ():
        for number, bundle in enumerate(entries):
            if number and name not in shared:  # all are as the first
                entries[number] = entries[0]
                continue
            device, gpus, host = needs(name, number, pools, memory)
            main = round((host if gpus else host + device) * 1e9)
            entries[number] = {**bundle, "memory": max(main, bundle.get("memory", 0))} if main else bundle
    return asked


def _plan(setting: Setting, solution: Solution) -> Plan:
    """Replay the moves on the nodes themselves."""
    where = {state: list(reversed(numbers)) for state, numbers in setting.members.items()}
    aside: dict[State, list[int]] = {}
    got: dict[tuple[int, Demand], list[int]] = {}
    for move in solution.moves:
        if move is None:
            for state, numbers in aside.items():
                where.setdefault(state, []).extend(numbers)
            aside = {}
            continue
        for _ in range(move.nodes):
            number = where[move.before].pop()
            got.setdefault((move.item, move.demand), []).extend([number] * move.each)
            (aside if move.aside else where).setdefault(move.after, []).append(number)
    asked = demands(setting.pools, setting.memory)
    placed = {}
    for index, item in enumerate(setting.items):
        queues = {demand: iter(got[index, demand]) for demand, _ in item.bundles}
        nodes = []
        for bundle in asked[item.name]:
            nodes.append(setting.nodes[next(queues[demand_of(bundle, setting.resources)])].name)
        placed[item.name] = tuple(nodes)
    order = tuple(setting.items[index].name for index in solution.order)
    return Plan(setting.pools, setting.nodes, placed, _left(setting, asked, placed), order, dict(setting.memory))


def _left(setting: Setting, asked: Mapping[str, list[dict[str, int]]], placed: Mapping[str, tuple[str, ...]]) -> dict[str, Node]:
    left = {node.name: node for node in setting.nodes}
    used: dict[str, Counter[str]] = {}
    for name, nodes in placed.items():
        for bundle, node in zip(asked[name], nodes, strict=True):
            used.setdefault(node, Counter()).update(bundle)
    for host, amounts in used.items():
        owner = left[host]
        has = owner.steps()
        rest = {resource: has.get(resource, 0) - amounts.get(resource, 0) for resource in {*has, *amounts}}
        left[host] = msgspec.structs.replace(
            owner,
            cpus=rest["CPU"] / STEP,
            gpus=rest["GPU"] / STEP,
            memory_gb=rest["memory"] / 1e9 if owner.memory_gb else 0.0,
            resources={resource: rest[resource] / STEP for resource in owner.resources},
        )
    return left

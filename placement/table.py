"""A plan, or the reasons why there is none, for people to read."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rolecall.placement.planner import Plan
from rolecall.placement.pools import STEP, base_of

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rolecall.protocols.errors import PlanError

SHOWN = 20  # nodes listed; a larger cluster is summed up


def plan_tables(plan: Plan) -> Group:
    """What each pool gets, what each node gives and keeps, and the memory of the roles."""
    from rich.console import Group

    tables = [_pools(plan), _nodes(plan)]
    if plan.memory:
        tables.append(_memory(plan))
    return Group(*tables)


def reasons_table(error: PlanError) -> Table:
    """One row a reason: who asks what, what there is, what to change."""
    from rich.table import Table

    table = Table("pools", "asked", "there is", "do", title="These pools don't fit", show_lines=True)
    for reason in error.fields["details"]:
        table.add_row(", ".join(reason.pools), reason.ask, reason.have, reason.remedy)
    return table


def short(bundle: dict[str, int]) -> str:
    """A bundle in a few characters: "1 GPU, 2 CPU, 16 GB"."""
    parts = []
    for name in sorted(bundle, key=lambda name: (name != "GPU", name != "CPU", name)):
        parts.append(f"{bundle[name] / 1e9:g} GB" if name == "memory" else f"{bundle[name] / STEP:g} {name}")
    return ", ".join(parts)


def _pools(plan: Plan) -> Table:
    from rich.table import Table

    table = Table("pool", "members", "each", "accelerator", "strategy", "on (bundles)", title="Pools")
    by_name = {pool.name: pool for pool in plan.pools}
    for pool in plan.pools:
        base = base_of(pool, by_name).name
        if pool.shares:
            where, strategy, accelerator = f"bundles of {base!r}", "", by_name[base].accelerator
        else:
            counts = Counter(plan.bundles[pool.name])
            listed = [f"{_name(node)}×{count}" if count > 1 else _name(node) for node, count in list(counts.items())[:SHOWN]]
            where = ", ".join(listed) + (f" and {len(counts) - SHOWN} nodes more" if len(counts) > SHOWN else "")
            strategy, accelerator = pool.strategy, pool.accelerator
        table.add_row(pool.name, str(pool.members), short(pool.demand()) or "nothing of its own", accelerator or "any", strategy, where)
    return table


def _name(node: str) -> str:
    return node[:12]  # Ray's ids are 56 characters


def _nodes(plan: Plan) -> Table:
    from rich.table import Table

    table = Table("node", "accelerator", "has", "used by", "left", title="Nodes")
    users: dict[str, Counter[str]] = {}
    for name, nodes in plan.bundles.items():
        for owner in nodes:
            users.setdefault(owner, Counter())[name] += 1
    by_use = sorted(plan.nodes, key=lambda node: node.name not in users)
    for node in by_use[:SHOWN]:
        used = ", ".join(f"{name}×{count}" if count > 1 else name for name, count in users.get(node.name, Counter()).items())
        table.add_row(_name(node.name), node.accelerator, _has(node.steps()), used or "nobody", _has(plan.left[node.name].steps()))
    if len(by_use) > SHOWN:
        free = sum(node.name not in users for node in by_use)
        table.caption = f"{len(by_use) - SHOWN} nodes more; {free} of all {len(by_use)} are not used"
    return table


def _has(steps: dict[str, int]) -> str:
    return short({name: amount for name, amount in steps.items() if amount}) or "nothing"


def _memory(plan: Plan) -> Table:
    from rich.table import Table

    parts = ("weights", "gradients", "optimiser", "activations", "cache", "reserve")
    table = Table("role", "pool", *parts, "device GB", title="Memory of a member, GB of 10⁹ bytes")
    for role, estimate in plan.memory.items():
        table.add_row(role, estimate.pool or role, *(f"{getattr(estimate, part):.2f}" for part in parts), f"{estimate.device_gb:.2f}")
    return table

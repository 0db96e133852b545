"""The smallest changes with which everything fits, found by trying them."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from rolecall.placement.nodes import Node
from rolecall.placement.planner import Setting
from rolecall.placement.pools import Pool, base_of

TRY = 300  # steps of exhaustive search for each change tried
MOST = 1024  # nodes that a remedy may ask for


def fewer_members(setting: Setting, name: str) -> Pool | None:
    """The pool with the most members with which all items of `setting` fit, or None where no number does."""
    pool = next(pool for pool in setting.pools if pool.name == name)
    low, high = 0, pool.members  # low is known to fit (or 0), high not to
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(setting, msgspec.structs.replace(pool, members=middle)):
            low = middle
        else:
            high = middle
    return msgspec.structs.replace(pool, members=low) if low else None


def _fits(setting: Setting, pool: Pool) -> bool:
    by_name = {entry.name: entry for entry in setting.pools}
    names = {item.name for item in setting.items}
    pools = [pool if entry.name == pool.name else entry for entry in setting.pools if base_of(entry, by_name).name in names]
    return setting.changed(pools).solve(steps=TRY).solution is not None


def more_nodes(setting: Setting) -> str:
    """The fewest nodes of a type that is there which, added, make everything fit: "add 2 nodes like 'a' (8 CPUs, …)"."""
    best: tuple[int, Node] | None = None
    for kind, node in enumerate(setting.types):
        limit = best[0] - 1 if best else MOST
        count = _added(setting, kind, limit)
        if count:
            best = (count, node)
    if best is None:
        return ""
    count, node = best
    parts = [f"{node.cpus:g} CPUs"] + ([f"{node.gpus:g} GPUs"] if node.gpus else []) + ([node.accelerator] if node.accelerator else [])
    return f"add {count} node{'s' if count > 1 else ''} like {node.name!r} ({', '.join(parts)})"


def _added(setting: Setting, kind: int, limit: int) -> int:
    """The fewest of at most `limit` more nodes of a type with which all fits, or 0."""
    low, high = 0, 1
    while high <= limit and not _grown(setting, kind, high):
        low, high = high, high * 2
    if high > limit:
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        if _grown(setting, kind, middle):
            high = middle
        else:
            low = middle
    return high


def _grown(setting: Setting, kind: int, count: int) -> bool:
    """Whether all fits with `count` nodes more of type `kind`, empty."""
    state = next(state for state in setting.members if state.kind == kind)
    members = dict(setting.members)
    members[state] = members[state] + [members[state][0]] * count
    return replace(setting, members=members).solve(steps=TRY).solution is not None

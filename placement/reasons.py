"""Why pools don't fit: each reason with what is asked, what there is, and the smallest change that would fit.

A remedy that names numbers has been tried: `Reason.changes` holds the pools so changed, and the search found a place for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec
from rolecall.placement.nodes import Node
from rolecall.placement.planner import UNKNOWN, Setting, allowed, demands, needs
from rolecall.placement.pools import STEP, Pool, base_of, nearest
from rolecall.placement.remedies import fewer_members, more_nodes
from rolecall.placement.search import Item, free_gpu, take
from rolecall.protocols.errors import PlanError

WORDS = {"CPU": "CPUs", "GPU": "GPUs", "memory": "GB of main memory"}
FIELDS = {"CPU": "cpus", "GPU": "gpus", "memory": "memory_gb"}


class Reason(msgspec.Struct, frozen=True):
    """One reason. Its text is `ask`; `have`. `remedy`.

    Args:
        pools: whom it concerns.
        ask, have, remedy: in words.
        changes: pools as the remedy would have them; empty where no change of members or strategy helps.
    """

    pools: tuple[str, ...]
    ask: str
    have: str
    remedy: str
    changes: tuple[Pool, ...] = ()

    def __str__(self) -> str:
        return f"{self.ask[0].upper()}{self.ask[1:]}; {self.have}. {self.remedy[0].upper()}{self.remedy[1:]}."


def refuse(setting: Setting, *, proven: bool) -> PlanError:
    """The error with every reason: what is wrong with each pool alone, then what is wrong with the others together."""
    found: list[Reason] = []
    bad = set()
    for item in setting.items:
        alone = _alone(setting, item)
        if alone:
            bad.add(item.name)
            found += alone
    rest = setting.only([item.name for item in setting.items if item.name not in bad])
    if not bad or (len(rest.items) > 1 and rest.solve(steps=2000).solution is None):
        found.append(_together(rest, proven=proven))
    texts = tuple(map(str, found))
    lines = texts[0] if len(texts) == 1 else "\n" + "\n".join(f"  {number}. {text}" for number, text in enumerate(texts, 1))
    error = PlanError(f"The pools don't fit the cluster: {lines}", reasons=texts, details=tuple(found))
    error.ask, error.have, error.remedy = ("; ".join(getattr(reason, part) for reason in found) for part in ("ask", "have", "remedy"))
    error.fields |= {"ask": error.ask, "have": error.have, "remedy": error.remedy}
    return error


def amount(resource: str, steps: int) -> str:
    """An amount in words: "8 GPUs", "0.5 CPUs", "12 GB of main memory", "2 nvme"."""
    value = steps / 1e9 if resource == "memory" else steps / STEP
    word = WORDS.get(resource, resource)
    return f"{value:g} {word[:-1] if value == 1 and word.endswith('s') and resource in WORDS else word}"


def _alone(setting: Setting, item: Item) -> list[Reason]:
    pool = next(pool for pool in setting.pools if pool.name == item.name)
    nodes = [node for node in setting.types if allowed(pool, node)]
    if not setting.nodes:
        return [Reason((pool.name,), f"pool {pool.name!r} asks for {pool.members} members", "the cluster has no node", "start one")]
    if not nodes:
        return [_no_accelerator(setting, pool)]
    found = _no_memory(setting, pool, nodes)
    if found:
        return found
    found = _too_large(setting, item, [setting.types[kind] for kind in sorted(item.kinds)])
    if found:
        return found
    return _too_many(setting, item, pool)


def _no_accelerator(setting: Setting, pool: Pool) -> Reason:
    there = sorted({node.accelerator for node in setting.types if node.accelerator})
    near = nearest(pool.accelerator, there) or (there[0] if len(there) == 1 else "")
    remedy = (f"use accelerator={near!r}, or " if near else "") + f"add a node labelled {pool.accelerator!r}"
    if there and not near:
        remedy += f", or use one of {', '.join(map(repr, there))}"
    has = ", ".join(map(repr, there)) or "nothing (label nodes with ray.io/accelerator-type)"
    changes = (msgspec.structs.replace(pool, accelerator=near),) if near and _fits(setting, pool, accelerator=near) else ()
    return Reason((pool.name,), f"pool {pool.name!r} asks for accelerator {pool.accelerator!r}", f"the nodes have {has}", remedy, changes)


def _no_memory(setting: Setting, pool: Pool, nodes: Sequence[Node]) -> list[Reason]:
    """The estimated memory of the roles is more than any of the nodes gives a bundle."""
    if not setting.memory:
        return []
    device, gpus, host = needs(pool.name, 0, setting.pools, setting.memory)  # bundle 0 is the fullest
    roles = ", ".join(role for role, estimate in setting.memory.items() if _base(setting, estimate.pool or role) == pool.name)
    largest = max((node.gpu_memory_gb or float("inf") for node in nodes if node.gpus), default=float("inf"))
    if gpus and device > gpus * largest:
        ask = f"pool {pool.name!r}: its roles ({roles}) hold about {device:.1f} GB of device memory in {gpus:g} GPUs of a bundle"
        remedy = f"take a smaller model, batch, row or cache, fewer bytes a number, or GPUs of at least {math.ceil(device / gpus)} GB"
        return [Reason((pool.name,), ask, f"the largest GPU there has {largest:g} GB, which makes {gpus * largest:g} GB", remedy)]
    main = host if gpus else host + device  # without a GPU all is in main memory
    most = max(node.memory_gb or float("inf") for node in nodes)
    if main > most:
        ask = f"pool {pool.name!r}: its roles ({roles}) hold about {main:.1f} GB of main memory in a bundle"
        return [Reason((pool.name,), ask, f"the largest node has {most:g} GB", "take a smaller model, batch or cache, or a larger node")]
    return []


def _base(setting: Setting, name: str) -> str:
    by_name = {pool.name: pool for pool in setting.pools}
    return base_of(by_name[name], by_name).name if name in by_name else ""


def _too_large(setting: Setting, item: Item, nodes: Sequence[Node]) -> list[Reason]:
    """The largest bundle of a pool fits no node, whatever else is placed."""
    states = [state for state in setting.counts if state.kind in item.kinds]
    demand = item.bundles[0][0]
    if any(take(state, demand) is not None for state in states):
        return []
    asked = {name: steps for name, steps in zip(setting.resources, demand.plain, strict=True) if steps}
    if demand.gpu:
        asked["GPU"] = demand.gpu
    has = [{**dict(zip(setting.resources, state.plain, strict=True)), "GPU": free_gpu(state)} for state in states]
    sharers = [pool.name for pool in setting.pools if pool.name != item.name and _base(setting, pool.name) == item.name]
    who = f"pool {item.name!r}" + (f" (with {', '.join(map(repr, sharers))} in its bundles)" if sharers else "")
    kind = (
        f" with accelerator {nodes[0].accelerator!r}"
        if nodes and all(node.accelerator == nodes[0].accelerator != "" for node in nodes)
        else ""
    )
    found = []
    for name, steps in asked.items():
        most = max((node.get(name, 0) for node in has), default=0)
        if steps > most:
            found.append(_resource(setting, item, who, name, steps, most, kind, sharers))
    if found:
        return found
    wants = " and ".join(amount(name, steps) for name, steps in asked.items())
    # Each is there, but not on one node: what is missing on the node that comes closest is the smallest change.
    close = min(has, key=lambda node: sum(1 - node[name] / steps for name, steps in asked.items() if node[name] < steps))
    short = {name: close[name] for name, steps in asked.items() if close[name] < steps}
    gives = " and ".join(amount(name, close[name]) for name in asked if close[name] < UNKNOWN // 2)
    if not short:
        gives, short = "GPUs free only in parts", {"GPU": max(max((state.devices and STEP, *state.parts)) for state in states)}
    change = " and ".join(_limit(name, steps) for name, steps in short.items())
    return [Reason((item.name,), f"{who} asks for {wants} for each member", f"no one node{kind} has that; the closest has {gives}", change)]


def _limit(resource: str, steps: int) -> str:
    value = steps / 1e9 if resource == "memory" else steps / STEP
    if resource in FIELDS:
        value = int(value) if resource == "GPU" and value > 1 else value
        return f"use {FIELDS[resource]}<={value:g}" if value else f"use {FIELDS[resource]}=0"
    return f"use resources={{{resource!r}: {value:g}}} or less"


def _resource(setting: Setting, item: Item, who: str, name: str, steps: int, most: int, kind: str, sharers: Sequence[str]) -> Reason:
    ask = f"{who} asks for {amount(name, steps)} for each member"
    have = f"the largest node{kind} has {most / 1e9 if name == 'memory' else most / STEP:g}"
    if most == 0 and name not in WORDS:
        known = {resource for node in setting.types for resource in node.resources}
        near = nearest(name, known)
        have = f"no node{kind} has any {name!r}"
        return Reason((item.name,), ask, have, f"use {near!r}" if near else "add a node that has it, or drop it")
    remedy = _limit(name, most) if most else f"add a node with {amount(name, steps)}"
    return Reason((item.name,), ask, have, f"{remedy}, sharers included" if sharers else remedy)


def _fits(setting: Setting, pool: Pool, **change: object) -> bool:
    """Whether the pool, changed so, finds a place when nothing else is placed."""
    pools = [msgspec.structs.replace(entry, **change) if entry.name == pool.name else entry for entry in setting.pools]
    return setting.changed(pools).only([_base(setting, pool.name)]).solve(steps=500).solution is not None


def _too_many(setting: Setting, item: Item, pool: Pool) -> list[Reason]:
    """One bundle fits, all of them don't, by the pool's strategy."""
    alone = setting.only([item.name])
    if alone.solve(steps=2000).solution is not None:
        return []
    total = {
        name: sum(bundle.get(name, 0) for bundle in demands(setting.pools, setting.memory)[item.name])
        for name in (*setting.resources, "GPU")
    }
    words = " and ".join(amount(name, steps) for name, steps in total.items() if steps)
    ask, have = f"pool {pool.name!r} asks for {words} in all ({pool.members} members, {pool.strategy})", ""
    states = [state for state in setting.counts if state.kind in item.kinds]
    if pool.strategy == "STRICT_PACK":
        largest = {name: max(state.plain[at] for state in states) for at, name in enumerate(setting.resources)}
        largest["GPU"] = max(free_gpu(state) for state in states)
        ask = f"pool {pool.name!r} asks for {words} on one node (STRICT_PACK)"
        have = f"the largest node has {_has(total, largest)}"
    elif pool.strategy == "STRICT_SPREAD":
        able = sum(nodes for state, nodes in setting.counts.items() if state.kind in item.kinds and take(state, item.bundles[0][0]))
        ask = f"pool {pool.name!r} asks for {pool.members} nodes of their own (STRICT_SPREAD), each with {_bundle(setting, item)}"
        have = f"{able} nodes can hold a member"
    else:
        there = {name: sum(min(s.plain[at], UNKNOWN) * setting.counts[s] for s in states) for at, name in enumerate(setting.resources)}
        there["GPU"] = sum(free_gpu(state) * setting.counts[state] for state in states)
        kind = f" with accelerator {pool.accelerator!r}" if pool.accelerator else ""
        have = f"the nodes{kind} have {_has(total, there)}"
    changes, remedies = [], []
    soft = "SPREAD" if pool.strategy in ("STRICT_PACK", "STRICT_SPREAD") else ""
    if soft and _fits(setting, pool, strategy=soft):
        changes.append(msgspec.structs.replace(pool, strategy=soft))
        remedies.append(f"strategy={soft!r}")
    fewer = fewer_members(alone, pool.name)
    if fewer:
        changes.append(fewer)
        remedies.append(f"members<={fewer.members}")
    have += f", enough for {fewer.members} member{'s' if fewer.members > 1 else ''}" if fewer else ""
    if any(demand.gpu % STEP for demand, _ in item.bundles):
        have += " (a part of a GPU lies on one device)"
    remedy = "use " + " or ".join(remedies) if remedies else (more_nodes(alone) or "ask for less in each member")
    return [Reason((pool.name,), ask, have, remedy, tuple(changes))]


def _bundle(setting: Setting, item: Item) -> str:
    demand = item.bundles[0][0]
    asked = {**dict(zip(setting.resources, demand.plain, strict=True)), "GPU": demand.gpu}
    return " and ".join(amount(name, steps) for name, steps in asked.items() if steps)


def _has(asked: dict[str, int], has: dict[str, int]) -> str:
    short = [name for name, steps in asked.items() if steps > has[name]] or [name for name, steps in asked.items() if steps]
    return " and ".join(amount(name, has[name]) for name in short)


def _together(setting: Setting, *, proven: bool) -> Reason:
    """Each pool would fit alone: name the fewest that can't stand together, and what to take away or add."""
    clash = _clash(setting)
    inside = setting.only(clash)
    asked = dict.fromkeys((*setting.resources, "GPU"), 0)
    each: dict[str, list[str]] = {name: [] for name in asked}
    for item in inside.items:
        for at, name in enumerate(setting.resources):
            _count(asked, each, name, item.name, sum(demand.plain[at] * count for demand, count in item.bundles))
        _count(asked, each, "GPU", item.name, sum(demand.gpu * count for demand, count in item.bundles))
    kinds = frozenset(kind for item in inside.items for kind in item.kinds)
    states = {state: nodes for state, nodes in setting.counts.items() if state.kind in kinds}
    there = {name: sum(state.plain[at] * nodes for state, nodes in states.items()) for at, name in enumerate(setting.resources)}
    there["GPU"] = sum(free_gpu(state) * nodes for state, nodes in states.items())
    over = [name for name in asked if asked[name] > there[name]]
    shown = over or [name for name in asked if asked[name]]
    words = " and ".join(f"{amount(name, asked[name])} ({', '.join(each[name])})" for name in shown)
    have = "the nodes they may use have " + " and ".join(amount(name, there[name]) for name in shown if there[name] < UNKNOWN // 2)
    if not over:
        have += ", but not where they are asked together"
    if not (proven or over):
        have += " (the search gave up before it was proven that no placement exists)"
    changes = [fewer for name in _members_of(setting, clash) if (fewer := fewer_members(setting, name))]
    remedies = [f"members<={pool.members} of {pool.name!r}" for pool in changes]
    more = more_nodes(setting)
    text = ("use " + " or ".join(remedies) if remedies else "ask for less") + (f", or {more}" if more else "")
    return Reason(tuple(clash), f"pools {', '.join(map(repr, clash))} together ask for {words}", have, text, tuple(changes))


def _count(asked: dict[str, int], each: dict[str, list[str]], resource: str, pool: str, steps: int) -> None:
    if steps:
        asked[resource] += steps
        each[resource].append(f"{pool} {steps / 1e9 if resource == 'memory' else steps / STEP:g}")


def _members_of(setting: Setting, names: Iterable[str]) -> list[str]:
    """The pools, sharers too, whose bundles are those of these base pools."""
    return [pool.name for pool in setting.pools if _base(setting, pool.name) in set(names)]


def _clash(setting: Setting) -> list[str]:
    """A set of pools that don't fit together, of which none can be left out."""
    names = [item.name for item in setting.items]
    for name in list(names):
        fewer = [other for other in names if other != name]
        if len(fewer) > 1 and setting.only(fewer).solve(steps=500).solution is None:
            names = fewer
    return names

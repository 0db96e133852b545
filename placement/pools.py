"""What a role asks of the cluster: pools, and the check that a set of them makes sense on its own.

Units everywhere in this layer: CPUs and GPUs in devices, memory in GB of 10^9 bytes, custom resources in whatever the
cluster counts. Ray counts in steps of 1/10,000; finer numbers are refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import msgspec
from rolecall.protocols.errors import ConfigError

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
S = TypeVar("S", bound=msgspec.Struct)
STEP = 10_000  # Ray's fixed point: one unit is 10,000 steps
RESERVED = ("CPU", "GPU", "memory", "object_store_memory")  # have fields of their own


class Pool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named slice of the cluster: `members` bundles, each with these resources. Realised as one Ray placement group.

    Args:
        name: what a controller and the errors call it.
        members: number of processes, one bundle each.
        cpus: CPUs per member; may be fractional. A member gets `max(1, floor(cpus))` threads.
        gpus: GPUs per member: a fraction below 1 (several members on one device) or a whole number.
        memory_gb: main memory per member, GB of 10^9 bytes; 0 leaves it uncounted.
        accelerator: type by Ray's node label `ray.io/accelerator-type` ("H100"); "" takes any node.
        resources: custom resources per member, by Ray's names.
        strategy: PACK (few nodes), SPREAD (many nodes), both as far as possible; STRICT_PACK (one node) and
            STRICT_SPREAD (a node of its own for each member) are conditions.
        shares: name of the pool whose bundles this pool uses: member i runs in bundle i mod members of that pool, and
            what it asks is added to that bundle. 1 GPU shared by 0.5 is a bundle of 1.5 GPUs: for two roles
            on one device give both 0.5. Strategy and accelerator are then the other pool's.
    """

    name: str
    members: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    memory_gb: float = 0.0
    accelerator: str = ""
    resources: dict[str, float] = {}
    strategy: Strategy = "PACK"
    shares: str = ""

    def problems(self) -> list[ConfigError]:
        """Everything that is wrong with this pool by itself."""
        found: list[ConfigError] = []
        where = f"Pool {self.name!r}:"

        def add(what: str, ask: str, remedy: str) -> None:
            found.append(ConfigError(f"{where} {what}.", ask=ask, remedy=remedy))

        if not self.name or not isinstance(self.name, str):
            add("a pool needs a name", f"name={self.name!r}", "give it a short word, such as 'train'")
        if isinstance(self.members, bool) or not isinstance(self.members, int) or self.members < 1:
            add("members must be a whole number of at least 1", f"members={self.members!r}", "set members=1 or more")
        if self.strategy not in get_args(Strategy):
            near = nearest(str(self.strategy).upper(), get_args(Strategy)) or "PACK"
            add("no such strategy", f"strategy={self.strategy!r}", f"use {near!r} (one of {', '.join(get_args(Strategy))})")
        for name, amount in self._amounts().items():
            if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < 1e12:
                add(f"{name} must be a finite number that is not negative", f"{name}={amount!r}", f"set {name}=0 or more")
            elif name != "memory_gb" and abs(amount * STEP - round(amount * STEP)) > 1e-6:
                add(f"{name} is finer than Ray counts", f"{name}={amount!r}", f"round it to {round(amount * STEP) / STEP}")
        if isinstance(self.gpus, int | float) and self.gpus > 1 and self.gpus != int(self.gpus):
            remedy = f"set gpus={int(self.gpus)} or gpus={int(self.gpus) + 1}"
            add("GPUs of a member are a fraction below 1 or a whole number", f"gpus={self.gpus}", remedy)
        for name in self.resources:
            if name in RESERVED or not name:
                field = {"CPU": "cpus", "GPU": "gpus"}.get(name, "memory_gb")
                add(f"{name!r} is no custom resource", f"resources={{{name!r}: …}}", f"use the field {field}")
        if not found and not self.shares and not any(self._amounts().values()):
            add("a member needs a part of at least one resource", "cpus=0, gpus=0", "set cpus=0.1 or more")
        return found

    def _amounts(self) -> dict[str, Any]:
        return {"cpus": self.cpus, "gpus": self.gpus, "memory_gb": self.memory_gb, **self.resources}

    @property
    def threads(self) -> int:
        """CPU threads that a member's share pays for."""
        return max(1, int(self.cpus))

    def demand(self) -> dict[str, int]:
        """What one member asks, by Ray's resource names: steps of 1/10,000 (memory in bytes); zeros left out."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        steps = {name: round(amount * STEP) for name, amount in asked.items()}
        steps["memory"] = round(self.memory_gb * 1e9)
        return {name: amount for name, amount in steps.items() if amount}


def nearest(word: str, words: Iterable[str]) -> str:
    """The most similar of `words`, or "" where none is."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return found[0] if found else ""


def read_pools(entries: Sequence[Mapping[str, Any]], where: str = "pools") -> tuple[Pool, ...]:
    """Pools from the tables of a TOML file (`[[pools]]`), strictly: unknown keys and wrong types are refused.

    Raises:
        ConfigError: with the place in the file and the nearest right word.
    """
    pools = tuple(read_entry(entry, Pool, f"{where}[{number}]") for number, entry in enumerate(entries))
    return check_pools(pools)


def read_entry(entry: Any, kind: type[S], where: str) -> S:
    """One table of a TOML file as a struct, or a ConfigError that names its place."""
    if not isinstance(entry, Mapping):
        remedy = f"write [[{where.split('[')[0]}]] and key = value lines below it"
        raise ConfigError(f"{where} is no table.", ask=repr(entry), remedy=remedy)
    fields = kind.__struct_fields__
    for key in entry:
        if key not in fields:
            near = nearest(str(key), fields)
            remedy = f"use {near!r}" if near else f"use one of {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key {key!r}.", ask=f"{key} = {entry[key]!r}", remedy=remedy)
    try:
        return msgspec.convert(dict(entry), kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        raise ConfigError(f"{where}{place.rstrip('`')}: {what}.", remedy="correct the value in the file") from None


def check_pools(pools: Sequence[Pool]) -> tuple[Pool, ...]:
    """The pools themselves, when each and all together make sense.

    Raises:
        ConfigError: the one thing that is wrong, or all of them in one message (`problems` lists them).
    """
    found = [problem for pool in pools for problem in pool.problems()]
    names = [pool.name for pool in pools]
    by_name = {pool.name: pool for pool in pools}
    for name in sorted({name for name in names if names.count(name) > 1}):
        found.append(ConfigError(f"Two pools are called {name!r}.", remedy="give each pool a name of its own"))
    if not pools:
        found.append(ConfigError("There is no pool.", remedy="declare at least one, such as Pool('all', members=1, cpus=1)"))
    for pool in pools:
        found.extend(_sharing_problems(pool, by_name))
    if len(found) == 1:
        raise found[0]
    if found:
        text = "\n".join(f"  {problem}" for problem in found)
        raise ConfigError(f"{len(found)} things are wrong with the pools:\n{text}", problems=tuple(map(str, found)))
    return tuple(pools)


def _sharing_problems(pool: Pool, by_name: Mapping[str, Pool]) -> list[ConfigError]:
    if not pool.shares:
        return []
    where = f"Pool {pool.name!r}:"
    ask = f"shares={pool.shares!r}"

    def problem(what: str, ask: str = ask, have: str = "", remedy: str = "") -> list[ConfigError]:
        return [ConfigError(f"{where} {what}.", ask=ask, have=have, remedy=remedy)]

    if pool.shares not in by_name:
        near = nearest(pool.shares, by_name) or next(iter(by_name))
        have = ", ".join(repr(name) for name in by_name)
        return problem("it shares a pool that does not exist", have=have, remedy=f"use {near!r}")
    path = [pool.name]
    while by_name[path[-1]].shares in by_name:
        path.append(by_name[path[-1]].shares)
        if path[-1] in path[:-1]:
            if path[-1] != pool.name:
                return []  # the pools on the circle report it
            return problem(f"the sharing goes in a circle: {' → '.join(path)}", remedy="let one of them have bundles of its own")
    base = by_name[path[-1]]
    if pool.accelerator and pool.accelerator != base.accelerator:
        have = f"pool {base.name!r} has accelerator={base.accelerator!r}"
        remedy = f"drop accelerator={pool.accelerator!r} here or set it on {base.name!r}"
        return problem("its accelerator contradicts the pool it shares", f"accelerator={pool.accelerator!r}", have, remedy)
    if pool.strategy not in ("PACK", base.strategy):
        have = f"pool {base.name!r} has strategy={base.strategy!r}"
        remedy = f"set strategy={pool.strategy!r} on {base.name!r}, or drop it here"
        return problem("its strategy contradicts the pool it shares", f"strategy={pool.strategy!r}", have, remedy)
    return []


def base_of(pool: Pool, by_name: Mapping[str, Pool]) -> Pool:
    """The pool whose bundles `pool` uses: itself, or the end of its chain of `shares` (checked before)."""
    while pool.shares:
        pool = by_name[pool.shares]
    return pool


def bundle_of(pool: Pool, rank: int, by_name: Mapping[str, Pool]) -> int:
    """Number of the bundle, in the base pool, that member `rank` runs in."""
    while pool.shares:
        pool = by_name[pool.shares]
        rank %= pool.members
    return rank


def bundles(pools: Sequence[Pool]) -> dict[str, list[dict[str, int]]]:
    """What each bundle of each base pool holds (steps, as `Pool.demand`), sharers included; equal ones may be one object."""
    by_name = {pool.name: pool for pool in pools}
    result: dict[str, list[dict[str, int]]] = {pool.name: [pool.demand()] * pool.members for pool in pools if not pool.shares}
    for pool in pools:
        if pool.shares:
            demand, into = pool.demand(), result[base_of(pool, by_name).name]
            for rank in range(pool.members):
                index = bundle_of(pool, rank, by_name)
                into[index] = {name: into[index].get(name, 0) + demand.get(name, 0) for name in {**into[index], **demand}}
    return result


def together(*names: str, members: int = 1, cpus: float = 1.0, gpus: float = 0.0) -> tuple[Pool, ...]:
    """Pools that all live in the bundles of the first: what one machine with no special wishes needs.

    Args:
        names: of the pools; the first one owns the bundles.
        members: of each pool.
        cpus: CPUs of a bundle.
        gpus: GPUs of a bundle, all the first pool's; the others run on its CPUs. To divide a device, write the pools out.
    """
    first, *others = names
    return Pool(first, members=members, cpus=cpus, gpus=gpus), *(Pool(name, members=members, cpus=0, shares=first) for name in others)

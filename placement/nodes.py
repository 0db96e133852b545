"""What the cluster has: nodes, described in TOML or read from a running Ray cluster."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
from rolecall.placement.pools import STEP, read_entry
from rolecall.protocols.errors import ConfigError

ACCELERATOR_LABEL = "ray.io/accelerator-type"
ACCELERATOR_RESOURCE = "accelerator_type:"  # Ray adds this resource, with the type behind it, where it detects a device
GPU_MEMORY_LABEL = "rolecall/gpu-memory-gb"  # Ray does not know it; set it by `ray start --labels` to have memory checked


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One machine, or what is free on it.

    Args:
        name: node id on a live cluster; any word in a description.
        cpus, gpus: devices.
        memory_gb: main memory in GB of 10^9 bytes; 0 means that nobody said, and it is not checked.
        accelerator: type of its GPUs, as in Ray's label `ray.io/accelerator-type`.
        resources: custom resources by Ray's names.
        labels: Ray's node labels.
        gpu_memory_gb: memory of each GPU, GB of 10^9 bytes; 0 means that nobody said, and it is not checked.
        address: host or IP, where known.
    """

    name: str
    cpus: float = 0.0
    gpus: float = 0.0
    memory_gb: float = 0.0
    accelerator: str = ""
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}
    gpu_memory_gb: float = 0.0
    address: str = ""

    def steps(self) -> dict[str, int]:
        """What it has, by Ray's resource names: steps of 1/10,000 (memory in bytes; left out where unknown)."""
        has = {"CPU": round(self.cpus * STEP), "GPU": round(self.gpus * STEP)}
        has.update((name, round(amount * STEP)) for name, amount in self.resources.items())
        if self.memory_gb:
            has["memory"] = round(self.memory_gb * 1e9)
        return has


class _Entry(Node, frozen=True, forbid_unknown_fields=True):
    """A `[[node]]` table: a node, `count` times."""

    name: str = ""
    count: int = 1


def read_cluster(path: Path) -> tuple[Node, ...]:
    """Nodes from a TOML file of `[[node]]` tables; `count = 3` stands for three equal ones, called name-0 to name-2.

    Raises:
        ConfigError: no such file, no TOML, an unknown key (with the nearest right one), a wrong type, two equal names.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        remedy = "give the path of a TOML file"
        raise ConfigError(f"The cluster file can't be read: {error.strerror}.", ask=str(path), remedy=remedy) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}.", remedy="correct that line") from None
    for key in table:
        if key != "node":
            raise ConfigError(f"{path}: unknown key {key!r}.", ask=key, remedy="describe the nodes in [[node]] tables")
    entries = table.get("node", [])
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path} describes no node.", remedy='write at least one table: [[node]] name = "a" cpus = 8')
    nodes: list[Node] = []
    for number, entry in enumerate(entries):
        nodes.extend(_expand(read_entry(entry, _Entry, f"{path.name}: node[{number}]"), number, f"{path.name}: node[{number}]"))
    names = [node.name for node in nodes]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{path}: two nodes are called {twice!r}.", remedy="give each a name of its own")
    return tuple(nodes)


def _expand(entry: _Entry, number: int, where: str) -> list[Node]:
    if entry.count < 1:
        raise ConfigError(f"{where}: count must be at least 1.", ask=f"count = {entry.count}", remedy="set count = 1 or more")
    amounts = {name: getattr(entry, name) for name in ("cpus", "gpus", "memory_gb", "gpu_memory_gb")} | entry.resources
    for name, amount in amounts.items():
        if not 0 <= amount < 1e12:
            what = f"{where}: {name} must be a finite number that is not negative."
            raise ConfigError(what, ask=f"{name} = {amount}", remedy="correct it")
    fields: dict[str, Any] = {field: getattr(entry, field) for field in Node.__struct_fields__}
    fields["accelerator"] = entry.accelerator or entry.labels.get(ACCELERATOR_LABEL, "")
    name = entry.name or f"node{number}"
    if entry.count == 1:
        return [Node(**{**fields, "name": name})]
    return [Node(**{**fields, "name": f"{name}-{copy}"}) for copy in range(entry.count)]


def live(*, free: bool = True) -> tuple[Node, ...]:
    """The nodes of the Ray cluster that this process is connected to, with what is free now (or all they have).

    How a fraction that is taken lies on a node's GPUs is not known to Ray's head; it is taken to lie on as few as can be.
    """
    import ray
    from ray._private.state import available_resources_per_node

    available = available_resources_per_node() if free else {}
    nodes = []
    for entry in ray.nodes():
        if entry["Alive"]:
            has = available.get(entry["NodeID"], {}) if free else entry["Resources"]
            nodes.append(_live_node(entry, has))
    return tuple(nodes)


def _live_node(entry: dict[str, Any], has: dict[str, float]) -> Node:
    labels = entry.get("Labels") or {}
    total = entry["Resources"]
    types = [name.removeprefix(ACCELERATOR_RESOURCE) for name in total if name.startswith(ACCELERATOR_RESOURCE)]
    skip = ("node:", ACCELERATOR_RESOURCE, "bundle")
    plain = ("CPU", "GPU", "memory", "object_store_memory")
    resources = {name: amount for name, amount in has.items() if name not in plain and not name.startswith(skip) and "_group_" not in name}
    try:
        gpu_memory = float(labels.get(GPU_MEMORY_LABEL, 0))
    except ValueError:
        gpu_memory = 0.0
    return Node(
        name=entry["NodeID"],
        cpus=has.get("CPU", 0.0),
        gpus=has.get("GPU", 0.0),
        memory_gb=max(has.get("memory", 0.0) / 1e9, 1e-9),  # a byte where all is taken: 0 would mean unknown
        accelerator=labels.get(ACCELERATOR_LABEL) or (types[0] if types else ""),
        resources=resources,
        labels=dict(labels),
        gpu_memory_gb=gpu_memory,
        address=entry.get("NodeManagerAddress", ""),
    )

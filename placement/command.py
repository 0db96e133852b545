"""The body of `rolecall plan`."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rolecall.placement.memory import read_memory
from rolecall.placement.nodes import Node, live, read_cluster
from rolecall.placement.planner import fit
from rolecall.placement.pools import Pool, check_pools, read_pools
from rolecall.protocols.errors import ConfigError, PlanError, UserError

FITS, REFUSED, MISTAKEN = 0, 1, 2
Asked = tuple[Sequence[Pool], Mapping[str, Any]]  # pools, and the tables [memory.ROLE]


def plan(config: Path, cluster: Path | None = None, address: str | None = None) -> int:
    """Print where the pools of a config would go, or every reason why they don't fit.

    Args:
        config: TOML with `[[pools]]` tables and perhaps `[memory.ROLE]` tables; other keys are not looked at.
        cluster: TOML with `[[node]]` tables. Without it the live cluster is asked.
        address: of the live cluster; None means a local Ray on this machine.

    Returns:
        Exit status: 0 it fits, 1 it does not, 2 the question makes no sense.
    """

    def declared() -> Asked:
        table = _read(config)
        return read_pools(table["pools"], f"{config.name}: pools"), table.get("memory", {})

    return show(declared, cluster, address)


def show(asked: Callable[[], Asked], cluster: Path | None = None, address: str | None = None) -> int:
    """`plan` of the pools and memory tables that `asked` finds out; the mistakes that it raises are printed too."""
    from rich.console import Console
    from rolecall.placement.table import plan_tables, reasons_table

    console = Console(markup=False)  # names may hold brackets
    try:
        pools, tables = asked()
        check_pools(pools)  # before a cluster is asked, which may take seconds
        memory = read_memory(tables)
        nodes = read_cluster(cluster) if cluster else _live(address)
        console.print(plan_tables(fit(pools, nodes, memory=memory)))
        console.print("The pools fit.")
        return FITS
    except PlanError as error:
        console.print(reasons_table(error))
        return REFUSED
    except UserError as error:
        print(error, file=sys.stderr)
        return MISTAKEN


def _read(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The config can't be read: {error.strerror}.", ask=str(path), remedy="give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}.", remedy="correct that line") from None
    if isinstance(table.get("pools"), dict):
        raise ConfigError(
            f"{path} changes pools of a controller's own list, which isn't known here.",
            ask="tables [pools.NAME]",
            remedy="name the controller (--controller rolecall.examples.grpo), or write the pools out, as named tables [[pools]]",
        )
    if not isinstance(table.get("pools"), list):
        raise ConfigError(
            f"{path} declares no pools.",
            remedy='name the controller whose own pools are meant (--controller), or write at least one table: [[pools]] name = "train"',
        )
    return table


def _live(address: str | None) -> tuple[Node, ...]:
    from rolecall.placement.cluster import connect

    with connect(address):
        return live()

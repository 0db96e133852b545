"""The pools that a controller would place with a configuration file, for `rolecall plan`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
from rolecall.actors.config import given
from rolecall.placement.pools import Pool
from rolecall.protocols import ConfigError


def pools_of(controller: str, config: Path | None) -> tuple[Sequence[Pool], Mapping[str, Any]]:
    """Pools and `[memory.ROLE]` tables of a run of `controller`, as its `Args` and the file have them.

    Args:
        controller: a module, such as rolecall.examples.grpo, or the path of a Python file; it is imported, not run.
        config: TOML file of the run; None means the controller's own values.

    Raises:
        ConfigError: there is no such controller, it has no pools, or the file has mistakes.
    """
    if not controller:
        raise ConfigError("Nothing to plan.", remedy="give a TOML file with [[pools]] tables, or name a controller: --controller MODULE")
    kind = getattr(_module(controller), "Args", None)
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct) and "pools" in kind.__struct_fields__):
        raise ConfigError(f"{controller} declares no pools.", ask="a class Args with a field pools", remedy="name another module")
    values = given(kind, [] if config is None else ["--config", str(config)])
    if "pools" not in values:
        raise ConfigError(f"{controller} has no pools of its own.", remedy="give a file that declares them, each as a table [[pools]]")
    return values["pools"], values.get("memory", {})


def _module(name: str) -> ModuleType:
    path = Path(name).expanduser()
    remedy = "name a module that can be imported, such as rolecall.examples.grpo, or the path of a Python file"
    if path.suffix != ".py":
        try:
            return importlib.import_module(name)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"There is no controller {name}: {error}.", remedy=remedy) from None
    spec = importlib.util.spec_from_file_location(f"rolecall_planned_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"There is no controller {name}: no such file.", remedy=remedy)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its own types look for the names that annotations use
    spec.loader.exec_module(module)
    return module

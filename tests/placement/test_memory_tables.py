"""A run's `[memory.ROLE]` tables reach the plan, and what is wrong with them is said before Ray starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rolecall.actors import RunArgs
from rolecall.actors.config import resolve
from rolecall.placement import Pool, place
from rolecall.protocols import ConfigError


class Args(RunArgs, frozen=True, kw_only=True):
    pools: tuple[Pool, ...] = (Pool("train"),)


def test_tables_of_a_run_are_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('seed = 3\n[memory.policy]\nkind = "training"\nmodel = "some/folder"\ntokens = 64\npool = "train"\n')
    args = resolve(Args, ["--config", str(file)])
    assert args.memory == {"policy": {"kind": "training", "model": "some/folder", "tokens": 64, "pool": "train"}}


def test_a_wrong_table_is_refused_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory\.policy.*config\.json"), place([Pool("train")], memory={"policy": {"kind": "training"}}):
        pytest.fail("nothing may start")
    assert "ray._private.node" not in sys.modules or not __import__("ray").is_initialized()

"""The `rolecall` command hands on to the functions behind it, with their exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rolecall.actors.cli import plan
from rolecall.examples import grpo

POOLS = '[[pools]]\nname = "train"\nmembers = 2\n'
CLUSTER = '[[node]]\nname = "a"\ncpus = 1\n'


def rolecall(*argv: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rolecall.actors.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_help_lists_the_commands():
    run = rolecall("--help")
    assert run.returncode == 0
    assert "plan" in run.stdout
    assert "model" in run.stdout


def test_plan_refuses_what_does_not_fit(tmp_path):
    (tmp_path / "run.toml").write_text(POOLS)
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    run = rolecall("plan", "run.toml", "--cluster", "cluster.toml", cwd=tmp_path)
    assert run.returncode == 1, run.stderr
    assert "train" in run.stdout
    (tmp_path / "cluster.toml").write_text(CLUSTER.replace("cpus = 1", "cpus = 2"))
    assert rolecall("plan", "run.toml", "--cluster", "cluster.toml", cwd=tmp_path).returncode == 0


def test_a_mistake_has_no_traceback(tmp_path):
    (tmp_path / "file").write_text("x")
    run = rolecall("model", str(tmp_path))
    assert run.returncode == 2
    assert "files from elsewhere" in run.stderr
    assert "Traceback" not in run.stderr


def planned(folder: Path, text: str | None, **options) -> int:
    """Exit status of `rolecall plan` of a file with this text on a node of 4 CPUs."""
    (folder / "cluster.toml").write_text(CLUSTER.replace("cpus = 1", "cpus = 4"))
    if text is not None:
        (folder / "run.toml").write_text(text)
    return plan(None if text is None else folder / "run.toml", cluster=folder / "cluster.toml", **options)


@pytest.mark.parametrize("controller", ["rolecall.examples.grpo", grpo.__file__])
def test_a_plan_of_a_controllers_own_pools_as_a_file_changes_them(tmp_path, capsys, controller):
    assert planned(tmp_path, "steps = 3\n[pools.train]\nmembers = 4\n", controller=controller) == 0
    assert "a×4" in capsys.readouterr().out
    assert planned(tmp_path, "[pools.train]\nmembers = 5\n", controller=controller) == 1
    assert "members<=4" in capsys.readouterr().out
    assert planned(tmp_path, None, controller=controller) == 0
    assert "a×2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "controller", "words"),
    [
        ("[pools.train]\nmembers = 4\n", "", ["[pools.NAME]", "--controller rolecall.examples.grpo", "[[pools]]"]),
        (None, "", ["Nothing to plan", "--controller MODULE"]),
        ("[pools.trian]\nmembers = 4\n", "rolecall.examples.grpo", ["run.toml:1", "did you mean 'train'?"]),
        ("[pools.train]\nmember = 4\n", "rolecall.examples.grpo", ["run.toml:2", "did you mean 'members'?"]),
        ('[[pools]]\nname = "a"\nshares = "b"\n', "rolecall.examples.grpo", ["a pool that does not exist", "use 'a'"]),
        (None, "rolecall.examples.gpro", ["no controller rolecall.examples.gpro", "rolecall.examples.grpo"]),
        (None, "nowhere/mine.py", ["no such file", "the path of a Python file"]),
        (None, "rolecall.actors", ["declares no pools", "a class Args"]),
    ],
)
def test_a_plan_that_can_not_be_made_says_why(tmp_path, capsys, text, controller, words):
    assert planned(tmp_path, text, controller=controller) == 2
    said = capsys.readouterr()
    assert said.out == ""
    for word in words:
        assert word in said.err

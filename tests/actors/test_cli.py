"""The `rolecall` command hands on to the functions behind it, with their exit codes."""

from __future__ import annotations

import subprocess
import sys

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

"""`rolecall plan`: what it prints and its exit status."""

import subprocess
import sys

import pytest
from rolecall.placement.command import FITS, MISTAKEN, REFUSED, plan

CLUSTER = """
[[node]]
name = "big"
count = 2
cpus = 16
gpus = 4
accelerator = "H100"
[[node]]
name = "small"
cpus = 8
"""
CONFIG = """
steps = 100
[[pools]]
name = "train"
members = 4
gpus = 1
accelerator = "H100"
strategy = "STRICT_PACK"
[[pools]]
name = "reference"
members = 4
cpus = 0.5
shares = "train"
[[pools]]
name = "judge"
members = 6
"""


@pytest.fixture
def files(tmp_path):
    def write(config=CONFIG, cluster=CLUSTER):
        (tmp_path / "run.toml").write_text(config)
        (tmp_path / "cluster.toml").write_text(cluster)
        return tmp_path / "run.toml", tmp_path / "cluster.toml"

    return write


def test_a_plan_is_a_table_of_pools_and_nodes(files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert plan(*files()) == FITS
    text = capsys.readouterr().out
    for word in ("train", "big-0×4", "bundles of 'train'", "small×6", "2 CPU", "nobody", "The pools fit."):
        assert word in text


def test_reasons_are_a_table_and_exit_status_1(files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert plan(*files(CONFIG.replace("members = 4", "members = 5", 1).replace("members = 6", "members = 60"))) == REFUSED
    text = capsys.readouterr().out
    for word in ("train", "members<=4", "judge", "members<=", "60 CPUs"):
        assert word in text


@pytest.mark.parametrize(
    ("config", "cluster", "words"),
    [
        (CONFIG.replace("members", "member"), CLUSTER, ["run.toml", "pools[0]", "'members'"]),
        (CONFIG, CLUSTER.replace("cpus", "cpu"), ["cluster.toml", "node[0]", "'cpus'"]),
        ("steps = 1", CLUSTER, ["declares no pools"]),
        ("x = [", CLUSTER, ["no TOML"]),
        (CONFIG + '[memory.policy]\nkind = "training"\nmodel = "none"\n', CLUSTER, ["memory.policy", "config.json"]),
    ],
)
def test_mistakes_are_told_on_one_line_with_exit_status_2(files, capsys, config, cluster, words):
    assert plan(*files(config, cluster)) == MISTAKEN
    seen = capsys.readouterr()
    assert seen.err.count("\n") == 1
    assert seen.out == ""
    for word in words:
        assert word in seen.err


def test_a_missing_config_is_a_mistake(tmp_path, capsys):
    assert plan(tmp_path / "none.toml", None, None) == MISTAKEN
    assert "can't be read" in capsys.readouterr().err


def test_importing_placement_is_light():
    """No Ray, no rich, no torch: a wrong config must be refused before anything slow is imported."""
    script = "import sys, rolecall.placement; print([name for name in ('ray', 'rich', 'torch', 'transformers') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr

"""The generated pages: made from little files, and the same each time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"

RESULT = {
    "bench": "copy",
    "device": "cpu2",
    "workload": "one array",
    "ours": 2.0,
    "unit": "ms",
    "peers": {"slow": 50.0, "quick": 1.0},
    "limit": 0.5,
    "ratio": {"slow": 25.0, "quick": 0.5},
    "target": "10x slow",
    "met": True,
    "targets": {"at least 10x slow": {"reached": 25.0, "met": True}, "at least 2x quick": {"reached": 0.5, "met": False}},
    "spread": {"ours": [1.9, 2.2], "slow": [49.0, 61.0], "quick": [0.9, 1.2]},
    "rounds": 7,
    "missing": {"gone": "not installed"},
    "details": {"wire": {"ours": 10, "slow": 30, "quick": 10}, "arrays": 9},
    "date": "2026-01-02",
    "versions": {"numpy": "2.0", "gone": "missing"},
}
CONFIG = """
model = "/home/somebody/models/Tiny"
seed = 0
prompts = 4
group_size = 2
[[pools]]
name = "train"
members = 2
[task]
task = "gcd"
config = {"max" = 3}
"""


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import curves
    import report

    yield curves, report
    for name in ("curves", "report", "plots"):
        sys.modules.pop(name, None)


def folder_of_a_run(path: Path, rewards: list[float], after: float) -> Path:
    path.mkdir()
    lines: list[dict[str, object]] = [{"evaluation": "before", "accuracy": 0.25, "count": 8}]
    for step, reward in enumerate(rewards, 1):
        lines.append({"step": step, "reward/mean": reward, "policy/kl": 0.01 * step, "time/step_s": 2.0, "policy/loss": 1.0})
    lines.append({"evaluation": "after", "accuracy": after, "count": 8})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.toml").write_text(CONFIG)
    (path / "result.json").write_text(json.dumps({"before": 0.25, "after": after, "seconds": 120.0, "count": 8}))
    return path


def test_a_result_becomes_a_section_and_a_plot(scripts, tmp_path):
    _, report = scripts
    (tmp_path / "copy-cpu2.json").write_text(json.dumps(RESULT))
    (tmp_path / "docs").mkdir()
    page = report.report(tmp_path, tmp_path / "docs", SCRIPTS)
    text = page.read_text()
    assert "| **ours** | 2 | 1.9 – 2.2 | 1 | 10 |" in text
    assert "| slow | 50 | 49 – 61 | 25 | 30 |" in text
    assert "| at least 2x quick | 0.5 | **no** |" in text
    assert "`gone` did not run: not installed." in text
    plot = tmp_path / "docs" / "plots" / "copy-cpu2.svg"
    first = plot.read_bytes()
    assert b"copy on cpu2" in first
    report.report(tmp_path, tmp_path / "docs", SCRIPTS)
    assert plot.read_bytes() == first


def test_what_is_no_result_is_refused(scripts, tmp_path):
    _, report = scripts
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(ValueError, match="is no result"):
        report.read(tmp_path)


def test_runs_are_imported_and_summed_up(scripts, tmp_path):
    curves, _ = scripts
    small, docs = tmp_path / "curves", tmp_path / "docs"
    docs.mkdir()
    for seed, after in ((0, 0.5), (1, 0.75)):
        run = folder_of_a_run(tmp_path / f"run{seed}", [0.1] * 10 + [0.3] * 5, after)
        made = curves.import_run(run, f"gcd-seed{seed}", small, device="cpu2", date="2026-01-02", note="A test.")
        assert "somebody" not in made.read_text(), "paths of a machine stay out of the file"
        assert "policy/loss" not in made.read_text(), "only the columns that are needed"
    text = curves.report(small, docs).read_text()
    assert "| gcd-seed1 | Rolecall | 15 | 8 | 0.250 | 0.750 | +0.500 | 4 |" in text
    assert "| **mean of 2** | Rolecall | 15 | 8 | 0.250 | 0.625 | +0.375 | 4 |" in text
    assert "| reward up to step | 10 | 15 |" in text
    assert "| gcd-seed0 | 0.10 | 0.30 |" in text
    assert "model Tiny" in text
    assert (docs / "plots" / "curves-cpu2.svg").is_file()


def test_lines_that_are_means_already_count_so_many_steps(scripts):
    curves, _ = scripts
    steps = [{"step": 5, "over": 5, "reward/mean": 0.0}, {"step": 6, "reward/mean": 1.0}]
    assert curves.Curve("a", {}, {}, steps).means("reward/mean") == [(6, pytest.approx(1 / 6))]


def test_fine_tuning_has_losses_in_place_of_rewards(scripts, tmp_path):
    curves, _ = scripts
    run, small, docs = tmp_path / "run", tmp_path / "curves", tmp_path / "docs"
    run.mkdir()
    docs.mkdir()
    (run / "config.toml").write_text(
        'model = "/home/somebody/Tiny"\nrows = 4\ndata = "/home/somebody/chats.jsonl"\n[lora]\nr = 8\nalpha = 16.0\n'
    )
    lines = [
        {"evaluation": word, "loss": loss, "accuracy": share, "count": 8}
        for word, loss, share in (("before", 2.0, 0.0), ("step-12", 1.25, 0.5))
    ]
    steps = [
        {"step": step, "policy/loss": 1.5, "policy/tokens_per_s": 100.0, "data/wait_share": 0.5 if step == 1 else 0.001}
        for step in range(1, 13)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [lines[0], *steps, lines[1]]))
    made = curves.import_run(run, "chats-seed0", small, device="cpu2", date="2026-01-02")
    assert "somebody" not in made.read_text()
    text = curves.report(small, docs).read_text()
    assert "| chats-seed0 | Rolecall | 12 | 8 | 0.000 | 0.500 | +0.500 | – |" in text
    assert "| chats-seed0 | 2.000 | 1.250 | 100 | – | 0.10 % |" in text
    assert "| loss up to step | 10 | 12 |" in text
    assert "lora r 8, alpha 16; data chats.jsonl" in text
    assert (docs / "plots" / "loss-cpu2.svg").is_file()
    assert "reward up to step" not in text


def test_a_run_without_a_step_is_refused(scripts, tmp_path):
    curves, _ = scripts
    with pytest.raises(ValueError, match="no finished step"):
        curves.import_run(folder_of_a_run(tmp_path / "run", [], 0.5), "a", tmp_path, device="cpu2")

"""What a run tells a person: the batch arithmetic, its progress, the table at the end."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rolecall.actors import Evaluation, Run, RunArgs
from rolecall.actors.progress import Progress, show_report

LINE = {
    "step": 1.0, "reward/mean": 0.25, "policy/kl": 0.5, "policy/loss": -0.125, "rollout/tokens_per_s": 800.0, "policy/tokens_per_s": 90.0,
    "time/step_s": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("prompts", "per_prompt", "world", "updates", "said"),
    [
        (64, 8, 4, 2, "64 prompts × 8 completions = 512 samples a step, 4 policy members, about 128 each, 2 updates a step"),
        (3, 3, 2, 1, "3 prompts × 3 completions = 9 samples a step, 2 policy members, about 5 each, 1 update a step"),
        (1, 2, 1, 1, "1 prompt × 2 completions = 2 samples a step, 1 policy member, about 2 each, 1 update a step"),
    ],
)
def test_batch_arithmetic_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prompts: int, per_prompt: int, world: int, updates: int, said: str
) -> None:
    with Run(RunArgs(name="run", runs=str(tmp_path))) as run:
        run.explain(prompts=prompts, per_prompt=per_prompt, policy=SimpleNamespace(world=world), updates=updates)
    assert capsys.readouterr().out.splitlines() == [said, f"run folder: {tmp_path / 'run'}"]


def test_a_line_a_step_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("run", 4).show(LINE)
    said = capsys.readouterr().out
    assert said.startswith("step 1/4  reward 0.25  kl 0.5  loss -0.125  tok/s 800  step s 2  left ")
    assert said.endswith(" min\n")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = Progress("run", 4, 2)
    bar = progress._bar
    assert (bar.tasks[0].completed, bar.tasks[0].total, bar.tasks[0].fields["shown"]) == (2, 4, "first step…")
    progress.show({**LINE, "step": 3.0})
    assert bar.tasks[0].completed == 3
    assert bar.tasks[0].fields["shown"] == "reward 0.25  kl 0.5  loss -0.125  tok/s 800  step s 2"
    progress.close()
    progress.close()


def test_the_table_at_the_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")

    def evaluation(completion: str, values: list[float]) -> Evaluation:
        rows = len(values)
        return Evaluation(("p",) * rows, ("2 + 2 =",) * rows, (completion,) * rows, np.array(values, np.float32), ("",) * rows)

    before, after = evaluation("it is 5", [0.0, 0.0, 0.0, 1.0]), evaluation("it is 4", [1.0, 1.0, 0.0, float("nan")])
    show_report(before, after, {"checkpoint": "here/checkpoint", "run folder": "here"}, 90.0)
    said = capsys.readouterr().out
    run_together = " ".join(said.split())
    for words in (
        "held-out accuracy, 4 problems",
        "0.250",
        "0.667",
        "+0.417",
        "2 + 2 =",
        "it is 5",
        "it is 4",
        "checkpoint: here/checkpoint",
    ):
        assert words in run_together
    assert said.endswith("run folder: here\ntook 1.5 min\n")

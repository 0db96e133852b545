"""Learning curves: `import` a run folder into a small committed file, `report` all of them as `docs/results.md` with plots.

    python benchmarks/curves.py import runs/grpo-20260101-120000 sums-seed0 --device cpu2
    python benchmarks/curves.py report

A file is benchmarks/results/curves/NAME.jsonl: a header, the evaluations, and a line a step. NAME-seed0, NAME-seed1, … are
runs of one experiment.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plots import COLOURS, INK, axes, number, save, table

ROOT = Path(__file__).resolve().parents[1]
CURVES = ROOT / "benchmarks" / "results" / "curves"
COLUMNS = ("step", "reward/mean", "policy/kl", "rollout/completion_length", "time/step_s")
TRAINED = ("policy/loss", "policy/tokens", "policy/tokens_per_s", "policy/mfu", "data/wait_share")  # of steps that have no reward
SETTINGS = (
    "dtype", "prompts", "group_size", "samples", "tries", "rows", "row_tokens", "sft_steps", "grpo_steps", "max_tokens", "learning_rate",
    "sft_rate", "grpo_rate", "schedule", "warmup", "lora", "kl", "seed",
)  # of a run's config.toml  # fmt: skip
REWARDS = {"reward/mean": "reward, mean of 10 steps", "policy/kl": "KL to the first policy, nats a token"}
LOSSES = {"policy/loss": "loss of the trained tokens, mean of 10 steps, nats"}
WINDOW = 10  # steps that a point of a curve is the mean of
HEAD = """# Results

Made by `python benchmarks/curves.py report` from the files in `benchmarks/results/curves`; don't edit it by hand.

*Accuracy* is the share of held-out problems whose greedy completion is right, before the first and after the last step; no held-out
problem is trained on. *Held-out loss* is the mean negative log-likelihood of the assistant's tokens in held-out records, in nats.
*Reward* is the mean value of the sampled completions, *loss* that of the trained tokens, over ten steps at a time. The KL is the k3
estimate, in nats a token, of the policy against the model that the run began with. *Data wait* is the median share of a step that training
waited for data, the first step aside; *MFU* counts the model's own operations, on the device's published peak.
"""


@dataclass(frozen=True)
class Curve:
    """One run. `steps` have the columns of `COLUMNS`; a line with `over` is a mean of so many steps up to that one."""

    name: str
    header: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]
    steps: list[dict[str, float]]

    @property
    def experiment(self) -> str:
        """The name without its seed."""
        return re.sub(r"-seed\d+$", "", self.name)

    def accuracy(self, word: str) -> float:
        """Of the evaluation `before` or `after` (the last one); NaN where there is none."""
        return float(self.looked(word).get("accuracy", float("nan")))

    def looked(self, word: str) -> dict[str, Any]:
        """The evaluation `before` or `after`; the latter is the last one, whatever its word."""
        last = list(self.evaluations.values())[-1] if len(self.evaluations) > 1 else {}
        return self.evaluations.get(word, last if word == "after" else {})

    def median(self, column: str) -> float:
        """Of all steps but the first, in which everything starts; NaN where no step has it."""
        found = [float(step[column]) for step in self.steps[1:] if column in step]
        return statistics.median(found) if found else float("nan")

    def samples_per_s(self) -> float:
        """As the header says; else samples of a step over the mean time of a step that samples; NaN where none does."""
        config = self.header.get("config", {})
        seconds = [step["time/step_s"] for step in self.steps if "time/step_s" in step and "reward/mean" in step]
        each = config.get("prompts", 0) * next((config[name] for name in ("group_size", "samples", "tries") if name in config), 0)
        said = self.header.get("samples_per_s")
        return float(said) if said is not None else each / statistics.fmean(seconds) if seconds and each else float("nan")

    def means(self, column: str) -> list[tuple[int, float]]:
        """(last step, mean) of each `WINDOW` steps."""
        rows = [(int(step["step"]), float(step[column]), int(step.get("over", 1))) for step in self.steps if column in step]
        windows: dict[int, list[tuple[float, int]]] = {}
        for at, value, over in rows:
            windows.setdefault(-(-at // WINDOW) * WINDOW, []).append((value, over))
        last = rows[-1][0] if rows else 0
        return [
            (min(end, last), sum(value * over for value, over in found) / sum(over for _, over in found)) for end, found in windows.items()
        ]


def import_run(folder: Path, name: str, curves: Path, *, device: str, date: str = "", note: str = "") -> Path:
    """Write what is needed of a run folder as `curves/name.jsonl`.

    Raises:
        ValueError: the run has no finished step.
    """
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line]
    steps = [
        {key: line[key] for key in COLUMNS + (() if "reward/mean" in line else TRAINED) if key in line} for line in lines if "step" in line
    ]
    if not steps:
        raise ValueError(f"{folder} has no finished step")
    given = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    config: dict[str, Any] = {"model": Path(str(given.get("model", ""))).name}  # a path is nobody else's business
    config |= {key: given[key] for key in SETTINGS if key in given}
    task = given.get("task", {})
    asked = isinstance(task, dict) and "task" in task and not given.get("data")
    config |= {"task": f"{task['task']} {json.dumps(task['config'])}"} if asked else {}
    lora = config.pop("lora", None)
    config |= {"lora": f"r {lora['r']}, alpha {lora['alpha']:g}"} if isinstance(lora, dict) else {}
    config |= {"data": Path(str(given["data"])).name} if given.get("data") else {}
    config["pools"] = {pool["name"]: pool["members"] for pool in given.get("pools", [])}
    made = date or datetime.datetime.fromtimestamp(metrics.stat().st_mtime, datetime.UTC).date().isoformat()
    header: dict[str, Any] = {"system": "Rolecall", "device": device, "date": made, "config": config}
    result = folder / "result.json"
    if result.is_file():
        header["seconds"] = json.loads(result.read_text(encoding="utf-8"))["seconds"]
    if note:
        header["note"] = note
    evaluations = [line for line in lines if "evaluation" in line]
    curves.mkdir(parents=True, exist_ok=True)
    target = curves / f"{name}.jsonl"
    target.write_text("".join(json.dumps(line) + "\n" for line in ({"header": header}, *evaluations, *steps)), encoding="utf-8")
    return target


def read(folder: Path) -> list[Curve]:
    """All curves, by device and name.

    Raises:
        ValueError: a file does not begin with a header.
    """
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        if not lines or "device" not in lines[0].get("header", {}):
            raise ValueError(f"{path.name} does not begin with a header that names the device")
        evaluations = {line["evaluation"]: line for line in lines if "evaluation" in line}
        found.append(Curve(path.stem, lines[0]["header"], evaluations, [line for line in lines if "step" in line]))
    return sorted(found, key=lambda curve: (curve.header["device"], curve.name))


def report(curves: Path, docs: Path) -> Path:
    """Write the page and its plots; returns the page."""
    found = read(curves)
    parts = [HEAD.strip()] + ([] if found else ["There are no results yet."])
    for device in dict.fromkeys(curve.header["device"] for curve in found):
        here = [curve for curve in found if curve.header["device"] == device]
        sampled = [curve for curve in here if curve.means("reward/mean")]
        shown = [curve for curve in here if any("loss" in found for found in curve.evaluations.values())]
        parts += [f"## On {device}", _accuracies(here)]
        if sampled:
            _plot(sampled, device, docs / "plots" / f"curves-{device}.svg", REWARDS)
            parts += [f"![reward and KL on {device}](plots/curves-{device}.svg)", _windows(sampled, "reward/mean", "reward")]
        if shown:
            _plot(shown, device, docs / "plots" / f"loss-{device}.svg", LOSSES)
            parts += [_losses(shown), f"![loss on {device}](plots/loss-{device}.svg)", _windows(shown, "policy/loss", "loss")]
        parts += [_source(curve) for curve in here]
    page = docs / "results.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _accuracies(curves: Sequence[Curve]) -> str:
    rows: list[tuple[object, ...]] = []
    for name in dict.fromkeys(curve.experiment for curve in curves):
        runs = [curve for curve in curves if curve.experiment == name]
        rows += [_row(curve.name, [curve]) for curve in runs]
        if len(runs) > 1:
            rows.append(_row(f"**mean of {len(runs)}**", runs))
    return table(("run", "system", "steps", "problems", "before", "after", "change", "samples/s"), rows)


def _row(name: str, runs: Sequence[Curve]) -> tuple[object, ...]:
    before, after = (statistics.fmean(run.accuracy(word) for run in runs) for word in ("before", "after"))
    counts = {str(run.looked("after")["count"]) for run in runs if "count" in run.looked("after")}
    figures = [
        f"{value:{style}}" if value == value else "–" for value, style in ((before, ".3f"), (after, ".3f"), (after - before, "+.3f"))
    ]
    rate = number(statistics.fmean(run.samples_per_s() for run in runs))
    return name, runs[0].header.get("system", ""), int(runs[0].steps[-1]["step"]), "/".join(sorted(counts)), *figures, rate


def _losses(curves: Sequence[Curve]) -> str:
    """What fine-tuning did to the held-out records, and how fast it was."""
    rows = []
    for curve in curves:
        before, after = (float(curve.looked(word).get("loss", float("nan"))) for word in ("before", "after"))
        speed = [number(curve.median(column)) for column in ("policy/tokens_per_s", "policy/mfu")]
        wait = curve.median("data/wait_share")
        rows.append((curve.name, f"{before:.3f}", f"{after:.3f}", *speed, f"{100 * wait:.2f} %"))
    return table(("run", "held-out loss before", "after", "tokens/s a member", "MFU", "data wait"), rows)


def _windows(curves: Sequence[Curve], column: str, word: str) -> str:
    ends = sorted({end for curve in curves for end, _ in curve.means(column)})
    rows = []
    for curve in curves:
        means = dict(curve.means(column))
        rows.append((curve.name, *(f"{means[end]:.2f}" if end in means else "" for end in ends)))
    return table((f"{word} up to step", *map(str, ends)), rows)


def _source(curve: Curve) -> str:
    config = "; ".join(f"{key} {_words(value)}" for key, value in curve.header.get("config", {}).items())
    took = f", {curve.header['seconds'] / 60:.0f} min in all" if "seconds" in curve.header else ""
    note = f" {curve.header['note']}" if curve.header.get("note") else ""
    source = f"`benchmarks/results/curves/{curve.name}.jsonl`"
    return f"**{curve.name}** ({curve.header.get('date', 'no date')}{took}): {config}.{note} From {source}."


def _words(value: object) -> str:
    return ", ".join(f"{name} × {count}" for name, count in value.items()) if isinstance(value, dict) else str(value)


def _plot(curves: Sequence[Curve], device: str, path: Path, panels: Mapping[str, str]) -> None:
    shown = [column for column in panels if any(curve.means(column) for curve in curves)]
    figure, plots = axes(max(1, len(shown)))
    experiments = list(dict.fromkeys(curve.experiment for curve in curves))
    for plot, column in zip(plots, shown, strict=False):
        for curve in curves:
            points = curve.means(column)
            if points:
                colour = COLOURS[experiments.index(curve.experiment) % len(COLOURS)]
                seen = any(line.get_label() == curve.experiment for line in plot.lines)
                label = "_" if seen else curve.experiment
                plot.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
        plot.set_xlabel("step")
        plot.set_ylim(bottom=0)
        plot.set_title(f"{panels[column]}, {device}", loc="left", color=INK, fontsize=10)
    plots[0].legend(frameon=False, fontsize=9)
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=CURVES, help="folder of the small files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="write results.md and its plots")
    brought = commands.add_parser("import", help="bring a run folder into the small form")
    brought.add_argument("folder", type=Path, help="the run's folder")
    brought.add_argument("name", help="of the new file, such as sums-seed0")
    brought.add_argument("--device", required=True, help="cpu2, h100, …")
    brought.add_argument("--date", default="", help="of the run; that of its metrics without it")
    brought.add_argument("--note", default="", help="a sentence to print with it")
    given = parser.parse_args(argv)
    if given.command == "report":
        print(report(given.curves, given.docs))
    else:
        print(import_run(given.folder, given.name, given.curves, device=given.device, date=given.date, note=given.note))


if __name__ == "__main__":
    main()

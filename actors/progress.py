"""What a person sees of a run: one bar on a terminal, one line a step elsewhere, a table at the end."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rolecall.actors.evaluation import Evaluation

SHOWN = (  # the first metric of a word that there is
    ("reward", "reward/mean"),
    ("kl", "policy/kl"),
    ("loss", "policy/loss"),
    ("held-out loss", "policy/held_out_loss"),
    ("tok/s", "rollout/tokens_per_s"),
    ("tok/s", "policy/tokens_per_s"),
    ("mfu", "policy/mfu"),
    ("data wait", "data/wait_share"),
    ("step s", "time/step_s"),
)


class Progress:
    """Progress of a run's steps. On a terminal a bar that stays in place; elsewhere a line a step, for logs."""

    def __init__(self, name: str, steps: int, first: int = 0) -> None:
        self._name, self._steps, self._first, self._started = name, steps, first, time.monotonic()
        self._bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
            )
            self._bar.start()
            self._task = self._bar.add_task(name, total=steps, completed=first, shown="first step…")

    def show(self, line: dict[str, float]) -> None:
        """Show the metrics of a finished step."""
        words = {word: line[name] for word, name in reversed(SHOWN) if name in line}
        shown = "  ".join(f"{word} {value:.4g}" for word, value in reversed(words.items()))
        done = int(line["step"])
        if self._bar is not None:
            self._bar.update(self._task, completed=done, shown=shown)
            return
        left = (time.monotonic() - self._started) / max(1, done - self._first) * (self._steps - done)
        print(f"step {done}/{self._steps}  {shown}  left {left / 60:.1f} min", flush=True)

    def close(self) -> None:
        """Stop drawing; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def show_report(before: Evaluation, after: Evaluation, places: dict[str, str], seconds: float) -> None:
    """The table at the end of a run."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"held-out accuracy, {len(after.values)} problems, greedy")
    for word in ("before", "after", "change"):
        table.add_column(word, justify="right")
    table.add_row(f"{before.mean:.3f}", f"{after.mean:.3f}", f"{after.mean - before.mean:+.3f}")
    console.print(table)
    samples = Table(title="sample completions")
    for word in ("prompt", "before", "after", "value"):
        samples.add_column(word, overflow="fold")
    for row in range(min(6, len(after.ids))):
        samples.add_row(after.prompts[row], before.completions[row].strip(), after.completions[row].strip(), f"{after.values[row]:.2f}")
    console.print(samples)
    for word, place in places.items():
        console.print(f"{word}: {place}", soft_wrap=True, highlight=False)
    console.print(f"took {seconds / 60:.1f} min", highlight=False)

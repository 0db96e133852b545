"""Samples with their scores as a table: what a person looks at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rolecall.protocols import Samples, Scores


@dataclass(frozen=True)
class Evaluation:
    """Prompts, completions and values, a row a sample; `values` are NaN where no score was given."""

    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    completions: tuple[str, ...]
    values: np.ndarray  # [N] float32
    reasons: tuple[str, ...]  # why a sample has no score; "" for the others

    @property
    def mean(self) -> float:
        """Mean value of the scored samples; NaN when none was."""
        scored = self.values[~np.isnan(self.values)]
        return float(scored.mean()) if len(scored) else float("nan")

    def save(self, path: Path) -> None:
        """Write as parquet."""
        import pyarrow
        import pyarrow.parquet

        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {
            "id": self.ids,
            "prompt": self.prompts,
            "completion": self.completions,
            "value": self.values,
            "reason": self.reasons,
        }
        pyarrow.parquet.write_table(pyarrow.table({name: list(values) for name, values in columns.items()}), path)


def table_of(samples: Samples, scores: Scores | None) -> Evaluation:
    """Rows of samples with their scores, matched by order (both are in the order of the prompts)."""
    counts = samples.counts.tolist()
    ids = tuple(name for name, count in zip(samples.ids, counts, strict=True) for _ in range(count))
    prompts = tuple(text for text, count in zip(samples.texts, counts, strict=True) for _ in range(count))
    values = np.full(len(ids), np.nan, np.float32)
    reasons = [""] * len(ids)
    if scores is not None:
        values = np.where(scores.status == 0, scores.values, np.nan).astype(np.float32)
        for number, why in scores.reasons.items():
            reasons[number] = why
    return Evaluation(ids, prompts, samples.completions, values, tuple(reasons))

"""Running controllers on a tiny model: their arguments, and what is seen of a run from outside."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SMALL = """
held_out = 4
steps = 2
prompts = 3
max_tokens = 6
samples_every = 1
learning_rate = 1e-3
[task]
task = "chain_sum"
size = 60
config = { min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 2 }
"""
ONE_POOL = """
[[pools]]
name = "train"
""" + "".join(f'[[pools]]\nname = "{name}"\ncpus = 0\nshares = "train"\n' for name in ("sample", "reference", "judge", "data"))


def arguments(folder: Path, model: str, *more: str, pools: str = ONE_POOL) -> list[str]:
    """Command line of a small run `folder/run`; the configuration file is written beside it."""
    file = Path(tempfile.mkdtemp(dir=folder)) / "small.toml"
    file.write_text(SMALL + pools)
    return ["--config", str(file), "--model", model, "--runs", str(folder), "--name", "run", *more]


@dataclass
class Seen:
    """What was noted of a run in this process."""

    versions: list[list[int]] = field(default_factory=list)  # step → versions of the weights that sampled
    nodes: dict[str, list[str]] = field(default_factory=dict)  # role → node id of each member
    lines: list[dict[str, float]] = field(default_factory=list)  # metrics of each step


def watch(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Note what the runs of this process do, from now on."""
    import ray
    from rolecall.actors import Run

    seen, log = Seen(), Run.log

    def noting(run: Run, step: int, **what: Any) -> dict[str, float]:
        seen.versions.append(np.unique(what["samples"].result().span_versions).tolist())
        for group in run._groups:
            asked = [actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for actor in group._actors]
            seen.nodes[group.name] = ray.get(asked, timeout=60)
        seen.lines.append(log(run, step, **what))
        return seen.lines[-1]

    monkeypatch.setattr(Run, "log", noting)
    return seen


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def changed(model: str, checkpoint: Path) -> float:
    """Largest difference of any weight between two model folders."""
    from safetensors.numpy import load_file

    left, right = (load_file(Path(folder) / "model.safetensors") for folder in (model, checkpoint))
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)

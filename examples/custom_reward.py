"""A reward of one's own: subclass Role and answer Samples with Scores. In a run: `run.spawn(Brevity(20), on=pools["judge"])`."""

from __future__ import annotations

import numpy as np
from rolecall.protocols import Samples, Scores
from rolecall.roles.base import Role
from rolecall.roles.rewards import scores_for


class Brevity(Role):
    """1 for a completion of `target` tokens, less by how far it is off, 0 at twice the target and beyond."""

    name = "reward"

    def __init__(self, target: int = 20) -> None:
        self.target = target

    def score(self, samples: Samples) -> Scores:
        lengths = np.diff(samples.cu_seqlens) - samples.prompt_lengths
        self.meter.add("length", float(lengths.mean()), len(lengths))
        return scores_for(samples, np.clip(1 - abs(lengths - self.target) / self.target, 0, 1))

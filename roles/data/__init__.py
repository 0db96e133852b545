"""Data: where prompts come from, split, shuffled, templated and tokenised ahead of the rollout."""

from rolecall.roles.data.data import Data
from rolecall.roles.data.sources import ReasoningGym, Records, Source

__all__ = ["Data", "ReasoningGym", "Records", "Source"]

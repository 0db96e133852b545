"""Sampling completions. Light to import: torch and transformers come with `Rollout.setup`."""

from rolecall.roles.rollout.rollout import Rollout

__all__ = ["Rollout"]

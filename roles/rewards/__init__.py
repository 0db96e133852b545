"""Rewards: a function (or several) run where it can be stopped, or any role with a `score` of its own."""

from rolecall.protocols.messages import Abstained, Failed, Scored, Verdict
from rolecall.roles.rewards.builtin import ends_with, last_number, letters_in_place, math_equal, reasoning_gym_score
from rolecall.roles.rewards.reward import Reward
from rolecall.roles.rewards.verdicts import scores_for

__all__ = [
    "Abstained",
    "Failed",
    "Reward",
    "Scored",
    "Verdict",
    "ends_with",
    "last_number",
    "letters_in_place",
    "math_equal",
    "reasoning_gym_score",
    "scores_for",
]

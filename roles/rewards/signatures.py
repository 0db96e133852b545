"""Which of the three known signatures a scoring function has, told by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from rolecall.protocols.errors import RewardError

ACCEPTED = (
    "(prompt, completion, **columns) -> number, called for each sample; "
    "(prompts, completions, **columns) -> list of numbers, called once (as in TRL); "
    "(data_source, solution_str, ground_truth, extra_info=None) -> number, called for each sample (as in verl)"
)
_MARKS: dict[str, Literal["sample", "batch", "verl"]] = {"completion": "sample", "completions": "batch", "solution_str": "verl"}
_OURS = {
    "sample": ("prompt", "completion", "completion_ids"),
    "batch": ("prompts", "completions", "completion_ids"),
    "verl": ("data_source", "solution_str", "ground_truth", "extra_info"),
}
TRUTHS = ("ground_truth", "reward_model", "answer")  # where verl's ground_truth is looked for, in this order


@dataclass(frozen=True)
class Scorer:
    """A scoring function and how to call it."""

    name: str
    function: Callable[..., Any]
    kind: Literal["sample", "batch", "verl"]
    accepts: frozenset[str]  # parameters that may be given by name
    required: tuple[str, ...]  # columns of the data without which it can't be called
    everything: bool  # takes **columns

    def columns(self, there: Collection[str]) -> list[str]:
        """Those columns of the data that it is to be given.

        Raises:
            RewardError: a column that it needs is not there.
        """
        missing = [name for name in self.required if name not in there]
        if self.kind == "verl" and not any(name in there for name in TRUTHS):
            missing.append("ground_truth")
        if missing:
            raise RewardError(
                f"The reward {self.name!r} can't be called: the data has no column {', '.join(map(repr, missing))}.",
                ask=f"the columns {', '.join(self.required) or 'ground_truth'}",
                have=", ".join(sorted(there)) or "no column at all",
                remedy="rename the parameter or the column, or give the parameter a default value",
            )
        reserved = _OURS["sample"] + _OURS["batch"]
        if self.kind == "verl":
            return list(there)
        return [name for name in there if name not in reserved and (self.everything or name in self.accepts)]


def recognise(function: Callable[..., Any], name: str = "") -> Scorer:
    """Tell how `function` wants to be called.

    Raises:
        RewardError: it is not callable, is asynchronous, or has none of the accepted signatures.
    """
    if not callable(function):
        raise RewardError(f"A reward must be a function; this is {type(function).__name__}.", ask=repr(function), remedy=_remedy())
    name = name or name_of(function)
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        raise RewardError(f"The reward {name!r} is asynchronous.", remedy="give a plain function; it runs in a process of its own anyway")
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise RewardError(f"The parameters of the reward {name!r} can't be read: {error}.", remedy=_remedy()) from error
    plain = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    found = f"{name}({', '.join(str(p.replace(annotation=p.empty)) for p in parameters.values())})"
    marks = [mark for mark in _MARKS if any(p.name == mark for p in plain)]
    if len(marks) != 1 or any(p.kind == p.POSITIONAL_ONLY and p.default is p.empty for p in parameters.values()):
        why = f"it has both {' and '.join(map(repr, marks))}" if len(marks) > 1 else "its parameters are named otherwise"
        raise RewardError(f"The signature of the reward {name!r} is not known: {why}.", have=found, remedy=_remedy())
    kind = _MARKS[marks[0]]
    return Scorer(
        name=name,
        function=function,
        kind=kind,
        accepts=frozenset(p.name for p in plain),
        required=tuple(p.name for p in plain if p.default is p.empty and p.name not in _OURS[kind]),
        everything=any(p.kind == p.VAR_KEYWORD for p in parameters.values()),
    )


def name_of(function: Callable[..., Any]) -> str:
    """The word for a function in metrics and errors."""
    inner = getattr(function, "func", function)  # functools.partial
    name = getattr(inner, "__name__", type(inner).__name__)
    return "lambda" if name == "<lambda>" else str(name)


def _remedy() -> str:
    return f"name the parameters as one of: {ACCEPTED}"

"""The reward role: score samples by functions, each call in a process that can be stopped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rolecall.protocols.errors import RewardError
from rolecall.protocols.messages import Failed, Samples, Scored, Scores, Verdict
from rolecall.roles.base import Member, Role
from rolecall.roles.rewards.child import Child, ChildDied
from rolecall.roles.rewards.signatures import Scorer, name_of, recognise
from rolecall.roles.rewards.verdicts import scores_for, weighted_sum
from rolecall.roles.rewards.work import Task

Function = Callable[..., Any]
Component = Function | tuple[Function, float]


class Reward(Role):
    """Score samples with a function, or with the weighted sum of several.

    `Reward(f)`, `Reward([f, (g, 0.2)])`, `Reward({"exact": (f, 1.0), "format": (g, 0.2)})`. A function is, told by the names
    of its parameters, one of:

    - `(prompt, completion, **columns) -> number`, for each sample; `columns` are what the dataset says of the prompt,
      and a function gets those that it names (all of them with `**columns`);
    - TRL's `(prompts, completions, **columns) -> list[number | None]`, once for all samples; None abstains;
    - verl's `(data_source, solution_str, ground_truth, extra_info=None) -> number` (or a dictionary with "score").

    Whatever goes wrong (it raises, returns None, NaN or no number, hangs, kills its process) makes that sample Failed, with
    the reason, and never a 0. `Abstained()` says that a plain function has no opinion. A sample fails if one component does.

    The functions run in one child process, forked at the first use: module state persists between calls until a hang or a
    crash replaces the child. They must not use a GPU. An attribute `prepare` of a function is called once before the fork.

    Args:
        function: the function, or several (each with its weight, 1 if not said).
        deadline: seconds a sample may take; a batched function gets as many times more as there are samples.
        name: word for the role in logs and metrics.
        conversational: give batched functions lists of messages, as TRL does for conversational data.

    Raises:
        RewardError: a signature is not known, or a setting makes no sense.
    """

    def __init__(
        self,
        function: Function | Sequence[Component] | Mapping[str, Component],
        *,
        deadline: float = 10.0,
        name: str = "reward",
        conversational: bool = False,
    ) -> None:
        if not (math.isfinite(deadline) and deadline > 0):
            raise RewardError("The deadline of a sample must be a positive number of seconds.", ask=f"deadline={deadline}")
        self.name, self.deadline, self.conversational = name, float(deadline), conversational
        self.scorers, self.weights = _components(function)
        self._child: Child | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_child": None}  # processes stay where they are

    def setup(self, member: Member) -> None:
        """Import what the functions need (see `prepare`) and start the child."""
        super().setup(member)
        self._ready()

    def close(self) -> None:
        """End the child, whatever it is doing."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def score(self, samples: Samples) -> Scores:
        """One verdict for each sample.

        Raises:
            RewardError: the data lacks a column that a function needs.
        """
        columns = [scorer.columns(samples.columns) for scorer in self.scorers]
        verdicts = [self._run(number, _task(scorer, number, samples, columns[number], self.conversational))
                    for number, scorer in enumerate(self.scorers)]  # fmt: skip
        if self.weights == (1.0,):
            scores = scores_for(samples, verdicts[0])
        else:
            names = [scorer.name for scorer in self.scorers]
            total = [weighted_sum(each, self.weights, names) for each in zip(*verdicts, strict=True)]
            scores = scores_for(samples, total, dict(zip(names, verdicts, strict=True)))
            for name, given in zip(names, verdicts, strict=True):
                self._mean(f"part/{name}", np.array([each.value for each in given if isinstance(each, Scored)]))
        self._measure(scores)
        return scores

    def _ready(self) -> Child:
        """The child, started if it is not running."""
        if self._child is not None and not self._child.alive():
            self.close()  # it died while it had nothing to do
        if self._child is None:
            for scorer in self.scorers:
                prepare = getattr(scorer.function, "prepare", None)
                if prepare is not None:
                    prepare()
            self._child = Child(self.scorers)
        return self._child

    def _run(self, number: int, task: Task) -> list[Verdict]:
        """All verdicts of one function; what hangs or dies is given up, and the rest goes on in a new child."""
        verdicts: list[Verdict] = []
        count = len(task.completions)
        whole = self.scorers[number].kind == "batch"
        limit = self.deadline * (count if whole else 1)
        while len(verdicts) < count:
            child = self._ready()
            try:
                child.send(task)
                while len(verdicts) < count:
                    verdicts += child.receive(limit)
            except (TimeoutError, ChildDied) as event:
                self.close()
                if isinstance(event, TimeoutError):
                    why = f"did not return within its deadline of {limit:g} s and was stopped"
                else:
                    why = f"took its process down: it {event}"
                verdicts += [Failed(why)] * (count - len(verdicts) if whole else 1)
                task = _from(task, len(verdicts))
        return verdicts

    def _measure(self, scores: Scores) -> None:
        count = len(scores.status)
        if not count:
            return
        failed, abstained = (int((scores.status == Scores.STATUS.index(word)).sum()) for word in ("failed", "abstained"))
        self.meter.add("failed", failed / count, count)
        self.meter.add("abstained", abstained / count, count)
        same = failed == count and len(Counter(scores.reasons.values())) == 1
        self.meter.add("all_failed_alike", float(same))  # share of calls: the function itself is broken, not a sample
        values = scores.values[scores.status == 0]
        self._mean("mean", values)
        if len(values):
            self.meter.add("std", float(values.std()), len(values))

    def _mean(self, name: str, values: np.ndarray) -> None:
        if len(values):
            self.meter.add(name, float(values.mean()), len(values))


def _components(function: Function | Sequence[Component] | Mapping[str, Component]) -> tuple[tuple[Scorer, ...], tuple[float, ...]]:
    """The functions by name, and their weights."""
    named: list[tuple[str, Component]]
    if isinstance(function, str):  # a sequence too
        raise RewardError(
            "A reward must be a function; this is a text.", ask=repr(function), remedy="import the function and give it itself"
        )
    if isinstance(function, Mapping):
        named = list(function.items())
    elif isinstance(function, Sequence):
        named = [(name_of(each[0] if isinstance(each, tuple) else each), each) for each in function]
    else:
        named = [(name_of(function), function)]
    if not named:
        raise RewardError("A reward needs at least one function.", have="none")
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RewardError(f"Two components of the reward are named {twice!r}.", remedy='name them: Reward({"one": f, "other": g})')
    scorers, weights = [], []
    for name, each in named:
        part, weight = each if isinstance(each, tuple) else (each, 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise RewardError(f"The weight of the component {name!r} must be a finite number.", ask=repr(weight))
        scorers.append(recognise(part, name))
        weights.append(float(weight))
    return tuple(scorers), tuple(weights)


def _task(scorer: Scorer, number: int, samples: Samples, columns: Sequence[str], conversational: bool) -> Task:
    """What the child needs of `samples` to call one function."""
    ids: tuple[tuple[int, ...], ...] = ()
    if "completion_ids" in scorer.accepts:
        starts = samples.cu_seqlens[:-1] + samples.prompt_lengths
        ids = tuple(tuple(samples.tokens[a:b].tolist()) for a, b in zip(starts, samples.cu_seqlens[1:], strict=True))
    return Task(
        scorer=number,
        start=0,
        prompts=samples.texts,
        columns={name: samples.columns[name] for name in columns},
        owners=tuple(np.repeat(np.arange(len(samples.counts)), samples.counts).tolist()),
        completions=samples.completions,
        completion_ids=ids,
        conversational=conversational,
    )


def _from(task: Task, start: int) -> Task:
    """The same task from sample `start` on."""
    fields = {name: getattr(task, name) for name in task.__struct_fields__}
    return Task(**fields | {"start": start})

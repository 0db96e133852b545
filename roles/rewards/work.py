"""What runs in the child process: call the scoring functions sample by sample and say how each call went."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import msgspec
from rolecall.protocols.messages import Abstained, Failed, Verdict
from rolecall.roles.rewards.signatures import TRUTHS, Scorer
from rolecall.roles.rewards.verdicts import verdict_of


class Task(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Member to child: score these n samples of p prompts with one function, from sample `start` on."""

    scorer: int
    start: int
    prompts: tuple[str, ...]  # p: the user's words
    columns: dict[str, tuple[Any, ...]]  # p values each
    owners: tuple[int, ...]  # n: the prompt of each sample
    completions: tuple[str, ...]  # n
    completion_ids: tuple[tuple[int, ...], ...] = ()  # n, where the function asks for them
    conversational: bool = False  # texts as lists of one message, for batched functions


def answers(scorer: Scorer, task: Task) -> Iterator[list[Verdict]]:
    """Verdicts as they come: one by one, or all at once from a batched function. Never raises."""
    if scorer.kind == "batch":
        yield _batch(scorer, task)
        return
    arguments = _verl_arguments if scorer.kind == "verl" else _sample_arguments
    for number in range(task.start, len(task.completions)):
        try:
            result = scorer.function(**arguments(scorer, task, number))
            if scorer.kind == "verl" and isinstance(result, dict):
                result = _of_dictionary(result)
            verdict = verdict_of(result)
        except BaseException as error:  # also SystemExit: whatever a user's function does is told, not obeyed
            verdict = Failed(describe(error, scorer.function))
        yield [verdict]


def _sample_arguments(scorer: Scorer, task: Task, number: int) -> dict[str, Any]:
    owner = task.owners[number]
    arguments = {name: values[owner] for name, values in task.columns.items()}
    own = {"prompt": task.prompts[owner], "completion": task.completions[number]}
    if "completion_ids" in scorer.accepts:
        own["completion_ids"] = list(task.completion_ids[number])  # type: ignore[assignment]
    arguments.update({name: value for name, value in own.items() if name in scorer.accepts or scorer.everything})
    return arguments


def _verl_arguments(scorer: Scorer, task: Task, number: int) -> dict[str, Any]:
    owner = task.owners[number]
    row = {name: values[owner] for name, values in task.columns.items()}
    truth = next(row[name] for name in TRUTHS if name in row)
    if isinstance(truth, dict) and "ground_truth" in truth:  # verl's column reward_model
        truth = truth["ground_truth"]
    given = {
        "data_source": row.get("data_source", ""),
        "solution_str": task.completions[number],
        "ground_truth": truth,
        "extra_info": row.get("extra_info", row),
    }
    extra = {name: row[name] for name in scorer.required}
    return {name: value for name, value in given.items() if name in scorer.accepts or scorer.everything} | extra


def _of_dictionary(result: dict[str, Any]) -> Any:
    """verl takes {"score": number, …}; the other entries are its metrics."""
    return result["score"] if "score" in result else Failed(f"returned a dictionary without 'score' (it has {', '.join(map(str, result))})")


def _batch(scorer: Scorer, task: Task) -> list[Verdict]:
    count = len(task.completions)
    prompts: list[Any] = [task.prompts[owner] for owner in task.owners]
    completions: list[Any] = list(task.completions)
    if task.conversational:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    given: dict[str, Any] = {"prompts": prompts, "completions": completions}
    if "completion_ids" in scorer.accepts:
        given["completion_ids"] = [list(ids) for ids in task.completion_ids]
    given = {name: value for name, value in given.items() if name in scorer.accepts or scorer.everything}
    for name, values in task.columns.items():
        given[name] = [values[owner] for owner in task.owners]
    try:
        results = scorer.function(**given)
        if results is None or isinstance(results, str | bytes | dict) or not hasattr(results, "__len__"):
            why = f"returned {type(results).__name__} for {count} samples; return a list of {count} numbers"
            return [Failed(why)] * count
        if len(results) != count:
            return [Failed(f"returned {len(results)} values for {count} samples")] * count
        return [_each(result) for result in results]
    except BaseException as error:
        return [Failed(describe(error, scorer.function))] * count


def _each(result: Any) -> Verdict:
    """As `verdict_of`, where NaN is what TRL itself turns None into."""
    return Abstained() if result is None else verdict_of(result, none_abstains=True)


def describe(error: BaseException, function: Callable[..., Any]) -> str:
    """Type, message and the line of the user's file: `raised ValueError: no number (my_reward.py:12)`."""
    file = getattr(getattr(getattr(function, "func", function), "__code__", None), "co_filename", "")
    message = str(error).strip() or "no message"
    return f"raised {type(error).__name__}: {message}{_place(error.__traceback__, file)}"


def _place(trace: TracebackType | None, file: str) -> str:
    """The innermost line in `file`, else the innermost line below ours."""
    lines = []
    while trace is not None:
        lines.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    theirs = [line for line in lines if line[0] == file] or lines[1:]
    return f" ({theirs[-1][0].rsplit('/', 1)[-1]}:{theirs[-1][1]})" if theirs else ""


def flush() -> None:
    """Bring what the function printed into the member's log, now: the process may be killed at any time."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # the function closed it
            continue

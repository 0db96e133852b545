"""Rewards: the three signatures, what becomes Failed and why, weighted sums, metrics."""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest
from rolecall.protocols import RewardError, Samples, check
from rolecall.roles.base import Member
from rolecall.roles.rewards import Abstained, Failed, Reward, Scored, scores_for
from samples import samples_of


def score(reward: Reward, samples: Samples):
    """Score in process and end the child."""
    try:
        scores = reward.score(samples)
    finally:
        reward.close()
    check(scores)
    return scores


def test_a_plain_function_gets_the_columns_that_it_names_of_its_own_prompt():
    def right(completion: str, answer: str) -> bool:
        return completion == answer

    scores = score(Reward(right), samples_of(["a", "b", "b", "c"], per_prompt=2, answer=("a", "b"), other=(1, 2)))
    assert scores.values.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert scores.status.tolist() == [0, 0, 0, 0]
    assert scores.counts.tolist() == [2, 2]


def test_a_plain_function_with_columns_gets_all_of_them():
    def seen(prompt: str, completion: str, **columns: object) -> float:
        return 1.0 if (prompt, sorted(columns.items())) == ("question 1", [("answer", "b"), ("rank", {"deep": [1, 2]})]) else 0.0

    assert score(Reward(seen), samples_of(["x", "y"], answer=("a", "b"), rank=({}, {"deep": [1, 2]}))).values.tolist() == [0.0, 1.0]


def test_a_batched_function_as_in_trl_is_called_once_and_none_abstains():
    def lengths(prompts: list[str], completions: list[str], answer: list[str], completion_ids: list[list[int]], **_: object) -> list:
        assert answer == ["a", "a", "b", "b"]
        assert prompts[2] == "question 1"
        assert [len(ids) for ids in completion_ids] == [len(text) for text in completions]
        return [None if text == "--" else float(len(text)) for text in completions]

    scores = score(Reward(lengths), samples_of(["x", "--", "xyz", ""], per_prompt=2, answer=("a", "b")))
    assert scores.values.tolist() == [1.0, 0.0, 3.0, 0.0]
    assert scores.status.tolist() == [0, 2, 0, 0]
    assert scores.reasons == {}


def test_a_batched_function_can_be_given_messages_as_in_trl():
    def contents(completions: list) -> list[float]:
        return [float(len(completion[0]["content"])) for completion in completions]

    assert score(Reward(contents, conversational=True), samples_of(["abc", "d"])).values.tolist() == [3.0, 1.0]


@pytest.mark.parametrize(
    "columns", [{"ground_truth": ("4",)}, {"reward_model": ({"ground_truth": "4", "style": "rule"},)}, {"answer": ("4",)}]
)
def test_a_function_as_in_verl(columns: dict):
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        assert data_source == "gsm8k"
        return {"score": float(solution_str == ground_truth), "acc": 1} if extra_info["split"] == "train" else 0.5

    samples = samples_of(["4", "5"], per_prompt=2, data_source=("gsm8k",), extra_info=({"split": "train"},), **columns)
    assert score(Reward(compute_score), samples).values.tolist() == [1.0, 0.0]


def no_known_names(text):
    return 1.0


def both_names(completion, completions):
    return 1.0


async def asynchronous(completion):
    return 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            no_known_names,
            r"'no_known_names' is not known: its parameters are named otherwise.*no_known_names\(text\).*\(prompt, completion",
        ),
        (both_names, "it has both 'completion' and 'completions'"),
        (asynchronous, "is asynchronous"),
        ("exact", "must be a function"),
        (7, "must be a function; this is int"),
        ([], "needs at least one function"),
        ({"a": (lambda completion: 1.0, float("nan"))}, "weight of the component 'a' must be a finite number"),
        ([lambda completion: 1.0, lambda completion: 2.0], "Two components of the reward are named 'lambda'"),
    ],
)
def test_what_can_not_be_called_is_refused_at_construction(given, message: str):
    with pytest.raises(RewardError, match=message):
        Reward(given)


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf")])
def test_a_deadline_must_be_positive(deadline: float):
    with pytest.raises(RewardError, match="positive number of seconds"):
        Reward(lambda completion: 1.0, deadline=deadline)


def test_a_missing_column_is_named_before_anything_is_called():
    with pytest.raises(RewardError, match=r"no column 'target'.*There is: answer\."):
        score(Reward(lambda completion, target: 1.0), samples_of(["a"], answer=("a",)))
    with pytest.raises(RewardError, match="no column 'ground_truth'"):
        score(Reward(lambda data_source, solution_str, ground_truth: 1.0), samples_of(["a"]))


def test_bad_returns_and_exceptions_are_failed_with_the_reason_and_the_others_count():
    def moody(completion: str):
        if completion == "raise":
            raise ValueError("no number in it")
        if completion == "exit":
            sys.exit(3)
        returns = {"none": None, "nan": float("nan"), "inf": float("inf"), "text": "1.0", "list": [1.0], "huge": 1e39, "big": 10**400}
        returns |= {
            "bool": True,
            "numpy": np.float32(0.5),
            "array": np.array([0.25]),
            "long": np.zeros(2),
            "own": Failed("the judge is asleep"),
        }
        return {**returns, "whatever": Abstained(), "scored": Scored(2.0)}[completion]

    cases = {
        "raise": r"raised ValueError: no number in it (test_rewards.py:",
        "exit": "raised SystemExit: 3",
        "none": "returned None; return a number, or Abstained()",
        "nan": "returned nan; return a finite number",
        "inf": "returned inf",
        "text": "returned str '1.0'; return a number",
        "list": "returned list [1.0]",
        "huge": "beyond float32",
        "big": "returned inf",
        "long": "returned ndarray",
        "own": "the judge is asleep",
        "unknown": "raised KeyError: 'unknown'",
    }
    good = {"bool": 1.0, "numpy": 0.5, "array": 0.25, "scored": 2.0}
    scores = score(Reward(moody), samples_of([*cases, *good, "whatever"]))
    for number, (word, reason) in enumerate(cases.items()):
        assert scores.status[number] == 1, word
        assert reason in scores.reasons[number], word
    assert scores.values[len(cases) : -1].tolist() == list(good.values())
    assert scores.status[-1] == 2
    assert not scores.values[: len(cases)].any()


@pytest.mark.parametrize(
    ("returns", "reason"),
    [
        ([1.0], "returned 1 values for 2 samples"),
        (None, "returned NoneType for 2 samples; return a list of 2 numbers"),
        ("ab", "returned str for 2 samples"),
        (1.0, "returned float for 2 samples"),
    ],
)
def test_a_batched_function_with_the_wrong_count_fails_all(returns, reason: str):
    reward = Reward(lambda completions: returns)
    scores = score(reward, samples_of(["a", "b"]))
    assert [reason in why for why in scores.reasons.values()] == [True, True]
    assert reward.meter.drain()["all_failed_alike"] == (1.0, 1.0)


def test_a_batched_function_that_raises_fails_all_and_one_bad_value_fails_one():
    def raising(completions: list[str]) -> list[float]:
        return [1 / 0 for _ in completions]

    def one_bad(completions: list[str]) -> list:
        return [1.0, "x", float("nan")]

    assert ["ZeroDivisionError" in why for why in score(Reward(raising), samples_of(["a", "b"])).reasons.values()] == [True, True]
    assert score(Reward(one_bad), samples_of(["a", "b", "c"])).status.tolist() == [0, 1, 1]


def exact(completion: str, answer: str) -> float:
    return float(completion == answer)


def short(completions: list[str], **_: object) -> list:
    return [None if text == "skip" else -float(len(text)) for text in completions]


def test_a_weighted_sum_keeps_its_parts():
    reward = Reward({"exact": (exact, 1.0), "short": (short, 0.5)})
    scores = score(reward, samples_of(["ab", "skip"], answer=("ab", "x")))
    assert scores.values.tolist() == [0.0, 0.0]
    assert scores.status.tolist() == [0, 0]  # the second abstains in one part only
    assert scores.parts == {"exact": (1.0, 0.0), "short": (-2.0, 0.0)}
    metrics = reward.meter.drain()
    assert metrics["part/exact"] == (1.0, 2)
    assert metrics["part/short"] == (-2.0, 1)


def test_a_sample_fails_if_one_component_does_and_abstains_if_all_do():
    def broken(completion: str) -> float:
        if completion == "bad":
            raise RuntimeError("judge is down")
        return 1.0

    def silent(completion: str) -> Abstained:
        return Abstained()

    scores = score(Reward([(broken, 2.0), silent]), samples_of(["bad", "good"]))
    assert scores.status.tolist() == [1, 0]
    assert scores.values.tolist() == [0.0, 2.0]
    assert scores.reasons[0].startswith("broken: raised RuntimeError: judge is down")
    assert np.isnan(scores.parts["broken"][0])
    alone = score(Reward({"silent": (silent, 0.3)}), samples_of(["x"]))
    assert alone.status.tolist() == [2]


def test_metrics_are_weighted_by_counts():
    def half(completion: str):
        return {"a": 1.0, "b": 3.0, "c": None, "d": Abstained()}[completion]

    reward = Reward(half)
    score(reward, samples_of(["a", "b", "c", "d"]))
    metrics = reward.meter.drain()
    assert metrics == {"failed": (1.0, 4), "abstained": (1.0, 4), "all_failed_alike": (0.0, 1.0), "mean": (4.0, 2), "std": (2.0, 2)}


def test_partials_methods_and_callable_objects_are_functions_too():
    class Judge:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, completion: str) -> float:
            return self.factor * len(completion)

        def grade(self, completion: str) -> float:
            return self.factor

    def scaled(completion: str, factor: float) -> float:
        return factor * len(completion)

    for function, value in ((Judge(2.0), 4.0), (Judge(3.0).grade, 3.0), (functools.partial(scaled, factor=0.5), 1.0)):
        assert score(Reward(function), samples_of(["ab"])).values.tolist() == [value]


def test_no_samples_give_no_scores():
    scores = score(Reward(lambda completions: 1 / 0), samples_of(["a"]).take([]))
    assert len(scores.values) == 0
    assert scores.reasons == {}


def test_scores_for_wants_one_verdict_a_sample():
    with pytest.raises(RewardError, match="verdicts has 1 for 2 samples"):
        scores_for(samples_of(["a", "b"]), [1.0])
    scores = scores_for(samples_of(["a", "b", "c"]), [1, Failed("because"), None])
    assert scores.status.tolist() == [0, 1, 1]
    assert scores.reasons[1] == "because"


def test_the_example_of_a_custom_reward_is_a_role_of_15_lines():
    import ast
    import inspect

    from rolecall.examples import custom_reward

    source = inspect.getsource(custom_reward)
    documentation = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    code = [line for number, line in enumerate(source.splitlines(), 1) if line.strip() and number not in documentation]
    assert len(code) <= 15
    role = custom_reward.Brevity(target=4)
    role.setup(Member(role="reward"))
    scores = role.score(samples_of(["abcd", "ab", "a" * 12]))
    check(scores)
    assert scores.values.tolist() == [1.0, 0.5, 0.0]
    assert role.meter.drain()["length"] == (18.0, 3)

"""Scoring functions that come with Rolecall; each is a plain function and can be called anywhere."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from rolecall.protocols.errors import RewardError

# a minus is a sign only where no number, word or bracket stands before it: "5-9" holds 5 and 9, "= -4" holds -4
_SIGN = r"(?:(?<![\w.)\]])[-−+])?"
_WHOLE = r"(?:(?<!\d)(?<!\d,)\d{1,3}(?:,\d{3})++(?!,?\d)|\d++)"  # possessive: linear in the text, whatever a model writes
_NUMBER = re.compile(rf"{_SIGN}(?:{_WHOLE}(?:\.\d++)?|(?<![\w.])\.\d++)(?:[eE][-+]?\d{{1,3}}(?!\w))?")


def last_number(prompt: str, completion: str, answer: str | float, **_: Any) -> float:
    """1.0 if the last number in the completion equals the answer's, else 0.0.

    Signs, thousands separators ("1,234"), decimals and exponents are understood; "3.0" equals "3".

    Raises:
        ValueError: the answer holds no number.
    """
    truth = _last(str(answer))
    if truth is None:
        raise ValueError(f"the answer {answer!r} holds no number")
    return float(_last(completion) == truth)


def ends_with(prompt: str, completion: str, answer: str | float, **_: Any) -> float:
    """1.0 if the completion ends with the answer, else 0.0: with its last number where the answer is one, else with its very words.

    A full stop and blanks at the end don't count; nor does a word that only ends with the answer's letters ("unable" for "able").
    """
    truth, said = (text.strip().rstrip(".").rstrip() for text in (str(answer), completion))
    if _NUMBER.fullmatch(truth):
        return last_number(prompt, completion, truth)
    before = said[: len(said) - len(truth)]
    return float(bool(truth) and said.endswith(truth) and not (truth[0].isalnum() and before[-1:].isalnum()))


def letters_in_place(prompt: str, completion: str, answer: str, **_: Any) -> float:
    """Share of letters that the completion's last word has right, place by place; 1.0 for the answer alone. For answers of one word.

    What one of the two has too much counts as wrong. A full stop at the end doesn't count.
    """
    said = (completion.split() or [""])[-1].rstrip(".")
    return sum(one == other for one, other in zip(said, answer, strict=False)) / max(len(said), len(answer), 1)


# metadata that a task's scorer compares with tuples of tuples: they were such, but columns travel as plain data, which has only
# lists. These are all: the scorers of reasoning-gym's other tasks don't mind (tests/roles/test_rewards_gym.py)
_GRIDS = {"arc_agi": ("output",), "rearc": ("output",)}


def _last(text: str) -> Decimal | None:
    """The last number in a text."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None


def reasoning_gym_score(prompt: str, completion: str, answer: str, metadata: dict[str, Any], **_: Any) -> float:
    """What reasoning-gym's own scorer of the task says (0 to 1) of the text in the last <answer> tag, or of the whole completion.

    Raises:
        RewardError: the package is missing.
        KeyError: the metadata don't name the task.
    """
    gym = _reasoning_gym()
    given = gym.utils.extract_answer(completion)
    score = gym.get_score_answer_fn(metadata["source_dataset"])
    grids = {name: tuple(map(tuple, metadata[name])) for name in _GRIDS.get(metadata["source_dataset"], ()) if name in metadata}
    metadata = {**metadata, **grids}
    entry = {"question": prompt, "answer": answer, "metadata": metadata}
    return float(score(completion.strip() if given is None else given, entry))


def math_equal(prompt: str, completion: str, answer: str, **_: Any) -> float:
    """1.0 if math-verify finds the completion's final expression equal to the answer (a number or LaTeX), else 0.0.

    Deviation: verl's scorer gives 0 where math-verify is missing or breaks; here that is an error.

    Raises:
        RewardError: the package is missing.
        ValueError: the answer is no expression.
    """
    parse, verify = _math_verify()
    # no time limits of its own: they need signals of the main thread, and Reward has a deadline
    truth = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not truth:
        raise ValueError(f"the answer {answer!r} is no mathematical expression")
    found = parse(completion, parsing_timeout=None)
    return float(verify(truth, found, timeout_seconds=None, raise_on_error=True)) if found else 0.0


def _reasoning_gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise RewardError("The package reasoning-gym is missing.", remedy="pip install reasoning-gym") from error
    return reasoning_gym


def _math_verify() -> tuple[Any, Any]:
    try:
        from math_verify import parse, verify  # type: ignore[import-untyped]
    except ImportError as error:
        raise RewardError("The package math-verify is missing.", remedy="pip install math-verify") from error
    return parse, verify


# called by Reward before it forks: an import of seconds belongs to no sample's deadline, and a missing package is told at once
reasoning_gym_score.prepare = _reasoning_gym  # type: ignore[attr-defined]
math_equal.prepare = _math_verify  # type: ignore[attr-defined]

"""The scoring functions that come with Rolecall."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rolecall.protocols import RewardError
from rolecall.roles.base import Member
from rolecall.roles.rewards import Reward, ends_with, last_number, letters_in_place, math_equal, reasoning_gym_score


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("so 12 + 3 = 15\n#### 15.0", "15", 1.0),
        ("15 it is, or 16", "15", 0.0),
        ("l o c -> col", "col", 1.0),
        ("It is col.", "col", 1.0),
        ("protocol", "col", 0.0),
        ("col, I think", "col", 0.0),
        ('<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"name": "f"}</tool_call>', 1.0),
        ("", "col", 0.0),
        ("anything", "", 0.0),
    ],
)
def test_ends_with(completion: str, answer: str, value: float) -> None:
    assert ends_with("", completion, answer) == value


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("4 + 3 = 7", "7", 1.0),
        ("The answer is 7.", "7", 1.0),
        ("first 7, then 8", "7", 0.0),
        ("it is -37", "-37", 1.0),
        ("it is −37", "-37", 1.0),
        ("23 - 60 = -37", "-37", 1.0),
        ("60-37", "37", 1.0),
        ("60 - 37", "37", 1.0),
        ("(60)-37", "37", 1.0),
        ("it is 37", "-37", 0.0),
        ("1,234,567 in all", "1234567", 1.0),
        ("1,234.50", "1234.5", 1.0),
        ("1, 2, 3", "3", 1.0),
        ("1,23", "23", 1.0),
        ("**42**", "42", 1.0),
        ("$3.50", "3.5", 1.0),
        ("3.0", "3", 1.0),
        (".5", "0.5", 1.0),
        ("-.5", "-0.5", 1.0),
        ("1,111" + ",111" * 3000 + ",1111", "1111", 1.0),
        ("1e3", "1000", 1.0),
        ("x2", "2", 1.0),
        ("no number", "7", 0.0),
        ("", "7", 0.0),
        ("is 7", 7, 1.0),
        ("9" * 5000, "7", 0.0),
    ],
)
def test_last_number(completion: str, answer: str, value: float):
    assert last_number("prompt", completion, answer=answer, metadata={}) == value


def test_last_number_refuses_an_answer_without_a_number():
    with pytest.raises(ValueError, match="'seven' holds no number"):
        last_number("prompt", "7", answer="seven")


def test_math_equal():
    assert math_equal("", "so it is $\\frac{1}{2}$", answer="0.5") == 1.0
    assert math_equal("", "\\boxed{x + 1}", answer="1 + x") == 1.0
    assert math_equal("", "\\boxed{3}", answer="4") == 0.0
    assert math_equal("", "no idea", answer="4") == 0.0
    with pytest.raises(ValueError, match="no mathematical expression"):
        math_equal("", "4", answer="")


@pytest.mark.parametrize(
    ("function", "module", "package"), [(math_equal, "math_verify", "math-verify"), (reasoning_gym_score, "reasoning_gym", "reasoning-gym")]
)
def test_a_missing_package_is_told_at_setup_and_is_no_zero(monkeypatch, function, module: str, package: str):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RewardError, match=rf"{package} is missing.*pip install {package}"):
        Reward(function).setup(Member(role="reward"))


def test_reasoning_gym_scores_by_the_task_in_the_metadata():
    metadata = {"source_dataset": "chain_sum"}
    assert reasoning_gym_score("1 + 2 =", "well <answer>3</answer>", "3", metadata) == 1.0
    assert reasoning_gym_score("1 + 2 =", " 3 ", "3", metadata) == 1.0
    assert reasoning_gym_score("1 + 2 =", "<answer>4</answer>", "3", metadata) == 0.0
    with pytest.raises(KeyError, match="source_dataset"):
        reasoning_gym_score("1 + 2 =", "3", "3", {})


def test_rewards_and_data_are_light_to_import():
    heavy = ("torch", "ray", "transformers", "reasoning_gym")
    code = f"import sys, rolecall.roles.rewards, rolecall.roles.data; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("completion", "value"),
    [("y a h, yah", 1), ("yah.", 1), ("yat", 2 / 3), ("yahs", 3 / 4), ("ya", 2 / 3), ("hay", 1 / 3), ("y ah", 0), ("", 0), (" . ", 0)],
)
def test_letters_in_place(completion: str, value: float) -> None:
    assert letters_in_place("", completion, "yah") == pytest.approx(value)

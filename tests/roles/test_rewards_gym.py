"""reasoning-gym's scorers say the same of a problem that has travelled between processes as of the problem itself."""

from __future__ import annotations

import pytest
from rolecall.roles.plain import as_plain
from rolecall.roles.rewards import reasoning_gym_score

NEED_SETTINGS = ("composite",)  # a task made of others, which must be named


def differences(task: str, problems: int) -> list[str]:
    """Answers of which the scorer thinks otherwise after the journey."""
    import reasoning_gym

    found = []
    dataset = reasoning_gym.create_dataset(task, size=problems, seed=1)
    for entry in (dataset[number] for number in range(problems)):
        travelled = as_plain(entry)
        for answer in (entry["answer"], "wrong", "[[1, 2]]"):
            if answer is None:
                continue
            scores = []
            for metadata in (entry["metadata"], travelled["metadata"]):
                try:
                    own = {**entry, "metadata": metadata}
                    if metadata is entry["metadata"]:
                        scores.append(float(dataset.score_answer(answer, own)))
                    else:
                        scores.append(reasoning_gym_score(entry["question"], f"<answer>{answer}</answer>", entry["answer"], metadata))
                except Exception as error:  # some scorers raise at nonsense; then both must
                    scores.append(type(error).__name__)
            if scores[0] != scores[1]:
                found.append(f"{task}: {answer[:30]!r} scores {scores[0]}, after the journey {scores[1]}")
    return found


@pytest.mark.parametrize("task", ["rearc", "chain_sum", "countdown"])
def test_a_problem_is_scored_alike_before_and_after_a_journey(task: str):
    assert not differences(task, 2)


def test_the_right_answer_of_a_grid_task_scores_1():
    import reasoning_gym

    entry = as_plain(reasoning_gym.create_dataset("rearc", size=1, seed=1)[0])
    assert isinstance(entry["metadata"]["output"], list)
    assert reasoning_gym_score(entry["question"], f"<answer>{entry['answer']}</answer>", entry["answer"], entry["metadata"]) == 1.0


@pytest.mark.slow
def test_all_tasks_are_scored_alike_before_and_after_a_journey():
    from reasoning_gym.factory import DATASETS

    assert not [difference for task in sorted(DATASETS) if task not in NEED_SETTINGS for difference in differences(task, 3)]

"""Preferences made from rollouts: which samples are chosen, and that their tokens are the sampled ones."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels.losses import nll
from rolecall.protocols import DataError
from rolecall.protocols.messages import Samples, Scores
from rolecall.roles.base import Member
from rolecall.roles.data import Data, Documents, Files, Mix
from rolecall.roles.data.packer import pack_block
from rolecall.roles.data.preferences import choose, pairs_of, preferences_of
from rolecall.roles.policy import Policy
from rolecall.roles.rewards import Reward
from rolecall.roles.rollout import Rollout
from tiny import tiny_samples


def scored(samples: Samples, values, status=None) -> Scores:
    return Scores(
        keys=samples.keys,
        counts=samples.counts,
        values=np.array(values, np.float32),
        status=np.zeros(len(values), np.uint8) if status is None else np.array(status, np.uint8),
    )


SAMPLES = msgspec.structs.replace(
    tiny_samples(3, 4), texts=("a?", "b?", "c?"), completions=tuple(f"answer {number}" for number in range(12))
)
VALUES = [0, 1, 1, 0, 1, 1, 1, 1, 0.2, 0.9, 0.1, 0.5]


def test_the_best_and_the_worst_of_each_prompt_with_spread():
    assert choose(SAMPLES, scored(SAMPLES, VALUES)) == [(0, 1, 0), (2, 9, 10)]


def test_correct_against_wrong_by_a_threshold_and_a_margin():
    assert choose(SAMPLES, scored(SAMPLES, VALUES), threshold=1.0) == [(0, 1, 0)]
    assert choose(SAMPLES, scored(SAMPLES, VALUES), margin=0.85) == [(0, 1, 0)]
    assert choose(SAMPLES, scored(SAMPLES, VALUES), threshold=0.5, pairs="all") == [
        (0, 1, 0), (0, 1, 3), (0, 2, 0), (0, 2, 3), (2, 9, 8), (2, 9, 10), (2, 11, 8), (2, 11, 10),
    ]  # fmt: skip


def test_samples_that_failed_or_were_cut_off():
    status = [0, 1, 0, 2, *[0] * 8]
    assert choose(SAMPLES, scored(SAMPLES, VALUES, status))[0] == (0, 2, 0)
    finish = np.zeros(12, np.uint8)
    finish[[9, 10]] = Samples.FINISH.index("length")
    cut = msgspec.structs.replace(SAMPLES, finish=finish)
    assert choose(cut, scored(cut, VALUES))[1] == (2, 11, 10)  # 10 may be rejected, 9 not chosen
    assert choose(cut, scored(cut, VALUES), unfinished=True)[1] == (2, 9, 10)


def test_scores_of_other_samples_are_refused():
    with pytest.raises(DataError, match="scores are of other samples"):
        choose(SAMPLES, scored(tiny_samples(2, 4), [0.0] * 8))


def test_tokens_are_the_sampled_ones_and_the_prompt_is_shared():
    choices = choose(SAMPLES, scored(SAMPLES, VALUES))
    for choice, pair in zip(choices, pairs_of(SAMPLES, choices), strict=True):
        assert pair.shared == SAMPLES.prompt_lengths[choice.chosen]
        for number, side in ((choice.chosen, pair.chosen), (choice.rejected, pair.rejected)):
            start, stop = SAMPLES.cu_seqlens[number : number + 2]
            assert np.array_equal(side.tokens, SAMPLES.tokens[start:stop])
            assert side.trained.sum() == SAMPLES.completion_lengths[number]
            assert not side.trained[: pair.shared].any()
    batch = pack_block(pairs_of(SAMPLES, choices), capacity=64)
    assert len(batch.targets) == sum(
        int(side.trained.sum()) for pair in pairs_of(SAMPLES, choices) for side in (pair.chosen, pair.rejected)
    )


def few_vowels(completion: str) -> float:
    return -float(sum(letter in "aeiou" for letter in completion)) / max(1, len(completion))


def test_from_real_rollouts_and_rewards_to_rows_that_a_policy_trains_and_to_a_file_of_records(tiny: str, tmp_path: Path):
    roles = (
        Data([{"prompt": f"say {word}"} for word in ("one", "two", "three")], model=tiny, held_out=0),
        Rollout(tiny, max_tokens=12),
        Policy(tiny),
    )
    for role in roles:
        role.setup(Member(seed=3))
    data, rollout, policy = roles
    samples = rollout.generate(data.prompts(3), per_prompt=6)
    reward = Reward(few_vowels)
    scores = reward.score(samples)
    reward.close()
    choices = choose(samples, scores, unfinished=True)
    assert choices, "samples of a prompt differ"
    pairs = pairs_of(samples, choices)
    batch = pack_block(pairs, capacity=128)
    sums = policy.accumulate(batch, nll).sums
    assert sums["tokens"][0] == sum(int(side.trained.sum()) for pair in pairs for side in (pair.chosen, pair.rejected))
    assert policy.update(1e-3) == 1
    kept = preferences_of(samples, choices)
    lines = [{"prompt": each.prompt, "chosen": each.chosen, "rejected": each.rejected} for each in kept]
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, lines)))
    again = Documents(Mix({"pairs": Files(str(tmp_path / "pairs.jsonl"))}, epochs={"pairs": 1}), model=tiny, row_tokens=128)
    again.setup(Member())
    rows = again.batch(0)
    assert again.report() == {"read": len(kept), "used": len(kept)}
    assert rows.samples.max() == 2 * len(kept) - 1, "two sides of each"
    for role in (data, rollout, policy, again):
        role.close()


def test_records_hold_the_words():
    first, second = preferences_of(SAMPLES, choose(SAMPLES, scored(SAMPLES, VALUES)))
    assert (first.prompt, first.chosen, first.rejected) == ("a?", "answer 1", "answer 0")
    assert (second.prompt, second.chosen, second.rejected) == ("c?", "answer 9", "answer 10")


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.floats(-1, 1, width=32), min_size=12, max_size=12), threshold=st.none() | st.floats(-1, 1), margin=st.floats(0, 1)
)
def test_chosen_is_always_better_and_of_the_same_prompt(values, threshold, margin):
    every = choose(SAMPLES, scored(SAMPLES, values), threshold=threshold, margin=margin, pairs="all")
    few = choose(SAMPLES, scored(SAMPLES, values), threshold=threshold, margin=margin)
    assert set(few) <= set(every)
    assert {choice.prompt for choice in few} == {choice.prompt for choice in every}
    for choice in every:
        values_of = [np.float32(values[number]) for number in (choice.chosen, choice.rejected)]
        assert values_of[0] - values_of[1] > margin
        assert choice.chosen // 4 == choice.rejected // 4 == choice.prompt

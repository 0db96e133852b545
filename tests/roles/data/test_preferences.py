"""Preferences made from rollouts: which samples are chosen, and that their tokens are the sampled ones."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.protocols import DataError
from rolecall.protocols.messages import Samples, Scores
from rolecall.roles.data.packer import pack_block
from rolecall.roles.data.preferences import choose, pairs_of, preferences_of
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

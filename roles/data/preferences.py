"""Preferences made from rollouts: of the samples of one prompt, a better and a worse one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from rolecall.protocols.errors import DataError
from rolecall.protocols.messages import Samples, Scores
from rolecall.roles.data.encode import Encoded, Pair
from rolecall.roles.data.records import Preference

_STOPPED = Samples.FINISH.index("stop")


class Choice(NamedTuple):
    """Two samples of one prompt, numbered through the whole message."""

    prompt: int
    chosen: int
    rejected: int


def choose(
    samples: Samples,
    scores: Scores,
    *,
    threshold: float | None = None,
    margin: float = 0.0,
    pairs: Literal["extremes", "all"] = "extremes",
    unfinished: bool = False,
) -> list[Choice]:
    """Which samples to prefer to which.

    Samples without a score (failed or abstained) are left out, and so are those without a completion. A prompt whose samples are
    all equally good gives none.

    Args:
        samples: of a rollout.
        scores: of these samples.
        threshold: the chosen one must score at least this and the rejected one less: correct against wrong. None compares alone.
        margin: the chosen one must score more than this above the other.
        pairs: the best against the worst of each prompt ("extremes"; of equal ones the first), or every pair there is ("all").
        unfinished: allow completions that were cut off by their length to be chosen; rejected they may always be.

    Raises:
        DataError: the scores are of other samples.
    """
    if not np.array_equal(samples.keys, scores.keys) or not np.array_equal(samples.counts, scores.counts):
        raise DataError(
            "The scores are of other samples.",
            ask=f"scores of {len(samples.keys)} prompts with {len(samples.prompt_lengths)} samples",
            have=f"scores of {len(scores.keys)} prompts with {len(scores.values)} samples",
            remedy="give the scores that were made from these samples",
        )
    usable = scores.scored & (samples.completion_lengths > 0)
    better = usable if unfinished else usable & (samples.finish == _STOPPED)
    worse = usable
    if threshold is not None:
        better, worse = better & (scores.values >= threshold), worse & (scores.values < threshold)
    ends = np.concatenate([[0], np.cumsum(samples.counts)])
    found: list[Choice] = []
    for prompt, (start, stop) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        good, bad = (start + np.flatnonzero(side[start:stop]) for side in (better, worse))
        every = _extremes(scores.values, good, bad) if pairs == "extremes" else ((one, other) for one in good for other in bad)
        for one, other in every:
            if scores.values[one] - scores.values[other] > margin:
                found.append(Choice(prompt, int(one), int(other)))
    return found


def _extremes(values: np.ndarray, good: np.ndarray, bad: np.ndarray) -> Iterator[tuple[int, int]]:
    if len(good) and len(bad):
        yield int(good[np.argmax(values[good])]), int(bad[np.argmin(values[bad])])


def pairs_of(samples: Samples, choices: list[Choice]) -> list[Pair]:
    """The chosen pairs with the very tokens that were sampled: prompt shared, both completions trained.

    Args:
        samples: that were chosen from.
        choices: by `choose`.
    """
    return [
        Pair(_side(samples, choice, choice.chosen), _side(samples, choice, choice.rejected), int(samples.prompt_lengths[choice.chosen]))
        for choice in choices
    ]


def preferences_of(samples: Samples, choices: list[Choice]) -> list[Preference]:
    """The chosen pairs as records of texts, to be kept in a file. The prompt is the user's words: a system message is not in it.

    Args:
        samples: that were chosen from.
        choices: by `choose`.
    """
    return [
        Preference(
            prompt=samples.texts[choice.prompt],
            chosen=samples.completions[choice.chosen],
            rejected=samples.completions[choice.rejected],
            id=samples.ids[choice.prompt],
            place=_place(samples, choice),
        )
        for choice in choices
    ]


def _side(samples: Samples, choice: Choice, number: int) -> Encoded:
    start, stop = int(samples.cu_seqlens[number]), int(samples.cu_seqlens[number + 1])
    trained = np.arange(stop - start) >= samples.prompt_lengths[number]
    return Encoded(samples.tokens[start:stop].astype(np.int32), trained, samples.ids[choice.prompt], _place(samples, choice))


def _place(samples: Samples, choice: Choice) -> str:
    return f"prompt {samples.ids[choice.prompt]}, samples {samples.siblings[choice.chosen]} and {samples.siblings[choice.rejected]}"

"""How much better each sample was than its siblings: advantages from scores, in numpy.

P prompts (groups), N samples. Samples of one prompt stand together: group p is the next `counts[p]` entries.
Sums are taken in float64; results are float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32N = npt.NDArray[np.float32]

STD_FLOOR = 1e-6  # added to the standard deviation of a group, as in verl and TRL


def group_advantages(
    values: npt.ArrayLike, counts: npt.ArrayLike, *, scored: npt.ArrayLike | None = None, divide_by_std: bool = False
) -> Float32N:
    """Advantages centred in the group: A_i = r_i - mean(r), or (r_i - mean(r)) / (std(r) + 1e-6).

    GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1.2) divides by the standard deviation (of n - 1 degrees of
    freedom); Dr. GRPO (Liu et al. 2025, arXiv:2503.20783) does not, as it favours prompts that are too easy or too hard.

    Differs from verl's `grpo`: 1) samples without a score are out of the mean and get 0; 2) a group with fewer than two
    scores gets 0, not its raw score; 3) float64 sums, so that a group of equal scores gets 0 and not rounding / 1e-6.

    Args:
        values: [N] float, the scores.
        counts: [P] int, samples of each prompt; they add up to N.
        scored: [N] bool, which values are real scores; None means all.
        divide_by_std: divide by the group's standard deviation.

    Returns:
        [N] float32, 0 where not scored.

    Raises:
        ValueError: shapes disagree, a scored value isn't finite, or no prompt has more than one sample.
    """
    value, groups, mask = _grouped(values, counts, scored)
    number, mean = _means(value, groups, mask)
    centred = np.where(mask & (number >= 2)[groups], value - mean[groups], 0.0)
    if divide_by_std:
        variance = np.bincount(groups, weights=centred**2, minlength=len(number)) / np.maximum(number - 1, 1)
        centred = centred / (np.sqrt(variance) + STD_FLOOR)[groups]
    return centred.astype(np.float32)


def leave_one_out(values: npt.ArrayLike, counts: npt.ArrayLike, *, scored: npt.ArrayLike | None = None) -> Float32N:
    """Advantages against the mean of the *other* samples: A_i = r_i - mean(r_j, j != i) = n / (n - 1) * (r_i - mean(r)).

    RLOO (Ahmadian et al. 2024, arXiv:2402.14740, equation 8): an unbiased baseline.

    Differs from verl's `rloo` as `group_advantages` does (1 and 2 there). Arguments, result and errors as there.
    """
    value, groups, mask = _grouped(values, counts, scored)
    number, mean = _means(value, groups, mask)
    scale = number / np.maximum(number - 1, 1)
    return np.where(mask & (number >= 2)[groups], (value - mean[groups]) * scale[groups], 0.0).astype(np.float32)


def _grouped(
    values: npt.ArrayLike, counts: npt.ArrayLike, scored: npt.ArrayLike | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Values in float64 with 0 where not scored, the group of each, and the mask of the scored; all [N]."""
    value = np.asarray(values, dtype=np.float64)
    count = np.asarray(counts, dtype=np.int64)
    mask = np.ones(value.shape, dtype=bool) if scored is None else np.asarray(scored, dtype=bool)
    if value.ndim != 1 or count.ndim != 1 or mask.shape != value.shape or int(count.sum()) != len(value) or (count < 0).any():
        raise ValueError(
            f"Scores and groups disagree. Asked: advantages of values {value.shape} in groups that hold {int(count.sum())} samples, "
            f"scored {mask.shape}. Do: give values [N], counts [P] with sum N, scored [N], all of one Scores message."
        )
    if len(count) and int(count.max()) < 2:
        raise ValueError(
            f"Advantages within the group need siblings. Asked: {len(count)} prompts. There is: at most one sample of each, so that "
            "every advantage would be 0 and nothing would be learnt. Do: sample at least 2 completions a prompt (per_prompt >= 2)."
        )
    wrong = mask & ~np.isfinite(value)
    if wrong.any():
        raise ValueError(
            f"A score isn't a number. Asked: advantages of {len(value)} scores. There is: {value[wrong][0]} at sample "
            f"{int(np.flatnonzero(wrong)[0])} ({int(wrong.sum())} in all). Do: report such samples as failed (scored=False)."
        )
    return np.where(mask, value, 0.0), np.repeat(np.arange(len(count)), count), mask


def _means(
    values: npt.NDArray[np.float64], groups: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Number of scored samples and their mean, for each group up to the last that has a sample."""
    number = np.bincount(groups, weights=mask).astype(np.int64)
    return number, np.bincount(groups, weights=values) / np.maximum(number, 1)

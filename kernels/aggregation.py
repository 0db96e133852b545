"""What one token counts in the loss: the weight of each token of a sample, in numpy.

The policy minimises sum(loss * weight) over all tokens of all members, so a mean is a choice of weights. Each function
takes the completion lengths of *all* samples of the update and returns, for each sample, the weight of each one of its
tokens. Samples that are not kept (or have no token) get 0 and don't count in the mean. [N] samples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32N = npt.NDArray[np.float32]


def token_mean(lengths: npt.ArrayLike, *, kept: npt.ArrayLike | None = None) -> Float32N:
    """Every token counts the same: 1 / (tokens of the update). DAPO (Yu et al. 2025, arXiv:2503.14476, section 3.3).

    Args:
        lengths: [N] int, completion tokens of each sample.
        kept: [N] bool, samples to train; None means all.

    Returns:
        [N] float32, weight of each token of a sample; weight x length adds up to 1 (0 if there is no token).
    """
    length, keep = _kept(lengths, kept)
    return (keep / max(float((length * keep).sum()), 1.0)).astype(np.float32)


def sequence_mean(lengths: npt.ArrayLike, *, kept: npt.ArrayLike | None = None) -> Float32N:
    """Every sample counts the same, its tokens share that: 1 / (samples * length). GRPO (arXiv:2402.03300, equation 3).

    Arguments and result as in `token_mean`.
    """
    length, keep = _kept(lengths, kept)
    return (keep / (np.maximum(length, 1) * max(float(keep.sum()), 1.0))).astype(np.float32)


def constant_mean(lengths: npt.ArrayLike, horizon: int, *, kept: npt.ArrayLike | None = None) -> Float32N:
    """Every token counts the same however long the samples are: 1 / (samples * horizon). Dr. GRPO (arXiv:2503.20783).

    Arguments as in `token_mean`; `horizon` is the longest completion allowed. The sum is at most 1.

    Raises:
        ValueError: horizon is less than 1.
    """
    if horizon < 1:
        raise ValueError(f"A horizon is a number of tokens. Asked: horizon={horizon}. Do: give the longest completion, 1 or more.")
    _, keep = _kept(lengths, kept)
    return (keep / (horizon * max(float(keep.sum()), 1.0))).astype(np.float32)


def _kept(lengths: npt.ArrayLike, kept: npt.ArrayLike | None) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    length = np.asarray(lengths, dtype=np.float64)
    keep = length > 0
    return length, keep if kept is None else keep & np.asarray(kept, dtype=bool)

"""From what a scoring function returned to verdicts, and from verdicts to Scores. An error is never a 0."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rolecall.protocols.errors import RewardError
from rolecall.protocols.messages import Abstained, Failed, Samples, Scored, Scores, Verdict

_LARGEST = float(np.finfo(np.float32).max)  # Scores hold float32
_REASON = 600  # characters kept of a reason


def verdict_of(result: Any, *, none_abstains: bool = False) -> Verdict:
    """Read what a scoring function returned for one sample.

    Args:
        result: a real number (Python's, numpy's, a tensor of one element) or a `Verdict`.
        none_abstains: None means Abstained (TRL's batched functions), not a mistake.
    """
    if isinstance(result, Scored):
        result = result.value
    if isinstance(result, Failed | Abstained):
        return result
    if result is None:
        return Abstained() if none_abstains else Failed("returned None; return a number, or Abstained() for no opinion")
    value = _number(result)
    if value is None:
        return Failed(f"returned {type(result).__name__} {_short(repr(result), 60)}; return a number")
    if not math.isfinite(value):
        return Failed(f"returned {value}; return a finite number")
    if abs(value) > _LARGEST:
        return Failed(f"returned {value}, which is beyond float32")
    return Scored(value)


def _number(result: Any) -> float | None:
    """`result` as a float, or None where it is no single number (a text that looks like one is none)."""
    item = getattr(result, "item", None)
    if callable(item):  # an array or tensor of one element
        try:
            result = item()
        except (TypeError, ValueError, RuntimeError):
            return None
    if not isinstance(result, numbers.Real):
        return None
    try:
        return float(result)
    except OverflowError:  # an integer beyond all floats
        return math.inf


def _short(text: str, length: int = _REASON) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def weighted_sum(parts: Sequence[Verdict], weights: Sequence[float], names: Sequence[str]) -> Verdict:
    """One verdict of several components: failed if any failed; those that abstained are left out; abstained if all did."""
    failures = [f"{name}: {part.why}" for part, name in zip(parts, names, strict=True) if isinstance(part, Failed)]
    if failures:
        return Failed("; ".join(failures))
    scored = [(part.value, weight) for part, weight in zip(parts, weights, strict=True) if isinstance(part, Scored)]
    if not scored:
        return Abstained()
    return verdict_of(math.fsum(value * weight for value, weight in scored))


def scores_for(
    samples: Samples, verdicts: Sequence[Verdict | float | None] | np.ndarray, parts: Mapping[str, Sequence[Verdict]] | None = None
) -> Scores:
    """The Scores that answer `samples`: what a hand-written `score` returns.

    Args:
        samples: the samples that were scored, N of them.
        verdicts: one each, in their order: a number, or Scored, Failed, Abstained.
        parts: named components before weighting, N verdicts each; written as 0 where one abstained, NaN where it failed.

    Raises:
        RewardError: not one verdict for each sample.
    """
    count = len(samples.completions)
    for name, given in [("verdicts", verdicts), *(parts or {}).items()]:
        if len(given) != count:
            raise RewardError(f"There must be one verdict for each sample; {name} has {len(given)} for {count} samples.")
    read = [verdict_of(verdict) for verdict in verdicts]
    return Scores(
        keys=samples.keys,
        counts=samples.counts,
        values=np.array([verdict.value if isinstance(verdict, Scored) else 0.0 for verdict in read], dtype=np.float32),
        status=np.array([Scores.STATUS.index(type(verdict).__name__.lower()) for verdict in read], dtype=np.uint8),
        reasons={number: _short(verdict.why) for number, verdict in enumerate(read) if isinstance(verdict, Failed)},
        parts={
            name: tuple(
                verdict.value if isinstance(verdict, Scored) else math.nan if isinstance(verdict, Failed) else 0.0 for verdict in given
            )
            for name, given in (parts or {}).items()
        },
    )

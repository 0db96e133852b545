"""Several sources in one stream: which source each position takes, from weights, temperature, epochs or a curriculum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from rolecall.protocols.errors import DataError

_FAR = float(1 << 52)  # later than any record


class Mix(msgspec.Struct, frozen=True):
    """Named sources and their shares of the stream, counted in records.

    Without weights, temperature, epochs or curriculum, each source has a share in proportion to nothing but being there:
    all equal. Shares are kept at every point of the stream, to within a record for each source.
    """

    sources: dict[str, Any]  # name → Files, Hub, ReasoningGym, a path, a list of records, or any Source
    weights: dict[str, float] = {}  # name → share, of any sum
    temperature: float = 0.0  # shares in proportion to (records of the source) ** (1 / temperature); 1: as they are, large: equal
    epochs: dict[str, float] = {}  # name → how often each source is given; then the stream ends
    curriculum: dict[int, dict[str, float]] = {}  # step → weights from there on
    records_per_step: int = 1  # how many records of the stream are a step of the curriculum
    ramp: bool = False  # weights change linearly between the steps of the curriculum, instead of at once
    dry: Literal["repeat", "leave", "stop"] = "repeat"  # where a source has been given once: again in another order; go on
    # with the others; or end the stream
    shuffle: bool = True
    window: int = 16384  # records that are shuffled together, of a source that isn't in memory
    window_bytes: int = 1 << 26  # about as many bytes of them
    together: int = 16  # files (or parts of them) of a source that are read at the same time

    def check(self) -> None:
        """Refuse what makes no sense, before anything is read.

        Raises:
            DataError: it says what.
        """
        if not self.sources:
            raise DataError("A mix needs at least one source.", remedy="give {name: source}")
        ways = [word for word in ("weights", "temperature", "epochs", "curriculum") if getattr(self, word)]
        if len(ways) > 1:
            raise DataError("A mix has one way to divide its shares.", ask=" and ".join(ways), remedy="keep one of them")
        for word, shares in (("weights", self.weights), ("epochs", self.epochs), *((f"step {at}", w) for at, w in self.curriculum.items())):
            self._check_shares(word, shares)
        if self.curriculum and min(self.curriculum) != 0:
            raise DataError("A curriculum begins at step 0.", ask=f"from step {min(self.curriculum)} on", remedy="add weights for step 0")
        for word in ("records_per_step", "window", "window_bytes", "together"):
            if getattr(self, word) < 1:
                raise DataError(f"{word} must be at least 1.", ask=f"{word}={getattr(self, word)}")
        if self.temperature < 0 or not math.isfinite(self.temperature):
            raise DataError("The temperature of a mix must be positive.", ask=f"temperature={self.temperature}")

    def _check_shares(self, word: str, shares: Mapping[str, float]) -> None:
        if not shares:
            return
        have = ", ".join(self.sources)
        unknown = [name for name in shares if name not in self.sources]
        missing = [name for name in self.sources if name not in shares]
        if unknown or (missing and word in ("weights", "epochs")):
            wrong = f"names no source: {', '.join(unknown)}" if unknown else f"leaves out {', '.join(missing)}"
            raise DataError(f"A mix's {word} {wrong}.", ask=", ".join(shares), have=have, remedy="name every source once (0 is allowed)")
        if not all(math.isfinite(share) and share >= 0 for share in shares.values()) or not sum(shares.values()) > 0:
            raise DataError(f"A mix's {word} must be numbers of at least 0, not all 0.", ask=str(dict(shares)))

    def needs_totals(self) -> bool:
        """Whether the number of records of each source must be known at the start."""
        return bool(self.temperature or self.epochs or self.dry != "repeat")

    def schedule(self, totals: Sequence[int], seed: int) -> Schedule:
        """Which source each position takes.

        Args:
            totals: rows of each source, in order; looked at only if `needs_totals`.
            seed: of the stream.

        Raises:
            DataError: a source is empty that is to be given a number of times, or until it is dry.
        """
        names = list(self.sources)
        for name, total in zip(names, totals, strict=False):
            if not total and self.epochs.get(name, 1):
                raise DataError(
                    f"The source {name!r} is empty.", have="no record", remedy="give a source with at least one record, or leave it out"
                )
        caps: list[int | None] = [None] * len(names)
        if self.epochs:
            caps = [math.ceil(self.epochs[name] * total) for name, total in zip(names, totals, strict=True)]
        elif self.dry != "repeat":
            caps = list(totals)
        points: dict[int, list[float]]
        if self.curriculum:
            points = {at * self.records_per_step: [w.get(name, 0.0) for name in names] for at, w in sorted(self.curriculum.items())}
        elif self.temperature:
            largest = max(max(totals), 1)
            points = {0: [round((total / largest) ** (1 / self.temperature), 12) for total in totals]}
        elif self.epochs:
            points = {0: [float(cap or 0) for cap in caps]}
        else:
            points = {0: [float(self.weights[name]) for name in names] if self.weights else [1.0] * len(names)}
        return Schedule(points, caps, seed, ramp=self.ramp, stop=self.dry == "stop" and not self.epochs)


class Schedule:
    """Which source each position of a stream takes, and how many of its records came before: both by arithmetic alone.

    Source i gives its k-th record at the time t with W_i(t) = k + u, where W_i is the integral of its weight (weights sum
    to 1 at all times) and u in (0, 1) a hash of (seed, i, k). The stream is all sources' records in the order of their times.

    Args:
        points: time → weights of the sources from there on.
        caps: records that each source gives at most; None is without end.
        seed: of the hashes.
        ramp: weights change linearly between the points.
        stop: the stream ends when the first source has given all it has.
    """

    _PARTS = 256  # straight pieces that a linear change of weights is made of

    def __init__(
        self, points: dict[int, list[float]], caps: Sequence[int | None], seed: int, *, ramp: bool = False, stop: bool = False
    ) -> None:
        times = sorted(points)
        weights = [np.asarray(points[time]) / np.sum(points[time]) for time in times]
        knots, rates = [0.0], []
        for number, time in enumerate(times):
            end = float(times[number + 1]) if number + 1 < len(times) else _FAR
            parts = self._PARTS if ramp and number + 1 < len(times) else 1
            for part in range(parts):
                share = (part + 0.5) / parts if parts > 1 else 0.0
                after = weights[number + 1] if parts > 1 else weights[number]
                rates.append(weights[number] * (1 - share) + after * share)
                knots.append(time + (end - time) * (part + 1) / parts)
        self._knots = np.array(knots)
        self._given = np.vstack([np.zeros(len(caps)), np.cumsum(np.diff(self._knots)[:, None] * np.array(rates), axis=0)])
        self._caps = [cap if cap is not None else None for cap in caps]
        self._salts = [_mixed(np.array([_mixed_int(seed ^ _mixed_int(index + 1))], np.uint64))[0] for index in range(len(caps))]
        self._ending = self._knots[-1]
        self.length = self._length(stop)

    def before(self, position: int) -> list[int]:
        """How many records of each source come before a position."""
        low, counts = self._time(position)
        sources, numbers = self._between(low, counts, position - sum(counts))
        return [int(max(counts[index], numbers[sources == index].max(initial=-1) + 1)) for index in range(len(counts))]

    def chosen(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source [n] and number of its record [n] for the positions start … stop - 1, fewer where the stream ends."""
        if self.length is not None:
            stop = min(stop, self.length)
        if stop <= start:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        low, counts = self._time(start)
        sources, numbers = self._between(low, counts, stop - sum(counts))
        skip = start - sum(counts)
        return sources[skip:], numbers[skip:]

    def _between(self, low: float, counts: list[int], need: int) -> tuple[np.ndarray, np.ndarray]:
        """The `need` records after the time `low`, at which each source has given `counts`."""
        if need <= 0:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        reach = float(need) + 2 * len(counts) + 2
        after = self._counts(min(low + reach, self._ending))
        while sum(after) - sum(counts) < need and low + reach < self._ending:
            reach *= 2
            after = self._counts(min(low + reach, self._ending))
        sources = np.concatenate([np.full(b - a, index, np.int64) for index, (a, b) in enumerate(zip(counts, after, strict=True))])
        numbers = np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in zip(counts, after, strict=True)])
        times = np.concatenate([self._times(index, np.arange(a, b)) for index, (a, b) in enumerate(zip(counts, after, strict=True))])
        order = np.lexsort((sources, times))[:need]
        return sources[order], numbers[order]

    def _time(self, position: int) -> tuple[float, list[int]]:
        """A time before which at most `position` records, and not many fewer, are given; and how many of each source."""
        low = max(0.0, float(position - 2 * len(self._caps) - 2))
        counts = self._counts(low)
        if sum(counts) > position or position - sum(counts) > 8 * len(self._caps) + 8:
            low, high = 0.0, self._ending
            while high - low > 0.5:
                middle = (low + high) / 2
                low, high = (middle, high) if sum(self._counts(middle)) <= position else (low, middle)
            counts = self._counts(low)
        return low, counts

    def _counts(self, time: float) -> list[int]:
        """How many records each source has given up to a time. Asks the same function as the times, so both always agree."""
        found = []
        for index, cap in enumerate(self._caps):
            near = int(np.interp(time, self._knots, self._given[:, index]))
            tried = np.arange(max(near - 2, 0), near + 3)
            count = int(tried[0]) + int((self._times(index, tried) <= time).sum())
            found.append(count if cap is None else min(count, cap))
        return found

    def _times(self, index: int, numbers: np.ndarray) -> np.ndarray:
        """When a source gives its records of these numbers."""
        jitter = _mixed(numbers.astype(np.uint64) ^ self._salts[index]) >> np.uint64(12)
        amount = numbers + (jitter.astype(np.float64) + 0.5) / float(1 << 52)
        given = self._given[:, index]
        times: np.ndarray = np.where(amount < given[-1], np.interp(amount, given, self._knots), np.inf)
        return times

    def _length(self, stop: bool) -> int | None:
        if stop:
            ends = [float(self._times(index, np.array([cap]))[0]) for index, cap in enumerate(self._caps) if cap is not None]
            end = min(ends, default=np.inf)
            return None if not math.isfinite(end) else sum(self._counts(np.nextafter(end, 0.0)))
        final = self._given[-1] - self._given[-2]
        endless = any(cap is None and rate > 0 for cap, rate in zip(self._caps, final, strict=True))
        return None if endless else sum(self._counts(self._ending))


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): every bit of the input changes half of the output's."""
    with np.errstate(over="ignore"):
        numbers = (numbers + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = numbers ^ (numbers >> np.uint64(31))
        return mixed


def _mixed_int(number: int) -> int:
    return int(_mixed(np.array([number & 0xFFFFFFFFFFFFFFFF], np.uint64))[0])

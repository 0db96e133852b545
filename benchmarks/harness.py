"""What the benchmarks share: command line, alternating timing, the table and the JSON line that ends a run.

A benchmark checks exactness first, then calls `alternate` with ours and every peer, and ends with `finish`.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROUNDS = 7  # alternations; the contract asks for at least 5
SHORTEST = 0.05  # seconds of one timed sample: quicker calls are repeated and divided, so that all samples see the same pre-emption


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one sample an alternation."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """Quickest and slowest sample."""
        return min(self.samples), max(self.samples)


def arguments(description: str) -> argparse.Namespace:
    """`--quick`, `--out FILE`, `--rounds N` of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smaller workload, under a minute on two cores")
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="alternations, at least 5")
    found = parser.parse_args()
    if found.rounds < 5:
        parser.error("--rounds must be at least 5: medians of fewer say little")
    return found


def alternate(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Time each contender once a round, in turn, so that all see the same weather; the order turns round each time.

    One call of each goes untimed before (imports, caches), and says how often a quick one is to be repeated in a sample.
    `clock` may be `time.process_time`, for work of one thread on a machine that others use too. `before` are called untimed before each
    sample: where one's turn takes minutes, a system may meanwhile have taken memory from the processes of the other.
    """
    before = before or {}
    repeats = {name: _repeats(call) for name, call in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            gc.collect()
            if name in before:
                before[name]()
            samples[name].append(_seconds(contenders[name], repeats[name], clock))
    return {name: Timing(tuple(found)) for name, found in samples.items()}


def _repeats(call: Callable[[], object]) -> int:
    call()
    return max(1, round(SHORTEST / max(_seconds(call, 1, time.perf_counter), 1e-7)))


def _seconds(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def device() -> str:
    """`cpu2` for two usable cores; the GPU's short name where torch sees one (`h100`)."""
    try:
        import torch

        if torch.cuda.is_available():
            words = torch.cuda.get_device_name(0).replace("-", " ").split()
            return next((word for word in words if any(letter.isdigit() for letter in word)), words[-1]).lower()
    except ImportError:
        pass
    return f"cpu{len(os.sched_getaffinity(0))}"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions; "missing" for a package that is not there."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def finish(
    *,
    bench: str,
    workload: str,
    timings: Mapping[str, Timing],
    ours: str,
    targets: Mapping[str, tuple[float, bool]],
    target: str,
    limit: float | None = None,
    unit: str = "ms",
    scale: float = 1e3,
    missing: Mapping[str, str] | None = None,
    details: Mapping[str, object] | None = None,
    packages: Sequence[str] = (),
    quick: bool = False,
    out: Path | None = None,
) -> dict[str, object]:
    """Print the table and, as the last line, the JSON of the contract; write it to `out` with date and versions.

    Args:
        timings: of ours and of every peer that ran, as `alternate` returns them.
        ours: which name in `timings` is ours.
        targets: what was asked → (what was reached, whether that is enough); `met` is all of them.
        target: the targets in words.
        limit: the physical bound, in `unit`.
        unit, scale: seconds x scale = unit.
        missing: peers that could not run → why.
        details: more figures worth keeping.
    """
    own = timings[ours].median
    result: dict[str, object] = {
        "bench": bench,
        "device": device(),
        "workload": workload + (" (quick)" if quick else ""),
        "ours": _round(own * scale),
        "unit": unit,
        "peers": {name: _round(timing.median * scale) for name, timing in timings.items() if name != ours},
        "limit": None if limit is None else _round(limit),
        "ratio": {name: _round(timing.median / own) for name, timing in timings.items() if name != ours},
        "target": target,
        "met": all(enough for _, enough in targets.values()),
        "targets": {name: {"reached": _round(reached), "met": enough} for name, (reached, enough) in targets.items()},
        "spread": {name: [_round(end * scale) for end in timing.spread] for name, timing in timings.items()},
        "rounds": len(timings[ours].samples),
        "missing": dict(missing or {}),
        **({"details": dict(details)} if details else {}),
    }
    _table(result, timings, ours, unit, scale)
    if out is not None:
        stamp = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "versions": versions(packages)}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**result, **stamp}, indent=1) + "\n")
    print(json.dumps(result))
    return result


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _table(result: Mapping[str, object], timings: Mapping[str, Timing], ours: str, unit: str, scale: float) -> None:
    width = max(len(name) for name in timings)
    own = timings[ours].median
    print(f"{result['bench']} on {result['device']}: {result['workload']}")
    print(f"{'':{width}}  {unit:>10}  {'quickest':>10}  {'slowest':>10}  {'x ours':>8}")
    for name, timing in timings.items():
        low, high = timing.spread
        print(f"{name:{width}}  {timing.median * scale:10.3f}  {low * scale:10.3f}  {high * scale:10.3f}  {timing.median / own:8.2f}")
    for name, why in dict(result["missing"]).items():  # type: ignore[call-overload]
        print(f"{name}: missing ({why})")
    for name, found in dict(result["targets"]).items():  # type: ignore[call-overload]
        print(f"{'met ' if found['met'] else 'NOT MET'} {name}: {found['reached']}")

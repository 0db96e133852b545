"""What the benchmarks on a GPU share: CUDA-event timing in turn, the matmul and copy rates of the same run, memory above the inputs.

A benchmark checks exactness first, then calls `alternate` with ours and every peer (closures that leave nothing behind), and ends with
`harness.finish`. Rates are measured before and after, because a GPU that is warm or held down by its power limit is slower than a cold one.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from harness import ROUNDS, Timing

STARTED = time.monotonic()
VENDOR_RATE = 989e12  # FLOP/s, dense bf16 of an H100 or H200 (SXM) by the vendor's datasheet
FLUSH = 2**28  # bytes written between samples: 5 times the 50 MB of an H100's L2
MATMUL, COPY = 8192, 2**32  # side of the measured product; bytes read and written by the measured copy


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a bf16 matmul on random data, bytes/s of a device copy (read + written)."""

    matmul: float
    copy: float

    def milliseconds(self, flops: float = 0.0, moved: float = 0.0) -> float:
        """The floor of a job: the longer of its arithmetic and its memory traffic."""
        return max(flops / self.matmul, moved / self.copy) * 1e3

    def details(self) -> dict[str, float]:
        """For `finish(details=…)`."""
        return {"matmul TFLOP/s": round(self.matmul / 1e12, 1), "copy TB/s": round(self.copy / 1e12, 3)}


def require_gpu() -> torch.device:
    """The CUDA device; ends the program with a sentence where there is none."""
    if not torch.cuda.is_available():
        sys.exit("This benchmark measures a GPU, and torch sees none here. Run it on a host with one.")
    return torch.device("cuda")


def rates(repeats: int = 20) -> Rates:
    """What this GPU reaches now: medians of single samples, L2 flushed. Takes about half a second."""
    return Rates(matmul=_matmul_rate(repeats), copy=_copy_rate(repeats))


def _matmul_rate(repeats: int) -> float:
    left, right = (torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * MATMUL**3 / statistics.median(sample(lambda: torch.mm(left, right, out=product), repeats))


def sustained(products: int = 60, repeats: int = 5) -> float:
    """FLOP/s of the same matmul many times in a row: what is left of the rate when the GPU meets its power limit. About half a second."""
    left, right = (torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)

    def run() -> None:
        for _ in range(products):
            torch.mm(left, right, out=product)

    return products * 2 * MATMUL**3 / statistics.median(sample(run, repeats, warm=1))


def _copy_rate(repeats: int) -> float:
    source = torch.randint(0, 2**31, (COPY // 16,), device="cuda", dtype=torch.int64)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(sample(lambda: target.copy_(source), repeats))


def elapsed() -> float:
    """Seconds since this module was imported: a benchmark leaves things out, and says so, rather than end without a result."""
    return time.monotonic() - STARTED


def both(before: Rates, after: Rates) -> Rates:
    """The mean of two measurements, as the rate of the run between them."""
    return Rates(matmul=(before.matmul + after.matmul) / 2, copy=(before.copy + after.copy) / 2)


class Clock:
    """Times calls with CUDA events; before each one L2 is overwritten, which also keeps the queue ahead of short kernels."""

    def __init__(self) -> None:
        self._buffer = torch.empty(FLUSH // 4, device="cuda", dtype=torch.int32)

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call, on the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._buffer.random_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def sample(call: Callable[[], object], repeats: int, warm: int = 3) -> list[float]:
    """Seconds of `repeats` single calls, after `warm` untimed ones."""
    clock = Clock()
    for _ in range(warm):
        call()
    return [clock.seconds(call) for _ in range(repeats)]


def alternate(contenders: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, warm: int = 2) -> dict[str, Timing]:
    """Time each contender once a round, in turn; `warm` untimed calls of each go first.

    Each round begins with another one and every second goes the other way: a GPU at its power limit is slower after some than after
    others, so nobody may always follow the same.
    """
    clock = Clock()
    for call in contenders.values():
        for _ in range(warm):
            call()
    torch.cuda.synchronize()
    gc.collect()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        first = number % len(names)
        order = names[first:] + names[:first]
        for name in order if number % 2 == 0 else reversed(order):
            samples[name].append(clock.seconds(contenders[name]))
    return {name: Timing(tuple(found)) for name, found in samples.items()}


def memory(call: Callable[[], object]) -> int:
    """Bytes that a call needs at its peak above what is allocated before it (its results are part of that)."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def willing(contenders: Mapping[str, Callable[[], object]], missing: dict[str, str]) -> dict[str, Callable[[], object]]:
    """Those that run once; the others go to `missing` with the error's last line, and their trace to standard error."""
    able = {}
    for name, call in contenders.items():
        try:
            call()
            torch.cuda.synchronize()
            able[name] = call
        except Exception as error:  # a peer's failure is a result, not the end of the run
            traceback.print_exc(limit=4)
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
            torch.cuda.empty_cache()
    return able


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in float64; infinite if anything is not finite."""
    found, expected = found.detach().double(), expected.detach().double()
    gap, size = (found - expected).norm(), expected.norm()
    ratio = float(gap / size.clamp_min(1e-300))
    return ratio if ratio == ratio else float("inf")


def largest(values: Sequence[float]) -> float:
    """The largest of some errors; NaN counts as infinite."""
    return max(value if value == value else float("inf") for value in values)

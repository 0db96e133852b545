"""Contenders of the training benchmarks in turn: exactness first, then whole optimiser steps, their memory, and their share of the floor.

Each round every contender makes timed steps over varying batches; nothing is given back to the driver in between. Compilation and
warming up are outside the figures, and reported. A contender that fails, or finds no time left, is missing in the result and
ends nothing; what is known is printed as soon as it is.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from breakdown import breakdown
from contenders import Contender
from documents import Rows
from gpu import VENDOR_RATE, Rates, both, rates
from harness import ROUNDS, Timing
from rolecall.roles.models.flops import training_flops
from rolecall.roles.models.loading import family_of, read_config
from rolecall.roles.models.lora import Lora

GIB = 2**30
ON_CPU = Rates(matmul=5e10, copy=1e10)  # stands in for a GPU's rates where `--tiny` only shows that the script runs
LOSS_TOLERANCE, NORM_TOLERANCE = 5e-3, 5e-2  # of one another, in bfloat16: eight bits of mantissa, errors of all layers in the gradient
EXACT_TOLERANCE = 2e-4  # of one another, in float32: sums over thousands of terms in another order


@dataclass
class Result:
    """Of one contender."""

    seconds: list[float] = field(default_factory=list)  # of a step, one a round
    first: float = 0.0  # seconds of construction, compilation and the first passes over all batches
    memory: float = 0.0  # GiB at the peak of a step, what others hold left out
    loss: float = 0.0
    norm: float = 0.0
    about: str = ""


def clean() -> None:
    """Free what can be freed, on the host and the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sync() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def held() -> int:
    """Bytes allocated on the device."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def start(make: Callable[[], Contender], lots: Sequence[Rows], base: int) -> tuple[Contender, Result]:
    """Make a contender, measure loss and norm of the first lot, let it compile on all lots, and note its memory at the last.

    Args:
        make: makes it.
        lots: batches.
        base: bytes that others hold on the device.
    """
    began = time.perf_counter()
    contender = make()
    result = Result(about=contender.about)
    result.loss, result.norm = contender.loss_and_norm(lots[0])
    for lot in lots:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        contender.step(lot)
    sync()
    result.first = time.perf_counter() - began
    if torch.cuda.is_available():
        result.memory = (torch.cuda.max_memory_allocated() - base) / GIB
    return contender, result


def race(
    makers: Mapping[str, Callable[[], Contender]],
    lots: Sequence[Rows],
    *,
    rounds: int,
    steps: Mapping[str, int],
    missing: dict[str, str],
    until: float = float("inf"),
) -> dict[str, Result]:
    """Time the contenders; those that fail go to `missing` with the reason.

    Args:
        makers: name → what makes it. They are all kept, so that they can take turns.
        lots: batches, used in turn.
        rounds: alternations; fewer where the time is over.
        steps: timed steps of each contender in a round.
        until: time.monotonic() from which on no other contender is made and no other round begun.
    """
    running: dict[str, Contender] = {}
    results: dict[str, Result] = {}
    for name, make in makers.items():
        if running and time.monotonic() > until:
            missing[name] = "no time was left"
            continue
        try:
            running[name], results[name] = start(make, lots, held())
            print(f"{name}: ready after {results[name].first:.1f} s, loss {results[name].loss:.5f}, norm {results[name].norm:.5f}, "
                  f"peak {results[name].memory:.2f} GiB", flush=True)  # fmt: skip
        except Exception as error:  # a peer that fails is a result, not the end of the run
            traceback.print_exc(limit=6)
            missing[name] = _reason(error)
        clean()
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        for name in list(running) if number % 2 == 0 else list(reversed(running)):
            try:
                results[name].seconds.append(timed(running[name], lots, number, steps[name]))
            except Exception as error:
                traceback.print_exc(limit=6)
                missing[name] = f"round {number}: {_reason(error)}"
                running.pop(name).close()
        print(f"round {number}, seconds a step: " + ", ".join(f"{name} {results[name].seconds[-1]:.4f}" for name in running), flush=True)
    for contender in running.values():
        contender.close()
    return {name: result for name, result in results.items() if name in running}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def timed(contender: Contender, lots: Sequence[Rows], number: int, steps: int) -> float:
    """Seconds of a step; every contender sees the same lots in the same rounds when they make equally many steps."""
    sync()
    began = time.perf_counter()
    for step in range(steps):
        contender.step(lots[(number + step) % len(lots)])
    sync()
    return (time.perf_counter() - began) / steps


def timings(results: Mapping[str, Result]) -> dict[str, Timing]:
    """For the harness."""
    return {name: Timing(tuple(result.seconds)) for name, result in results.items()}


def gaps(results: Mapping[str, Result], ours: str) -> dict[str, float]:
    """Largest relative differences of loss and gradient norm between ours and the peers; infinite where a number is not finite."""
    own, found = results[ours], {"loss": 0.0, "norm": 0.0}
    for result in results.values():
        for kind, mine, theirs in (("loss", own.loss, result.loss), ("norm", own.norm, result.norm)):
            gap = abs(mine - theirs) / max(abs(theirs), 1e-12)
            found[kind] = max(found[kind], gap if math.isfinite(gap) else math.inf)
    return found


def exactly(results: Mapping[str, Result], ours: str) -> dict[str, float]:
    """`gaps` in float32, for the result's details.

    Raises:
        SystemExit: one is beyond `EXACT_TOLERANCE`: nothing is timed then.
    """
    found = gaps(results, ours)
    if max(found.values()) > EXACT_TOLERANCE:
        each = {name: (result.loss, result.norm) for name, result in results.items()}
        raise SystemExit(f"{ours} and its peers disagree by {found}, {EXACT_TOLERANCE:g} at most: loss and norm {each}")
    return {f"{kind} gap, float32": float(f"{gap:.2g}") for kind, gap in found.items()}


def nearly(results: Mapping[str, Result], ours: str) -> tuple[dict[str, float], dict[str, tuple[float, bool]]]:
    """`gaps` in bfloat16, for the result's details, and as targets to be met."""
    limits = {"loss": LOSS_TOLERANCE, "norm": NORM_TOLERANCE}
    found = {kind: float(f"{gap:.2g}") for kind, gap in gaps(results, ours).items()}
    wanted = {f"{kind} within {limits[kind]:g} of the peers'": (gap, gap <= limits[kind]) for kind, gap in found.items()}
    return {f"{kind} gap, bfloat16": gap for kind, gap in found.items()}, wanted


def options(description: str) -> argparse.ArgumentParser:
    """What the training benchmarks have in common on their command lines."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tiny", "--quick", action="store_true", help="a tiny model and rows, on a CPU too: measures nothing")
    parser.add_argument("--look", action="store_true", help="ours alone, and where the time of a step goes")
    parser.add_argument("--only", default="", help="names of contenders, separated by commas; all if empty")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="alternations, at least 5")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after so long no other contender is made and no other round begun")
    parser.add_argument("--rows-per-pass", type=int, default=0, help="rows of ours in one pass; 0 for the default of the model")
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    return parser


def chosen(makers: Mapping[str, Callable[[], Contender]], only: str) -> dict[str, Callable[[], Contender]]:
    """Those that `--only` names.

    Raises:
        SystemExit: there is no contender of a name.
    """
    wanted = [name.strip() for name in only.split(",") if name.strip()] or list(makers)
    unknown = [name for name in wanted if name not in makers]
    if unknown:
        raise SystemExit(f"There is no contender {unknown[0]!r}; there is: {', '.join(makers)}")
    return {name: makers[name] for name in wanted}


def figures(results: Mapping[str, Result], tokens: float, flops: float, rate: float) -> dict[str, dict[str, float]]:
    """Columns of the table, name → contender → number: throughput, MFU on both bases, memory, start.

    Args:
        tokens: of a step, in documents.
        flops: of a step, the model's own.
        rate: FLOP/s of the matrix product in this run.
    """
    found: dict[str, dict[str, float]] = {"tokens/s": {}, "MFU % of 989": {}, "MFU % of measured": {}, "peak GiB": {}, "start s": {}}
    for name, result in results.items():
        step = statistics.median(result.seconds)
        found["tokens/s"][name] = round(tokens / step)
        found["MFU % of 989"][name] = round(100 * flops / step / VENDOR_RATE, 1)
        found["MFU % of measured"][name] = round(100 * flops / step / rate, 1)
        found["peak GiB"][name] = round(result.memory, 2)
        found["start s"][name] = round(result.first, 1)
    return found


def work(lots: Sequence[Rows], model: str, lora: Lora | None = None) -> tuple[float, float]:
    """Tokens in documents, and model FLOPs, of a step: means over the lots."""
    _, spec = family_of(read_config(model))
    flops = [training_flops(spec, lot.lengths, predicted=lot.trained, lora=lora) for lot in lots]
    return statistics.mean(lot.tokens for lot in lots), statistics.mean(flops)


def measured() -> Rates:
    """The device's rates; those of `ON_CPU` without a GPU."""
    return rates() if torch.cuda.is_available() else ON_CPU


def look(make: Callable[[], Contender], lots: Sequence[Rows], done: tuple[float, float]) -> None:
    """One contender alone: its steps, and where their time goes.

    Args:
        make: makes it.
        lots: batches.
        done: tokens and FLOPs of a step, as `work` tells.
    """
    contender, result = start(make, lots, held())
    print(f"first {result.first:.1f} s, peak {result.memory:.2f} GiB, loss {result.loss:.5f}, norm {result.norm:.5f}", flush=True)
    before = measured()
    result.seconds = [timed(contender, lots, number, 3) for number in range(3)]
    rate = both(before, measured())
    tokens, flops = done
    columns = figures({contender.name: result}, tokens, flops, rate.matmul)
    print({name: found[contender.name] for name, found in columns.items()}, rate.details())
    print(f"floor {rate.milliseconds(flops):.1f} ms, {tokens:.0f} tokens, {flops / 1e12:.1f} TFLOP; steps of {result.seconds} s")
    print(breakdown(lambda: contender.step(lots[0])).text(), flush=True)
    contender.close()

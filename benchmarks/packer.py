"""`packer`: which sequence goes into which row, laying tokens into rows, and dividing sequences over ranks; one core.

What is compared is first checked: every sequence once, no row too full, every rank's share. A peer is called as its documentation says;
TRL packs and lays in one, so its rate stands beside both of ours together too. The process keeps memory that was freed, as members of
the data role do: else laying is slowed by page faults.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import Timing, alternate, arguments, finish
from rolecall.kernels.balancing import balance, cost
from rolecall.kernels.packing import OpenRows, assign_rows, lay, pack_rows
from rolecall.roles.memory import keep_freed_memory

SEED, CAPACITY, SEQUENCES, TOKENS = 7, 8192, 100_000, 488_000
UNITS, RANKS, OPEN = 4096, 64, 32
FULL, LENGTHS_PER_SECOND, TOKENS_PER_SECOND, EVEN, BALANCE_MS = 0.995, 10e6, 100e6, 1.001, 1.0
MEANS = {"documents of 50 tokens": 50, "documents of 500 tokens": 500, "documents of 2000 tokens": 2000}
PACKAGES = ("rolecall", "numpy", "trl", "datasets", "verl", "torch")
Call = Callable[[], Any]


def documents(number: int, middle: float = 6.5, spread: float = 0.8) -> np.ndarray:
    return np.random.default_rng(SEED).lognormal(middle, spread, number).astype(np.int64).clip(1, CAPACITY)


def on_line(lengths: list[int]) -> list[list[int]]:
    """Rows of a stream, the open ones at its end left out, as they would be filled further."""
    rows = OpenRows(CAPACITY, OPEN)
    return [row for ident, length in enumerate(lengths) for row in rows.add(length, ident)]


def filled(lengths: np.ndarray, rows: np.ndarray) -> float:
    """Share of the slots that hold a token; checks that no row is too full."""
    held = np.bincount(rows, weights=lengths)
    assert held.max() <= CAPACITY
    assert held.min() > 0
    return float(held.sum() / (len(held) * CAPACITY))


def packers(lengths: np.ndarray, missing: dict[str, str]) -> tuple[dict[str, Call], dict[str, float]]:
    """What to time, and how full each makes the rows."""
    as_list = lengths.tolist()
    stream = on_line(as_list)
    used = [ident for row in stream for ident in row]
    assert len(set(used)) == len(used)
    assert max(sum(as_list[ident] for ident in row) for row in stream) <= CAPACITY
    best_fit = pack_rows(lengths, CAPACITY)
    assert sorted(ident for row in best_fit for ident in row) == list(range(len(lengths)))
    full = {
        "rolecall": filled(lengths, assign_rows(lengths, CAPACITY)),
        "rolecall, best fit decreasing": float(lengths.sum() / (len(best_fit) * CAPACITY)),
        f"rolecall, on line with {OPEN} open rows": float(lengths[used].sum() / (len(stream) * CAPACITY)),
    }
    calls: dict[str, Call] = {
        "rolecall": lambda: assign_rows(lengths, CAPACITY),
        "rolecall, best fit decreasing": lambda: pack_rows(lengths, CAPACITY),
        f"rolecall, on line with {OPEN} open rows": lambda: on_line(as_list),
    }
    try:
        call = trl_packer(lengths)
        rows = call()
        assert sum(map(len, rows["input_ids"])) == lengths.sum()
        full["TRL bfd"] = float(lengths.sum() / (len(rows) * CAPACITY))
        calls["TRL bfd"] = call
    except Exception as error:
        missing["TRL bfd"] = f"{type(error).__name__}: {error}"[:200]
    return calls, full


def trl_packer(lengths: np.ndarray) -> Call:
    import datasets
    import pyarrow
    from trl.data_utils import pack_dataset

    datasets.disable_caching()
    datasets.disable_progress_bars()
    edges = np.append(0, np.cumsum(lengths))
    tokens = np.random.default_rng(SEED).integers(0, 150_000, edges[-1], dtype=np.int32)
    column = pyarrow.ListArray.from_arrays(edges.astype(np.int32), tokens)
    data = datasets.Dataset(pyarrow.table({"input_ids": column}))
    # One batch of the whole set: over several, each batch's last rows stay emptier.
    return lambda: pack_dataset(data, CAPACITY, "bfd", map_kwargs={"batch_size": len(lengths)})


def layers(total: int) -> dict[str, tuple[Call, int]]:
    """Laying streams of sequences, and copying as many bytes: the bound. With the number of tokens."""
    found: dict[str, tuple[Call, int]] = {}
    rng = np.random.default_rng(SEED)
    for name, mean in MEANS.items():
        lengths = rng.integers(1, 2 * mean, total // mean)
        edges = np.append(0, np.cumsum(lengths))
        tokens = rng.integers(0, 150_000, edges[-1], dtype=np.int32)
        rows = [np.asarray(row) for row in pack_rows(lengths, CAPACITY)]
        laid = lay(tokens, edges, rows, CAPACITY)
        assert np.array_equal(
            laid.tokens[laid.segments >= 0], np.concatenate([tokens[edges[one] : edges[one + 1]] for row in rows for one in row])
        )
        found[name] = (lambda parts=(tokens, edges, rows): lay(*parts, CAPACITY)), int(edges[-1])
    copied = np.zeros((3, int(edges[-1])), dtype=np.int32)
    found["copy of three arrays"] = copied.copy, int(edges[-1])
    return found


def balancers(missing: dict[str, str]) -> tuple[dict[str, Call], dict[str, float]]:
    """Dividing by tokens, and by tokens and squares; how far the heaviest rank is above the mean."""
    lengths = documents(UNITS)
    costs = {"tokens": lengths, "tokens and squares": cost(lengths, 1.0, 1e-4)}
    calls: dict[str, Call] = {f"rolecall, {name}": lambda of=of: balance(of, RANKS) for name, of in costs.items()}
    try:
        from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

        calls["verl, tokens"] = lambda: get_seqlen_balanced_partitions(lengths.tolist(), RANKS, equal_size=False)
        calls["verl, equal counts"] = lambda: get_seqlen_balanced_partitions(lengths.tolist(), RANKS, equal_size=True)
    except Exception as error:
        missing["verl"] = f"{type(error).__name__}: {error}"[:200]
    heaviest = {}
    for name, call in calls.items():
        of = costs["tokens and squares" if "squares" in name else "tokens"]
        parts = [np.asarray(part) for part in call()]
        assert sorted(np.concatenate(parts).tolist()) == list(range(UNITS))
        totals = [float(of[part].sum()) for part in parts]
        heaviest[name] = max(totals) / (sum(totals) / RANKS)
    return calls, heaviest


def main() -> None:
    options = arguments(__doc__ or "")
    keep_freed_memory()
    number = SEQUENCES // 5 if options.quick else SEQUENCES
    lengths, missing = documents(number), {}
    packing, full = packers(lengths, missing)
    laying = layers(TOKENS)
    balancing, heaviest = balancers(missing)
    times = alternate(packing, options.rounds)
    laid = alternate({name: call for name, (call, _) in laying.items()}, options.rounds)
    balanced = alternate(balancing, options.rounds)
    ours = {name: call for name, call in (packing | balancing).items() if name.startswith("rolecall")}
    ours |= {f"rolecall, {name}": call for name, (call, _) in laying.items() if name in MEANS}
    targets: dict[str, tuple[float, bool]] = {}
    for name, share in full.items():
        if name.startswith("rolecall"):
            targets[f"{name}: rows at least {FULL:.1%} full"] = (share, share >= FULL)
    rate = number / times["rolecall"].median
    targets["at least 10 M lengths a second"] = (rate / 1e6, rate >= LENGTHS_PER_SECOND)
    for name in MEANS:
        rate = laying[name][1] / laid[name].median
        targets[f"{name}: at least 100 M tokens a second"] = (rate / 1e6, rate >= TOKENS_PER_SECOND)
    for name in balancing:
        if name.startswith("rolecall"):
            spent = balanced[name].median * 1e3
            targets[f"balance by {name[10:]}: at most {BALANCE_MS} ms"] = (spent, spent <= BALANCE_MS)
            targets[f"balance by {name[10:]}: heaviest at most {EVEN} of the mean"] = (heaviest[name], heaviest[name] <= EVEN)
    details = {
        "processor ms of one call, ours": {name: processor(call) for name, call in ours.items()},
        "share of slots filled": {name: round(share, 5) for name, share in full.items()},
        f"ms to divide {UNITS} over {RANKS}": milliseconds(balanced),
        "heaviest rank over the mean": {name: round(value, 5) for name, value in heaviest.items()},
        "M tokens laid a second": {name: round(tokens / laid[name].median / 1e6, 1) for name, (_, tokens) in laying.items()},
    }
    finish(
        bench="packer",
        workload=f"{number} lengths, lognormal(6.5, 0.8), into rows of {CAPACITY}",
        timings=times,
        ours="rolecall",
        targets=targets,
        target="rows 99.5 % full, on line too; 10 M lengths/s; 100 M tokens/s; heaviest rank 1.001 of the mean in 1 ms",
        missing=missing,
        details=details,
        packages=PACKAGES,
        quick=options.quick,
        out=options.out,
    )


def processor(call: Call, repeats: int = 9) -> float:
    """Milliseconds of this thread, median: what others on the same cores don't add to."""
    taken = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        taken.append(time.thread_time() - start)
    return float(f"{sorted(taken)[repeats // 2] * 1e3:.4g}")


def milliseconds(timings: dict[str, Timing]) -> dict[str, float]:
    return {name: float(f"{timing.median * 1e3:.4g}") for name, timing in timings.items()}


if __name__ == "__main__":
    main()

"""`attn_packed`: attention over one packed row of 32k tokens, forward and backward, against what PyTorch offers for it.

Three laws of document lengths with 16 query and 8 key heads of 128, and Gemma 3's sliding window of 1024 with 8 and 4 heads of 256. All
contenders get queries, keys and values as a model makes them, [R, C, H, d] in memory. Their values and gradients are first compared with
float64 on a shorter row. Masks are made beforehand and timed apart. The floor counts the pairs that are seen, at 600 TFLOP/s.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gpu
import numpy as np
import torch
from harness import Timing, arguments, finish
from rolecall.kernels.attention import Packed, attend, attend_plain
from rolecall.kernels.attention_cudnn import find_sequences, usable
from torch import Tensor

SLOTS, QUICK, CHECKED = 32768, 8192, 2048
LAYERS = 28  # of the model whose step the mask's cost is compared with
RATE = 600e12  # FLOP/s of attention, forward and backward, that the floor assumes
SCALE = 0.088
NEAR = 1.2e-2  # of the norm: bfloat16 inputs, weights and results
OVER_VARLEN, MASK_SHARE = 1.25, 0.02
PARTS = ("result", "queries", "keys", "values")
PACKAGES = ("torch", "triton", "nvidia-cudnn-frontend")
Contender = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """Lengths by a law, heads, window."""

    law: Callable[[np.random.Generator], float]
    heads: int
    groups: int
    size: int
    window: int


def lognormal(middle: float, spread: float, longest: int) -> Callable[[np.random.Generator], float]:
    return lambda rng: min(max(rng.lognormal(middle, spread), 1), longest)


DOCUMENTS = lognormal(6.5, 0.8, 8192)
CASES = {
    "lognormal(6.5, 0.8)": Case(DOCUMENTS, 16, 8, 128, 0),
    "lognormal(6.0, 1.5)": Case(lognormal(6.0, 1.5, 32768), 16, 8, 128, 0),
    "8192 each": Case(lambda _: 8192, 16, 8, 128, 0),
    "window 1024, lognormal(6.5, 0.8)": Case(DOCUMENTS, 8, 4, 256, 1024),
    "window 1024, 8192 each": Case(lambda _: 8192, 8, 4, 256, 1024),
}


def row_of(case: Case, slots: int, seed: int = 0) -> Packed:
    """One row, full; tensors on the host."""
    rng, lengths = np.random.default_rng(seed), []
    while sum(lengths) < slots:
        lengths.append(min(int(case.law(rng)), slots - sum(lengths)))
    numbers = np.repeat(np.arange(len(lengths)), lengths)
    places = np.concatenate([np.arange(length) for length in lengths])
    return Packed(torch.from_numpy(numbers)[None], torch.full((len(lengths),), -1), torch.from_numpy(places)[None])


def inputs(case: Case, slots: int) -> tuple[list[Tensor], Tensor]:
    """Queries, keys, values and a gradient of the result, [1, heads, C, d] with the heads of a slot side by side."""

    def one(heads: int) -> Tensor:
        return torch.randn(1, slots, heads, case.size, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    return [one(heads).requires_grad_() for heads in (case.heads, case.groups, case.groups)], one(case.heads)


def varlen(where: Packed, case: Case) -> Contender:
    from torch.nn.attention.varlen import varlen_attn

    found = where.found
    edges = torch.from_numpy(np.append(found.start, found.rows * found.capacity)).to("cuda", torch.int32)
    longest = int(found.length.max())
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"scale": SCALE, "window_size": (case.window - 1 if case.window else -1, 0)}
    if "enable_gqa" in known:
        options["enable_gqa"] = True

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))
        return varlen_attn(*parts, edges, edges, longest, longest, **options).unsqueeze(0).transpose(1, 2)

    return run


class Flex:
    """FlexAttention as its documentation says: a block mask by `create_block_mask`, a compiled `flex_attention`."""

    def __init__(self) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        # So that a backward pass can be timed on its own, again and again.
        torch._functorch.config.donated_buffer = False
        self._attend = torch.compile(flex_attention, dynamic=False)

    def mask(self, where: Packed, case: Case) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        document, window = where.segments[0].to("cuda", torch.int32), case.window

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (document[query] == document[key]) & (query >= key)

        def near(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return seen(row, head, query, key) & (query - key < window)

        slots = document.shape[0]
        return create_block_mask(near if window else seen, None, None, slots, slots, device="cuda")

    def __call__(self, where: Packed, case: Case) -> Contender:
        mask = self.mask(where, case)
        return lambda q, k, v: self._attend(q, k, v, block_mask=mask, scale=SCALE, enable_gqa=True)


def dense(where: Packed, case: Case) -> Contender:
    mask = Packed(*(part.cuda() for part in (where.segments, where.parents, where.positions))).dense(case.window)
    times = case.heads // case.groups

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (part.repeat_interleave(times, dim=1) for part in (k, v))  # kernels that take a mask don't group heads
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=SCALE)

    return run


def contenders(where: Packed, case: Case, flex: Flex, missing: dict[str, str]) -> dict[str, Contender]:
    found: dict[str, Contender] = {"rolecall": lambda q, k, v: attend(q, k, v, where, window=case.window, scale=SCALE)}
    for name, make in {"varlen_attn": varlen, "flex_attention": flex, "dense mask": dense}.items():
        try:
            found[name] = make(where, case)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"[:200]
    return found


def errors(case: Case, flex: Flex, missing: dict[str, str]) -> dict[str, list[float]]:
    """Distance of the result and the three gradients from float64, documents of some tokens to most of the row."""
    where = row_of(case._replace(law=lognormal(6.0, 1.5, 1500)), CHECKED, seed=1)
    parts, slope = inputs(case, CHECKED)
    wide = [part.detach().double().requires_grad_() for part in parts]
    on_device = Packed(where.segments.cuda(), where.parents.cuda(), where.positions.cuda())
    exact = attend_plain(*wide, on_device, window=case.window, scale=SCALE)
    expected = [exact, *torch.autograd.grad(exact, wide, slope.double())]
    found = contenders(where, case, flex, missing)
    distances = {}
    for name in gpu.willing({name: _once(each, parts, slope) for name, each in found.items()}, missing):
        out = found[name](*parts)
        results = [out, *torch.autograd.grad(out, parts, slope)]
        distances[name] = [gpu.distance(one, other) for one, other in zip(results, expected, strict=True)]
    return distances


def _once(each: Contender, parts: list[Tensor], slope: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(each(*parts), parts, slope)


def measure(where: Packed, case: Case, slots: int, flex: Flex, rounds: int, missing: dict[str, str]) -> tuple[dict[str, Timing], ...]:
    """Times forward and backward of all."""
    parts, slope = inputs(case, slots)
    found = contenders(where, case, flex, missing)
    able = gpu.willing({name: _once(each, parts, slope) for name, each in found.items()}, missing)
    forth = gpu.alternate({name: lambda each=found[name]: each(*parts) for name in able}, rounds)
    made = {name: found[name](*parts) for name in able}
    back = gpu.alternate(
        {name: lambda out=out: torch.autograd.grad(out, parts, slope, retain_graph=True) for name, out in made.items()}, rounds
    )
    return forth, back


def mask_seconds(where: Packed, repeats: int = 20) -> float:
    """Of all that a batch needs before its first layer, tensors on the device included."""
    device, taken = torch.device("cuda"), []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        find_sequences(Packed(where.segments, where.parents, where.positions).found, device)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[repeats // 2]


def host_seconds(where: Packed, case: Case, slots: int, repeats: int = 20) -> float:
    """What calling ours costs the host, forward and backward."""
    parts, slope = inputs(case, slots)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        torch.autograd.grad(attend(*parts, where, window=case.window, scale=SCALE), parts, slope)
    taken = (time.perf_counter() - start) / repeats
    torch.cuda.synchronize()
    return taken


def main() -> None:
    options = arguments(__doc__ or "")
    device = gpu.require_gpu()
    torch.manual_seed(0)
    slots = QUICK if options.quick else SLOTS
    missing: dict[str, str] = {}
    if not usable(device):
        missing["cuDNN behind rolecall"] = "no Hopper GPU, or no nvidia-cudnn-frontend: ours are PyTorch's flash kernels"
    flex = Flex()
    distances = {}
    for name in ("lognormal(6.5, 0.8)", "window 1024, lognormal(6.5, 0.8)"):
        distances[name] = errors(CASES[name], flex, missing)
        for who, each in distances[name].items():
            print(
                f"{name:34} {who:16} against float64: " + ", ".join(f"{part} {value:.1e}" for part, value in zip(PARTS, each, strict=True))
            )
        if gpu.largest(distances[name]["rolecall"]) > NEAR:
            raise SystemExit("ours is not exact: nothing is timed")
    rates = gpu.rates()
    results = {}
    for name, case in CASES.items():
        where = row_of(case, slots)
        results[name] = where, *measure(where, case, slots, flex, options.rounds, missing)
    report(options, slots, results, rates, distances, missing)


def report(options: Any, slots: int, results: Any, rates: gpu.Rates, distances: Any, missing: dict[str, str]) -> None:
    targets: dict[str, tuple[float, bool]] = {}
    details: dict[str, Any] = {**rates.details(), "distance from float64 of the result and its gradients": distances}
    for name, (where, forth, back) in results.items():
        case = CASES[name]
        seen = 4.0 * case.heads * case.size * where.found.pair_count(case.window)
        for way, timings, floor in (("forward", forth, seen / RATE), ("backward", back, 2.5 * seen / RATE)):
            own = timings["rolecall"].median
            best = min(each.median for who, each in timings.items() if who != "rolecall")
            targets[f"{name}, {way}: at least the best peer"] = (best / own, best >= own)
            details[f"{name}, {way}, ms"] = {who: float(f"{each.median * 1e3:.4g}") for who, each in timings.items()} | {
                "floor": round(floor * 1e3, 3)
            }
        if "varlen_attn" in back:
            ratio = back["varlen_attn"].median / back["rolecall"].median
            targets[f"{name}: at least {OVER_VARLEN}x varlen_attn backward"] = (ratio, ratio >= OVER_VARLEN)
    first = next(iter(CASES))
    where, forth, back = results[first]
    whole = {who: Timing(tuple(map(sum, zip(forth[who].samples, back[who].samples, strict=True)))) for who in forth if who in back}
    share = mask_seconds(where) / (LAYERS * whole["rolecall"].median)
    targets[f"mask: at most {MASK_SHARE:.0%} of the attention of {LAYERS} layers"] = (share, share <= MASK_SHARE)
    details["host, forward and backward, ms"] = round(host_seconds(where, CASES[first], slots) * 1e3, 3)
    finish(
        bench="attn_packed",
        workload=f"a row of {slots} tokens, documents {first}, 16 and 8 heads of 128, bf16, forward and backward",
        timings=whole,
        ours="rolecall",
        targets=targets,
        target="at least the best peer on each law; at least 1.25x varlen_attn backward; masks at most 2 % of a step",
        limit=3.5 * 4.0 * 16 * 128 * where.found.pair_count() / RATE * 1e3,
        missing=missing,
        details=details,
        packages=PACKAGES,
        quick=options.quick,
        out=options.out,
    )


if __name__ == "__main__":
    main()

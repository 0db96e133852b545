"""`ce_head`: output head and cross entropy, forward and backward, with exact gradients of both inputs.

N tokens of D numbers against V rows of the head, bfloat16, random. The floor is 6 N D V operations at the matmul rate of the same
run. Every contender's loss and gradients are first compared with float64 on fewer tokens. Memory is what a step needs at its peak
above its two gradients. The floor's matmul rate is that of single products; a step keeps the GPU busy for longer and meets its power
limit, so the rate of many products in a row is reported beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu
import torch
from harness import Timing, arguments, finish
from rolecall.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_plain
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SHAPES = ((16384, 2048, 248320), (8192, 2304, 256000), (16384, 1024, 151936))
QUICK = ((4096, 1024, 65536),)
IGNORED = (0.3, 0.7)
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
CHECKED = 1024  # tokens compared with float64; as many as a compiled chunk, which is then compiled once a shape
LOSS, GRADIENT = 1e-5, 6e-3  # limits for ours: float32 logits; gradients rounded to bfloat16 on the way and at the end (3e-3 together)
CHUNK = 1024  # tokens of a compiled chunk
LATE = 150.0  # seconds after which no further shape is begun: one shape with its peers takes about 60
TIMES, MEMORY, OVER_CCE, OVER_LIGER = 1.25, 512.0, 1.15, 3.0
Contender = Callable[[Tensor, Tensor, Tensor], Tensor]


def contenders(missing: dict[str, str]) -> dict[str, Contender]:
    """Mean loss of each, called with (hidden, head, targets)."""

    def ours(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        counted = targets != -100
        return linear_cross_entropy(hidden, head, targets, weights=counted / counted.sum())

    def torch_whole(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(hidden @ head.T, targets)

    @torch.compile(dynamic=False)
    def one_chunk(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy((hidden @ head.T).float(), targets, reduction="sum")

    def compiled(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        total = sum(checkpoint(one_chunk, part, head, at, use_reentrant=False) for part, at in parts)
        return total / (targets != -100).sum()

    found: dict[str, Contender] = {"rolecall": ours, "F.cross_entropy": torch_whole, "compiled chunks": compiled}
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["Liger"] = lambda hidden, head, targets: liger_fused_linear_cross_entropy(hidden, head, targets)
    except Exception as error:
        missing["Liger"] = repr(error)[:200]
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        found["CCE"] = lambda hidden, head, targets: cce(hidden, head, targets)
        found["CCE, exact"] = lambda hidden, head, targets: cce(hidden, head, targets, filter_eps=None)
    except Exception as error:
        missing["CCE"] = repr(error)[:200]
    return found


def inputs(tokens: int, depth: int, vocab: int, ignored: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of about N(0, 9): a spread as trained models have it."""
    hidden = torch.randn(tokens, depth, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = (torch.randn(vocab, depth, device="cuda") * (3 / depth**0.5)).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device="cuda")
    targets[torch.rand(tokens, device="cuda") < ignored] = -100
    return hidden, head, targets


def step(contender: Contender, hidden: Tensor, head: Tensor, targets: Tensor) -> Callable[[], None]:
    def run() -> None:
        hidden.grad = head.grad = None
        contender(hidden, head, targets).backward()

    return run


def errors(found: dict[str, Contender], depth: int, vocab: int, missing: dict[str, str]) -> dict[str, list[float]]:
    """Distance of loss, gradient of hidden and of head from float64."""
    hidden, head, targets = inputs(CHECKED, depth, vocab, ignored=0.2)
    wide = [values.detach().double().requires_grad_() for values in (hidden, head)]
    exact = linear_cross_entropy_plain(*wide, targets) / (targets != -100).sum()
    expected = [exact, *torch.autograd.grad(exact, wide)]
    distances = {}
    for name, run in gpu.willing({name: step(each, hidden, head, targets) for name, each in found.items()}, missing).items():
        run()
        loss = found[name](hidden, head, targets)
        run()
        distances[name] = [gpu.distance(one, other) for one, other in zip((loss, hidden.grad, head.grad), expected, strict=True)]
    return distances


def measure(
    found: dict[str, Contender], shape: tuple[int, int, int], rounds: int, missing: dict[str, str]
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Times of all, and megabytes above the gradients."""
    hidden, head, targets = inputs(*shape)
    failed: dict[str, str] = {}
    able = gpu.willing({name: step(each, hidden, head, targets) for name, each in found.items()}, failed)
    missing.update({f"{name} at {'x'.join(map(str, shape))}": why for name, why in failed.items()})
    timings = gpu.alternate(able, rounds, warm=1)
    above = {}
    for name, run in able.items():
        hidden.grad = head.grad = None
        torch.cuda.empty_cache()
        above[name] = (gpu.memory(run) - hidden.nbytes - head.nbytes) / 1e6
    return timings, above


def falling(shape: tuple[int, int, int], ours: Contender, rounds: int) -> dict[str, Timing]:
    """Our time with none and with some tokens ignored."""
    batches = {f"{share:.0%} ignored": inputs(*shape, ignored=share) for share in (0.0, *IGNORED)}
    return gpu.alternate({name: step(ours, *batch) for name, batch in batches.items()}, rounds)


def main() -> None:
    options = arguments(__doc__ or "")
    gpu.require_gpu()
    torch.manual_seed(0)
    shapes = QUICK if options.quick else SHAPES
    missing: dict[str, str] = {}
    found = contenders(missing)
    distances = errors(found, *shapes[0][1:], missing)
    for name, each in distances.items():
        print(f"{name:16} against float64: loss {each[0]:.1e}, hidden {each[1]:.1e}, head {each[2]:.1e}")
    if "rolecall" not in distances:
        raise SystemExit(f"ours does not run: {missing['rolecall']}")
    if distances["rolecall"][0] > LOSS or gpu.largest(distances["rolecall"][1:]) > GRADIENT:
        raise SystemExit("ours is not exact: nothing is timed")
    found = {name: each for name, each in found.items() if name in distances}
    before = gpu.rates()
    results = {shapes[0]: measure(found, shapes[0], options.rounds, missing)}
    shares = falling(shapes[0], found["rolecall"], options.rounds)
    for shape in shapes[1:]:
        if gpu.elapsed() < LATE:
            results[shape] = measure(found, shape, options.rounds, missing)
        else:
            missing["x".join(map(str, shape))] = f"not begun after {gpu.elapsed():.0f} s"
    rates = gpu.both(before, gpu.rates())
    report(options, shapes, results, shares, rates, distances, missing)


def report(options: Any, shapes: Any, results: Any, shares: Any, rates: gpu.Rates, distances: Any, missing: dict[str, str]) -> None:
    targets: dict[str, tuple[float, bool]] = {}
    details: dict[str, Any] = {**rates.details(), "matmul TFLOP/s, 60 in a row": round(gpu.sustained() / 1e12, 1)}
    targets["shapes measured"] = (len(results), len(results) == len(shapes))
    floors = {shape: rates.milliseconds(flops=6.0 * shape[0] * shape[1] * shape[2]) for shape in shapes}
    for shape, (timings, above) in results.items():
        label, own = "x".join(map(str, shape)), timings["rolecall"].median
        targets[f"{label}: at most {TIMES}x the floor"] = (own * 1e3 / floors[shape], own * 1e3 <= TIMES * floors[shape])
        targets[f"{label}: at most {MEMORY:.0f} MB above the gradients"] = (above["rolecall"], above["rolecall"] <= MEMORY)
        for peer, least in (("CCE", OVER_CCE), ("CCE, exact", OVER_CCE), ("Liger", OVER_LIGER)):
            if peer in timings:
                ratio = timings[peer].median / own
                targets[f"{label}: at least {least}x {peer}"] = (ratio, ratio >= least)
        details[f"floor of {label}, ms"] = round(floors[shape], 2)
        if shape != shapes[0]:
            details[f"ms at {label}"] = {name: round(each.median * 1e3, 3) for name, each in timings.items()}
        details[f"MB above the gradients at {label}"] = {name: round(each, 1) for name, each in above.items()}
    whole = shares["0% ignored"].median
    for share in IGNORED:
        ratio = shares[f"{share:.0%} ignored"].median / whole
        targets[f"{share:.0%} ignored: at most {1.1 * (1 - share):.2f} of the time"] = (ratio, ratio <= 1.1 * (1 - share))
    for place, what in enumerate(("loss", "gradient of hidden", "gradient of head")):
        details[f"distance from float64, {what}"] = {name: float(f"{each[place]:.2g}") for name, each in distances.items()}
    finish(
        bench="ce_head",
        workload=" x ".join(map(str, shapes[0])) + " (tokens x hidden size x vocabulary), bf16, forward and backward",
        timings=results[shapes[0]][0],
        ours="rolecall",
        targets=targets,
        target="at most 1.25x the floor, 512 MB above the gradients; at least 1.15x CCE, 3x Liger; time falls with the ignored share",
        limit=floors[shapes[0]],
        missing=missing,
        details=details,
        packages=PACKAGES,
        quick=options.quick,
        out=options.out,
    )


if __name__ == "__main__":
    main()

"""The parts of the fused head on a Hopper GPU, one by one: what `docs/kernels.md` says was tried. No targets, no peers.

Prints, and with `--out` writes, TFLOP/s of the three products of a chunk in the ways that were tried, milliseconds of whole steps for
several ways of cutting them into chunks, and how much of a sum the tensor cores lose. About half a minute.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import torch
from harness import arguments, device, versions
from rolecall.kernels import head_fused, head_plan
from rolecall.kernels.cross_entropy import linear_cross_entropy
from rolecall.kernels.head import Law
from torch import Tensor

PROJECTED = {"MEASURE": (16384, 1024, 151936), "EXPONENTIALS": (1024, 2048, 248320), "SLOPES": (768, 1024, 151936)}
SETTINGS: dict[str, dict[str, Any]] = {
    "128x256x64, one loop": {},
    "128x256x64, nested loops": {"flatten": False},
    "256x128x64, one loop": {"tile": (256, 128, 64)},
    "128x128x64, two programs": {"tile": (128, 128, 64), "warps": 4, "stages": 2, "resident": 2},
}
CHUNKS = ((1024, 2048, 248320), (896, 2304, 256000), (1664, 1024, 151936), (768, 1024, 151936))
STEPS = {
    (16384, 2048, 248320): ((1024, 2), (896, 1), (896, 2), (896, 7)),
    (8192, 2304, 256000): ((896, 2), (896, 1), (768, 1)),
    (16384, 1024, 151936): ((1408, 3), (1536, 1), (1024, 4)),
}
DEPTHS = (256, 1024, 2048, 4096)


def inputs(tokens: int, depth: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, depth, device="cuda", dtype=torch.bfloat16)
    return hidden, (torch.randn(vocab, depth, device="cuda") * (3 / depth**0.5)).to(torch.bfloat16), torch.arange(tokens, device="cuda")


def rate(call: Callable[[], object], flops: float) -> float:
    """TFLOP/s, the median of 5."""
    return round(flops / sorted(gpu.sample(call, 5, 1))[2] / 1e12, 1)


def projected(kind: str, size: tuple[int, int, int]) -> dict[str, float]:
    """The product with its epilogue, in each of the settings, and cuBLAS without one."""
    hidden, head, targets = inputs(*size)
    rule = Law(size[2])
    out = None if kind == "MEASURE" else torch.empty(size[0], size[2], device="cuda", dtype=torch.bfloat16)
    rows = [torch.zeros(size[0], device="cuda") for _ in range(4)]
    named = dict(zip(("at", "reference", "first", "second"), rows, strict=True))
    found, chosen = {}, head_fused.SETTINGS
    for name, changes in SETTINGS.items():
        head_fused.SETTINGS = dataclasses.replace(chosen, **changes)
        sums = torch.empty(3, head_fused._tiles(size[2]) * size[0], device="cuda")
        try:
            found[name] = rate(
                lambda sums=sums: head_fused._project(kind, hidden, head, rule, targets, out=out, sums=sums, **named),
                2.0 * size[0] * size[1] * size[2],
            )
        finally:
            head_fused.SETTINGS = chosen
    few = hidden[:1024]
    found["cuBLAS, bf16 result"] = rate(lambda: torch.mm(few, head.T), 2.0 * len(few) * size[1] * size[2])
    return found


def multiplied(tokens: int, depth: int, vocab: int) -> dict[str, float]:
    """cuBLAS products of a chunk: gradient of the head, added in place or not, and of the states, in parts of the vocabulary."""
    hidden, head, _ = inputs(tokens, depth, vocab)
    slope, total = torch.randn(tokens, vocab, device="cuda", dtype=torch.bfloat16), torch.zeros_like(head)
    flops = 2.0 * tokens * depth * vocab
    found = {
        "head": rate(lambda: torch.mm(slope.T, hidden, out=total), flops),
        "head, added": rate(lambda: total.addmm_(slope.T, hidden), flops),
        "states, whole": rate(lambda: torch.mm(slope, head, out_dtype=torch.float32), flops),
    }
    for parts in (2, 4, 5, 8):
        sums = head_fused._Sums(hidden, head, Law(vocab), to_hidden=True, to_head=False)
        found[f"states, {parts} parts"] = rate(lambda sums=sums, parts=parts: sums._pieces(slope, parts), flops)
    return found


def stepped(size: tuple[int, int, int], tries: tuple[tuple[int, int], ...]) -> dict[str, float]:
    """Milliseconds of cross entropy forward and backward, cut by the model and as told."""
    hidden, head, targets = inputs(*size)
    hidden.requires_grad_()
    head.requires_grad_()
    planned = head_fused.plan

    def told(rows: int, splits: int) -> Callable[..., Any]:
        def cut(shape: head_plan.Shape, memory: int, chunk: int = 0) -> tuple[head_plan.Chunk, ...]:
            return tuple(head_plan.Chunk(min(rows, shape.count - start), splits) for start in range(0, shape.count, rows))

        return cut

    def step(cut: Callable[..., Any]) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = head.grad = None
            head_fused.plan = cut
            try:
                linear_cross_entropy(hidden, head, targets).backward()
            finally:
                head_fused.plan = planned

        return run

    runs = {"by the model": step(planned), **{f"{rows} tokens, {splits} parts": step(told(rows, splits)) for rows, splits in tries}}
    return {name: round(timing.median * 1e3, 2) for name, timing in gpu.alternate(runs, 5, warm=1).items()}


def lost(depth: int) -> float:
    """Share of the largest sums that is lost, by the number of terms, with nothing made good: a least-squares fit against float64."""
    hidden, head, targets = inputs(256, depth, 16384)
    sums, kept = torch.empty(3, 64 * 256, device="cuda"), head_fused.TRUNCATED
    head_fused.TRUNCATED = 0.0
    try:  # logits in units of log 2 are, at this temperature, the sums themselves
        rule = Law(16384, temperature=head_fused.LOG2E)
        head_fused._project("MEASURE", hidden, head, rule, targets, sums=sums, at=torch.zeros(256, device="cuda"))
    finally:
        head_fused.TRUNCATED = kept
    top = (hidden.double() @ head.double().T).view(256, 64, 256).amax(2).T.reshape(-1)
    return float(f"{float(((top - sums[0]) * top).sum() / top.square().sum()) / depth:.3g}")


def main() -> None:
    options = arguments(__doc__ or "")
    gpu.require_gpu()
    torch.manual_seed(0)
    result = {
        "device": device(),
        "rates": {**gpu.rates().details(), "matmul TFLOP/s, 60 in a row": round(gpu.sustained() / 1e12, 1)},
        "lost": {str(depth): lost(depth) for depth in DEPTHS},
        "projected": {f"{kind} {size}": projected(kind, size) for kind, size in PROJECTED.items()},
        "multiplied": {str(size): multiplied(*size) for size in CHUNKS},
        "stepped": {str(size): stepped(size, tries) for size, tries in STEPS.items()},
        "versions": versions(("torch", "triton")),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        Path(options.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

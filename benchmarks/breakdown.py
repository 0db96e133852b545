"""Where the time of a step goes on the device: kernels by kind, matrix products by shape with their rate, the gaps between kernels."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = (  # the first that matches a kernel's name
    ("attention", r"flash|fmha|attention|flex|sdpa|varlen|bwd_dq_dk_dv|convert_dq|dot_do_o"),
    ("head and loss", r"logprob|cross_entropy|linear_ce|softmax|nll|_ce_|head"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|splitK|wgmma|_mm_|mm_kernel"),
    ("optimiser, clip, gradients", r"multi_tensor|foreach|fused_?adam|lpnorm|CUDAFunctor_add"),
    ("copies and fills", r"Memcpy|Memset|copy_kernel|fill|direct_copy"),
    ("embedding", r"embedding|index|gather|scatter|sort|unique"),
    ("fused by Inductor", r"triton_"),
)
WAITS, LONGEST = (1.0, 2.0, 5.0, 20.0, 100.0, 1000.0, float("inf")), 12  # microseconds; gaps listed by name
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


@dataclass
class Breakdown:
    """Milliseconds of one step.

    Attributes:
        wall: from the first kernel's start to the last one's end.
        idle: of that, no kernel ran.
        kinds: kind → (milliseconds, kernels).
        products: (operation, shapes) → (milliseconds, calls, TFLOP/s).
        kernels: (name, milliseconds, calls), the longest first.
        waits: upper bound in microseconds → milliseconds and number of the gaps between kernels that are no longer.
        longest: (milliseconds, kernel before, kernel after) of the longest gaps.
    """

    wall: float = 0.0
    idle: float = 0.0
    kinds: dict[str, tuple[float, int]] = field(default_factory=dict)
    products: dict[str, tuple[float, int, float]] = field(default_factory=dict)
    kernels: list[tuple[str, float, int]] = field(default_factory=list)
    waits: dict[float, tuple[float, int]] = field(default_factory=dict)
    longest: list[tuple[float, str, str]] = field(default_factory=list)

    def text(self, number: int = 25) -> str:
        """A compact table."""
        lines = [f"wall {self.wall:.1f} ms, no kernel running {self.idle:.1f} ms"]
        lines += [f"  {kind:28} {took:8.2f} ms {calls:6d} kernels" for kind, (took, calls) in self.kinds.items()]
        lines.append("matrix products by shape")
        ranked = sorted(self.products.items(), key=lambda each: -each[1][0])
        lines += [f"  {shape:58} {took:8.2f} ms {calls:5d} calls {rate:6.0f} TFLOP/s" for shape, (took, calls, rate) in ranked[:number]]
        lines.append("kernels")
        lines += [
            f"  {took:8.2f} ms {calls:5d} x {took / calls * 1e3:8.1f} us  {name[:100]}" for name, took, calls in self.kernels[:number]
        ]
        lines.append("gaps between kernels")
        lines += [f"  up to {bound:g} us {took:8.2f} ms {count:6d}" for bound, (took, count) in self.waits.items()]
        lines += [f"  {took:8.3f} ms after {one[:50]}, before {other[:50]}" for took, one, other in self.longest]
        return "\n".join(lines)


def breakdown(step: Callable[[], object]) -> Breakdown:
    """Profile one call of `step`, which should have run before."""
    device = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device else [])], record_shapes=True) as run:
        step()
        if device:
            torch.cuda.synchronize()
    found = Breakdown()
    _kernels(run, found)
    for each in run.key_averages(group_by_input_shape=True):
        if each.key in PRODUCTS:
            _product(each, found, device)
    return found


def kind_of(name: str) -> str:
    """Of a kernel."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def _kernels(run: Any, found: Breakdown) -> None:
    spans, names = [], {}
    for event in run.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        took = (event.time_range.end - event.time_range.start) / 1e3
        spans.append((event.time_range.start, event.time_range.end, event.name))
        for table, key in ((found.kinds, kind_of(event.name)), (names, event.name)):
            before = table.get(key, (0.0, 0))
            table[key] = (before[0] + took, before[1] + 1)
    found.kinds = dict(sorted(found.kinds.items(), key=lambda each: -each[1][0]))
    found.kernels = sorted(((name, took, calls) for name, (took, calls) in names.items()), key=lambda each: -each[1])
    if spans:
        gaps, found.wall = gaps_of(spans)
        found.idle = sum(gap for gap, _, _ in gaps)
        found.longest = sorted(gaps, reverse=True)[:LONGEST]
        for gap, _, _ in gaps:
            bound = next(bound for bound in WAITS if gap * 1e3 <= bound)
            took, count = found.waits.get(bound, (0.0, 0))
            found.waits[bound] = (took + gap, count + 1)
        found.waits = dict(sorted(found.waits.items()))


def gaps_of(spans: list[tuple[float, float, str]]) -> tuple[list[tuple[float, str, str]], float]:
    """The gaps (milliseconds, kernel before, kernel after) between kernels (start and end in microseconds, name), and the whole time."""
    gaps: list[tuple[float, str, str]] = []
    ordered = sorted(spans)
    _, last, before = ordered[0]
    for begin, end, name in ordered:
        if begin > last:
            gaps.append(((begin - last) / 1e3, before, name))
        if end > last:
            last, before = end, name
    return gaps, (last - ordered[0][0]) / 1e3


def _product(event: Any, found: Breakdown, device: bool) -> None:
    shapes = [tuple(shape) for shape in event.input_shapes if len(shape) >= 2]
    took = (event.device_time_total if device else event.cpu_time_total) / 1e3
    if len(shapes) < 2 or took <= 0:
        return
    left, right = shapes[-2:] if event.key in ("aten::addmm", "aten::baddbmm") else shapes[:2]
    batch = left[0] if len(left) == 3 else 1
    flops = 2.0 * batch * left[-2] * left[-1] * right[-1] * event.count
    key = f"{event.key.removeprefix('aten::')} {list(left)} x {list(right)}"
    before = found.products.get(key, (0.0, 0, 0.0))
    done = before[0] * before[2] + flops / 1e9  # GFLOP = ms x TFLOP/s
    found.products[key] = (before[0] + took, before[1] + event.count, done / (before[0] + took))

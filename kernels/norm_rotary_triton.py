"""Triton kernels of `kernels/norm_rotary.py`: one row is one head of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 4096  # of x that a program holds at a time: 32 rows of 128
PROGRAMS = 1056  # of the backward pass, 8 for each multiprocessor of an H100; each has a sum of the gain's gradient of its own


# fmt: off
@triton.jit
def turn(
    x: tl.tensor, cosines: tl.tensor, sines: tl.tensor, gain: tl.tensor, out: tl.tensor, number: int, eps: float, offset: float,
    HEADS: tl.constexpr, SIDE: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
) -> None:
    # fmt: on
    """ROWS rows of x [number, 2 SIDE], normed and turned. cosines, sines [number / HEADS, SIDE]; gain [2 SIDE]; PAD: SIDE rounded up."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAD)
    real = (row < number)[:, None] & (column < SIDE)[None, :]
    at = row.to(tl.int64)[:, None] * (2 * SIDE) + column[None, :]
    a = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    b = tl.load(x + at + SIDE, mask=real, other=0.0).to(tl.float32)
    if NORM:
        shrink = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * SIDE) + eps)[:, None]
        a *= shrink * (tl.load(gain + column, mask=column < SIDE, other=0.0).to(tl.float32) + offset)[None, :]
        b *= shrink * (tl.load(gain + SIDE + column, mask=column < SIDE, other=0.0).to(tl.float32) + offset)[None, :]
    angle = (row // HEADS)[:, None] * SIDE + column[None, :]
    c = tl.load(cosines + angle, mask=real, other=0.0).to(tl.float32)
    s = tl.load(sines + angle, mask=real, other=0.0).to(tl.float32)
    tl.store(out + at, (a * c - b * s).to(out.dtype.element_ty), mask=real)
    tl.store(out + at + SIDE, (b * c + a * s).to(out.dtype.element_ty), mask=real)


# fmt: off
@triton.jit
def turn_back(
    slope: tl.tensor, x: tl.tensor, cosines: tl.tensor, sines: tl.tensor, gain: tl.tensor, to_x: tl.tensor, to_gain: tl.tensor,
    number: int, programs: int, eps: float, offset: float,
    HEADS: tl.constexpr, SIDE: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
) -> None:
    # fmt: on
    """The gradient of x [number, 2 SIDE] from that of what `turn` makes, and each program's share of the gain's [programs, 2 SIDE] f32."""
    column = tl.arange(0, PAD)
    sum_a, sum_b = tl.zeros((ROWS, PAD), tl.float32), tl.zeros((ROWS, PAD), tl.float32)
    if NORM:
        gain_a = (tl.load(gain + column, mask=column < SIDE, other=0.0).to(tl.float32) + offset)[None, :]
        gain_b = (tl.load(gain + SIDE + column, mask=column < SIDE, other=0.0).to(tl.float32) + offset)[None, :]
    for block in range(tl.program_id(0), tl.cdiv(number, ROWS), programs):
        row = block * ROWS + tl.arange(0, ROWS)
        real = (row < number)[:, None] & (column < SIDE)[None, :]
        at = row.to(tl.int64)[:, None] * (2 * SIDE) + column[None, :]
        p = tl.load(slope + at, mask=real, other=0.0).to(tl.float32)
        q = tl.load(slope + at + SIDE, mask=real, other=0.0).to(tl.float32)
        angle = (row // HEADS)[:, None] * SIDE + column[None, :]
        c = tl.load(cosines + angle, mask=real, other=0.0).to(tl.float32)
        s = tl.load(sines + angle, mask=real, other=0.0).to(tl.float32)
        g = p * c + q * s
        h = q * c - p * s
        if NORM:
            a = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
            b = tl.load(x + at + SIDE, mask=real, other=0.0).to(tl.float32)
            shrink = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * SIDE) + eps)[:, None]
            a *= shrink
            b *= shrink
            sum_a += g * a
            sum_b += h * b
            g *= gain_a
            h *= gain_b
            mean = ((tl.sum(g * a, 1) + tl.sum(h * b, 1)) / (2 * SIDE))[:, None]
            g = shrink * (g - a * mean)
            h = shrink * (h - b * mean)
        tl.store(to_x + at, g.to(to_x.dtype.element_ty), mask=real)
        tl.store(to_x + at + SIDE, h.to(to_x.dtype.element_ty), mask=real)
    if NORM:
        part = to_gain + tl.program_id(0) * (2 * SIDE) + column
        tl.store(part, tl.sum(sum_a, 0), mask=column < SIDE)
        tl.store(part + SIDE, tl.sum(sum_b, 0), mask=column < SIDE)


def forward(x: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor | None, eps: float, offset: float) -> Tensor:
    """What `norm_rotary` returns; all contiguous."""
    out, how = torch.empty_like(x), _sizes(x, gain)
    number = x.numel() // x.shape[-1]
    turn[(triton.cdiv(number, how["ROWS"]),)](x, cosines, sines, x if gain is None else gain, out, number, eps, offset, **how)
    return out


def backward(
    slope: Tensor, x: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and gain; all contiguous."""
    to_x, how = torch.empty_like(x), _sizes(x, gain)
    number = x.numel() // x.shape[-1]
    programs = min(PROGRAMS, triton.cdiv(number, how["ROWS"]))
    sums = torch.empty((programs, x.shape[-1]) if gain is not None else (0,), device=x.device)
    own = x if gain is None else gain
    turn_back[(programs,)](slope, x, cosines, sines, own, to_x, sums, number, programs, eps, offset, **how)
    return to_x, x.new_empty(0) if gain is None else sums.sum(0).to(gain.dtype)


def _sizes(x: Tensor, gain: Tensor | None) -> dict[str, int | bool]:
    side = x.shape[-1] // 2
    pad = triton.next_power_of_2(side)
    return {"HEADS": x.shape[2], "SIDE": side, "PAD": pad, "ROWS": max(1, ENTRIES // (2 * pad)), "NORM": gain is not None}

"""Norm of queries and keys and their turn by position, in one: on a GPU each tensor is read once and written once, forward and backward.

R rows, C slots, H heads, d size of a head. The fused form computes in float32 and rounds its result; the plain one rounds where a
model's own definition does. `torch.compile` sees the fused form as one operation.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
TRITON = importlib.util.find_spec("triton") is not None  # found out once: torch.compile can't trace the question


def norm_rotary(
    x: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor | None = None, *, eps: float = 0.0, offset: float = 0.0, wide: bool = False
) -> Tensor:
    """x / rms(x) x (gain + offset) over the last dimension, then turned; differentiable in x and gain.

    Args:
        x: [R, C, H, d].
        cosines, sines: [R, C, 1, d / 2], of the angles; dimension i and i + d / 2 are a pair. They get no gradient.
        gain: [d]; None for no norm.
        eps: added to the mean square.
        offset: added to the gain.
        wide: the plain form multiplies by the gain before rounding to x's dtype, instead of after.

    Returns:
        [R, C, H, d] in x's dtype.
    """
    if _quick(x):
        turned: Tensor = norm_rotary_op(x, cosines, sines, gain, eps, offset)
        return turned
    return norm_rotary_plain(x, cosines, sines, gain, eps=eps, offset=offset, wide=wide)


def norm_rotary_plain(
    x: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor | None = None, *, eps: float = 0.0, offset: float = 0.0, wide: bool = False
) -> Tensor:
    """The same by the formula."""
    if gain is not None:
        x = rms_norm(x, gain, eps=eps, offset=offset, wide=wide)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def rms_norm(x: Tensor, gain: Tensor, *, eps: float, offset: float = 0.0, wide: bool = False) -> Tensor:
    """x / rms(x) x (gain + offset), the mean in float32 (float64 for float64), as Zhang and Sennrich 2019 (arXiv:1910.07467)."""
    if not offset and _quick(x) and not torch.compiler.is_compiling():  # one kernel for eight: a decoding step is made of little else
        return torch.nn.functional.rms_norm(x, gain.shape, gain, eps)
    high = x.to(_wide(x))
    scaled = high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps)
    if not wide:
        return gain * scaled.to(x.dtype)
    factor = gain.to(high.dtype)
    return (scaled * (factor + offset if offset else factor)).to(x.dtype)


@torch.library.custom_op("rolecall::norm_rotary", mutates_args=())
def norm_rotary_op(x: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor | None, eps: float, offset: float) -> Tensor:
    """The fused form as one operation; on a CPU its formula in float32 or wider, for tests of how it is put together."""
    if x.is_cuda:
        made: Tensor = _kernels().forward(x.contiguous(), cosines.contiguous(), sines.contiguous(), gain, eps, offset)
        return made
    dtype = _wide(x)
    wide = None if gain is None else gain.to(dtype)
    return norm_rotary_plain(x.to(dtype), cosines.to(dtype), sines.to(dtype), wide, eps=eps, offset=offset, wide=True).to(x.dtype)


@torch.library.custom_op("rolecall::norm_rotary_backward", mutates_args=())
def _backward_op(
    slope: Tensor, x: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and gain; the latter of no entries without a gain."""
    if x.is_cuda:
        parts = (slope.contiguous(), x.contiguous(), cosines.contiguous(), sines.contiguous())
        made: tuple[Tensor, Tensor] = _kernels().backward(*parts, gain, eps, offset)
        return made
    high = x.to(_wide(x))
    first, second = slope.to(high.dtype).chunk(2, dim=-1)
    slope = torch.cat((first * cosines + second * sines, second * cosines - first * sines), dim=-1)
    if gain is None:
        return slope.to(x.dtype), x.new_empty(0)
    shrink = torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps)
    unit, weighted = high * shrink, slope * (gain.to(high.dtype) + offset)
    to_x = shrink * (weighted - unit * (weighted * unit).mean(-1, keepdim=True))
    return to_x.to(x.dtype), (slope * unit).sum((0, 1, 2)).to(gain.dtype)


@norm_rotary_op.register_fake
def _(x: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor | None, eps: float, offset: float) -> Tensor:
    return x.new_empty(x.shape)


@_backward_op.register_fake
def _(slope: Tensor, x: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if gain is None else gain.new_empty(gain.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cosines, sines, gain, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(x, cosines, sines, gain)


def _slopes(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing hands each tensor out a single time
    gain = saved[3]
    to_x, to_gain = _backward_op(slope, *saved, ctx.eps, ctx.offset)
    return to_x, None, None, None if gain is None else to_gain, None, None


norm_rotary_op.register_autograd(_slopes, setup_context=_keep)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _quick(x: Tensor) -> bool:
    return TRITON and x.is_cuda and x.dtype in HALF


def _kernels() -> Any:
    return importlib.import_module("rolecall.kernels.norm_rotary_triton")

"""Rotary position embeddings: frequencies of every kind that transformers knows for our families, and the tables of a pass.

Computed in float32 whatever the model's dtype, with the operations of transformers in their order: models were trained
with these roundings, and at position 100,000 one unit in the last place of a frequency is 0.01 radians.

R rows, C slots, d size of a head.
"""

from __future__ import annotations

import math

import torch
from rolecall.roles.models.spec import Rope
from torch import Tensor


def frequencies(rope: Rope, size: int, longest: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Radians a position, float32 [d / 2].

    Args:
        rope: kind and numbers.
        size: d, all of which is rotated.
        longest: tokens of the longest sequence of the pass; only kinds with `Rope.by_length` look at it.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.int64, device=device).float() / size
    if rope.kind == "dynamic":
        length = max(longest, rope.max_positions)
        stretched = rope.theta * ((rope.factor * length / rope.max_positions) - (rope.factor - 1)) ** (size / (size - 2))
        return torch.reciprocal(stretched**exponents)
    if rope.kind == "longrope":
        factors = rope.long_factor if longest > rope.original_positions else rope.short_factor
        return 1.0 / (torch.tensor(factors, dtype=torch.float32, device=device) * rope.theta**exponents)
    if rope.kind == "yarn":
        return _yarn(rope, size, rope.theta**exponents)
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return plain / rope.factor
    return _llama3(rope, plain) if rope.kind == "llama3" else plain


def tables(rope: Rope, size: int, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [R, 1, C, d / 2] of positions [R, C], for all heads of all layers with this rope."""
    longest = int(positions.max()) + 1 if rope.by_length and positions.numel() else 0
    angles = positions[..., None].float() * frequencies(rope, size, longest, positions.device)
    cosines, sines = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
    return cosines.to(dtype)[:, None], sines.to(dtype)[:, None]


def _yarn(rope: Rope, size: int, powers: Tensor) -> Tensor:
    """Slow dimensions interpolated, fast ones left, a ramp between (equation 23 of arXiv:2309.00071)."""

    def dimension(turns: float) -> float:
        """Which dimension turns so often within the original context."""
        return (size * math.log(rope.original_positions / (turns * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 * (low == high)
    ramp = (torch.arange(size // 2, dtype=torch.float32, device=powers.device) - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Long waves are stretched, short ones left, those between blended (Llama 3.1)."""
    context, low, high = rope.original_positions, rope.low_freq_factor, rope.high_freq_factor
    wave = 2 * math.pi / plain
    stretched = torch.where(wave > context / low, plain / rope.factor, plain)
    smooth = (context / wave - low) / (high - low)
    blended = (1 - smooth) * stretched / rope.factor + smooth * stretched
    between = ~(wave < context / high) * ~(wave > context / low)
    return torch.where(between, blended, stretched)

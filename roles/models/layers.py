"""The parts of a decoder block, one class each for all families.

R rows, C slots, D hidden size, H query heads, G key heads, d size of a head, F size within the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rolecall.kernels.attention import Where, attend, attend_slots
from rolecall.kernels.norm_rotary import norm_rotary, rms_norm
from rolecall.roles.models.experts import SparseMLP
from rolecall.roles.models.spec import ModelSpec
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
}


class RMSNorm(nn.Module):
    """x / rms(x) x gain, as `rolecall.kernels.norm_rotary.rms_norm`.

    Args:
        size: of the last dimension.
        eps: added to the mean square.
        offset: the gain is the weight plus this.
        wide: multiply by the gain before rounding to the input's dtype instead of after.
    """

    def __init__(self, size: int, *, eps: float, offset: float = 0.0, wide: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.offset, self.wide = eps, offset, wide

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension; same dtype."""
        return rms_norm(x, self.weight, eps=self.eps, offset=self.offset, wide=self.wide)

    def turned(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Normalise [R, C, H, d] over the last dimension, then turn by position, cosines and sines [R, C, 1, d / 2]; same dtype."""
        return norm_rotary(x, cosines, sines, self.weight, eps=self.eps, offset=self.offset, wide=self.wide)


def norm_of(spec: ModelSpec, size: int) -> RMSNorm:
    """The norm as a family wants it."""
    return RMSNorm(size, eps=spec.eps, offset=spec.gain_offset, wide=spec.wide_gain)


class Attention(nn.Module):
    """Grouped attention with rotary positions; which keys a slot sees is told by `where` and the layer's window."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        size, bias = spec.head_dim, spec.attention_bias
        self.q = nn.Linear(spec.hidden, spec.heads * size, bias=bias)
        self.k = nn.Linear(spec.hidden, spec.kv_heads * size, bias=bias)
        self.v = nn.Linear(spec.hidden, spec.kv_heads * size, bias=bias)
        self.o = nn.Linear(spec.heads * size, spec.hidden, bias=bias)
        self.q_norm = norm_of(spec, size) if spec.qk_norm else None
        self.k_norm = norm_of(spec, size) if spec.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(spec.heads)) if spec.sinks else None
        self.size, self.layer, self.window = size, layer, spec.windows[layer]
        self.scale, self.softcap = spec.scale, spec.attention_softcap

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor, where: Where, cache: Any = None) -> Tensor:
        """[R, C, D] to [R, C, D].

        Args:
            cosines, sines: [R, 1, C, d / 2].
            where: who sees whom.
            cache: `update(keys, values, layer) -> (keys, values)`, called with this pass's [R, G, C, d].
        """
        out: Tensor = self.o(self.mixed(*self.apart(x, cosines, sines), where, cache))
        return out

    def apart(self, x: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [R, C, H, d], keys and values [R, C, G, d], ready to meet.

        Heads of a slot lie side by side: attention kernels take that layout without a copy.
        """
        rows, slots, _ = x.shape
        q, k, v = (part(x).view(rows, slots, -1, self.size) for part in (self.q, self.k, self.v))
        turn = cosines.transpose(1, 2), sines.transpose(1, 2)
        q = norm_rotary(q, *turn) if self.q_norm is None else self.q_norm.turned(q, *turn)
        k = norm_rotary(k, *turn) if self.k_norm is None else self.k_norm.turned(k, *turn)
        return q, k, v

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, where: Where, cache: Any = None) -> Tensor:
        """What `apart` gives to [R, C, H d]: each query's mean of values."""
        options: dict[str, Any] = {"window": self.window, "scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
        if cache is None:
            means: Tensor = attend_slots(q, k, v, where, **options)
        else:
            k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer)
            means = attend(q.transpose(1, 2), k, v, where, **options).transpose(1, 2)
        return means.flatten(2)


class MLP(nn.Module):
    """down(act(gate(x)) x up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.hidden, spec.intermediate, bias=spec.mlp_bias)
        self.up = nn.Linear(spec.hidden, spec.intermediate, bias=spec.mlp_bias)
        self.down = nn.Linear(spec.intermediate, spec.hidden, bias=spec.mlp_bias)
        self.act = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] to […, D]."""
        out: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return out


class Norms(nn.Module):
    """The norms of a block: before attention and MLP, and after each where the family has those."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention = norm_of(spec, spec.hidden)
        self.mlp = norm_of(spec, spec.hidden)
        self.after_attention = norm_of(spec, spec.hidden) if spec.sandwich else None
        self.after_mlp = norm_of(spec, spec.hidden) if spec.sandwich else None


class Block(nn.Module):
    """Attention and MLP, each added to what came in. With a dense MLP only attention itself depends on where segments lie."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.attention = Attention(spec, layer)
        sparse = spec.experts is not None and spec.experts.layers[layer]
        self.mlp = SparseMLP(spec.hidden, spec.experts, ACTIVATIONS[spec.activation]) if sparse and spec.experts else MLP(spec)
        self.norms = Norms(spec)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor, where: Where, cache: Any = None) -> Tensor:
        """[R, C, D] to [R, C, D]; arguments as of `Attention.forward`."""
        return self.added(x, self.attention(self.norms.attention(x), cosines, sines, where, cache))

    def added(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The block's output, from its input and what attention made of it."""
        x = x + (mixed if self.norms.after_attention is None else self.norms.after_attention(mixed))
        made = self.mlp(self.norms.mlp(x))
        out: Tensor = x + (made if self.norms.after_mlp is None else self.norms.after_mlp(made))
        return out

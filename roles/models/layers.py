"""The parts of a decoder block, one class each for all families.

R rows, C slots, D hidden size, H query heads, G key heads, d size of a head, F size within the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rolecall.kernels.attention import Where, attend
from rolecall.roles.models.experts import SparseMLP
from rolecall.roles.models.rope import rotate
from rolecall.roles.models.spec import ModelSpec
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
}


class RMSNorm(nn.Module):
    """x / rms(x) x gain, the mean in float32 (float64 for float64), as Zhang and Sennrich 2019 (arXiv:1910.07467).

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
        high = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + self.eps)
        if not self.wide:
            return self.weight * scaled.to(x.dtype)
        gain = self.weight.to(high.dtype)
        return (scaled * (gain + self.offset if self.offset else gain)).to(x.dtype)


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
        rows, slots, _ = x.shape
        q, k, v = (part(x).view(rows, slots, -1, self.size) for part in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        # Turned while the heads of a slot still lie side by side: attention kernels take that layout without a copy.
        turn = cosines.transpose(1, 2), sines.transpose(1, 2)
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, *turn), rotate(k, *turn), v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        mixed = attend(q, k, v, where, window=self.window, scale=self.scale, softcap=self.softcap, sinks=self.sinks)
        out: Tensor = self.o(mixed.transpose(1, 2).reshape(rows, slots, -1))
        return out


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
    """Attention and MLP, each added to what came in. With a dense MLP no Python control flow depends on data: it compiles whole."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.attention = Attention(spec, layer)
        sparse = spec.experts is not None and spec.experts.layers[layer]
        self.mlp = SparseMLP(spec.hidden, spec.experts, ACTIVATIONS[spec.activation]) if sparse and spec.experts else MLP(spec)
        self.norms = Norms(spec)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor, where: Where, cache: Any = None) -> Tensor:
        """[R, C, D] to [R, C, D]; arguments as of `Attention.forward`."""
        mixed = self.attention(self.norms.attention(x), cosines, sines, where, cache)
        x = x + (mixed if self.norms.after_attention is None else self.norms.after_attention(mixed))
        made = self.mlp(self.norms.mlp(x))
        out: Tensor = x + (made if self.norms.after_mlp is None else self.norms.after_mlp(made))
        return out

"""The decoder of all families: embedding, blocks, final norm and head, with the same names throughout.

```
embed                            [Vp, D]
blocks.N.attention.{q,k,v,o}     and q_norm, k_norm, sinks where the family has them
blocks.N.mlp.{gate,up,down}      or mlp.router and mlp.experts.{gate_up,down}
blocks.N.norms.{attention,mlp}   and after_attention, after_mlp
norm
head                             [Vp, D], the embedding itself where they are tied
```

R rows, C slots, D hidden size, V vocabulary, Vp its size with padding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from rolecall.kernels.attention import Where
from rolecall.roles.models.layers import Block, norm_of
from rolecall.roles.models.pieces import Pieces
from rolecall.roles.models.rope import tables
from rolecall.roles.models.spec import ModelSpec
from torch import Tensor, nn


class Decoder(nn.Module):
    """A language model without its head applied: tokens in, hidden states out. Parameters are not initialised.

    Args:
        spec: of the model.
        rows: of embedding and head, at least the vocabulary; 0 for just that.

    Attributes:
        pieces: what runs in place of the blocks where there is no cache; None for the blocks themselves.
    """

    pieces: Pieces | None = None

    def __init__(self, spec: ModelSpec, rows: int = 0) -> None:
        super().__init__()
        self.spec = spec
        rows = rows or spec.vocab
        self.embed = nn.Embedding(rows, spec.hidden)
        self.blocks = nn.ModuleList(Block(spec, layer) for layer in range(spec.layers))
        self.norm = norm_of(spec, spec.hidden)
        self.head = nn.Linear(spec.hidden, rows, bias=False)
        if spec.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, positions: Tensor, where: Where, cache: Any = None) -> Tensor:
        """Hidden states [R, C, D] after the final norm; arguments as of `rolecall.roles.models.causal.CausalModel.hidden`."""
        x = self.embed(tokens)
        if self.spec.embed_scale != 1.0:
            x = x * float(torch.tensor(self.spec.embed_scale, dtype=x.dtype))  # rounded to the dtype first, as Gemma was trained
        rotary = [tables(rope, self.spec.head_dim, positions, x.dtype) for rope in self.spec.ropes]
        turns = [rotary[number] for number in self.spec.rope_of]
        if self.pieces is not None and cache is None:
            return self.pieces(cast(list[Block], list(self.blocks)), self.norm, x, turns, where)
        for block, turn in zip(self.blocks, turns, strict=True):
            x = block(x, *turn, where, cache)
        out: Tensor = self.norm(x)
        return out

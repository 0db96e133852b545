"""A decoder compiled from one attention to the next, instead of block by block.

Attention depends on where segments lie and runs as it is. What lies between two attentions, the end of one block and the beginning of
the next, is one piece: the stream of residuals goes into it once and comes out once, so that every sum and norm on the way is
fused with its neighbours, forward and backward. The pieces of all layers are alike; what is compiled for one serves all. (Left to
itself, torch.compile gives up every function on the way to attention: it makes four or five pieces of a block.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rolecall.kernels.attention import Where
from torch import Tensor

if TYPE_CHECKING:
    from rolecall.roles.models.layers import Block, RMSNorm

Turn = tuple[Tensor, Tensor]  # cosines and sines, [R, 1, C, d / 2]
Parts = tuple[Tensor, Tensor, Tensor]  # queries, keys, values: [R, C, heads, d]


class Pieces:
    """Runs the blocks of a decoder and its final norm, piece by piece.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        made = partial(torch.compile, backend=backend)  # when a piece is first needed
        self._first, self._between, self._end, self._last = made(_first), made(_between), made(_end), made(_last)

    def __call__(self, blocks: Sequence[Block], norm: RMSNorm, x: Tensor, turns: Sequence[Turn], where: Where) -> Tensor:
        """[R, C, D] embedded tokens to [R, C, D] after the final norm; `turns` are of each block."""
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # where adapters alone are trained; else the first pieces would be unlike the others
        q, k, v = self._first(blocks[0], x, *turns[0])
        for number, block in enumerate(blocks):
            mixed = block.attention.mixed(q, k, v, where)
            if number + 1 < len(blocks):
                x, q, k, v = self._between(block, blocks[number + 1], x, mixed, *turns[number + 1])
        states: Tensor = self._last(blocks[-1], norm, x, mixed)
        return states

    def of_block(self, block: Block) -> Callable[..., Tensor]:
        """A forward of one block alone, in two pieces: for a block that is done again in the backward pass."""

        def forward(x: Tensor, cosines: Tensor, sines: Tensor, where: Where, cache: Any = None) -> Tensor:
            q, k, v = self._first(block, x, cosines, sines)
            mixed = block.attention.mixed(q, k, v, where, cache)
            made: Tensor = self._end(block, x, mixed)
            return made

        return forward


def _first(block: Block, x: Tensor, cosines: Tensor, sines: Tensor) -> Parts:
    return block.attention.apart(block.norms.attention(x), cosines, sines)


def _between(
    block: Block, following: Block, x: Tensor, mixed: Tensor, cosines: Tensor, sines: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _end(block, x, mixed)
    return x, *_first(following, x, cosines, sines)


def _end(block: Block, x: Tensor, mixed: Tensor) -> Tensor:
    return block.added(x, block.attention.o(mixed))


def _last(block: Block, norm: RMSNorm, x: Tensor, mixed: Tensor) -> Tensor:
    states: Tensor = norm(_end(block, x, mixed))
    return states

"""Time for memory: what a block computes is thrown away and computed again in the backward pass. And compiled blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rolecall.protocols.errors import ModelError
from rolecall.roles.models.decoder import Decoder
from rolecall.roles.models.layers import Block
from rolecall.roles.models.pieces import Pieces
from torch import nn
from torch.utils.checkpoint import checkpoint

RECOMPUTE = ("none", "selective", "full")


def recompute(net: nn.Module, how: str, *, dropout: bool = False) -> None:
    """Let the blocks of a model keep less for the backward pass (Chen et al. 2016, arXiv:1604.06174). Gradients stay the same.

    Kept a token and layer (D hidden size, F size within the MLP, as in `rolecall.placement.memory.training`):

    - "none": everything, about 5 D + attention + 4 F numbers.
    - "selective": all but the inside of the MLP, the 4 F. Two of its three products are done again.
    - "full": the block's input, D. The block is done again but for its last product.

    Args:
        net: our decoder or a Hugging Face model.
        how: one of these.
        dropout: whether random numbers are drawn in the blocks, to be drawn again.

    Raises:
        ModelError: a Hugging Face model whose blocks are not found.
    """
    if how == "none":
        return
    for block in blocks_of(net):
        part = block if how == "full" else getattr(block, "mlp", None)
        if not isinstance(part, nn.Module):
            raise ModelError(f"The blocks of {type(net).__name__} have no MLP of that name.", remedy='set recompute to "full" or "none"')
        part.forward = _again(part.forward, dropout)


def compile_blocks(net: nn.Module, backend: str | Callable[..., Any] = "inductor", *, whole: bool = False) -> None:
    """Compile a model for training. Attention runs as it is, between the compiled parts. Names and parameters stay.

    Our decoder is cut at attention (`rolecall.roles.models.pieces`), a Hugging Face model into its blocks; these are alike, so what is
    compiled for one serves all. Comes before `recompute`: what is done again is compiled within, as a compiled whole can't
    hold what runs as it is.

    Args:
        net: our decoder or a Hugging Face model.
        backend: of torch.compile.
        whole: no piece of our decoder reaches from one block into the next, so that blocks can be done again.

    Raises:
        ModelError: a Hugging Face model whose blocks are not found.
    """
    pieces = Pieces(backend)
    if isinstance(net, Decoder) and not whole:
        net.pieces = pieces
        return
    for block in blocks_of(net):
        block.forward = pieces.of_block(block) if isinstance(block, Block) else torch.compile(block.forward, backend=backend)


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The blocks of our decoder or of a Hugging Face model.

    Raises:
        ModelError: there are none where they usually are.
    """
    found = getattr(net, "blocks", None) or getattr(getattr(net, "base_model", None), "layers", None)
    if not isinstance(found, nn.ModuleList):
        raise ModelError(
            f"The blocks of {type(net).__name__} are not found, so they can be neither recomputed nor compiled.",
            remedy='set recompute="none" and compile=False, or use a family that has its definition here',
        )
    return list(found)


def _again(forward: Callable[..., Any], dropout: bool) -> Callable[..., Any]:
    """A forward that is done again in the backward pass."""

    def twice(*args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=dropout, **options)

    return twice

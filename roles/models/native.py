"""Causal models on our own decoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rolecall.kernels.attention import Where
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.models.decoder import Decoder
from rolecall.roles.models.families import Family
from rolecall.roles.models.spec import ModelSpec
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NativeModel(CausalModel):
    """A model of a known family on `Decoder`.

    Args:
        family: of the model.
        spec: of the model.
        config: its Hugging Face config, which checkpoints carry on; and its generation config, if it has one.
        dtype: of the parameters.
        device: of the parameters, which are not initialised but for the padding.
        pad_vocab: rows of embedding and head are a multiple of it. The rows added are 0; nobody outside sees them.
    """

    net: Decoder

    def __init__(
        self, family: Family, spec: ModelSpec, config: Any, generation: Any = None, *, dtype: torch.dtype, device: str, pad_vocab: int = 64
    ) -> None:
        with torch.device("meta"):
            net = Decoder(spec, -(-spec.vocab // pad_vocab) * pad_vocab)
        if spec.tied:
            net.head.register_parameter("weight", None)  # else room would be made for it too
        self.net = net.to(dtype).to_empty(device=device).eval()
        if spec.tied:
            self.net.head.weight = self.net.embed.weight
        self.spec, self.family, self.config, self.generation = spec, family, config, generation
        with torch.no_grad():
            for matrix in (self.net.embed.weight, self.net.head.weight):
                matrix[spec.vocab :] = 0

    @property
    def head(self) -> Tensor:
        """[Vp, D]; a parameter, the embedding itself where they are tied."""
        return self.net.head.weight

    def hidden(self, tokens: Tensor, positions: Tensor, where: Where, cache: Any = None) -> Tensor:
        """As `CausalModel.hidden`."""
        states: Tensor = self.net(tokens, positions, where, cache)
        return states

    def named_tensors(self) -> dict[str, Tensor]:
        """As `CausalModel.named_tensors`: views of the parameters, at their true sizes."""
        own = dict(self.net.named_parameters())
        return {name.theirs: own[name.ours].detach()[name.index or ...] for name in self.family.names(self.spec)}

    def write(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """As `CausalModel.write`."""
        from rolecall.roles.models.writing import write_config, write_tensors

        write_config(folder, self.config, self.generation, self.family.architecture, self.dtype)
        write_tensors(folder, self.named_tensors())
        tokenizer.save_pretrained(str(folder))

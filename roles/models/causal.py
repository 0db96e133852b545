"""The seam between the roles and a model's code: what every causal language model can do, whoever defines it.

Shape letters: R rows, C slots of a row, D hidden size, V vocabulary, Vp rows of the head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from rolecall.kernels.attention import Where
from rolecall.protocols.errors import ModelError, WeightsError
from rolecall.roles.folders import new_folder
from rolecall.roles.models.heads import Head, HeadSpec, write_heads
from rolecall.roles.models.spec import ModelSpec
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CausalModel(ABC):
    """A causal language model without its head applied: tokens in, hidden states out.

    The head is kept apart because only some positions need logits. Dropout is off, in training too: the policy that is
    trained must be the one that sampled. Logits are `hidden @ head.T`, the first `spec.vocab` columns, times
    `spec.logit_scale` and capped by `spec.logit_softcap` if that is not 0.

    Attributes:
        net: the module with the parameters.
        spec: sizes and choices.
        longest: slots that a row may have, where the implementation can't do longer ones; 0 for no limit of its own.
        caches: whether `hidden` takes a cache.
        notes: what can't be had with this model and why, a sentence each.
        heads: beside the model's own, by name; trained and saved with it.
    """

    net: torch.nn.Module
    spec: ModelSpec
    longest: int = 0
    caches: bool = True
    notes: tuple[str, ...] = ()
    heads: Mapping[str, Head] = MappingProxyType({})

    @property
    @abstractmethod
    def head(self) -> Tensor:
        """[Vp, D] matrix that turns hidden states into logits; rows from `spec.vocab` on are padding."""

    @abstractmethod
    def hidden(self, tokens: Tensor, positions: Tensor, where: Where, cache: Any = None) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: [R, C] int64, each in the vocabulary.
            positions: [R, C] int64, of each token within its sequence.
            where: who may attend to whom; `Packed` without a cache, `Dense` with one.
            cache: object with `update(keys, values, layer) -> (keys, values)`, [R, key heads, C, size of a head], for decoding.

        Returns:
            [R, C, D] in the model's dtype.

        Raises:
            ModelError: rows are longer than `longest`.
        """

    @abstractmethod
    def named_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint of the model holds: Hugging Face name → tensor (not a copy, without gradient), tied ones once."""

    @abstractmethod
    def write(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write config, weights (safetensors) and tokenizer into an existing folder."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.head.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.head.device

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], in float32 at least: for a few positions, as they are all held at once."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        found = self.spec.logit_scale * (hidden.to(wide) @ self.head[: self.spec.vocab].to(wide).T)
        cap = self.spec.logit_softcap
        return cap * torch.tanh(found / cap) if cap else found

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Every parameter once, in a fixed order."""
        return self.net.parameters()

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by the names of `net` and "heads.NAME…" for other heads, in a fixed order."""
        found = {name: parameter for name, parameter in self.net.named_parameters() if parameter.requires_grad}
        for name, head in self.heads.items():
            found |= {f"heads.{name}.{label}": parameter for label, parameter in head.named_parameters()}
        return found

    def add_head(self, name: str, spec: HeadSpec, *, seed: int = 0) -> Head:
        """Put a fresh head beside the model's own, in float32 at least; returns it.

        Raises:
            ModelError: there is one of that name, or the name is no identifier.
            ConfigError: the spec makes no sense.
        """
        if name in self.heads or not name.isidentifier():
            raise ModelError(
                "A head needs a name of its own.", ask=repr(name), have=", ".join(self.heads) or "no heads", remedy="give another name"
            )
        head = Head(spec, self.spec.hidden, seed=seed).to(torch.promote_types(self.dtype, torch.float32)).to(self.device)
        self.heads = MappingProxyType({**self.heads, name: head})
        return head

    def check_length(self, tokens: int) -> None:
        """Raise ModelError if a sequence of so many tokens is longer than the model's context."""
        if tokens > self.spec.max_positions:
            raise ModelError(
                "A prompt with its completion is longer than the model's context.",
                ask=f"{tokens} tokens",
                have=f"{self.spec.max_positions} positions",
                remedy="leave out long prompts, lower max_tokens, or use a model with a longer context",
            )

    def check_tokens(self, least: int, greatest: int) -> None:
        """Raise ModelError unless token ids from `least` to `greatest` are all in the vocabulary."""
        if least < 0 or greatest >= self.spec.vocab:
            raise ModelError(
                "There are tokens that the model does not know.",
                ask=f"token ids {least} to {greatest}",
                have=f"0 to {self.spec.vocab - 1}",
                remedy="tokenise with the tokenizer of this model, or extend its vocabulary",
            )

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors of the same names and shapes over the model's; dtype and device may differ.

        Raises:
            WeightsError: a name is missing or unknown, or a shape differs; nothing was copied then.
        """
        own = self.named_tensors()
        if own.keys() != tensors.keys():
            missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
            raise WeightsError(f"The weights are of another model: missing {missing[:3]}, unknown {unknown[:3]}.")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise WeightsError(f"Tensor {name} is {tuple(tensors[name].shape)}, the model's is {tuple(tensor.shape)}.")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> str:
        """Write a new folder that plain transformers loads; returns its path. Raises ModelError if it exists already."""
        with new_folder(folder, ModelError) as aside:
            self.write(aside, tokenizer)
            write_heads(aside, self.heads)
        return str(folder)

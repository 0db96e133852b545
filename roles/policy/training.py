"""What a policy does in its member's process: forward, backward, gradients, update. Needs torch.

R rows, C slots, K trained tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from rolecall.kernels.losses import Tokens, nll
from rolecall.protocols.errors import UserError
from rolecall.protocols.messages import PackedBatch
from rolecall.roles.models.adapters import Adapters
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.models.lora import Lora, resolve
from rolecall.roles.models.recompute import compile_blocks, recompute
from rolecall.roles.packed import on_device, packed_logprobs, packed_nll, passes
from rolecall.roles.policy.distributed import Meeting
from rolecall.roles.policy.gradients import Gradients
from rolecall.roles.policy.optimiser import Optimiser
from rolecall.roles.policy.speed import Speed
from rolecall.roles.weights import tensors_digest
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Loss = Callable[[Tokens], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Sums:
    """Sums of what a pass measures, kept on the device until they are asked for: reading a number there stops the GPU."""

    totals: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        """Count the values [K] under `name`."""
        total = values.detach().double().sum()
        self.totals[name] = self.totals[name] + total if name in self.totals else total


class Training:
    """A model, its gradients and its optimiser.

    Args:
        adapters: in the model; they are what is trained then.
        source: where the model was loaded from.
    """

    def __init__(
        self,
        model: CausalModel,
        tokenizer: PreTrainedTokenizerBase,
        meeting: Meeting,
        adapters: Adapters | None = None,
        *,
        source: str = "",
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        named = model.named_parameters()
        self.model = model
        self.tokenizer = tokenizer
        self.meeting = meeting
        self.adapters = adapters
        self.source = source
        self.speed = Speed(model, adapters)
        self._passes = 0  # since the last update
        self._base = ""
        self.gradients = Gradients(list(named.values()))
        self.optimiser = Optimiser(named, self.gradients, betas=betas, weight_decay=weight_decay)

    def accumulate(self, batch: PackedBatch, loss: Loss, rows_per_pass: int) -> dict[str, tuple[float, float]]:
        """Add the gradient of sum(loss x weights) over the batch's trained tokens.

        Returns:
            Measures, as (sum, weight) that add up over calls and members: `loss` is the weighted mean, the loss's own
            measures and `logprob_gap` (|logprob - old|) are means over tokens, `tokens` are the trained ones. `nll` on tokens
            that nobody sampled (fine-tuning) has no measures of its own, not even the entropy: logprobs are never made.

        Raises:
            UserError: the loss does not return a loss for each token. After any error the gradients are 0.
        """
        started = time.perf_counter()
        sums, slots, operations = Sums(), 0, 0.0
        try:
            for part in passes(batch, rows_per_pass):
                with self._dropping():
                    self._one_pass(part, loss, sums).backward()
                slots += int((part.segments >= 0).sum())
                operations += self.speed.operations(part)
        except BaseException:
            self.gradients.clear()
            raise
        found = _means(batch, sums)
        took = time.perf_counter() - started
        return found and found | {"tokens_per_s": (float(slots), took)} | self.speed.measures(operations, took)

    @torch.no_grad()
    def measure(self, batch: PackedBatch, loss: Loss, rows_per_pass: int) -> dict[str, tuple[float, float]]:
        """What `accumulate` returns of the tokens, without gradient and without dropout; errors are the same."""
        sums = Sums()
        for part in passes(batch, rows_per_pass):
            self._one_pass(part, loss, sums)
        return _means(batch, sums)

    def _one_pass(self, part: PackedBatch, loss: Loss, sums: Sums) -> Tensor:
        """sum(loss x weights) of a pass, which is measured."""
        if loss is nll and part.old is None and part.reference is None and part.temperature == 1.0:
            total = packed_nll(self.model, part)  # nobody asks for a token's logprob: half the work of the head
            sums.add("loss", total)
            return total
        logprobs, entropy = packed_logprobs(self.model, part)

        def put(values: np.ndarray | None) -> Tensor | None:
            return None if values is None else on_device(values, logprobs.device).to(logprobs.dtype)

        weights = on_device(part.weights, logprobs.device).to(logprobs.dtype)
        tokens = Tokens(
            logprobs=logprobs,
            old=put(part.old),
            advantages=put(part.advantages),
            weights=weights,
            samples=on_device(part.samples, logprobs.device),
            reference=put(part.reference),
            entropy=entropy,
        )
        each, measures = loss(tokens)
        wrong = [name for name, values in {"loss": each, **measures}.items() if values.shape != logprobs.shape]
        if wrong:
            raise UserError(
                f"The loss function gives {wrong[0]!r} in another shape than one value a token.",
                ask=f"shape {tuple(logprobs.shape)}",
                remedy="return (loss [K], measures {name: [K]}) and let the weights make the mean",
            )
        weighted = each * weights
        sums.add("loss", weighted)
        if tokens.old is not None:
            sums.add("logprob_gap", (logprobs.detach() - tokens.old).abs())
        for name, values in measures.items():
            sums.add(name, values)
        return weighted.sum()

    def update(self, learning_rate: float, clip: float) -> tuple[float, bool]:
        """Add the gradients up over the members, clip them, step, and start anew from 0.

        Returns:
            The gradient's norm before clipping, and whether the step was taken: not if the norm is not finite, nor if it is 0
            (every sample failed or none differed), where only momentum would move. The weights are then as they were, in all
            members.
        """
        self.gradients.add_up(self.meeting)
        norm = self.gradients.clip(clip)
        sound = math.isfinite(norm) and norm > 0.0
        if sound:
            self.optimiser.step(learning_rate)
        self.gradients.clear()
        self._passes = 0
        return norm, sound

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from other weights of the same model: optimiser and adapters start anew.

        Raises:
            WeightsError: they are of another model; nothing has changed then.
        """
        self.model.load_tensors(tensors)
        self._base = ""
        if self.adapters is not None:
            self.adapters.restart()
        self.optimiser.adopt()
        self.gradients.clear()

    @property
    def base(self) -> str:
        """Digest of the model without its adapters, computed once as they are frozen."""
        self._base = self._base or tensors_digest(self.model.named_tensors())
        return self._base

    def _dropping(self) -> AbstractContextManager[None]:
        """The adapters' dropout, which depends on update, pass and member alone: a restored policy draws the same."""
        self._passes += 1
        if self.adapters is None:
            return nullcontext()
        return self.adapters.dropping(self.optimiser.steps, self._passes, self.meeting.rank)


def prepare(model: CausalModel, *, lora: Lora | None, recomputed: str, compiled: bool) -> Adapters | None:
    """Make a model ready for training: adapters in it, what is recomputed, compiled blocks.

    Raises:
        ModelError: the model has no linears of those names, or no blocks.
    """
    adapters = None if lora is None else Adapters(model.net, resolve(lora))
    if compiled:
        compile_blocks(model.net, whole=recomputed == "full")
    recompute(model.net, recomputed, dropout=lora is not None and lora.dropout > 0)
    return adapters


def _means(batch: PackedBatch, sums: Sums) -> dict[str, tuple[float, float]]:
    """What was measured of a batch, as (sum, weight); nothing where it has no trained token."""
    count = float(len(batch.targets))
    if not count:
        return {}
    found = {name: (float(total), count) for name, total in sums.totals.items()}
    return found | {"loss": (found["loss"][0], float(batch.weights.astype("float64").sum())), "tokens": (count, 1.0)}

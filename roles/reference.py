"""The reference: a model that is not trained, asked for the logprobs of samples."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rolecall.protocols.errors import ConfigError, RolecallError
from rolecall.protocols.messages import Logprobs, Samples
from rolecall.roles.base import Member, Role
from rolecall.roles.models import check_model

if TYPE_CHECKING:
    from rolecall.roles.models.causal import CausalModel


class Reference(Role):
    """A model, forward only.

    Args:
        model: Hugging Face folder or hub name.
        dtype: of weights and computation.
        row_tokens: capacity of the packed rows.
        rows_per_pass: rows computed at once; memory grows with rows_per_pass x row_tokens².
    """

    name = "reference"

    def __init__(self, model: str, *, dtype: str = "float32", row_tokens: int = 1024, rows_per_pass: int = 1) -> None:
        self.model = model
        self.dtype = dtype
        self.row_tokens = row_tokens
        self.rows_per_pass = rows_per_pass
        self._net: CausalModel | None = None

    def check(self) -> None:
        """Raise ModelError or ConfigError for a model folder or settings that can't work."""
        check_model(self.model)
        if self.row_tokens < 1 or self.rows_per_pass < 1:
            raise ConfigError("row_tokens and rows_per_pass are at least 1.", ask=f"{self.row_tokens} and {self.rows_per_pass}")

    def setup(self, member: Member) -> None:
        """Load the model."""
        super().setup(member)
        import torch
        from rolecall.roles.models import load

        if member.device == "cpu":
            torch.set_num_threads(member.threads)
        self._net = load(self.model, dtype=self.dtype, device=member.device)

    def logprobs(self, samples: Samples) -> Logprobs:
        """Logprob of each completion token under this model, at the temperature it was sampled at; 0 at prompt tokens."""
        from rolecall.roles.packed import sample_logprobs

        if self._net is None:
            raise RolecallError("The reference is not set up: call setup(member) before any verb.")
        started = time.perf_counter()
        answer = sample_logprobs(self._net, samples, row_tokens=self.row_tokens, rows_per_pass=self.rows_per_pass, version=self.version)
        self.meter.add("tokens_per_s", len(samples.tokens) / (took := time.perf_counter() - started), weight=took)
        return answer

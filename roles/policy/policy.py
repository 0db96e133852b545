"""The policy: settings and verbs. Light to import; what needs torch stands in the modules beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from rolecall.protocols.errors import ConfigError, RolecallError
from rolecall.protocols.messages import Logprobs, Metrics, PackedBatch, Samples, Weights
from rolecall.roles.base import Member, Role
from rolecall.roles.models import check_model
from rolecall.roles.models.lora import Lora, check_pattern, resolve

if TYPE_CHECKING:
    from rolecall.roles.policy.training import Training
DTYPES = ("float32", "bfloat16", "float64")  # float16 can be sent, not trained: its gradients underflow
SCHEDULES = ("constant", "linear", "cosine", "wsd")
RECOMPUTE = ("none", "selective", "full")


class Policy(Role):
    """A causal language model that is trained; N members give the same update as one.

    Args:
        model: Hugging Face folder or hub name.
        dtype: of the parameters and the computation; gradients and optimiser are float32 at least.
        row_tokens: capacity of the packed rows of `logprobs`.
        rows_per_pass: rows computed at once; memory grows with rows_per_pass x capacity².
        weight_decay: of AdamW, on matrices.
        betas: of AdamW.
        clip: largest global norm of the gradient; 0 for no limit.
        warmup: updates over which the learning rate rises to the one asked for.
        schedule: "constant", or "linear" or "cosine" down to 0 at `total_steps`, or "wsd": constant, and down to 0 at the end.
        total_steps: updates of the whole run; needed unless the schedule is constant.
        cooldown: updates over which "wsd" goes down to 0; 0 for a tenth of all.
        publish_dtype: to send weights in; "" means as they are.
        lora: train low-rank adapters instead of the weights; what is published has them merged.
        freeze: regular expression; parameters whose Hugging Face names begin with what it matches are not trained.
        recompute: "none" keeps everything for the backward pass, "selective" all but the inside of the MLPs, "full" only
            the input of each block; what is not kept is computed twice. The gradients are the same.
        compile: compile each block with torch.compile; meant for GPUs. The first passes take minutes.
        deadline: seconds that members wait for each other.
    """

    name = "policy"

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        row_tokens: int = 1024,
        rows_per_pass: int = 1,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        clip: float = 1.0,
        warmup: int = 0,
        schedule: str = "constant",
        total_steps: int = 0,
        cooldown: int = 0,
        publish_dtype: str = "",
        lora: Lora | None = None,
        freeze: str = "",
        recompute: str = "none",
        compile: bool = False,  # noqa: A002
        deadline: float = 300.0,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.row_tokens = row_tokens
        self.rows_per_pass = rows_per_pass
        self.weight_decay = weight_decay
        self.betas = betas
        self.clip = clip
        self.warmup = warmup
        self.schedule = schedule
        self.total_steps = total_steps
        self.cooldown = cooldown
        self.publish_dtype = publish_dtype
        self.lora = lora
        self.freeze = freeze
        self.recompute = recompute
        self.compile = compile
        self.deadline = deadline
        self._training: Training | None = None

    def check(self) -> None:
        """Raise ModelError or ConfigError for a model folder or settings that can't work."""
        check_model(self.model)
        for name, value, allowed in (
            ("dtype", self.dtype, DTYPES),
            ("publish_dtype", self.publish_dtype, ("", "float16", *DTYPES)),
            ("schedule", self.schedule, SCHEDULES),
            ("recompute", self.recompute, RECOMPUTE),
        ):
            if value not in allowed:
                raise ConfigError(f"The policy has no {name} {value!r}.", have=", ".join(allowed), remedy="choose one of these")
        if self.schedule != "constant" and self.total_steps <= self.warmup + self.cooldown:
            raise ConfigError(
                f"A {self.schedule} schedule ends at total_steps.",
                ask=f"total_steps={self.total_steps}, warmup={self.warmup}, cooldown={self.cooldown}",
                remedy="set total_steps to the number of updates of the run, above warmup and cooldown together",
            )
        low = min(self.weight_decay, self.clip, self.warmup, self.cooldown)
        if min(self.row_tokens, self.rows_per_pass) < 1 or low < 0 or self.deadline <= 0:
            raise ConfigError(
                "A number of the policy is too small.",
                ask=f"row_tokens={self.row_tokens}, rows_per_pass={self.rows_per_pass}, weight_decay={self.weight_decay}, "
                f"clip={self.clip}, warmup={self.warmup}, cooldown={self.cooldown}, deadline={self.deadline}",
                remedy="row_tokens, rows_per_pass and deadline are positive, the others not negative",
            )

        if self.lora is not None:
            self.lora.check()
            resolve(self.lora)
        check_pattern("freeze", self.freeze)
        if self.freeze and self.lora is not None:
            raise ConfigError(
                "With adapters all weights are frozen.", ask=f"freeze={self.freeze!r} and lora", remedy="leave one of them out"
            )

    def setup(self, member: Member) -> None:
        """Meet the other members and load the model."""
        super().setup(member)
        import torch
        from rolecall.roles.memory import keep_freed_memory
        from rolecall.roles.models import load
        from rolecall.roles.models.freezing import freeze
        from rolecall.roles.policy.distributed import Meeting
        from rolecall.roles.policy.training import Training, prepare
        from rolecall.roles.tokens import identity, load_tokenizer

        if member.device == "cpu":
            torch.set_num_threads(member.threads)
            keep_freed_memory()
        net = load(self.model, dtype=self.dtype, device=member.device)
        freeze(net, self.freeze)
        adapters = prepare(net, lora=self.lora, recomputed=self.recompute, compiled=self.compile)
        tokenizer = load_tokenizer(self.model)  # goes into every checkpoint
        self._identity = identity(tokenizer)
        meeting = Meeting(member, self.deadline)
        self._training = Training(net, tokenizer, meeting, adapters, source=self.model, betas=self.betas, weight_decay=self.weight_decay)

    def accumulate(self, batch: PackedBatch, loss: Callable[..., Any]) -> Metrics:
        """Add the gradient of sum(loss x weights) over the trained tokens of the batch to what was accumulated before.

        Args:
            batch: this member's share, maybe of no rows. Weights sum to 1 over all members and calls until the update.
            loss: from `rolecall.kernels.losses` or of that form: Tokens → (loss [K], measures {name: [K]}).

        Returns:
            loss, tokens, tokens_per_s, tflops, mfu, logprob_gap and the loss's own measures (kl, clip_fraction, entropy, …).

        Raises:
            UserError: the loss returns another shape. After any error the gradients are 0, those of earlier calls too.
            DataError: the rows were made with another tokenizer; then nothing has changed.
        """
        self._check_tokens(batch)
        return Metrics(sums=self._ready().accumulate(batch, loss, self.rows_per_pass))

    def measure(self, batch: PackedBatch, loss: Callable[..., Any], word: str = "held_out") -> Metrics:
        """What `accumulate` measures, without gradient: nothing is trained. Names begin with `word`: held_out_loss, held_out_tokens, …

        Args:
            batch: this member's share, maybe of no rows.
            loss: as for `accumulate`.
            word: of this measurement.
        """
        self._check_tokens(batch)
        found = self._ready().measure(batch, loss, self.rows_per_pass)
        return Metrics(sums={f"{word}_{name}": each for name, each in found.items()})

    def _check_tokens(self, batch: PackedBatch) -> None:
        from rolecall.roles.tokens import check_identity

        self._ready()
        check_identity(batch.tokenizer, self._identity, "rows", self.model)

    def update(self, learning_rate: float) -> int:
        """Step the optimiser with the gradients of all members; every member must be called.

        A gradient that is not finite, or 0 throughout (no sample was scored, or none differed), moves nothing: weights and
        version stay as they are, and the metric `skipped` is 1.

        Args:
            learning_rate: before warmup and schedule.

        Returns:
            The version of the weights now.
        """
        from rolecall.roles.policy.optimiser import scheduled

        training = self._ready()
        started = time.perf_counter()
        rate = scheduled(
            learning_rate,
            training.optimiser.steps,
            schedule=self.schedule,
            warmup=self.warmup,
            total_steps=self.total_steps,
            cooldown=self.cooldown,
        )
        norm, sound = training.update(rate, self.clip)
        if sound:
            self.version += 1
            self.meter.add("grad_norm", norm)
        self.meter.add("skipped", 0.0 if sound else 1.0)
        self.meter.add("learning_rate", rate)
        self.meter.add("update_s", time.perf_counter() - started)
        return self.version

    def logprobs(self, samples: Samples, *, reference: bool = False) -> Logprobs:
        """Logprob of each completion token under the weights as they are, without gradient; 0 at prompt tokens.

        Args:
            reference: leave the adapters out, so that the policy answers as the model it started from (version 0): a
                `Reference` that needs no second model.

        Raises:
            ConfigError: a reference is asked of a policy without adapters.
        """
        from rolecall.roles.packed import sample_logprobs

        training = self._ready()
        if reference and training.adapters is None:
            raise ConfigError(
                "A policy that trains all weights has no reference in it.", ask="reference=True", remedy="set lora, or spawn a Reference"
            )
        with training.adapters.off() if reference and training.adapters is not None else nullcontext():
            return sample_logprobs(
                training.model,
                samples,
                row_tokens=self.row_tokens,
                rows_per_pass=self.rows_per_pass,
                version=0 if reference else self.version,
            )

    def publish(self) -> Weights:
        """This member's shard of the weights, adapters merged: a copy, with a digest for each tensor."""
        from rolecall.roles.weights import export

        training = self._ready()
        merged = None if training.adapters is None else training.adapters.merged
        tensors = training.model.named_tensors()
        return export(tensors, self.version, self.member.rank, self.member.world, self.publish_dtype or None, merged)

    def load(self, parts: Weights | Sequence[Weights]) -> dict[str, Any]:
        """Take over published weights and their version; the optimiser starts anew, and so do adapters.

        Returns:
            {"version": …, "digest": …} of what is loaded.

        Raises:
            WeightsError: they are not whole or of another model; nothing has changed then.
        """
        from rolecall.roles.weights import assemble, version_digest

        shards = [parts] if isinstance(parts, Weights) else list(parts)
        training = self._ready()
        training.take(assemble(shards, training.model.named_tensors()))
        self.version = shards[0].version
        return {"version": self.version, "digest": version_digest(shards)}

    def save(self, folder: str) -> str:
        """Write a checkpoint into a new folder; one member is enough. Returns its path.

        Plain transformers loads the folder, or peft does: with `lora` it holds the adapters alone.

        Raises:
            ModelError: the folder exists already.
        """
        from rolecall.roles.policy.checkpoint import Facts, write

        training = self._ready()
        facts = Facts(version=self.version, steps=training.optimiser.steps, dtype=self.dtype)
        write(folder, training, facts)
        return folder

    def restore(self, folder: str) -> int:
        """Continue exactly from a checkpoint; every member must be called. Returns the version of the weights.

        Raises:
            ModelError: a file of it is missing or has changed, or it is of another model or dtype; nothing has changed then.
        """
        from rolecall.roles.policy.checkpoint import restore

        facts = restore(folder, self._ready(), self.dtype)
        self.version = facts.version
        return self.version

    def export(self, folder: str) -> str:
        """Write the model alone, adapters merged, into a new folder that plain transformers loads; returns its path.

        Raises:
            ModelError: the folder exists already.
        """
        training = self._ready()
        with training.adapters.plain() if training.adapters is not None else nullcontext():
            return training.model.save(folder, training.tokenizer)

    def close(self) -> None:
        """Leave the group of members."""
        if self._training is not None:
            self._training.meeting.leave()
            self._training = None

    def _ready(self) -> Training:
        if self._training is None:
            raise RolecallError("The policy is not set up: call setup(member) before any verb.")
        return self._training

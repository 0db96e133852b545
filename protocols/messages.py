"""What is said: one frozen struct a message.

Shape letters: P prompts (groups), N samples, T tokens of all sequences laid end to end, R rows, C capacity of a row,
L = R x C slots, S segments, K trained tokens, B bytes, E tensors. Token ids are int32; logprobs are float32, in nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Self

import msgspec
import numpy as np
from rolecall.protocols import sense, units
from rolecall.protocols.arrays import Int32T, NatsT, Offsets, Spec
from rolecall.protocols.base import Divisible, Message, Outline
from rolecall.protocols.packed import PackedBatch

__all__ = [
    "Abstained", "Divisible", "Failed", "Logprobs", "Message", "Metrics", "Outline", "PackedBatch", "Prompts",
    "Receipt", "Samples", "Scored", "Scores", "Tensor", "Verdict", "Weights",
]  # fmt: skip

Array = np.ndarray


class Prompts(Divisible, frozen=True, kw_only=True, eq=False):
    """Data to rollout: tokenised prompts. A unit is a prompt."""

    keys: Annotated[Array, Spec("int64", "N")]  # position in the data stream, unique within a run; samples are seeded by it
    ids: Annotated[tuple[str, ...], Spec("", "N")]  # identity of the record, the same in every epoch
    tokens: Int32T
    cu_seqlens: Offsets
    texts: Annotated[tuple[str, ...], Spec("", "N")]  # the user's words, before templating
    columns: Annotated[dict[str, tuple[Any, ...]], Spec("", "N")] = msgspec.field(default_factory=dict)  # answer, metadata
    tokenizer: str = ""  # identity hash; roles compare it before the first step

    @property
    def lengths(self) -> Array:
        """Tokens of each prompt: int64[N]."""
        return np.diff(self.cu_seqlens)

    def faults(self) -> Iterator[tuple[str, str]]:
        """What the Specs can't say: tokens, offsets, keys."""
        return sense.prompts(self)

    def outline(self) -> Outline:
        """One sample a unit, nothing to train."""
        count = len(self.keys)
        return Outline(keys=self.keys, sizes=self.lengths, counts=np.ones(count, np.int32), lengths=np.zeros(count, np.int32))

    def take(self, chosen: Sequence[int] | Array) -> Self:
        """These prompts alone."""
        rows = units.ranges(chosen, len(self.keys), "Prompts")
        return msgspec.structs.replace(
            self,
            keys=units.cut(self.keys, rows),
            ids=units.cut_tuple(self.ids, rows),
            tokens=units.cut(self.tokens, units.below(rows, self.cu_seqlens)),
            cu_seqlens=units.cut_offsets(self.cu_seqlens, rows),
            texts=units.cut_tuple(self.texts, rows),
            columns=units.cut_columns(self.columns, rows),
        )

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All prompts of these parts, which must be of one tokenizer."""
        return cls(
            tokenizer=units.agreed([part.tokenizer for part in parts], "Prompts", "tokenizer"),
            keys=units.joined([part.keys for part in parts]),
            ids=tuple(name for part in parts for name in part.ids),
            tokens=units.joined([part.tokens for part in parts]),
            cu_seqlens=units.offsets(units.joined([part.lengths for part in parts])),
            texts=tuple(text for part in parts for text in part.texts),
            columns=units.joined_columns([(len(part.keys), part.columns) for part in parts], "Prompts", "columns"),
        )


class Samples(Divisible, frozen=True, kw_only=True, eq=False):
    """Rollout to reward, reference, policy: prompts with their completions. A unit is a prompt with its samples.

    Samples of one prompt stand together, siblings in order. `tokens` of a sample are prompt then completion.
    """

    keys: Annotated[Array, Spec("int64", "P")]
    ids: Annotated[tuple[str, ...], Spec("", "P")]
    texts: Annotated[tuple[str, ...], Spec("", "P")]
    columns: Annotated[dict[str, tuple[Any, ...]], Spec("", "P")] = msgspec.field(default_factory=dict)
    counts: Annotated[Array, Spec("int32", "P")]  # samples of each prompt
    tokens: Int32T
    logprobs: NatsT  # of each completion token when it was sampled; 0 at prompt tokens
    cu_seqlens: Offsets
    prompt_lengths: Annotated[Array, Spec("int32", "N")]
    siblings: Annotated[Array, Spec("int32", "N")]  # 0 .. counts-1 within the prompt
    finish: Annotated[Array, Spec("uint8", "N")]  # FINISH[...]: 0 stop, 1 length, 2 aborted
    completions: Annotated[tuple[str, ...], Spec("", "N")]  # decoded, without special tokens
    span_starts: Annotated[Array, Spec("int64", "V")]  # token offset at which a version begins, ascending
    span_versions: Annotated[Array, Spec("int64", "V")]  # weights version that sampled the tokens from there on
    temperature: float = 1.0  # the logprobs are those of the distribution at this temperature

    FINISH: ClassVar[tuple[str, ...]] = ("stop", "length", "aborted")

    @property
    def lengths(self) -> Array:
        """Tokens of each sample, prompt and completion: int64[N]."""
        return np.diff(self.cu_seqlens)

    @property
    def completion_lengths(self) -> Array:
        """Tokens sampled for each sample: int32[N]."""
        found: Array = (self.lengths - self.prompt_lengths).astype(np.int32)
        return found

    @property
    def prompt_numbers(self) -> Array:
        """Which prompt (0 .. P-1) each sample answers: int64[N]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def oldest_version(self) -> int:
        """The oldest weights that sampled a token of this message; 0 when there are no tokens."""
        return int(self.span_versions.min(initial=np.iinfo(np.int64).max)) if len(self.span_versions) else 0

    def token_versions(self) -> Array:
        """Weights version of every token: int64[T]."""
        return np.repeat(self.span_versions, np.diff(self.span_starts, append=len(self.tokens)))

    def faults(self) -> Iterator[tuple[str, str]]:
        """What the Specs can't say: how samples stand together, lengths, codes, version spans."""
        return sense.samples(self)

    def outline(self) -> Outline:
        """A prompt's size is the tokens of all its samples."""
        sizes = np.diff(self.cu_seqlens[units.offsets(self.counts)])
        return Outline(keys=self.keys, sizes=sizes, counts=self.counts, lengths=self.completion_lengths)

    def take(self, chosen: Sequence[int] | Array) -> Self:
        """These prompts with their samples."""
        rows = units.ranges(chosen, len(self.keys), "Samples")
        own = units.below(rows, units.offsets(self.counts))
        tokens = units.below(own, self.cu_seqlens)
        starts, versions = units.cut_spans(self.span_starts, self.span_versions, tokens)
        return msgspec.structs.replace(
            self,
            keys=units.cut(self.keys, rows),
            ids=units.cut_tuple(self.ids, rows),
            texts=units.cut_tuple(self.texts, rows),
            columns=units.cut_columns(self.columns, rows),
            counts=units.cut(self.counts, rows),
            tokens=units.cut(self.tokens, tokens),
            logprobs=units.cut(self.logprobs, tokens),
            cu_seqlens=units.cut_offsets(self.cu_seqlens, own),
            prompt_lengths=units.cut(self.prompt_lengths, own),
            siblings=units.cut(self.siblings, own),
            finish=units.cut(self.finish, own),
            completions=units.cut_tuple(self.completions, own),
            span_starts=starts,
            span_versions=versions,
        )

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All samples of these parts, which must be of one temperature."""
        temperature = units.agreed([part.temperature for part in parts], "Samples", "temperature")
        begins = units.offsets(np.array([len(part.tokens) for part in parts]))
        shifted = [part.span_starts + begin for part, begin in zip(parts, begins, strict=False)]
        starts, versions = units.merge_spans(shifted, [part.span_versions for part in parts])
        return cls(
            temperature=temperature,
            keys=units.joined([part.keys for part in parts]),
            ids=tuple(name for part in parts for name in part.ids),
            texts=tuple(text for part in parts for text in part.texts),
            columns=units.joined_columns([(len(part.keys), part.columns) for part in parts], "Samples", "columns"),
            counts=units.joined([part.counts for part in parts]),
            tokens=units.joined([part.tokens for part in parts]),
            logprobs=units.joined([part.logprobs for part in parts]),
            cu_seqlens=units.offsets(units.joined([part.lengths for part in parts])),
            prompt_lengths=units.joined([part.prompt_lengths for part in parts]),
            siblings=units.joined([part.siblings for part in parts]),
            finish=units.joined([part.finish for part in parts]),
            completions=tuple(text for part in parts for text in part.completions),
            span_starts=starts,
            span_versions=versions,
        )


class Scored(msgspec.Struct, frozen=True, tag=True):
    """The verdict on one sample: a value."""

    value: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The verdict on one sample: it could not be scored, which is never a score of 0."""

    why: str


class Abstained(msgspec.Struct, frozen=True, tag=True):
    """The verdict on one sample: this reward has nothing to say of it."""


Verdict = Scored | Failed | Abstained


class Scores(Divisible, frozen=True, kw_only=True, eq=False):
    """Reward to controller. A unit is a prompt; `values[n]` counts only where `status[n]` is scored."""

    keys: Annotated[Array, Spec("int64", "P")]
    counts: Annotated[Array, Spec("int32", "P")]
    values: Annotated[Array, Spec("float32", "N", "finite")]  # 0 where not scored
    status: Annotated[Array, Spec("uint8", "N")]  # STATUS[...]: 0 scored, 1 failed, 2 abstained
    reasons: dict[int, str] = msgspec.field(default_factory=dict)  # sample number → why it failed
    parts: Annotated[dict[str, tuple[float, ...]], Spec("", "N")] = msgspec.field(default_factory=dict)  # named components before weighting

    STATUS: ClassVar[tuple[str, ...]] = ("scored", "failed", "abstained")

    @property
    def scored(self) -> Array:
        """Which samples have a value: bool[N]."""
        found: Array = self.status == 0
        return found

    def verdicts(self) -> Iterator[Verdict]:
        """What was found for each sample, in order."""
        for number, (status, value) in enumerate(zip(self.status.tolist(), self.values.tolist(), strict=True)):
            yield Scored(value) if status == 0 else Failed(self.reasons.get(number, "")) if status == 1 else Abstained()

    def faults(self) -> Iterator[tuple[str, str]]:
        """What the Specs can't say: status codes, a reason for every failure and for nothing else."""
        return sense.scores(self)

    def outline(self) -> Outline:
        """A prompt's size is the number of its samples."""
        nothing = np.zeros(len(self.values), np.int32)
        return Outline(keys=self.keys, sizes=self.counts.astype(np.int64), counts=self.counts, lengths=nothing)

    def take(self, chosen: Sequence[int] | Array) -> Self:
        """The scores of these prompts' samples."""
        rows = units.ranges(chosen, len(self.keys), "Scores")
        own = units.below(rows, units.offsets(self.counts))
        status = units.cut(self.status, own)
        before = units.cut(np.arange(len(self.status)), own)
        return msgspec.structs.replace(
            self,
            keys=units.cut(self.keys, rows),
            counts=units.cut(self.counts, rows),
            values=units.cut(self.values, own),
            status=status,
            reasons={int(new): self.reasons[int(before[new])] for new in np.flatnonzero(status == 1) if int(before[new]) in self.reasons},
            parts=units.cut_columns(self.parts, own),
        )

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All scores of these parts."""
        units.agreed([type(part) for part in parts], "Scores", "type")
        begins = units.offsets(np.array([len(part.values) for part in parts])).tolist()
        return cls(
            keys=units.joined([part.keys for part in parts]),
            counts=units.joined([part.counts for part in parts]),
            values=units.joined([part.values for part in parts]),
            status=units.joined([part.status for part in parts]),
            reasons={begin + number: why for begin, part in zip(begins, parts, strict=False) for number, why in part.reasons.items()},
            parts=units.joined_columns([(len(part.values), part.parts) for part in parts], "Scores", "parts"),
        )


class Logprobs(Divisible, frozen=True, kw_only=True, eq=False):
    """Reference (or policy) to policy: logprob of each completion token, laid out as the Samples it answers."""

    keys: Annotated[Array, Spec("int64", "P")]
    counts: Annotated[Array, Spec("int32", "P")]
    logprobs: NatsT  # 0 at prompt tokens
    cu_seqlens: Offsets
    version: int = 0  # weights that computed them

    @property
    def lengths(self) -> Array:
        """Tokens of each sequence, prompt and completion: int64[N]."""
        return np.diff(self.cu_seqlens)

    def faults(self) -> Iterator[tuple[str, str]]:
        """What the Specs can't say: counts, offsets, version."""
        return sense.logprobs(self)

    def outline(self) -> Outline:
        """A prompt's size is the tokens of all its samples; `lengths` are whole sequences, as prompts aren't told apart."""
        sizes = np.diff(self.cu_seqlens[units.offsets(self.counts)])
        return Outline(keys=self.keys, sizes=sizes, counts=self.counts, lengths=self.lengths.astype(np.int32))

    def take(self, chosen: Sequence[int] | Array) -> Self:
        """The logprobs of these prompts' samples."""
        rows = units.ranges(chosen, len(self.keys), "Logprobs")
        own = units.below(rows, units.offsets(self.counts))
        return msgspec.structs.replace(
            self,
            keys=units.cut(self.keys, rows),
            counts=units.cut(self.counts, rows),
            logprobs=units.cut(self.logprobs, units.below(own, self.cu_seqlens)),
            cu_seqlens=units.cut_offsets(self.cu_seqlens, own),
        )

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All logprobs of these parts, which must be of one version."""
        return cls(
            version=units.agreed([part.version for part in parts], "Logprobs", "version"),
            keys=units.joined([part.keys for part in parts]),
            counts=units.joined([part.counts for part in parts]),
            logprobs=units.joined([part.logprobs for part in parts]),
            cu_seqlens=units.offsets(units.joined([part.lengths for part in parts])),
        )


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of a manifest."""

    name: str
    dtype: str  # torch name: "float32", "bfloat16", …
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the shard's data
    nbytes: int
    digest: str  # xxh3-128 of its bytes, hexadecimal


class Weights(Message, frozen=True, kw_only=True, eq=False):
    """Policy to rollout: one shard of the weights of one version. `names` lists the tensors of all shards."""

    version: int
    shard: int
    shards: int
    names: tuple[str, ...]  # of the whole version, sorted
    manifest: tuple[Tensor, ...]  # of this shard
    data: Annotated[Array, Spec("uint8", "B")]

    def faults(self) -> Iterator[tuple[str, str]]:
        """What the Specs can't say: that the manifest tiles the data. Digests are the loading role's to verify."""
        return sense.weights(self)


class Metrics(Message, frozen=True, kw_only=True, eq=False):
    """What a verb measured: name → (sum of value x weight, sum of weights), so that parts of a group add up."""

    sums: dict[str, tuple[float, float]] = msgspec.field(default_factory=dict)

    def faults(self) -> Iterator[tuple[str, str]]:
        """What the types can't say: weights below 0."""
        return sense.metrics(self)


class Receipt(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Member to controller, for every call: small, always read; the bulk stays in the object store."""

    role: str
    rank: int
    node: str
    verb: str
    seconds: float  # in the role's own code
    waited: float  # seconds between the call's arrival and its start: fetching inputs
    kind: str  # name of the message made, "" for a plain value
    nbytes: int = 0  # of the frame in the object store
    value: Any = None  # what the verb returned, when it is plain and small
    outline: Outline | None = None
    metrics: dict[str, tuple[float, float]] = msgspec.field(default_factory=dict)  # as in Metrics
    version: int = 0

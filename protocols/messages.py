"""What is said: one frozen struct a message.

Shape letters: P prompts (groups), N samples, T tokens of all sequences laid end to end, R rows, C capacity of a row,
L = R x C slots, S segments, K trained tokens, B bytes, E tensors. Token ids are int32; logprobs are float32, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

import msgspec
import numpy as np

from rolecall.protocols.arrays import Float32T, Int32T, Offsets, Spec

Array = np.ndarray


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, eq=False):
    """Base of all messages; subclasses are known by their class name."""


class Outline(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a controller may know of a divisible message without holding it. Small; travels in the receipt."""

    keys: Annotated[Array, Spec("int64", "P")]  # which unit (the stream index of its prompt)
    sizes: Annotated[Array, Spec("int64", "P")]  # tokens of each unit; what `split` balances
    counts: Annotated[Array, Spec("int32", "P")]  # samples of each unit
    lengths: Annotated[Array, Spec("int32", "N")]  # trainable (completion) tokens of each sample


class Divisible(Message, frozen=True, kw_only=True, eq=False):
    """A message that `split` can cut between units and that parts can be joined to again."""

    def outline(self) -> Outline:
        """Keys, sizes, counts and lengths of the units."""
        raise NotImplementedError

    def take(self, units: Sequence[int] | Array) -> Self:
        """The message of these units alone, in the given order."""
        raise NotImplementedError

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """One message of all parts, in order."""
        raise NotImplementedError


class Prompts(Divisible, frozen=True, kw_only=True, eq=False):
    """Data to rollout: tokenised prompts. A unit is a prompt."""

    keys: Annotated[Array, Spec("int64", "N")]  # position in the data stream, unique within a run
    ids: Annotated[tuple[str, ...], Spec("", "N")]  # identity of the record, the same in every epoch
    tokens: Int32T
    cu_seqlens: Offsets
    texts: Annotated[tuple[str, ...], Spec("", "N")]  # the user's words, before templating
    columns: dict[str, tuple[Any, ...]] = {}  # what the dataset says of each prompt (answer, metadata), N values each
    epoch: int = 0
    tokenizer: str = ""  # identity hash; roles compare it before the first step


class Samples(Divisible, frozen=True, kw_only=True, eq=False):
    """Rollout to reward, reference, policy: prompts with their completions. A unit is a prompt with its samples.

    Samples of one prompt stand together, siblings in order. `tokens` of a sample are prompt then completion.
    """

    keys: Annotated[Array, Spec("int64", "P")]
    ids: Annotated[tuple[str, ...], Spec("", "P")]
    texts: Annotated[tuple[str, ...], Spec("", "P")]
    columns: dict[str, tuple[Any, ...]] = {}  # P values each
    counts: Annotated[Array, Spec("int32", "P")]  # samples of each prompt
    tokens: Int32T
    logprobs: Float32T  # of each completion token when it was sampled; 0 at prompt tokens
    cu_seqlens: Offsets
    prompt_lengths: Annotated[Array, Spec("int32", "N")]
    siblings: Annotated[Array, Spec("int32", "N")]  # 0 .. counts-1 within the prompt
    finish: Annotated[Array, Spec("uint8", "N")]  # FINISH[...]: 0 stop, 1 length, 2 aborted
    completions: Annotated[tuple[str, ...], Spec("", "N")]  # decoded, without special tokens
    span_starts: Annotated[Array, Spec("int64", "V")]  # token offset at which a version begins, ascending
    span_versions: Annotated[Array, Spec("int64", "V")]  # weights version that sampled the tokens from there on
    temperature: float = 1.0  # the logprobs are those of the distribution at this temperature

    FINISH: ClassVar[tuple[str, ...]] = ("stop", "length", "aborted")


class Scores(Divisible, frozen=True, kw_only=True, eq=False):
    """Reward to controller. A unit is a prompt; `values[n]` counts only where `status[n]` is scored."""

    keys: Annotated[Array, Spec("int64", "P")]
    counts: Annotated[Array, Spec("int32", "P")]
    values: Annotated[Array, Spec("float32", "N", "finite")]  # 0 where not scored
    status: Annotated[Array, Spec("uint8", "N")]  # STATUS[...]: 0 scored, 1 failed, 2 abstained
    reasons: dict[int, str] = {}  # sample number → why it failed
    parts: dict[str, tuple[float, ...]] = {}  # named components before weighting, N values each

    STATUS: ClassVar[tuple[str, ...]] = ("scored", "failed", "abstained")


class Logprobs(Divisible, frozen=True, kw_only=True, eq=False):
    """Reference (or policy) to policy: logprob of each completion token, laid out as the Samples it answers."""

    keys: Annotated[Array, Spec("int64", "P")]
    counts: Annotated[Array, Spec("int32", "P")]
    logprobs: Float32T  # 0 at prompt tokens
    cu_seqlens: Offsets
    version: int = 0  # weights that computed them


class PackedBatch(Message, frozen=True, kw_only=True, eq=False):
    """To the policy: rows of fixed capacity, and the flat list of tokens to train.

    A segment attends to itself (causally) and to its parent segment, if it has one: the completions of one prompt are
    segments whose parent is the prompt, so a prompt is computed once however many completions it has. Trained token k
    is `targets[k]`, predicted from the hidden state at slot `sources[k]`.
    """

    capacity: int  # C
    tokens: Annotated[Array, Spec("int32", "L")]
    positions: Annotated[Array, Spec("int32", "L")]  # position within prompt + completion; 0 in unused slots
    segments: Annotated[Array, Spec("int32", "L")]  # number of the segment, -1 in unused slots
    parents: Annotated[Array, Spec("int32", "S")]  # segment that this one continues, -1 for none
    sources: Annotated[Array, Spec("int64", "K")]
    targets: Annotated[Array, Spec("int32", "K")]
    weights: Annotated[Array, Spec("float32", "K", "finite")]  # of each token in the loss; they sum to 1 over all members
    samples: Annotated[Array, Spec("int32", "K")]  # which sample, in the order of the Samples message
    old: Annotated[Array, Spec("float32", "K", "finite")]  # logprob when sampled
    advantages: Annotated[Array, Spec("float32", "K", "finite")]
    reference: Annotated[Array, Spec("float32", "K", "finite")] | None = None
    temperature: float = 1.0


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


class Metrics(Message, frozen=True, kw_only=True, eq=False):
    """What a verb measured: name → (sum of value x weight, sum of weights), so that parts of a group add up."""

    sums: dict[str, tuple[float, float]] = {}


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
    metrics: dict[str, tuple[float, float]] = {}  # as in Metrics
    version: int = 0

"""How many floating-point operations a model's training takes: the model's own, exact for packed rows; no recomputation.

A product of matrices [m, k] x [k, n] counts 2 m k n; nothing else is counted (norms, softmax, the optimiser). Attention
counts the pairs of query and key that may meet, and no others: about s²/2 for a segment of s tokens, less where a window
is shorter, more where it continues a parent. The head counts only for tokens that are predicted. So padding, masks that
are computed and thrown away, and activation checkpointing make training slower but don't add to these numbers.

Backward, a product costs again what it cost forward for each of its two inputs that needs a gradient. For a model that
is trained whole this makes 6 N a token and 12 H d a pair and layer; with adapters, 4 N and what the adapters need.

T tokens, K predicted tokens, P pairs, D hidden size, H query heads, G key heads, d size of a head, F size within the MLP,
V vocabulary, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from rolecall.roles.models.lora import Lora, names_of
from rolecall.roles.models.spec import Experts, ModelSpec

Trained = Callable[[str], bool]


@dataclass
class Count:
    """Operations of a forward and a backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward


def training_flops(
    spec: ModelSpec,
    lengths: npt.ArrayLike,
    *,
    before: npt.ArrayLike = 0,
    predicted: int | None = None,
    lora: Lora | None = None,
    frozen: Sequence[str] = (),
) -> float:
    """Operations of one forward and backward pass over segments, however they are packed.

    Args:
        spec: of one of the families that have a definition here.
        lengths: [S] tokens of each segment.
        before: [S] tokens of the segments that each one continues (its position); 0 for none.
        predicted: tokens that the head is applied to; None means all.
        lora: adapters; everything else is frozen then.
        frozen: regular expressions; a parameter whose name ("embed.weight", "blocks.0.mlp.up.weight") begins so is not trained.

    Raises:
        ValueError: the model runs as its Hugging Face class, so that its products are not known.
    """
    patterns = [re.compile(pattern) for pattern in frozen]

    def trained(name: str) -> bool:
        return lora is None and not any(pattern.match(name) for pattern in patterns)

    ranks = {} if lora is None else {name: lora.r for name in linears(spec) if lora.hits(*names_of(name))}
    return count(spec, lengths, before=before, predicted=predicted, trained=trained, ranks=ranks).total


def count(
    spec: ModelSpec,
    lengths: npt.ArrayLike,
    *,
    before: npt.ArrayLike = 0,
    predicted: int | None = None,
    trained: Trained | Collection[str] = lambda _: True,
    ranks: Mapping[str, int] | None = None,
    pairs: Callable[[int], float] | None = None,
) -> Count:
    """As `training_flops`, both passes apart, for a model as it stands.

    Args:
        trained: names of the parameters that need a gradient, or a function that tells.
        ranks: our name of a linear → rank of its adapter.
        pairs: of query and key, by a layer's window; those that `attended` finds without it.
    """
    if not spec.family:
        raise ValueError("The operations of a model that runs as its Hugging Face class are not known.")
    tokens = float(np.asarray(lengths, dtype=np.int64).sum())
    lookup = pairs or (lambda window: attended(lengths, before=before, window=window))
    known = {window: lookup(window) for window in set(spec.windows)}
    walk = _Walk(spec, tokens, trained if callable(trained) else trained.__contains__, ranks or {})
    flows = walk.trained("embed.weight")
    for layer in range(spec.layers):
        flows = walk.block(layer, flows, known[spec.windows[layer]])
    flows = flows or walk.trained("norm.weight")
    head = "embed.weight" if spec.tied else "head.weight"
    walk.product(tokens if predicted is None else predicted, spec.hidden, spec.vocab, flows, walk.trained(head))
    return walk.found


def attended(lengths: npt.ArrayLike, *, before: npt.ArrayLike = 0, window: int = 0) -> float:
    """Pairs of a query and a key it may see: the sum over tokens of min(position + 1, window).

    Args:
        lengths, before: as in `training_flops`.
        window: positions that a token sees, its own included; 0 for all.
    """
    size = np.asarray(lengths, dtype=np.float64)
    first = np.broadcast_to(np.asarray(before, dtype=np.float64), size.shape)
    if not window:
        return float((size * first + size * (size + 1) / 2).sum())
    growing = np.clip(window - first, 0, size)  # tokens whose window reaches back to the start
    return float((growing * first + growing * (growing + 1) / 2 + (size - growing) * window).sum())


def linears(spec: ModelSpec) -> list[str]:
    """Our names of the linears of all blocks that can have an adapter."""
    found = []
    for layer in range(spec.layers):
        found += [f"blocks.{layer}.attention.{part}" for part in "qkvo"]
        if spec.experts is None or not spec.experts.layers[layer]:
            found += [f"blocks.{layer}.mlp.{part}" for part in ("gate", "up", "down")]
    return found


@dataclass
class _Walk:
    """Goes through a model as a forward pass does, and knows at each place whether a gradient will come back to it."""

    spec: ModelSpec
    tokens: float
    trained: Trained
    ranks: Mapping[str, int]
    found: Count = field(default_factory=Count)

    def product(self, tokens: float, inputs: int, outputs: int, flows: bool, trained: bool) -> bool:
        """A product with a weight; whether its output needs a gradient."""
        once = 2.0 * tokens * inputs * outputs
        self.found.forward += once
        self.found.backward += once * (flows + trained)
        return flows or trained

    def linear(self, name: str, inputs: int, outputs: int, flows: bool) -> bool:
        """A linear with the adapter it may have."""
        rank = self.ranks.get(name, 0)
        bias = self.trained(f"{name}.bias")
        needs = self.product(self.tokens, inputs, outputs, flows, self.trained(f"{name}.weight")) or bias
        if not rank:
            return needs
        self.product(self.tokens, inputs, rank, flows, True)
        self.product(self.tokens, rank, outputs, True, True)
        return True

    def gain(self, name: str, flows: bool) -> bool:
        """A norm."""
        return flows or self.trained(f"{name}.weight")

    def block(self, layer: int, flows: bool, pairs: float) -> bool:
        """Attention and MLP of a layer, each added to what came in."""
        here, spec = f"blocks.{layer}", self.spec
        mixed = self.attention(f"{here}.attention", self.gain(f"{here}.norms.attention", flows), pairs)
        flows = flows or (self.gain(f"{here}.norms.after_attention", mixed) if spec.sandwich else mixed)
        inner = self.gain(f"{here}.norms.mlp", flows)
        if spec.experts is not None and spec.experts.layers[layer]:
            made = self.experts(spec.experts, f"{here}.mlp", inner)
        else:
            raised = [self.linear(f"{here}.mlp.{part}", spec.hidden, spec.intermediate, inner) for part in ("gate", "up")]
            made = self.linear(f"{here}.mlp.down", spec.intermediate, spec.hidden, any(raised))
        return flows or (self.gain(f"{here}.norms.after_mlp", made) if spec.sandwich else made)

    def attention(self, here: str, flows: bool, pairs: float) -> bool:
        """Projections, scores and mixing: 4 H d a pair; backward 2 H d for each of the values, the scores, queries and keys."""
        spec, inner = self.spec, self.spec.heads * self.spec.head_dim
        outer = spec.kv_heads * spec.head_dim
        query = self.linear(f"{here}.q", spec.hidden, inner, flows)
        key = self.linear(f"{here}.k", spec.hidden, outer, flows)
        value = self.linear(f"{here}.v", spec.hidden, outer, flows)
        if spec.qk_norm:
            query, key = self.gain(f"{here}.q_norm", query), self.gain(f"{here}.k_norm", key)
        sinks = spec.sinks and self.trained(f"{here}.sinks")
        scores = query or key or sinks
        each = 2.0 * inner * pairs
        self.found.forward += 2 * each
        self.found.backward += each * (value + scores + query + key)
        return self.linear(f"{here}.o", inner, spec.hidden, scores or value)

    def experts(self, experts: Experts, here: str, flows: bool) -> bool:
        """The router, and the experts that are active for each token."""
        hidden, size, tokens = self.spec.hidden, experts.intermediate, self.tokens * experts.active
        routed = self.product(self.tokens, hidden, experts.number, flows, self.trained(f"{here}.router.weight"))
        routed = routed or self.trained(f"{here}.router.bias")
        inner = self.product(tokens, hidden, 2 * size, flows, self.trained(f"{here}.experts.gate_up"))
        inner = inner or self.trained(f"{here}.experts.gate_up_bias")
        made = self.product(tokens, size, hidden, inner, self.trained(f"{here}.experts.down"))
        return made or routed or self.trained(f"{here}.experts.down_bias")

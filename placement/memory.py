"""What a role holds in memory, estimated from its model's config: pure numbers, checked by `fit` where a node tells its memory.

GB are 10^9 bytes. D hidden, L layers, H heads, K key/value heads, d head size, I intermediate, V vocabulary.
The estimates are of what must be there; allocators, CUDA contexts (0.5–1 GB) and fragmentation come on top: `reserve`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from rolecall.placement.pools import nearest
from rolecall.protocols.errors import ConfigError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
RECOMPUTE = ("none", "selective", "full")


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of one member of a role, in GB of 10^9 bytes.

    Args:
        weights, gradients, optimiser, activations, cache, reserve: parts of it on the device; in main memory where the
            pool has no GPU.
        host_gb: main memory beside that.
        pool: the pool it runs in; "" means the pool with the role's name.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimiser: float = 0.0
    activations: float = 0.0
    cache: float = 0.0
    reserve: float = 0.0
    host_gb: float = 0.0
    pool: str = ""

    @property
    def device_gb(self) -> float:
        """All that lies on the device."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.cache + self.reserve


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a decoder with gated MLPs and RMS norms (Llama, Mistral, Qwen2, Qwen3, Gemma 3)."""

    hidden: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # d
    intermediate: int  # I
    vocab: int  # V
    tied: bool = False  # one matrix for embedding and head
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich: bool = False  # norms after attention and MLP too (Gemma 3)

    @property
    def parameters(self) -> int:
        """Number of parameters: V·D (2·V·D untied) + L·(2·D·H·d + 2·D·K·d + 3·D·I + 2·D) + D, and the biases and norms there are."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 2 * self.hidden * (query + key) + 3 * self.hidden * self.intermediate + 2 * self.hidden
        layer += (query + 2 * key) * self.qkv_bias + self.hidden * self.output_bias
        layer += (2 * self.intermediate + self.hidden) * self.mlp_bias + 2 * self.head_dim * self.qk_norm + 2 * self.hidden * self.sandwich
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.layers * layer + self.hidden


def read_shape(config: Mapping[str, Any]) -> Shape:
    """The sizes from a model's `config.json`.

    Raises:
        ConfigError: a size is missing, or the family is not one of those this counts.
    """
    family = config.get("model_type", "llama")
    if family not in FAMILIES:
        have = ", ".join(FAMILIES)
        raise ConfigError(
            "The memory of this family of models can't be estimated.", ask=str(family), have=have, remedy="leave the estimate out"
        )
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    sizes = {name: config.get(name) for name in needed}
    wrong = [name for name, value in sizes.items() if not isinstance(value, int) or value < 1]
    if wrong:
        raise ConfigError(f"The model's config lacks {', '.join(wrong)}.", remedy="give the config.json of the model")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return Shape(
        hidden=hidden,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", family == "gemma3_text")),
        qkv_bias=bool(config.get("attention_bias", False)) or family == "qwen2",
        output_bias=bool(config.get("attention_bias", False)) and family != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "gemma3_text"),
        sandwich=family == "gemma3_text",
    )


def training(
    shape: Shape,
    *,
    tokens: int,
    bytes_each: int = 4,
    gradient_bytes: int = 4,
    state_bytes: int = 8,
    shards: int = 1,
    chunk: int = 1024,
    row: int = 0,
    lora: int = 0,
    recompute: str = "none",
    reserve: float = 0.0,
    pool: str = "",
) -> Estimate:
    """A policy or critic in training, per member.

    Weights, gradients and optimiser, per parameter: AdamW in float32 is 4 + 4 + 8 = 16 bytes, and so is mixed precision with
    gradients in 16 bits, 2 + 2 + 12 (ZeRO, Rajbhandari et al. 2020, section 3.1); our policy in bfloat16 sums gradients in
    float32, 2 + 4 + 12. All three are divided by `shards`. With adapters, gradients and optimiser are of theirs alone.

    Activations kept for the backward pass, per token and layer, counted as in Korthikanti et al. 2022 (section 4.1)
    for this family: 5·D (inputs of norms and projections) + 2·H·d + 2·K·d (queries, attention's output, keys, values) + 4·I (gate,
    up, their product and the activation); with `row` > 0, the slots of a row, also 2·H·row for
    scores and probabilities of an attention that is not fused. Recomputation keeps less: "selective" not the 4·I, "full" the D of
    a block's input alone; of one layer at a time all is there again. On top: logits and their gradient in float32, `chunk` tokens
    at a time.

    Args:
        tokens: of one forward/backward pass (row_tokens × rows_per_pass).
        bytes_each: of a weight or an activation. gradient_bytes: of a gradient. state_bytes: of the optimiser, per parameter.
        shards: members among which the model is divided (1 where each holds it whole).
        lora: rank of adapters on all linears; 0 where all weights are trained.
        recompute: as of the policy.

    Raises:
        ConfigError: there is no such recomputation.
    """
    if recompute not in RECOMPUTE:
        raise ConfigError("There is no such recomputation.", ask=f"recompute = {recompute!r}", have=", ".join(RECOMPUTE))
    count = shape.parameters / shards / 1e9
    own = adapters(shape, lora) / shards / 1e9
    trained = own if lora else count
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = 5 * shape.hidden + 2 * query + 2 * key + 4 * shape.intermediate + 2 * shape.heads * row
    layer += 7 * lora
    remains = {"none": layer, "selective": layer - 4 * shape.intermediate, "full": shape.hidden}[recompute]
    kept = tokens * (remains * shape.layers + layer - remains) * bytes_each / 1e9
    return Estimate(
        weights=(count + own) * bytes_each,
        gradients=trained * gradient_bytes,
        optimiser=trained * state_bytes,
        activations=kept + logits(shape, min(chunk, tokens)) * 2,
        reserve=reserve,
        pool=pool,
    )


def forward(
    shape: Shape, *, tokens: int, bytes_each: int = 4, shards: int = 1, chunk: int = 1024, reserve: float = 0.0, pool: str = ""
) -> Estimate:
    """A reference, teacher or reward model, per member: the weights, one layer's activations, and a chunk of logits in float32."""
    layer = 5 * shape.hidden + 2 * (shape.heads + shape.kv_heads) * shape.head_dim + 4 * shape.intermediate
    passing = tokens * layer * bytes_each / 1e9 + logits(shape, min(chunk, tokens))
    return Estimate(weights=shape.parameters / shards / 1e9 * bytes_each, activations=passing, reserve=reserve, pool=pool)


def sampling(
    shape: Shape, *, slots: int, context: int, bytes_each: int = 4, shards: int = 1, reserve: float = 0.0, pool: str = ""
) -> Estimate:
    """A rollout, per member: the weights, and keys and values of `slots` sequences of `context` tokens.

    A token's cache is 2·L·K·d numbers (Kwon et al. 2023, section 3: 800 KB for OPT-13B in 16 bits).
    """
    cache = slots * context * cache_bytes(shape, bytes_each) / shards / 1e9
    return Estimate(
        weights=shape.parameters / shards / 1e9 * bytes_each, activations=logits(shape, slots), cache=cache, reserve=reserve, pool=pool
    )


def adapters(shape: Shape, rank: int) -> int:
    """Number of parameters of adapters on all linears of the blocks: rank x (inputs + outputs) each."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * (shape.hidden + query) + 2 * (shape.hidden + key)
    return shape.layers * rank * (attention + 3 * (shape.hidden + shape.intermediate))


def cache_bytes(shape: Shape, bytes_each: int) -> int:
    """Bytes of keys and values of one token, all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * bytes_each


def logits(shape: Shape, tokens: int) -> float:
    """GB of the logits of `tokens` tokens, in float32."""
    return tokens * shape.vocab * 4 / 1e9


KINDS: dict[str, Callable[..., Estimate]] = {"training": training, "forward": forward, "sampling": sampling}


def read_memory(tables: Mapping[str, Any]) -> dict[str, Estimate]:
    """Estimates from the `[memory.ROLE]` tables of a TOML file: kind (training, forward, sampling), model (a folder), and the
    arguments of the function of that name above.

    Raises:
        ConfigError: an unknown kind or key, a model folder without config.json, a size missing.
    """
    found = {}
    for role, table in tables.items():
        where, rest = f"memory.{role}", dict(table) if isinstance(table, Mapping) else {}
        kind, model = str(rest.pop("kind", "")), str(rest.pop("model", ""))
        if kind not in KINDS:
            near = nearest(kind, KINDS) or "training"
            raise ConfigError(f"{where}: no such kind of use.", ask=f"kind = {kind!r}", have=", ".join(KINDS), remedy=f"use {near!r}")
        try:
            config = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{where}: no config.json can be read: {error}.", ask=f"model = {model!r}", remedy="give the model's folder"
            ) from None
        known = [name for name in inspect.signature(KINDS[kind]).parameters if name != "shape"]
        for key, value in rest.items():
            if key not in known:
                remedy = f"use {nearest(key, known)!r}" if nearest(key, known) else f"use one of kind, model, {', '.join(known)}"
                raise ConfigError(f"{where}: unknown key {key!r}.", ask=f"{key} = {value!r}", remedy=remedy)
            if key == "recompute" and value not in RECOMPUTE:
                raise ConfigError(f"{where}: no such recomputation.", ask=f"{key} = {value!r}", have=", ".join(RECOMPUTE), remedy="use one")
            if key not in ("pool", "recompute") and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
                raise ConfigError(f"{where}: {key} must be a number that is not negative.", ask=f"{key} = {value!r}", remedy="correct it")
        try:
            found[role] = KINDS[kind](read_shape(config), **rest)
        except TypeError:
            needed = {"training": "tokens", "forward": "tokens", "sampling": "slots and context"}[kind]
            raise ConfigError(f"{where}: a size is missing.", ask=f"kind = {kind!r}", remedy=f"set {needed}") from None
    return found

"""What the families share: reading a config, the names of a dense decoder's tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rolecall.protocols.errors import ModelError
from rolecall.roles.models.spec import ModelSpec, Rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class Name:
    """One tensor of a checkpoint and where it is in our decoder."""

    theirs: str  # as in the checkpoint
    ours: str  # parameter of `Decoder`
    index: tuple[int | slice, ...] = ()  # the part of that parameter which it is; all of it where empty


@dataclass(frozen=True)
class Family:
    """How one Hugging Face architecture maps to `Decoder`.

    Args:
        name: `model_type` of its config.
        architecture: the class that transformers and vLLM load it as.
        spec: config → sizes and choices; raises ModelError for a setting that the decoder does not have.
        names: every tensor of a checkpoint, tied ones once.
    """

    name: str
    architecture: str
    spec: Callable[[Any], ModelSpec]
    names: Callable[[ModelSpec], Iterator[Name]]


def common_spec(config: Any, **choices: Any) -> dict[str, Any]:
    """Fields of `ModelSpec` that families read alike; `choices` come over them.

    Args:
        config: a transformers PreTrainedConfig.
    """
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {
        "family": config.model_type,
        "layers": layers,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": size,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "vocab": config.vocab_size,
        "max_positions": _context(config),
        "tied": bool(config.tie_word_embeddings),
        "stops": stops_of(config),
        "windows": windows_of(config),
        "eps": config.rms_norm_eps,
        "scale": size**-0.5,
        "attention_bias": bool(getattr(config, "attention_bias", False)),
    } | choices


def _context(config: Any) -> int:
    """Positions that a model is meant for: "dynamic" ropes stretch beyond what their config says, the others are told after it."""
    rope = getattr(config, "rope_parameters", None) or {}
    stretched = rope.get("factor", 1.0) if rope.get("rope_type") == "dynamic" else 1.0
    return int(config.max_position_embeddings * stretched)


def stops_of(*sources: Any) -> tuple[int, ...]:
    """Token ids that end a completion, of a generation config and a config, each once."""
    stops: list[int] = []
    for source in sources:
        found = getattr(source, "eos_token_id", None)
        stops += [] if found is None else [found] if isinstance(found, int) else list(found)
    return tuple(dict.fromkeys(stops))


def windows_of(config: Any) -> tuple[int, ...]:
    """The sliding window of each layer, 0 where there is none."""
    window = getattr(config, "sliding_window", None) or 0
    if not getattr(config, "use_sliding_window", True):
        window = 0
    kinds = getattr(config, "layer_types", None)
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds) if kinds else (window,) * config.num_hidden_layers


def activation_of(name: str) -> str:
    """Our name of an activation. Raises ModelError for one that the decoder does not have."""
    if name not in ACTIVATIONS:
        raise ModelError(f"There is no activation {name!r} here.", have=", ".join(ACTIVATIONS))
    return ACTIVATIONS[name]


def rope_of(config: Any, parameters: Mapping[str, Any]) -> Rope:
    """One entry of `rope_parameters` as a Rope.

    Raises:
        ModelError: the kind is unknown, rotates a part of the head, or lacks a number.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in KINDS or parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ModelError(f"There are no rotary positions of kind {kind!r} over a part of the head here.", have=", ".join(KINDS))
    theta, longest = float(parameters["rope_theta"]), config.max_position_embeddings
    original = parameters.get("original_max_position_embeddings") or longest
    factor = parameters.get("factor") or longest / original
    try:
        return Rope(
            theta=theta,
            kind=kind,
            factor=float(factor),
            original_positions=int(original),
            max_positions=int(longest),
            attention_factor=_attention_factor(kind, parameters, float(factor), int(original)),
            beta_fast=float(parameters.get("beta_fast") or 32),
            beta_slow=float(parameters.get("beta_slow") or 1),
            truncate=bool(parameters.get("truncate", True)),
            low_freq_factor=float(parameters["low_freq_factor"]) if kind == "llama3" else 1.0,
            high_freq_factor=float(parameters["high_freq_factor"]) if kind == "llama3" else 1.0,
            short_factor=tuple(parameters["short_factor"]) if kind == "longrope" else (),
            long_factor=tuple(parameters["long_factor"]) if kind == "longrope" else (),
        )
    except KeyError as error:
        raise ModelError(f"Rotary positions of kind {kind!r} lack {error} in the model's config.") from error


def _attention_factor(kind: str, parameters: Mapping[str, Any], factor: float, original: int) -> float:
    """What cos and sin are multiplied by: as the config says, or as the papers of "yarn" and "longrope" recommend."""
    given = parameters.get("attention_factor")
    if kind not in ("yarn", "longrope"):
        return 1.0
    if given is not None:
        return float(given)
    if kind == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))

    def grown(times: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * times * math.log(factor) + 1.0

    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return grown(above) / grown(below) if above and below else grown(1.0)


def dense_names(
    spec: ModelSpec, norms: Mapping[str, str], mlp: Callable[[ModelSpec, int, str, str], Iterator[Name]] | None = None
) -> Iterator[Name]:
    """Names of Llama's pattern, which the other families extend.

    Args:
        norms: our norms of a block → theirs.
        mlp: names of a layer's MLP, from (spec, layer, their prefix, our prefix); that of a dense one without it.
    """
    vocabulary = (slice(spec.vocab),)  # without the rows of padding
    yield Name("model.embed_tokens.weight", "embed.weight", vocabulary)
    for layer in range(spec.layers):
        theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        for part in "qkvo":
            yield Name(f"{theirs}self_attn.{part}_proj.weight", f"{ours}attention.{part}.weight")
            if spec.attention_bias:
                yield Name(f"{theirs}self_attn.{part}_proj.bias", f"{ours}attention.{part}.bias")
        for part in ("q_norm", "k_norm") if spec.qk_norm else ():
            yield Name(f"{theirs}self_attn.{part}.weight", f"{ours}attention.{part}.weight")
        if spec.sinks:
            yield Name(f"{theirs}self_attn.sinks", f"{ours}attention.sinks")
        yield from (mlp or dense_mlp)(spec, layer, theirs, ours)
        for own, name in norms.items():
            yield Name(f"{theirs}{name}.weight", f"{ours}norms.{own}.weight")
    yield Name("model.norm.weight", "norm.weight")
    if not spec.tied:
        yield Name("lm_head.weight", "head.weight", vocabulary)


def dense_mlp(spec: ModelSpec, layer: int, theirs: str, ours: str) -> Iterator[Name]:
    """Names of a dense MLP."""
    for part in ("gate", "up", "down"):
        yield Name(f"{theirs}mlp.{part}_proj.weight", f"{ours}mlp.{part}.weight")
        if spec.mlp_bias:
            yield Name(f"{theirs}mlp.{part}_proj.bias", f"{ours}mlp.{part}.bias")


PRE_NORMS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}

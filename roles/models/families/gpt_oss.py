"""GPT-OSS in bfloat16 or float32 (not its 4-bit checkpoints): attention sinks, windows in every other layer, clamped experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rolecall.roles.models.families.common import PRE_NORMS, Family, Name, activation_of, common_spec, dense_names, rope_of
from rolecall.roles.models.spec import Experts, ModelSpec

PARTS = {"gate_up_proj": "gate_up", "gate_up_proj_bias": "gate_up_bias", "down_proj": "down", "down_proj_bias": "down_bias"}


def spec(config: Any) -> ModelSpec:
    """Of a GptOssConfig."""
    experts = Experts(
        number=config.num_local_experts,
        active=config.num_experts_per_tok,
        intermediate=config.intermediate_size,
        kind="top_softmax",
        layers=(True,) * config.num_hidden_layers,
    )
    fields = common_spec(
        config,
        activation=activation_of(config.hidden_act),
        wide_gain=True,
        sinks=True,
        ropes=(rope_of(config, config.rope_parameters),),
        rope_of=(0,) * config.num_hidden_layers,
        experts=experts,
    )
    return ModelSpec(**fields)


def names(spec: ModelSpec) -> Iterator[Name]:
    """Tensors of a GptOssForCausalLM."""
    return dense_names(spec, PRE_NORMS, _mlp)


def _mlp(spec: ModelSpec, layer: int, theirs: str, ours: str) -> Iterator[Name]:
    for part in ("weight", "bias"):
        yield Name(f"{theirs}mlp.router.{part}", f"{ours}mlp.router.{part}")
    for name, own in PARTS.items():
        yield Name(f"{theirs}mlp.experts.{name}", f"{ours}mlp.experts.{own}")


GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", spec, names)

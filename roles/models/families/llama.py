"""Llama, and what is built like it: SmolLM2, Llama 2 and 3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rolecall.roles.models.families.common import PRE_NORMS, Family, Name, activation_of, common_spec, dense_names, rope_of
from rolecall.roles.models.spec import ModelSpec


def spec(config: Any) -> ModelSpec:
    """Of a LlamaConfig."""
    fields = common_spec(
        config,
        activation=activation_of(config.hidden_act),
        mlp_bias=bool(config.mlp_bias),
        ropes=(rope_of(config, config.rope_parameters),),
        rope_of=(0,) * config.num_hidden_layers,
        windows=(0,) * config.num_hidden_layers,
    )
    return ModelSpec(**fields)


def names(spec: ModelSpec) -> Iterator[Name]:
    """Tensors of a LlamaForCausalLM."""
    return dense_names(spec, PRE_NORMS)


LLAMA = Family("llama", "LlamaForCausalLM", spec, names)

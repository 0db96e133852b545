"""Qwen3: Llama with norms on queries and keys, and maybe sliding windows in the upper layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rolecall.roles.models.families.common import PRE_NORMS, Family, Name, activation_of, common_spec, dense_names, rope_of
from rolecall.roles.models.spec import ModelSpec


def spec(config: Any) -> ModelSpec:
    """Of a Qwen3Config."""
    fields = common_spec(
        config,
        activation=activation_of(config.hidden_act),
        qk_norm=True,
        ropes=(rope_of(config, config.rope_parameters),),
        rope_of=(0,) * config.num_hidden_layers,
    )
    return ModelSpec(**fields)


def names(spec: ModelSpec) -> Iterator[Name]:
    """Tensors of a Qwen3ForCausalLM."""
    return dense_names(spec, PRE_NORMS)


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", spec, names)

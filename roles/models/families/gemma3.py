"""Gemma 3, text alone: sliding and global layers with a rope each, norms with gain 1 + weight before and after everything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rolecall.protocols.errors import ModelError
from rolecall.roles.models.families.common import Family, Name, activation_of, common_spec, dense_names, rope_of
from rolecall.roles.models.spec import ModelSpec

NORMS = {
    "attention": "input_layernorm",
    "after_attention": "post_attention_layernorm",
    "mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}


def spec(config: Any) -> ModelSpec:
    """Of a Gemma3TextConfig. Raises ModelError for its bidirectional form."""
    if config.use_bidirectional_attention:
        raise ModelError("This Gemma 3 looks ahead (use_bidirectional_attention), so it is no causal language model.")
    kinds = sorted(set(config.layer_types))
    fields = common_spec(
        config,
        activation=activation_of(config.hidden_activation),
        qk_norm=True,
        sandwich=True,
        gain_offset=1.0,
        wide_gain=True,
        embed_scale=config.hidden_size**0.5,
        scale=config.query_pre_attn_scalar**-0.5,
        attention_softcap=config.attn_logit_softcapping or 0.0,
        logit_softcap=config.final_logit_softcapping or 0.0,
        ropes=tuple(rope_of(config, config.rope_parameters[kind]) for kind in kinds),
        rope_of=tuple(kinds.index(kind) for kind in config.layer_types),
    )
    return ModelSpec(**fields)


def names(spec: ModelSpec) -> Iterator[Name]:
    """Tensors of a Gemma3ForCausalLM."""
    return dense_names(spec, NORMS)


GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", spec, names)

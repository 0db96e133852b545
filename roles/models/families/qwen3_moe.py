"""Qwen3-MoE: Qwen3 with sparse MLPs in some or all layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rolecall.roles.models.families.common import PRE_NORMS, Family, Name, activation_of, common_spec, dense_mlp, dense_names, rope_of
from rolecall.roles.models.spec import Experts, ModelSpec


def spec(config: Any) -> ModelSpec:
    """Of a Qwen3MoeConfig."""
    sparse = tuple(
        layer not in config.mlp_only_layers and config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
        for layer in range(config.num_hidden_layers)
    )
    experts = Experts(
        number=config.num_experts,
        active=config.num_experts_per_tok,
        intermediate=config.moe_intermediate_size,
        renormalise=bool(config.norm_topk_prob),
        layers=sparse,
    )
    fields = common_spec(
        config,
        activation=activation_of(config.hidden_act),
        qk_norm=True,
        ropes=(rope_of(config, config.rope_parameters),),
        rope_of=(0,) * config.num_hidden_layers,
        experts=experts if any(sparse) else None,
    )
    return ModelSpec(**fields)


def names(spec: ModelSpec) -> Iterator[Name]:
    """Tensors of a Qwen3MoeForCausalLM; each expert's are apart in a checkpoint, together in memory."""
    return dense_names(spec, PRE_NORMS, _mlp)


def _mlp(spec: ModelSpec, layer: int, theirs: str, ours: str) -> Iterator[Name]:
    experts = spec.experts
    if experts is None or not experts.layers[layer]:
        yield from dense_mlp(spec, layer, theirs, ours)
        return
    size, own = experts.intermediate, f"{ours}mlp.experts."
    yield Name(f"{theirs}mlp.gate.weight", f"{ours}mlp.router.weight")
    for expert in range(experts.number):
        prefix = f"{theirs}mlp.experts.{expert}."
        yield Name(f"{prefix}gate_proj.weight", f"{own}gate_up", (expert, slice(size)))
        yield Name(f"{prefix}up_proj.weight", f"{own}gate_up", (expert, slice(size, 2 * size)))
        yield Name(f"{prefix}down_proj.weight", f"{own}down", (expert,))


QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", spec, names)

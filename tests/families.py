"""Tiny random models of every family, with the settings that go wrong first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import tiny_tokenizer

VOCAB = 263  # a prime
COMMON = {"vocab_size": VOCAB, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
SMALL = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "max_position_embeddings": 96}
LLAMA = {**COMMON, **SMALL, "num_attention_heads": 6, "num_key_value_heads": 2}
QWEN3 = {**COMMON, **SMALL, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 20}
GEMMA3 = {
    **COMMON,
    **SMALL,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "sliding_window": 9,
}
GEMMA3 |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"], "query_pre_attn_scalar": 40}


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
    """Settings of a Llama with stretched positions."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, "factor": 3.0, **numbers}, "num_hidden_layers": 2}


STRETCHED = {"original_max_position_embeddings": 32}
EIGHT = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}  # heads of 16: 8 frequencies
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "llama-untied-biased": ("Llama", {**LLAMA, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "llama-tied-one-key-head": ("Llama", {**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-wide-heads": ("Llama", {**LLAMA, "num_key_value_heads": 6, "head_dim": 14, "hidden_act": "gelu"}),
    "llama-linear": ("Llama", {**LLAMA, **rope("linear")}),
    "llama-dynamic": ("Llama", {**LLAMA, **rope("dynamic"), "max_position_embeddings": 20}),
    "llama-llama3": ("Llama", {**LLAMA, **rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **STRETCHED)}),
    "llama-yarn": ("Llama", {**LLAMA, **rope("yarn", **STRETCHED)}),
    "llama-yarn-mscale": ("Llama", {**LLAMA, **rope("yarn", mscale=0.7, mscale_all_dim=0.4, beta_fast=16.0, truncate=False, **STRETCHED)}),
    "llama-longrope": (
        "Llama",
        {
            **LLAMA,
            **EIGHT,
            **rope("longrope", short_factor=[1.0 + n / 9 for n in range(8)], long_factor=[2.0 + n for n in range(8)], **STRETCHED),
        },
    ),
    "qwen3": ("Qwen3", {**QWEN3, "tie_word_embeddings": True}),
    "qwen3-untied": ("Qwen3", {**QWEN3, "num_key_value_heads": 2, "attention_bias": True}),
    "qwen3-sliding": ("Qwen3", {**QWEN3, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "gemma3": ("Gemma3", GEMMA3),
    "gemma3-untied-capped": ("Gemma3", {**GEMMA3, "tie_word_embeddings": False, "final_logit_softcapping": 3.0}),
    "gemma3-ropes": (
        "Gemma3",
        {
            **GEMMA3,
            "num_key_value_heads": 4,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 80000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
            },
        },
    ),
}
CASES |= {
    "qwen3-moe": ("Qwen3Moe", {**QWEN3, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {
            **QWEN3,
            "num_key_value_heads": 2,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 11,
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            **COMMON,
            **SMALL,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
        },
    ),
}


def family_model(name: str, folder: str | Path, seed: int = 0, tokenizer: bool = False) -> str:
    """Save the random float32 model of a case; every gain, bias and sink is random too. Returns the folder."""
    import torch
    import transformers

    kind, settings = CASES[name]
    text = "Text" if kind == "Gemma3" else ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}{text}Config")(**settings))
        with torch.no_grad():
            for label, parameter in model.named_parameters():
                if parameter.ndim == 1 or "bias" in label:  # also gains and sinks
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                elif "embed" not in label:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(str(folder))
    return tiny_tokenizer(folder) if tokenizer else str(folder)

"""Known model sizes with random weights, as folders: what the training benchmarks load, ours and peers alike.

The sizes are those of the published config.json files. No hub is asked; speed does not depend on what the weights are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMON = {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-4B": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "Gemma3-1B": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "layer_types": ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(26)],
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "SmolLM2-135M": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    },
}
TINY = {"vocab_size": 512, "hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 32768}


def config(name: str, **changes: Any) -> Any:
    """The transformers config of a known model, sizes changed at will."""
    from transformers import AutoConfig

    found = {**COMMON, **KNOWN[name], **changes}
    return AutoConfig.for_model(found.pop("model_type"), **found)


def small(name: str) -> dict[str, Any]:
    """Changes that make a known model tiny and keep its kind: heads in the same ratio, both kinds of layers."""
    known = KNOWN[name]
    ratio = known["num_attention_heads"] // known["num_key_value_heads"]
    changes: dict[str, Any] = {**TINY, "num_key_value_heads": 2, "num_attention_heads": 2 * ratio, "head_dim": 32}
    if "layer_types" in known:
        changes |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64, "query_pre_attn_scalar": 32}
    return changes


def build(name: str, folder: Path, *, dtype: str = "bfloat16", device: str = "cpu", seed: int = 0, **changes: Any) -> str:
    """Write the model with random weights, and a tokenizer of single bytes, into `folder`; returns its path."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config(name, **changes), dtype=getattr(torch, dtype))
    model.save_pretrained(str(folder))
    _tokenizer(folder)
    return str(folder)


def _tokenizer(folder: Path) -> None:
    """The policy's checkpoints want one; nothing here reads text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate([*special, *letters])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]).save_pretrained(
        str(folder)
    )

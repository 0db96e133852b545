"""From one GGUF file of a Llama-shaped model to an ordinary Hugging Face folder.

transformers can read GGUF too, but refuses to save what it read, and parses the file five times (50 s for 135M
parameters, here 10 s); its tokenizer also lacks the split of numbers into digits that the file asks for by "smollm".
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rolecall.protocols.errors import ModelError

if TYPE_CHECKING:
    import torch

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
TURN_END = "<|im_end|>"
CONTROL = 3  # GGUF's type of a token that text can't contain


def convert(source: Path, folder: Path) -> None:
    """Write the model and tokenizer in the GGUF file `source` as float32 Hugging Face files into the empty `folder`.

    Raises:
        ModelError: the file holds another architecture, or tensors that Llama does not have, or what was written does
            not load again bit for bit.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(source))
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts.get("general.architecture") != "llama" or facts.get("tokenizer.ggml.pre") != "smollm":
        raise ModelError(
            f"{source.name} is not of the kind that this conversion knows.",
            ask="a Llama model with SmolLM's tokenizer",
            have=f"{facts.get('general.architecture')} with {facts.get('tokenizer.ggml.pre')}",
            remedy="pass a Hugging Face folder or hub name as the model instead",
        )
    tensors = _tensors(reader, facts)
    _write_tokenizer(facts, folder)
    _write_model(facts, tensors, folder)
    _verify(tensors, facts, folder)


def _tensors(reader: Any, facts: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Hugging Face name → float32 tensor, dequantised."""
    import torch
    from gguf import dequantize

    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    tensors: dict[str, torch.Tensor] = {}
    for item in reader.tensors:
        values = np.asarray(dequantize(item.data, item.tensor_type), dtype=np.float32)
        if item.name in TOP_NAMES:
            tensors[TOP_NAMES[item.name]] = torch.from_numpy(np.array(values))
            continue
        _, layer, part, _ = item.name.split(".")
        if part in heads:
            values = _halves_from_pairs(values, heads[part])
        tensors[f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"] = torch.from_numpy(np.array(values))
    return tensors


def _halves_from_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's order of rotary dimensions (neighbours in pairs) to Hugging Face's (first half, second half)."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_model(facts: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    heads = facts["llama.attention.head_count"]
    ids = {
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=facts["llama.vocab_size"],
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        head_dim=facts["llama.embedding_length"] // heads,
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        tie_word_embeddings=True,  # the file has no output.weight
        dtype="float32",
        **ids,
    )
    config.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [word for word, kind in zip(words, facts["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in control])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=words[facts["tokenizer.ggml.bos_token_id"]],
        eos_token=words[facts["tokenizer.ggml.eos_token_id"]],
        pad_token=words[facts["tokenizer.ggml.padding_token_id"]],
        unk_token=words[facts["tokenizer.ggml.unknown_token_id"]],
        model_max_length=facts["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = facts["tokenizer.chat_template"]
    wrapped.save_pretrained(folder)


def _verify(tensors: dict[str, torch.Tensor], facts: dict[str, Any], folder: Path) -> None:
    """Load the folder as any user would; what comes back must be what went in."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, loading = loaded
    wrong = [name for name, tensor in model.named_parameters() if name not in tensors or not torch.equal(tensor, tensors[name])]
    wrong += sorted(set(tensors) - dict(model.named_parameters()).keys())
    wrong += [f"{kind}: {names}" for kind, names in loading.items() if names]
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        wrong.append("the embeddings are not tied")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token != TURN_END or tokenizer.eos_token_id != model.config.eos_token_id:
        wrong.append(f"a turn should end with {TURN_END}, not with {tokenizer.eos_token!r}")
    if len(tokenizer) != facts["llama.vocab_size"] or not tokenizer.chat_template:
        wrong.append("the tokenizer is not whole")
    if wrong:
        raise ModelError(f"The converted model does not load as it was written: {'; '.join(wrong[:5])}.")

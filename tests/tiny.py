"""What tests load and feed: a random little Llama with a byte-level tokenizer in a Hugging Face folder, and random samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rolecall.protocols.messages import Samples

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
VOCAB = 256 + len(SPECIAL)


def tiny_tokenizer(folder: str | Path, *, template: str | None = TEMPLATE) -> str:
    """Save a tokenizer of 256 bytes and four special tokens: any text round-trips, one token a byte. eos `<|im_end|>`, pad `<|pad|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[3]
    )
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(str(folder))
    return str(folder)


def tiny_model(
    folder: str | Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = VOCAB,
    positions: int = 512,
    tied: bool = True,
    seed: int = 0,
) -> str:
    """Save a random float32 Llama with its tokenizer in `folder`, made if missing; returns the folder.

    The weights are ten times larger than usual at initialisation, so that logits differ enough for tests to see mistakes.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(str(folder))
    return tiny_tokenizer(folder)


def tiny_samples(
    prompts: int = 3, per_prompt: int = 4, *, vocab: int = VOCAB, seed: int = 0, longest_prompt: int = 20, longest: int = 9
) -> Samples:
    """Random samples of random lengths (1 token at least), as a rollout makes them; logprobs are random numbers below 0."""
    rng = np.random.default_rng(seed)
    tokens: list[np.ndarray] = []
    logprobs: list[np.ndarray] = []
    prompt_lengths: list[int] = []
    for _ in range(prompts):
        prompt = rng.integers(4, vocab, rng.integers(1, longest_prompt + 1))
        for _ in range(per_prompt):
            completion = rng.integers(4, vocab, rng.integers(1, longest + 1))
            tokens.append(np.concatenate([prompt, completion]))
            logprobs.append(np.concatenate([np.zeros(len(prompt)), -5 * rng.random(len(completion))]))
            prompt_lengths.append(len(prompt))
    number = prompts * per_prompt
    return Samples(
        keys=np.arange(prompts, dtype=np.int64),
        ids=tuple(f"id{unit}" for unit in range(prompts)),
        texts=("",) * prompts,
        counts=np.full(prompts, per_prompt, dtype=np.int32),
        tokens=np.concatenate(tokens).astype(np.int32),
        logprobs=np.concatenate(logprobs).astype(np.float32),
        cu_seqlens=np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        prompt_lengths=np.array(prompt_lengths, dtype=np.int32),
        siblings=np.tile(np.arange(per_prompt, dtype=np.int32), prompts),
        finish=np.zeros(number, dtype=np.uint8),
        completions=("",) * number,
        span_starts=np.zeros(1, dtype=np.int64),
        span_versions=np.zeros(1, dtype=np.int64),
        temperature=1.0,
    )

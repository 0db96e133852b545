"""Tokenizers with chat templates in the manner of well-known models, for tests of masks."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

TEMPLATES = Path(__file__).parent / "roles" / "data" / "templates"
NAMES = tuple(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
SPECIAL = (
    "<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<bos>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|start|>", "<|end|>", "<|message|>", "<|channel|>",
    "<|return|>", "<|call|>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
)  # fmt: skip
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # added, but not special: as Qwen3 has them
ENDS = {
    "alpaca": "</s>", "chatml": "<|im_end|>", "deepseek": "<｜end▁of▁sentence｜>", "gemma": "<end_of_turn>",
    "harmony": "<|return|>", "llama3": "<|eot_id|>", "marked": "<|im_end|>", "mistral": "</s>", "qwen3": "<|im_end|>",
    "thinking": "<|im_end|>", "tools": "<|im_end|>",
}  # fmt: skip
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it can't find the way home again; so it goes.",
    "user\nassistant\nsystem\n\nWhat is the answer? The answer is 42. I think that's right, isn't it?",
    '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}} tool_call tool_response',
    "def main() -> None:\n    for number in range(10):\n        print(number)\n\n\n    return None\n",
] * 3


@lru_cache
def tokenizer(name: str = "", *, merges: bool = True):
    """A byte-level tokenizer with the chat template of that name ("" for none); `merges` False makes a byte a token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = (600 if merges else 256) + len(SPECIAL)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    raw.add_tokens([AddedToken(word, normalized=False) for word in PLAIN])
    begin = {"gemma": "<bos>"}.get(name, "<s>")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=begin, eos_token=ENDS.get(name, "<|endoftext|>"), pad_token="<|endoftext|>"
    )
    if name:
        fast.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return fast


def said(tokens, trained, words) -> list[str]:
    """The trained spans of a record, decoded one by one."""
    spans: list[list[int]] = []
    for number, (token, mine) in enumerate(zip(tokens.tolist(), trained.tolist(), strict=True)):
        if mine:
            if not number or not trained[number - 1]:
                spans.append([])
            spans[-1].append(token)
    return [words.decode(span, skip_special_tokens=False) for span in spans]

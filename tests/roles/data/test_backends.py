"""Every tokenizer is reached through AutoTokenizer: Hugging Face's own, SentencePiece, tiktoken, plain Python; masks hold for all."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import CORPUS, NAMES, TEMPLATES, said, tokenizer
from rolecall.protocols import ConfigError, DataError
from rolecall.roles.data.encode import Encoder
from rolecall.roles.data.records import Conversation, recognise
from rolecall.roles.data.tokenizer import Tokenizer, semantic_ids
from rolecall.roles.models.folder import TOKENIZERS
from rolecall.roles.tokens import identity, load_tokenizer

CHATML = (TEMPLATES / "chatml.jinja").read_text()
MARKS = ["<|im_start|>", "<|im_end|>"]
TEXTS = ("Hello world", "The answer is 42.\nIt's so!", "Grüße, 中文 and 😀", "a  b   c\n\n d")
TALK = (
    {"role": "user", "content": "Who is it?"},
    {"role": "assistant", "content": "Grüße 😀, it's  me"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris", "days": [1, 2.5, null, true]}'}}
ERRAND = {  # as a client sends it: content in parts, content that is null, arguments as JSON
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "in Paris?"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny, 20 °C"},
        {"role": "assistant", "content": "It is sunny."},
    ],
    "tools": [
        {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": CITY}},
        {"function": {"parameters": CITY, "name": "storms", "strict": True}, "type": "function"},
        {"type": "function", "function": {"description": "The time.", "name": "now"}},
    ],
}
WITH_TOOLS = ("deepseek", "harmony", "qwen3", "tools")
SERVE = """
import json, sys
from vllm.config import ModelConfig, VllmConfig
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest
from vllm.renderers import renderer_from_config
def served(folder, texts, records):
    config = VllmConfig(model_config=ModelConfig(folder, max_model_len=2048))
    renderer = renderer_from_config(config)
    ids = [renderer.get_tokenizer().encode(text, add_special_tokens=special) for special in (False, True) for text in texts]
    for record in records:
        request = TokenizeChatRequest(**record)
        tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
        settings = request.build_chat_params(None, "auto").with_defaults({"tools": tools, "tokenize": False})
        _, (found,) = renderer.render_chat([request.messages], settings, request.build_tok_params(config.model_config))
        ids.append(found["prompt_token_ids"])
    return ids
print("FOUND", json.dumps([served(*each) for each in json.load(open(sys.argv[1]))]))
"""
CHANGES = (
    lambda words: setattr(words, "chat_template", "other"),
    lambda words: words.add_tokens(["<new>"]),
    lambda words: setattr(words, "eos_token", MARKS[0]),
)
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def sentencepiece(folder: Path, kind: str, name: str) -> bytes:
    """A folder with a SentencePiece model of that file name, for the tokenizer class `kind`; the model."""
    import sentencepiece as pieces

    out = io.BytesIO()
    pieces.SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS, *TEXTS]), model_writer=out, vocab_size=430, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, remove_extra_whitespaces=False, normalization_rule_name="identity", user_defined_symbols=MARKS,
        minloglevel=2,
    )  # fmt: skip
    (folder / name).write_bytes(out.getvalue())
    config = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    return out.getvalue()


def tiktoken(folder: Path) -> dict[bytes, int]:
    """A folder with a tiktoken file, as Llama 3 and Qwen came first; the ranks in it."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    rules = json.loads(tokenizer().backend_tokenizer.to_str())
    letters = {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}
    added = {token["content"] for token in rules["added_tokens"]}
    words = [word for word, _ in sorted(rules["model"]["vocab"].items(), key=lambda pair: pair[1]) if word not in added]
    ranks = {b"".join(letters[letter] for letter in word): rank for rank, word in enumerate(words)}
    (folder / "tokenizer.model").write_bytes(b"\n".join(base64.b64encode(word) + f" {rank}".encode() for word, rank in ranks.items()))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": MARKS, "bos_token": MARKS[0], "eos_token": MARKS[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    return ranks


def assert_masked(words) -> None:
    """Ids are AutoTokenizer's, and what is trained is what the assistant says."""
    found = Encoder(words).encode(Conversation(messages=TALK))
    assert found.tokens.tolist() == words.apply_chat_template(list(TALK), tokenize=True, return_dict=False)
    spans = said(found.tokens, found.trained, words)
    spans[0] = spans[0].lstrip()  # where a blank is part of the first token
    assert spans == ["Grüße 😀, it's  me<|im_end|>", "Yes.<|im_end|>"]


def test_sentencepiece_through_the_fast_backend(tmp_path: Path):
    import sentencepiece as pieces

    model = sentencepiece(tmp_path, "LlamaTokenizer", "tokenizer.model")
    words = load_tokenizer(str(tmp_path))
    assert words.is_fast
    theirs = pieces.SentencePieceProcessor(model_proto=model)
    for text in TEXTS:
        assert words(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)
    assert_masked(words)


def bytewise(folder: Path) -> None:
    """A folder with a tokenizer of plain Python, which reads no vocabulary."""
    from transformers import ByT5Tokenizer

    ByT5Tokenizer(chat_template=CHATML, extra_ids=0, additional_special_tokens=MARKS).save_pretrained(str(folder))
    assert not any((folder / name).exists() for name in TOKENIZERS)


def test_bytes_without_a_vocabulary(tmp_path: Path):
    bytewise(tmp_path)
    words = load_tokenizer(str(tmp_path))
    assert words("hé", add_special_tokens=False)["input_ids"] == [3 + byte for byte in "hé".encode()]
    assert_masked(words)


def test_sentencepiece_without_a_fast_backend(tmp_path: Path):
    """There are no offsets: where spans begin and end is found by decoding."""
    sentencepiece(tmp_path, "GPTSw3Tokenizer", "spiece.model")
    words = load_tokenizer(str(tmp_path))
    assert not words.is_fast
    assert_masked(words)


def test_tiktoken_files(tmp_path: Path):
    tiktoken_library = pytest.importorskip("tiktoken")
    ranks = tiktoken(tmp_path)
    words = load_tokenizer(str(tmp_path))
    special = {mark: len(ranks) + number for number, mark in enumerate(MARKS)}
    theirs = tiktoken_library.Encoding("test", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    for text in (*TEXTS, "<|im_start|>user\nhi<|im_end|>"):
        assert Tokenizer(words).encode([text], [[]])[0][0].tolist() == theirs.encode(text, allowed_special="all")
    assert_masked(words)


def test_a_tokenizer_of_plain_python(tmp_path: Path):
    from transformers import AutoTokenizer, ByT5Tokenizer

    made = ByT5Tokenizer()
    made.add_special_tokens({"additional_special_tokens": MARKS})
    made.chat_template = CHATML
    made.save_pretrained(str(tmp_path))
    words = AutoTokenizer.from_pretrained(str(tmp_path))
    assert not words.is_fast
    assert_masked(words)


def test_identities_differ_where_ids_may(tmp_path: Path):
    """Vocabulary, merges, added tokens, normaliser, template, special tokens: each changes the hash; loading again does not."""
    folders = {name: tmp_path / name for name in ("llama", "sw3", "tik")}
    for folder in folders.values():
        folder.mkdir()
    sentencepiece(folders["llama"], "LlamaTokenizer", "tokenizer.model")
    sentencepiece(folders["sw3"], "GPTSw3Tokenizer", "spiece.model")
    tiktoken(folders["tik"])
    hashes = [identity(load_tokenizer(str(folder))) for folder in folders.values()]
    assert hashes == [identity(load_tokenizer(str(folder))) for folder in folders.values()]
    changed = []
    for folder, before in zip(folders.values(), hashes, strict=True):
        for change in CHANGES:
            words = load_tokenizer(str(folder))
            change(words)
            changed.append(identity(words))
            assert changed[-1] != before
    assert len({*hashes, *changed}) == len(hashes) + len(changed)


def test_an_identity_is_of_the_tokenizer_and_not_of_its_last_call():
    words = tokenizer("chatml")
    before = identity(words)
    words(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert identity(words) == before


def test_a_tokenizer_set_to_cut_and_fill_texts_does_neither(tmp_path: Path):
    import copy

    words = copy.deepcopy(tokenizer("chatml"))
    words.backend_tokenizer.enable_truncation(5)
    words.backend_tokenizer.enable_padding(length=64)
    words.save_pretrained(str(tmp_path))
    for each in (words, load_tokenizer(str(tmp_path))):
        assert_masked(each)


def test_the_policy_refuses_rows_of_another_tokenizer(tiny: str):
    from functools import partial

    from rolecall.kernels.losses import nll
    from rolecall.roles import Policy
    from rolecall.roles.base import Member
    from rolecall.roles.data.encode import Encoded
    from rolecall.roles.data.packer import pack_block

    policy = Policy(tiny)
    policy.setup(Member())
    record = Encoded(np.arange(5, 15, dtype=np.int32), np.arange(10) > 3)
    rows = partial(pack_block, [record], capacity=16)
    with pytest.raises(DataError, match="The rows were made with another tokenizer"):
        policy.accumulate(rows(tokenizer="0" * 32), nll)
    assert policy.accumulate(rows(tokenizer=identity(load_tokenizer(tiny))), nll).sums["loss"][1] > 0


def test_pad_is_a_token_that_there_is():
    from transformers import PreTrainedTokenizerFast

    raw = tokenizer().backend_tokenizer
    assert Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<s>", eos_token="</s>")).pad == 1
    assert Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")).pad == 2
    assert Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw)).pad == 0


def test_semantic_ids_are_single_tokens_and_quick_to_find():
    import copy

    words = copy.deepcopy(tokenizer("chatml"))
    added = semantic_ids([64, 64, 64])
    before = len(words)
    assert words.add_tokens(added) == len(added) == 192
    ours = Tokenizer(words)
    assert ours._words is not None
    item = "<|0_5|><|1_63|><|2_0|>"
    record = Conversation(
        messages=({"role": "user", "content": f"After {item} <|3_0|> <b> a<b>?"}, {"role": "assistant", "content": item * 2})
    )
    found = Encoder(ours).encode(record)
    assert found.tokens.tolist() == words.apply_chat_template(list(record.messages), tokenize=True, return_dict=False)
    assert found.tokens[found.trained].tolist() == [before + 5, before + 127, before + 128] * 2 + words.convert_tokens_to_ids(
        ["<|im_end|>"]
    )
    assert np.count_nonzero(found.tokens >= before) == 9
    with pytest.raises(ConfigError, match="can't be those of semantic ids"):
        semantic_ids([4], "item {code}")
    with pytest.raises(ConfigError):
        semantic_ids([4, 4], "<{code}>")


VLLM = {  # a folder of every backend, and of every template
    **{name: lambda folder, name=name: tokenizer(name).save_pretrained(str(folder)) for name in NAMES},
    "sentencepiece": lambda folder: sentencepiece(folder, "LlamaTokenizer", "tokenizer.model"),
    "sentencepiece without a fast backend": lambda folder: sentencepiece(folder, "GPTSw3Tokenizer", "spiece.model"),
    "tiktoken": tiktoken,
    "bytes without a vocabulary": bytewise,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[list[int]]]]:
    """Of each backend the folder and vLLM's ids of the texts and the records, all from one process: vLLM takes long to import."""
    from transformers import LlamaConfig

    root, asked = tmp_path_factory.mktemp("vllm"), []
    for name, make in VLLM.items():
        folder = root / name.replace(" ", "-")
        LlamaConfig(hidden_size=32, num_attention_heads=1, num_hidden_layers=1).save_pretrained(str(folder))  # vLLM wants a model's
        make(folder)
        asked.append((str(folder), TEXTS, [request for _, request in records(name)]))
    (root / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, "-c", SERVE, str(root / "asked.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))[6:])
    return {name: (own[0], ids) for name, own, ids in zip(VLLM, asked, found, strict=True)}


def records(name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What a template of that name is asked for: conversations and what begins them, as our records and as vLLM's requests."""
    found = []
    for each in ({"messages": list(TALK)}, ERRAND)[: 1 + (name in WITH_TOOLS)]:
        question = {**each, "messages": each["messages"][:1]}
        found.append((each, {**each, "add_generation_prompt": False}))
        found.append(({**question, "answer": ""}, {**question, "add_generation_prompt": True}))
    return found


@pytest.mark.slow
@pytest.mark.timeout(660)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("name", VLLM)
def test_vllm_makes_the_same_ids(name: str, served: dict[str, tuple[str, list[list[int]]]]):
    """Its tokenizer on texts; on records its chat server's way from a request to ids, which reads parts, nulls and JSON as we do."""
    folder, theirs = served[name]
    words = Tokenizer.load(folder)
    ours = [words.encode([text], [[]], special=special)[0][0].tolist() for special in (False, True) for text in TEXTS]
    for record, request in records(name):
        layout = recognise(record, want=("question" if request["add_generation_prompt"] else "conversation",))
        ours.append(Encoder(words).encode(layout.read(record)).tokens.tolist())
    assert ours == theirs

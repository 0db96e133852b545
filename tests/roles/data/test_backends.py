"""Every tokenizer is reached through AutoTokenizer: Hugging Face's own, SentencePiece, tiktoken, plain Python; masks hold for all."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from chats import CORPUS, TEMPLATES, said, tokenizer
from rolecall.protocols import ConfigError, DataError
from rolecall.roles.data.encode import Encoder
from rolecall.roles.data.records import Conversation
from rolecall.roles.data.tokenizer import Tokenizer, semantic_ids
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


@pytest.mark.slow
def test_vllm_makes_the_same_ids(tmp_path: Path):
    """Its tokenizer, and its chat renderer on the same messages."""
    tokenizers = pytest.importorskip("vllm.tokenizers")
    for name in ("chatml", "qwen3", "llama3"):
        folder = str(tmp_path / name)
        tokenizer(name).save_pretrained(folder)
        ours, theirs = Tokenizer.load(folder), tokenizers.get_tokenizer(folder)
        for text in TEXTS:
            assert ours.encode([text], [[]])[0][0].tolist() == theirs.encode(text, add_special_tokens=False)
        found = Encoder(ours).encode(Conversation(messages=TALK))
        assert found.tokens.tolist() == theirs.apply_chat_template(list(TALK), tokenize=True, return_dict=False)

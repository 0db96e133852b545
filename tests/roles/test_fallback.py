"""Models that our decoder does not know run as their Hugging Face class, and say what can't be had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from rolecall.kernels.attention import Packed
from rolecall.protocols.errors import ModelError
from rolecall.roles.base import Member
from rolecall.roles.models import load
from rolecall.roles.models.huggingface import HuggingFaceModel
from rolecall.roles.rollout import Rollout
from tiny import tiny_tokenizer

LOGITS = 2e-4  # float32 in transformers' own code, with and without a mask
SMALL = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
OLD = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
KNOWN = {
    "Gemma2": {**SMALL, **HEADS, "head_dim": 8, "final_logit_softcapping": 1.5, "attn_logit_softcapping": None},
    "Cohere": {**SMALL, **HEADS, "logit_scale": 0.3},
    "Granite": {**SMALL, **HEADS, "logits_scaling": 4.0},
    "GPTJ": {**OLD, "rotary_dim": 4},  # its head has a bias
    "Qwen2": {**SMALL, **HEADS},
    "Bloom": {"vocab_size": 260, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},  # places in the mask
    "Mamba": {**SMALL, "state_size": 4, "conv_kernel": 3},
}
ONE_BY_ONE = ("Bloom", "Mamba")


def folder_of(kind: str, folder: Path, **changes: object) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{**KNOWN[kind], **changes}))
        head = model.get_output_embeddings()
        if head.bias is not None:
            head.bias.data.normal_()
    model.save_pretrained(folder)
    return tiny_tokenizer(folder)


@pytest.mark.parametrize("kind", KNOWN)
@torch.no_grad()
def test_packed_logits_are_those_of_each_sequence_alone(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A prompt with two completions, and a sequence beside them."""
    model = load(folder_of(kind, tmp_path))
    assert isinstance(model, HuggingFaceModel)
    segments = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4 + [3] * 6 + [-1] * 2])
    positions = torch.tensor([[*range(5), *range(5, 8), *range(5, 9), *range(6), 0, 0]])
    tokens = torch.arange(20, 40)[None]
    ours = model.logits(model.hidden(tokens, positions, Packed(segments, torch.tensor([-1, 0, 0, -1]), positions)))[0]
    for chain in ((0, 1), (0, 2), (3,)):
        slots = torch.cat([(segments[0] == one).nonzero()[:, 0] for one in chain])
        theirs = model.net(input_ids=tokens[:, slots], use_cache=False).logits[0]
        torch.testing.assert_close(ours[slots], theirs, rtol=0, atol=LOGITS)
    assert "no family" in caplog.text
    assert "which has no definition here" in caplog.text
    assert any("one by one" in note for note in model.notes) is (kind in ONE_BY_ONE)
    assert model.packs is (kind not in ONE_BY_ONE)


def test_the_bias_of_a_head_is_trained(tmp_path: Path) -> None:
    model = load(folder_of("GPTJ", tmp_path))
    positions = torch.arange(6)[None]
    hidden = model.hidden(positions + 9, positions, Packed(positions * 0, torch.tensor([-1]), positions))
    model.logits(hidden)[0, :, 7].sum().backward()
    bias = model.net.get_output_embeddings().bias.grad
    assert bias[7] == 6
    assert bias.sum() == 6


def test_what_has_no_keys_and_values_is_not_sampled_from(tmp_path: Path) -> None:
    rollout = Rollout(folder_of("Mamba", tmp_path))
    with pytest.raises(ModelError, match=r"can't sample.*MambaForCausalLM can't decode.*Do: use a model of attention layers"):
        rollout.setup(Member())


def test_a_head_that_its_config_does_not_explain_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("Qwen2", tmp_path)
    head = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: head(self, x) * (2 if self.out_features == 260 else 1))
    with pytest.raises(ModelError, match="changes its logits after the head"):
        load(folder)


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    transformers.BertLMHeadModel(transformers.BertConfig(**sizes, initializer_range=0.3)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="BertLMHeadModel looks ahead"):
        load(str(tmp_path))


def test_sliding_windows_of_a_fallback_limit_its_rows(tmp_path: Path) -> None:
    model = load(folder_of("Qwen2", tmp_path, use_sliding_window=True, sliding_window=8, max_window_layers=1))
    assert model.longest == 8
    assert any("window of 8" in note for note in model.notes)
    positions = torch.arange(9)[None]
    with pytest.raises(ModelError, match=r"longer than the sliding window"):
        model.hidden(positions, positions, Packed(positions * 0, torch.tensor([-1]), positions))


def test_the_controller_is_told_before_anything_starts(tmp_path: Path) -> None:
    folder = folder_of("Cohere", tmp_path)
    code = f"import sys; from rolecall.roles.policy import Policy; Policy({folder!r}).check(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"
    assert done.stderr.count("is a 'cohere' model, which has no definition here: it runs as its Hugging Face class.") == 1


def test_native_alone_can_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no family 'cohere' here.*There is: llama, qwen3"):
        load(folder_of("Cohere", tmp_path), native=True)

"""New tokens: the same ids in tokenizer and model, the mean of what there was, and nothing else changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rolecall.kernels.attention import Packed
from rolecall.kernels.losses import nll
from rolecall.protocols.errors import ModelError
from rolecall.roles.base import Member
from rolecall.roles.models import load
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.models.native import NativeModel
from rolecall.roles.models.vocabulary import extend, extend_model
from rolecall.roles.packing import pack_samples
from rolecall.roles.policy import Policy
from rolecall.roles.tokens import load_tokenizer
from rolecall.roles.weights import assemble
from tiny import VOCAB, tiny_model, tiny_samples
from transformers import AutoModelForCausalLM

NEW = ("<think>", "</think>", "<|tool|>")
TOKENS = torch.arange(4, 40)[None]
CLOSE = 2e-5


def logits(model: CausalModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        return model.logits(model.hidden(tokens, positions, Packed(torch.zeros_like(tokens), torch.tensor([-1]), positions)))


@pytest.mark.parametrize("native", [True, False], ids=["native", "huggingface"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_tokens_are_the_mean_and_the_old_stay(tmp_path: Path, tied: bool, native: bool) -> None:
    folder = tiny_model(tmp_path / "old", tied=tied)
    model, tokenizer = load(folder, native=native), load_tokenizer(folder)
    before, old = logits(model), {name: tensor.clone() for name, tensor in model.named_tensors().items()}
    ids = extend(model, tokenizer, NEW)
    assert ids == (VOCAB, VOCAB + 1, VOCAB + 2) == tuple(tokenizer.convert_tokens_to_ids(list(NEW)))
    assert model.spec.vocab == VOCAB + 3 == len(tokenizer)
    after = logits(model)
    assert torch.equal(after[..., :VOCAB], before)
    assert (after[..., VOCAB:] - before.mean(-1, keepdim=True)).abs().max() < CLOSE
    for name, tensor in model.named_tensors().items():
        assert torch.equal(tensor[: len(old[name])], old[name])
        if len(tensor) > len(old[name]):
            assert torch.equal(tensor[VOCAB:], old[name].mean(0).expand(3, -1))
    if isinstance(model, NativeModel):
        assert len(model.head) == 320
        assert not model.head[VOCAB + 3 :].any()
    saved = model.save(tmp_path / "new", tokenizer)
    net, text = AutoModelForCausalLM.from_pretrained(saved), load_tokenizer(saved)
    assert net.config.vocab_size == VOCAB + 3
    assert text("a<think>b")["input_ids"].count(VOCAB) == 1
    assert text.decode([VOCAB], skip_special_tokens=True) == ""
    with torch.no_grad():
        assert (net(TOKENS).logits - after).abs().max() < CLOSE


def test_unused_rows_of_the_vocabulary_are_taken_first(tmp_path: Path) -> None:
    """Checkpoints often have more rows than their tokenizer has tokens; what lies there was never trained."""
    folder = tiny_model(tmp_path / "old", vocab=VOCAB + 2)
    for native in (True, False):
        model, tokenizer = load(folder, native=native), load_tokenizer(folder)
        mean = model.named_tensors()["model.embed_tokens.weight"][:VOCAB].mean(0)
        assert extend(model, tokenizer, NEW[:1]) == (VOCAB,)
        assert model.spec.vocab == VOCAB + 2
        assert torch.equal(model.named_tensors()["model.embed_tokens.weight"][VOCAB], mean)
        assert extend(model, tokenizer, NEW[1:]) == (VOCAB + 1, VOCAB + 2)
        assert model.spec.vocab == VOCAB + 3


def test_a_policy_trains_and_publishes_new_tokens(tiny: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "new")
    ids = extend_model(tiny, folder, NEW, special=False)
    assert load_tokenizer(folder).decode([ids[0]], skip_special_tokens=True) == "<think>"
    policy = Policy(folder)
    policy.check()
    policy.setup(Member())
    samples = tiny_samples(2, 2)
    samples.tokens[-1] = ids[2]
    before = policy.logprobs(samples).logprobs[-1]
    for _ in range(5):
        policy.accumulate(pack_samples(samples, None, [0.1] * 4, capacity=64), nll)
        policy.update(1e-2)
    assert policy.logprobs(samples).logprobs[-1] > before + 0.5
    published = assemble([policy.publish()])
    assert published["model.embed_tokens.weight"].shape == (VOCAB + 3, 64)
    net = AutoModelForCausalLM.from_pretrained(policy.save(str(tmp_path / "checkpoint")))
    assert np.array_equal(net.get_input_embeddings().weight.detach(), published["model.embed_tokens.weight"])


@pytest.mark.parametrize("tokens", [[], ["<|im_start|>"], ["a"], [""], ["<x>", "<x>"]])
def test_what_is_no_new_token_is_refused(tiny: str, tokens: list[str]) -> None:
    model, tokenizer = load(tiny), load_tokenizer(tiny)
    with pytest.raises(ModelError, match="can't become new tokens"):
        extend(model, tokenizer, tokens)
    assert (model.spec.vocab, len(tokenizer)) == (VOCAB, VOCAB)

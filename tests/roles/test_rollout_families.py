"""The native engine and the packed trainer on models of every family, beyond their sliding windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import VOCAB, family_model
from prompting import prompts_of, random_rows
from rolecall.roles.base import Member
from rolecall.roles.reference import Reference
from rolecall.roles.rollout import Rollout
from transformers import AutoModelForCausalLM

LOGPROB = 5e-5  # float32, sums in another order; logprobs down to -20
MADE = 30  # tokens of a completion: three windows


@pytest.mark.parametrize("name", ["qwen3-sliding", "gemma3", "gemma3-untied-capped", "qwen3-moe-mixed", "gpt-oss", "llama-untied-biased"])
def test_what_is_sampled_and_trained_is_what_transformers_computes(name: str, tmp_path: Path) -> None:
    """Logprobs of the engine, of packed rows, and of each sample alone in transformers agree."""
    folder = family_model(name, tmp_path, tokenizer=True)
    rollout = Rollout(folder, slots=3, max_tokens=MADE)
    rollout.setup(Member(seed=3))
    start = random_rows((12,))[0]
    rows = [start + tail for tail in random_rows((1, 9, 20, 4), seed=1)]  # a beginning that is computed once
    samples = rollout.generate(prompts_of(rows), per_prompt=2)
    assert samples.tokens.max() < VOCAB
    reference = Reference(folder, row_tokens=150)
    reference.setup(Member())
    packed = reference.logprobs(samples).logprobs
    net = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        for first, last, prompt in zip(samples.cu_seqlens, samples.cu_seqlens[1:], samples.prompt_lengths, strict=False):
            tokens = torch.from_numpy(samples.tokens[first:last].astype(np.int64))
            table = net(input_ids=tokens[None]).logits[0].log_softmax(-1)
            wanted = table[prompt - 1 : -1].gather(1, tokens[prompt:, None])[:, 0].numpy()
            for ours in (samples.logprobs, packed):
                np.testing.assert_allclose(ours[first + prompt : last], wanted, rtol=0, atol=LOGPROB)
    assert (np.diff(samples.cu_seqlens) > 40).any()


def test_a_greedy_choice_is_never_padding(tmp_path: Path) -> None:
    """Logits of the padding rows are 0; with all others below, a mask is what keeps them out."""
    folder = family_model("llama-untied-biased", tmp_path, tokenizer=True)
    rollout = Rollout(folder, max_tokens=4)
    rollout.setup(Member())
    model = rollout._model
    with torch.no_grad():
        model.net.norm.weight.fill_(1.0)
        model.net.head.weight[:VOCAB] = -torch.ones(VOCAB, 1) * model.net.norm.weight  # one direction, all alike
        model.net.norm.register_forward_hook(lambda *_: torch.ones(()).expand(_[2].shape))
    for temperature in (0.0, 1.0):
        samples = rollout.generate(prompts_of(random_rows((5, 3))), per_prompt=8, temperature=temperature)
        assert samples.tokens.max() < VOCAB
        np.testing.assert_allclose(samples.logprobs[samples.logprobs != 0], -np.log(VOCAB), rtol=1e-4)

"""What we save, vLLM loads unchanged and computes alike."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import CASES, family_model
from rolecall.kernels.attention import Packed
from rolecall.roles.models import load
from rolecall.roles.tokens import load_tokenizer

PROMPT, MADE = list(range(40, 60)), 12
LOGPROB = {"float32": 2e-4, "bfloat16": 0.15}  # sums in another order; a bfloat16 engine rounds every layer
QUIET = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
folder, dtype, prompt, made = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
engine = LLM(folder, dtype=dtype, enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=64, skip_tokenizer_init=True)
settings = SamplingParams(temperature=0, max_tokens=made, min_tokens=made, logprobs=0, ignore_eos=True, detokenize=False)
out = engine.generate([{"prompt_token_ids": prompt}], settings)[0].outputs[0]
found = [[token, each[token].logprob] for token, each in zip(out.token_ids, out.logprobs)]
print("FOUND", json.dumps(found))
"""
SHAPES = {  # vLLM's kernels want heads of 32 numbers at least; those of experts on a CPU want sizes that 32 divides
    "llama": {"head_dim": 32, "tie_word_embeddings": True},
    "qwen3-untied": {"head_dim": 32, "attention_bias": False},  # vLLM has no bias after attention there, and says nothing
    "gemma3": {"head_dim": 32, "sliding_window": 16},
    "qwen3-moe": {"head_dim": 32, "hidden_size": 64},
    "gpt-oss": {"head_dim": 32, "hidden_size": 64, "intermediate_size": 96, "sliding_window": 16},
}
ENGINE = {"gpt-oss": "bfloat16"}  # vLLM's CPU kernel takes sinks in bfloat16 alone ("expected scalar type BFloat16 but found Float")


@pytest.mark.slow
@pytest.mark.timeout(660)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("name", SHAPES)
def test_vllm_loads_what_we_save(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, name, (CASES[name][0], {**CASES[name][1], **SHAPES[name]}))
    first = family_model(name, tmp_path / "first", tokenizer=True)
    dtype = "bfloat16" if torch.cuda.is_available() else ENGINE.get(name, "float32")
    model = load(first, dtype=dtype, native=True)
    # Sinks of size 3, not 0.3: else a model without them would pass too.
    model.load_tensors({key: tensor * 1.1 + 3 * ("sinks" in key) for key, tensor in model.named_tensors().items()})
    saved = model.save(tmp_path / "saved", load_tokenizer(first))
    command = [sys.executable, "-c", SCRIPT, saved, dtype, json.dumps(PROMPT), str(MADE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, **QUIET})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))[6:])
    tokens = torch.tensor([PROMPT + [token for token, _ in found]])
    places = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        states = model.hidden(tokens, places, Packed(places * 0, torch.tensor([-1]), places))
        table = model.logits(states)[0].log_softmax(-1)
    ours = table[len(PROMPT) - 1 : -1].gather(1, tokens[0, len(PROMPT) :, None])[:, 0]
    torch.testing.assert_close(ours, torch.tensor([logprob for _, logprob in found]), rtol=0, atol=LOGPROB[dtype])

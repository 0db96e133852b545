"""Every family on a GPU: the kernels chosen there compute what transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import CASES, family_model
from rolecall.kernels.attention import Packed
from rolecall.roles.models import load
from rolecall.roles.models.verify import AGREES, verify

GRADIENT = 2e-3  # float32: share of a tensor's largest entry; another order of sums, atomics in some backward kernels
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", CASES)
def test_verify_agrees(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(family_model(name, tmp_path, tokenizer=True), device="cuda:0") == AGREES, capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama-tied-one-key-head", "qwen3-sliding", "gemma3", "gpt-oss"])
def test_gradients_of_packed_rows_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    folder = family_model(name, tmp_path)
    segments = torch.tensor([[0] * 9 + [1] * 20 + [2] * 15 + [3] * 18 + [-1] * 2])
    positions = torch.tensor([[*range(9), *range(9, 29), *range(9, 24), *range(18), 0, 0]])
    tokens = torch.arange(64)[None] * 3
    gradients = []
    for device in ("cpu", "cuda:0"):
        model = load(folder, device=device)
        where = Packed(segments, torch.tensor([-1, 0, 0, -1]), positions)
        states = model.hidden(tokens.to(device), positions.to(device), where)[:, :62]
        model.logits(states).log_softmax(-1)[..., 7].sum().backward()
        gradients.append({key: parameter.grad.cpu() for key, parameter in model.net.named_parameters()})
    for key, wanted in gradients[0].items():
        assert (gradients[1][key] - wanted).abs().max() <= GRADIENT * wanted.abs().max() + 1e-6, key

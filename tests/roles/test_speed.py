"""What a policy reports of its speed: operations from the real lengths, and their share of a GPU's peak."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rolecall.kernels.losses import nll
from rolecall.protocols.messages import Samples
from rolecall.roles.base import Member
from rolecall.roles.models import load
from rolecall.roles.models.adapters import Adapters
from rolecall.roles.models.flops import training_flops
from rolecall.roles.models.lora import Lora
from rolecall.roles.packing import pack_samples
from rolecall.roles.policy import Policy
from rolecall.roles.policy.speed import PEAKS, Speed, peak
from tiny import tiny_samples


def wanted(model, samples: Samples, lora: Lora | None = None) -> float:
    """Prompts once, each completion after its prompt but for its last token, the head for completion tokens alone."""
    prompts, counts = samples.prompt_lengths, np.diff(samples.cu_seqlens)
    first = np.concatenate([[0], np.cumsum(samples.counts)[:-1]])
    tails = counts - prompts - 1
    lengths = [*prompts[first], *tails]
    before = [0] * len(first) + list(prompts)
    return training_flops(model.spec, lengths, before=before, predicted=int((counts - prompts).sum()), lora=lora)


@pytest.mark.parametrize("lora", [None, Lora(r=3, targets=("q_proj", "up_proj"))], ids=["all", "lora"])
@pytest.mark.parametrize("capacity", [32, 500])
def test_operations_are_those_of_the_real_lengths(tiny: str, capacity: int, lora: Lora | None) -> None:
    """However much room is left in the rows; one row holds each prompt whole, the prompts fit with all completions."""
    model, samples = load(tiny), tiny_samples(4, 2, longest_prompt=9, longest=8)
    speed = Speed(model, None if lora is None else Adapters(model.net, lora))
    assert speed.operations(pack_samples(samples, capacity=capacity)) == pytest.approx(wanted(model, samples, lora), rel=1e-12)


def test_a_policy_reports_them(tiny: str) -> None:
    policy = Policy(tiny)
    policy.setup(Member())
    batch = pack_samples(tiny_samples(2, 2), None, [0.1] * 4, capacity=64)
    sums = policy.accumulate(batch, nll).sums
    operations = wanted(policy._training.model, tiny_samples(2, 2))
    assert sums["tflops"][0] == pytest.approx(operations / 1e12)
    assert sums["tflops"][1] == sums["tokens_per_s"][1] > 0
    assert "mfu" not in sums, "a CPU has no peak here"


def test_the_share_of_a_gpu_whose_peak_is_known(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda:0")
    assert peak(gpu, torch.bfloat16) == 989.4e12
    assert peak(gpu, torch.float32) == peak(torch.device("cpu"), torch.bfloat16) == 0.0
    found = {}
    for name in ("NVIDIA H100 PCIe", "NVIDIA L40S", "NVIDIA L4", "NVIDIA A100-SXM4-80GB", "Somebody's GPU"):
        found[name] = peak(gpu, torch.float16) / 1e12
    assert list(found.values()) == [756.0, 362.0, 121.0, 312.0, 0.0]
    speed = Speed(load(tiny), None)
    speed._peak = 4e12
    assert speed.measures(1e12, 0.5) == {"tflops": (1.0, 0.5), "mfu": (0.25, 0.5)}
    assert speed.measures(0.0, 0.5) == {}
    assert all(value > 0 for value in PEAKS.values())


def test_a_hugging_face_class_reports_none(tiny: str) -> None:
    batch = pack_samples(tiny_samples(2, 2), None, [0.1] * 4, capacity=64)
    assert Speed(load(tiny, native=False), None).operations(batch) == 0.0

"""A policy on a GPU: the gradients of a CPU's float32, whatever is compiled, recomputed or adapted; resuming exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rolecall.kernels.losses import nll
from rolecall.protocols.messages import PackedBatch
from rolecall.roles.base import Member
from rolecall.roles.models.lora import Lora
from rolecall.roles.packing import pack_samples
from rolecall.roles.policy import Policy
from tiny import tiny_model, tiny_samples
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.gpu

GPU = Member(device="cuda:0")
NEAR = 0.05  # of a gradient's norm; bfloat16 keeps 8 bits
AGAIN = 5e-3  # of a gradient's norm: attention's backward may add in another order each time
LORA = Lora(r=8, alpha=16.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With weights of usual size: the tests' own are so large that what bfloat16 rounds grows from layer to layer."""
    folder = tiny_model(tmp_path_factory.mktemp("gpu"), hidden=256, heads=4, kv_heads=2, layers=3)
    net = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.3 if parameter.ndim > 1 else 1.0)
    net.save_pretrained(folder)
    return folder


def batch(seed: int) -> PackedBatch:
    samples = tiny_samples(8, 4, seed=seed, longest_prompt=60, longest=40)
    return pack_samples(samples, None, [1 / 600] * 32, capacity=256)


def ready(model: str, member: Member = GPU, **settings: object) -> Policy:
    policy = Policy(model, rows_per_pass=4, **settings)
    policy.check()
    policy.setup(member)
    if policy._training.adapters is not None:
        for number, parameter in enumerate(policy._training.adapters.parameters().values()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.05
            parameter.data.copy_(drawn)
        policy._training.optimiser.adopt()
    return policy


def gradient(policy: Policy) -> torch.Tensor:
    for seed in range(2):
        policy.accumulate(batch(seed), nll)
    return torch.cat([view.flatten().cpu().double() for view in policy._training.gradients.views])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("lora", [None, LORA], ids=["all", "lora"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_bfloat16_gives_the_gradients_of_float32(model: str, lora: Lora | None, compiled: bool, how: str) -> None:
    wanted = gradient(ready(model, Member(threads=4), lora=lora))
    found = gradient(ready(model, lora=lora, dtype="bfloat16", compile=compiled, recompute=how))
    assert apart(found, wanted) < NEAR
    again = gradient(ready(model, lora=lora, dtype="bfloat16", compile=compiled))
    assert apart(found, again) < (AGAIN if not compiled else NEAR)


def test_float32_gives_the_gradients_of_a_cpu(model: str) -> None:
    assert apart(gradient(ready(model)), gradient(ready(model, Member(threads=4)))) < 1e-4


@pytest.mark.parametrize("lora", [None, Lora(r=8, dropout=0.1)], ids=["all", "lora-dropout"])
def test_training_goes_on_from_a_checkpoint(model: str, tmp_path: Path, lora: Lora | None) -> None:
    settings = {"dtype": "bfloat16", "lora": lora, "recompute": "selective"}
    first, second = ready(model, **settings), ready(model, **settings)
    gradient(first)
    first.update(1e-3)
    second.restore(first.save(str(tmp_path / "checkpoint")))
    masters, moments = first._training.optimiser.tensors(), second._training.optimiser.tensors()
    assert all(torch.equal(tensor, moments[name]) for name, tensor in masters.items())
    assert apart(gradient(second), gradient(first)) < AGAIN


def test_speed_is_reported_beside_the_peak(model: str) -> None:
    policy = ready(model, dtype="bfloat16")
    sums = policy.accumulate(batch(0), nll).sums
    assert sums["tflops"][0] > 0
    assert ("mfu" in sums) == (policy._training.speed._peak > 0)
    if "mfu" in sums:
        assert 0 < sums["mfu"][0] / sums["mfu"][1] < 1


def test_adapters_take_less_memory_and_recomputation_too(model: str) -> None:
    peaks = {}
    for name, settings in {"all": {}, "lora": {"lora": LORA}, "lora, full": {"lora": LORA, "recompute": "full"}}.items():
        torch.cuda.empty_cache()
        policy = ready(model, dtype="bfloat16", **settings)
        torch.cuda.reset_peak_memory_stats()
        gradient(policy)
        policy.update(1e-4)
        peaks[name] = torch.cuda.max_memory_allocated()
        policy.close()
    assert peaks["all"] > peaks["lora"] > peaks["lora, full"], peaks

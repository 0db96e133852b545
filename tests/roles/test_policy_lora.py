"""A policy with adapters: what it trains, publishes, saves, and answers as its own reference."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from gloo import Trained, play, play_all
from peft import PeftModel
from rolecall.kernels.losses import nll
from rolecall.protocols.errors import ConfigError, ModelError
from rolecall.protocols.messages import PackedBatch
from rolecall.roles.base import Member
from rolecall.roles.models.lora import Lora
from rolecall.roles.packing import pack_samples
from rolecall.roles.policy import Policy
from rolecall.roles.reference import Reference
from rolecall.roles.weights import assemble, version_digest
from tiny import tiny_model, tiny_samples
from transformers import AutoModelForCausalLM

RATE = 1e-3
CLOSE = 2e-5  # float32 logprobs; sums in another order
MEAN, ANY, NORM = 1e-5 * RATE, 2e-2 * RATE, 1e-5  # as in test_policy_members.py
LORA = Lora(r=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))


def ready(model: str, lora: Lora | None = LORA, **settings: object) -> Policy:
    policy = Policy(model, lora=lora, weight_decay=0.1, **settings)
    policy.check()
    policy.setup(Member())
    return policy


def train(policy: Policy, steps: range) -> None:
    for step in steps:
        samples = tiny_samples(2, 2, seed=step)
        policy.accumulate(pack_samples(samples, None, [0.1] * 4, capacity=64), nll)
        policy.update(RATE)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in assemble([policy.publish()]).items()}


def adapters(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in policy._training.adapters.parameters().items()}


def test_adapters_are_trained_and_nothing_else(tiny: str) -> None:
    policy = ready(tiny)
    base = {name: tensor.clone() for name, tensor in policy._training.model.named_tensors().items()}
    before = weights(policy)
    assert all(torch.equal(tensor, base[name]) for name, tensor in before.items())
    train(policy, range(3))
    assert all(torch.equal(tensor, base[name]) for name, tensor in policy._training.model.named_tensors().items())
    moved = {name for name, tensor in weights(policy).items() if not torch.equal(tensor, base[name])}
    assert moved == {
        f"model.layers.{layer}.{part}.weight" for layer in range(2) for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    assert policy.version == 3


def test_what_is_published_is_what_is_trained(tiny: str) -> None:
    """A policy that trains all weights and takes over the published ones gives the same logprobs."""
    policy, plain, samples = ready(tiny), ready(tiny, None), tiny_samples(3, 2)
    train(policy, range(3))
    plain.load(policy.publish())
    assert plain.version == 3
    np.testing.assert_allclose(plain.logprobs(samples).logprobs, policy.logprobs(samples).logprobs, atol=CLOSE, rtol=0)


def test_it_answers_as_its_own_reference(tiny: str) -> None:
    policy, samples = ready(tiny), tiny_samples(3, 2)
    reference = Reference(tiny)
    reference.setup(Member())
    train(policy, range(2))
    found, wanted = policy.logprobs(samples, reference=True), reference.logprobs(samples)
    assert np.array_equal(found.logprobs, wanted.logprobs)
    assert (found.version, policy.logprobs(samples).version) == (0, 2)
    assert np.abs(policy.logprobs(samples).logprobs - wanted.logprobs).max() > 1e-3
    with pytest.raises(ConfigError, match=r"no reference in it.*Do: set lora, or spawn a Reference"):
        ready(tiny, None).logprobs(samples, reference=True)


@pytest.mark.parametrize(("dtype", "dropout"), [("float32", 0.0), ("bfloat16", 0.0), ("float32", 0.3)])
def test_training_goes_on_exactly(tiny: str, tmp_path: Path, dtype: str, dropout: float) -> None:
    lora = msgspec.structs.replace(LORA, dropout=dropout)
    settings = {"dtype": dtype, "warmup": 3, "schedule": "cosine", "total_steps": 6}
    straight, first, second = (ready(tiny, lora, **settings) for _ in range(3))
    train(straight, range(4))
    train(first, range(2))
    saved = first.save(str(tmp_path / "checkpoint"))
    train(second, range(7, 8))  # whatever it was before
    assert second.restore(saved) == 2 == second.version
    train(second, range(2, 4))
    found, wanted = adapters(second), adapters(straight)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert version_digest([second.publish()]) == version_digest([straight.publish()])
    assert sum(path.stat().st_size for path in Path(saved).glob("*.safetensors")) < 0.5 * Path(tiny, "model.safetensors").stat().st_size


def test_peft_and_a_new_policy_load_a_checkpoint(tiny: str, tmp_path: Path) -> None:
    policy = ready(tiny)
    train(policy, range(3))
    saved = policy.save(str(tmp_path / "checkpoint"))
    net = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), saved).merge_and_unload()
    for name, tensor in net.named_parameters():
        assert (tensor - weights(policy)[name]).abs().max() < CLOSE
    with pytest.raises(ModelError, match=r"holds adapters, not a model.*Do: write the whole model with policy\.export"):
        Reference(saved).check()
    further = ready(tiny, Lora(start=saved))
    assert all(torch.equal(tensor, adapters(policy)[name]) for name, tensor in adapters(further).items())
    assert further.version == 0


def test_plain_transformers_loads_an_export(tiny: str, tmp_path: Path) -> None:
    policy, samples = ready(tiny), tiny_samples(3, 2)
    train(policy, range(2))
    before = policy.logprobs(samples).logprobs
    folder = policy.export(str(tmp_path / "whole"))
    assert np.array_equal(policy.logprobs(samples).logprobs, before)
    net = AutoModelForCausalLM.from_pretrained(folder)
    whole = dict(net.named_parameters())
    assert whole.keys() == weights(policy).keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(policy).items())
    reference = Reference(folder)
    reference.setup(Member())
    np.testing.assert_allclose(reference.logprobs(samples).logprobs, before, atol=CLOSE, rtol=0)
    with pytest.raises(ModelError, match="exists already"):
        policy.export(folder)
    train(policy, range(2, 3))
    plain = ready(tiny, None)
    assert Policy(plain.export(str(tmp_path / "plain"))).check() is None


def test_loaded_weights_become_the_base(tiny: str, tmp_path: Path) -> None:
    policy, other = ready(tiny), ready(tiny)
    train(policy, range(2))
    other.load(policy.publish())
    assert all(torch.equal(tensor, weights(policy)[name]) for name, tensor in weights(other).items())
    assert not any(tensor.any() for name, tensor in adapters(other).items() if "lora_B" in name)
    with pytest.raises(ModelError, match="is of another model"):
        other.restore(policy.save(str(tmp_path / "checkpoint")))


def test_checkpoints_of_something_else_are_refused(tiny: str, tmp_path: Path) -> None:
    policy = ready(tiny)
    train(policy, range(1))
    saved, whole = policy.save(str(tmp_path / "adapters")), ready(tiny, None).save(str(tmp_path / "whole"))
    before = adapters(policy)
    with pytest.raises(ModelError, match=r"another kind.*adapters for frozen weights.*Do: set lora"):
        ready(tiny, None).restore(saved)
    with pytest.raises(ModelError, match=r"another kind.*Do: leave lora out"):
        policy.restore(whole)
    with pytest.raises(ModelError, match="is of another model"):
        ready(tiny_model(tmp_path / "other", seed=5)).restore(saved)
    with pytest.raises(ModelError, match=r"scaled otherwise.*Do: set r=4, alpha=8"):
        ready(tiny, msgspec.structs.replace(LORA, alpha=4.0)).restore(saved)
    with pytest.raises(ModelError, match="is for other linears"):
        ready(tiny, msgspec.structs.replace(LORA, targets=("q_proj",))).restore(saved)
    with pytest.raises(ModelError, match="another shape"):
        ready(tiny, msgspec.structs.replace(LORA, r=2, alpha=4.0)).restore(saved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapters(policy).items())
    torn = Path(saved, "adapter_model.safetensors")
    torn.write_bytes(torn.read_bytes()[:-1] + b"!")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors has changed"):
        policy.restore(saved)


def test_settings_are_refused_before_anything_starts(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="r=0"):
        Policy(tiny, lora=Lora(r=0)).check()
    with pytest.raises(ModelError, match="no adapter in"):
        Policy(tiny, lora=Lora(start=str(tmp_path))).check()
    with pytest.raises(ConfigError, match=r"no recompute 'half'.*none, selective, full"):
        Policy(tiny, recompute="half").check()


def shares(members: int) -> list[list[list[PackedBatch]]]:
    dealt: list[list[list[PackedBatch]]] = [[] for _ in range(members)]
    for update in range(3):
        samples = tiny_samples(4, 3, seed=update)
        advantages = np.random.default_rng(update).standard_normal(12).astype(np.float32)
        owners = np.arange(12) // 3 % members
        for rank in range(members):
            dealt[rank].append([pack_samples(samples, advantages, np.where(owners == rank, 0.01, 0.0), capacity=48)])
    return dealt


def test_members_give_the_update_of_one(tiny: str) -> None:
    one: Trained = play(Member(), tiny, {"lora": LORA, "clip": 0.05}, shares(1)[0], RATE)
    played = play_all(tiny, {"lora": LORA, "clip": 0.05}, shares(2), RATE)
    assert len({version_digest([member.whole]) for member in played}) == 1  # of the base
    assert played[0].norms == played[1].norms == pytest.approx(one.norms, rel=NORM)
    together, alone = assemble([member.weights for member in played]), assemble([one.weights])
    difference = torch.cat([(together[name] - alone[name]).abs().flatten() for name in alone])
    assert difference.mean() <= MEAN
    assert difference.max() <= ANY
    start = assemble([one.whole])
    assert sum(not torch.equal(alone[name], start[name]) for name in alone) == 2 * 3

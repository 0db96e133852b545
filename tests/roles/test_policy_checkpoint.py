"""A checkpoint continues exactly, loads in transformers, and is refused when a byte of it has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from rolecall.kernels.attention import Packed
from rolecall.kernels.losses import nll
from rolecall.protocols.errors import ModelError
from rolecall.roles.base import Member
from rolecall.roles.packing import pack_samples
from rolecall.roles.policy import Policy
from tiny import tiny_model, tiny_samples
from transformers import AutoModelForCausalLM, AutoTokenizer

LOGITS = 1e-5  # float32 rounding: a mask takes another attention kernel than none


def ready(model: str, dtype: str = "float32") -> Policy:
    policy = Policy(model, dtype=dtype, warmup=3, schedule="cosine", total_steps=6, weight_decay=0.1)
    policy.setup(Member())
    return policy


def train(policy: Policy, steps: range) -> None:
    for step in steps:
        samples = tiny_samples(2, 2, seed=step)
        policy.accumulate(pack_samples(samples, None, [0.1] * 4, capacity=64), nll)
        policy.update(1e-3)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy._training.model.named_tensors().items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_exactly(tiny: str, tmp_path: Path, dtype: str) -> None:
    straight = ready(tiny, dtype)
    train(straight, range(4))
    first = ready(tiny, dtype)
    train(first, range(2))
    saved = first.save(str(tmp_path / "checkpoint"))
    second = ready(tiny, dtype)
    train(second, range(7, 8))  # whatever it was before
    assert second.restore(saved) == 2 == second.version
    train(second, range(2, 4))
    assert second.version == straight.version == 4
    assert all(torch.equal(tensor, weights(straight)[name]) for name, tensor in weights(second).items())
    with pytest.raises(ModelError, match="exists already"):
        second.save(saved)


def test_before_the_first_update(tiny: str, tmp_path: Path) -> None:
    policy, other = ready(tiny), ready(tiny)
    train(other, range(1))
    assert other.restore(policy.save(str(tmp_path / "checkpoint"))) == 0
    train(other, range(2))
    train(policy, range(2))
    assert all(torch.equal(tensor, weights(policy)[name]) for name, tensor in weights(other).items())


def test_plain_transformers_loads_a_checkpoint(tiny: str, tmp_path: Path) -> None:
    policy = ready(tiny)
    train(policy, range(1))
    saved = policy.save(str(tmp_path / "deep" / "checkpoint"))
    tokens = torch.arange(4, 30)[None]
    positions = torch.arange(26)[None]
    where, model = Packed(torch.zeros_like(positions), torch.tensor([-1]), positions), policy._training.model
    with torch.no_grad():
        ours = model.logits(model.hidden(tokens, positions, where))
        torch.testing.assert_close(ours, AutoModelForCausalLM.from_pretrained(saved)(tokens).logits, rtol=LOGITS, atol=LOGITS)
    assert AutoTokenizer.from_pretrained(saved).chat_template
    assert Policy(saved).check() is None


def test_a_changed_checkpoint_is_refused_and_nothing_changes(tiny: str, tmp_path: Path) -> None:
    policy = ready(tiny)
    train(policy, range(2))
    saved = Path(policy.save(str(tmp_path / "checkpoint")))
    before = weights(policy)
    for number, path in enumerate(sorted(saved.iterdir())):
        torn = tmp_path / f"torn{number}"
        shutil.copytree(saved, torn)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        (torn / path.name).write_bytes(data)
        with pytest.raises(ModelError):
            policy.restore(str(torn))
        if path.name != "digests.json":
            with pytest.raises(ModelError, match=f"{path.name} has changed since it was saved"):
                policy.restore(str(torn))
        (torn / path.name).unlink()
        with pytest.raises(ModelError, match=r"lacks|is no checkpoint"):
            policy.restore(str(torn))
    assert policy.version == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(policy).items())


def test_checkpoints_of_something_else_are_refused(tiny: str, tmp_path: Path) -> None:
    saved = ready(tiny).save(str(tmp_path / "checkpoint"))
    with pytest.raises(ModelError, match=r"is in float32\. Asked: bfloat16"):
        ready(tiny, "bfloat16").restore(saved)
    with pytest.raises(ModelError, match="is of another model"):
        ready(tiny_model(tmp_path / "other", layers=1)).restore(saved)
    with pytest.raises(ModelError, match="is no checkpoint"):
        ready(tiny).restore(tiny)
    with pytest.raises(ModelError, match="no such folder"):
        ready(tiny).restore(str(tmp_path / "nowhere"))

"""What is frozen stays, what is not is trained as if nothing were, and no gradient is computed for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import family_model
from rolecall.kernels.losses import nll
from rolecall.protocols.errors import ConfigError, ModelError
from rolecall.roles.base import Member
from rolecall.roles.models import load
from rolecall.roles.models.freezing import freeze
from rolecall.roles.models.lora import Lora
from rolecall.roles.packing import pack_samples
from rolecall.roles.policy import Policy
from tiny import tiny_samples

FROZEN = r"model\.(embed_tokens|layers\.0\.)"


def ready(model: str, **settings: object) -> Policy:
    policy = Policy(model, **settings)
    policy.check()
    policy.setup(Member())
    return policy


def test_frozen_parameters_stay_and_the_rest_is_trained_as_before(tiny: str, tmp_path: Path) -> None:
    whole, part = ready(tiny), ready(tiny, freeze=FROZEN)
    batch = pack_samples(tiny_samples(2, 2), None, [0.1] * 4, capacity=64)
    before = {name: tensor.clone() for name, tensor in part._training.model.named_tensors().items()}
    sums = [policy.accumulate(batch, nll).sums for policy in (whole, part)]
    wanted = dict(zip(whole._training.model.named_parameters(), whole._training.gradients.views, strict=True))
    for name, view in zip(part._training.model.named_parameters(), part._training.gradients.views, strict=True):
        assert torch.equal(view, wanted[name])
    assert sums[1]["tflops"][0] < 0.7 * sums[0]["tflops"][0]
    part.update(1e-3)
    for name, tensor in part._training.model.named_tensors().items():
        assert torch.equal(tensor, before[name]) == name.startswith(("model.embed_tokens", "model.layers.0."))
    again = ready(tiny, freeze=FROZEN)
    assert again.restore(part.save(str(tmp_path / "checkpoint"))) == 1
    with pytest.raises(ModelError, match=r"trained other parameters.*Do: freeze and adapt"):
        ready(tiny).restore(str(tmp_path / "checkpoint"))


@pytest.mark.parametrize("native", [True, False], ids=["native", "huggingface"])
def test_names_are_those_of_hugging_face(tmp_path: Path, native: bool) -> None:
    model = load(family_model("qwen3-moe", tmp_path), native=native)
    freeze(model, r"model\.layers\.\d+\.mlp\.experts")
    assert {name for name, parameter in model.net.named_parameters() if not parameter.requires_grad} == {
        name for name, _ in model.net.named_parameters() if ".experts." in name
    }
    if native:
        with pytest.raises(ModelError, match="frozen together or not at all"):
            freeze(model, r"model\.layers\.\d+\.mlp\.experts\.0")


def test_patterns_that_freeze_nothing_or_everything_are_refused(tiny: str) -> None:
    with pytest.raises(ModelError, match=r"nothing that is frozen.*model\.embed_tokens\.weight"):
        freeze(load(tiny), "blocks")
    with pytest.raises(ModelError, match="nothing left to train"):
        freeze(load(tiny), "model")
    with pytest.raises(ConfigError, match="freeze is no regular expression"):
        Policy(tiny, freeze="(").check()
    with pytest.raises(ConfigError, match="With adapters all weights are frozen"):
        Policy(tiny, freeze=FROZEN, lora=Lora()).check()

"""Gradients and masters in whole buffers: the updates of AdamW parameter by parameter, and a state by names."""

from __future__ import annotations

import pytest
import torch
from rolecall.roles.policy import gradients as module
from rolecall.roles.policy.gradients import Gradients
from rolecall.roles.policy.optimiser import EPSILON, Optimiser
from torch import nn

SHAPES = {"a": (4, 6), "gain": (6,), "b": (3, 5), "bias": (7,), "c": (2, 3, 4), "d": (9, 2)}
SAME = 1e-6  # float32: vectors of other lengths are rounded in other places


def named(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for name, shape in SHAPES.items()}


def ready(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, nn.Parameter], Gradients, Optimiser]:
    monkeypatch.setattr(module, "BUCKET", 30)  # matrices in two buffers, vectors in one
    parameters = named(dtype)
    gradients = Gradients(list(parameters.values()))
    return parameters, gradients, Optimiser(parameters, gradients, betas=(0.9, 0.95), weight_decay=0.1)


def train(parameters: dict[str, nn.Parameter], gradients: Gradients, optimiser: Optimiser, steps: range) -> None:
    for step in steps:
        random = torch.Generator().manual_seed(step)
        for parameter in parameters.values():  # two passes, each with a gradient of its own
            for _ in range(2):
                (parameter * torch.randn(parameter.shape, generator=random).to(parameter.dtype)).sum().backward()
        gradients.clip(1.0)
        optimiser.step(1e-2)
        gradients.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_those_of_single_parameters(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, gradients, optimiser = ready(dtype, monkeypatch)
    alone = [nn.Parameter(parameter.detach().float().clone()) for parameter in named(dtype).values()]
    kinds = {decayed: [each for each in alone if (each.ndim > 1) == decayed] for decayed in (True, False)}
    groups = [{"params": found, "weight_decay": 0.1 * decayed} for decayed, found in kinds.items()]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=EPSILON)
    train(parameters, gradients, optimiser, range(3))
    for step in range(3):
        random = torch.Generator().manual_seed(step)
        for each in alone:
            each.grad = sum(torch.randn(each.shape, generator=random).to(dtype).float() for _ in range(2))
        torch.nn.utils.clip_grad_norm_(alone, 1.0)
        adam.step()
    state = optimiser.tensors()
    for (name, parameter), each in zip(parameters.items(), alone, strict=True):
        master = state.get(f"master/{name}", parameter.detach())
        assert torch.allclose(master, each, rtol=0, atol=SAME), name
        assert torch.equal(parameter, master.to(dtype)), name
        assert torch.allclose(state[f"mean/{name}"], adam.state[each]["exp_avg"], rtol=0, atol=SAME), name
        assert state[f"square/{name}"].shape == parameter.shape


def test_every_gradient_lies_in_one_buffer_beside_its_like(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, gradients, _ = ready(torch.bfloat16, monkeypatch)
    ranks = [parameter.ndim > 1 for parameter in parameters.values()]
    assert gradients.buckets == [[0, 2], [1, 3], [4, 5]]
    assert all(len({ranks[number] for number in bucket}) == 1 for bucket in gradients.buckets)
    assert sum(buffer.numel() for buffer in gradients.buffers) == sum(parameter.numel() for parameter in parameters.values())
    for number, view in enumerate(gradients.views):
        view.fill_(number + 1)
    for bucket, buffer in zip(gradients.buckets, gradients.buffers, strict=True):
        assert sorted(set(buffer.tolist())) == [number + 1 for number in bucket]
    gradients.clear()
    assert not any(view.any() for view in gradients.views)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_is_taken_over_to_the_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ready(dtype, monkeypatch), ready(dtype, monkeypatch)
    train(*first, range(2))
    for name, parameter in first[0].items():
        second[0][name].data.copy_(parameter.data)
    saved = {name: tensor.clone() for name, tensor in first[2].tensors().items()}
    with pytest.raises(KeyError):
        second[2].restore({name: tensor for name, tensor in saved.items() if name != "square/c"}, 2)
    assert not any(name.startswith("mean") for name in second[2].tensors())
    second[2].restore(saved, 2)
    for one in (first, second):
        train(*one, range(2, 4))
    assert all(torch.equal(first[0][name], second[0][name]) for name in SHAPES)
    assert all(torch.equal(tensor, second[2].tensors()[name]) for name, tensor in first[2].tensors().items())

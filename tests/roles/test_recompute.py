"""Recomputed and compiled blocks give the gradients of plain ones, and keep what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rolecall.kernels.losses import nll
from rolecall.placement.memory import read_shape, training
from rolecall.protocols.errors import ModelError
from rolecall.roles.base import Member
from rolecall.roles.models import load
from rolecall.roles.models.lora import Lora
from rolecall.roles.models.recompute import RECOMPUTE, blocks_of, compile_blocks, recompute
from rolecall.roles.packed import packed_logprobs, passes
from rolecall.roles.packing import pack_samples
from rolecall.roles.policy import Policy, policy
from rolecall.roles.policy.training import Training, prepare
from tiny import tiny_model, tiny_samples

COMPILED = 1e-5  # float32; fused operations round in another order; a share of the largest entry
NUMBER = 4  # bytes of a float32
ESTIMATED = 0.75  # of what is kept; the rest are copies in between, which compiled blocks don't keep


def batch(seed: int = 0, capacity: int = 64):
    return pack_samples(tiny_samples(2, 2, seed=seed), None, [0.1] * 4, capacity=capacity)


def gradients(tiny: str, native: bool, lora: Lora | None, how: str, compiled: bool = False) -> list[torch.Tensor]:
    model = load(tiny, native=native)
    adapters = prepare(model, lora=lora, recomputed=how, compiled=compiled)
    if adapters is not None:
        for number, parameter in enumerate(adapters.parameters().values()):
            parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    meeting = type("Alone", (), {"rank": 0})()
    training = Training(model, None, meeting, adapters, betas=(0.9, 0.95), weight_decay=0.0)
    for seed in range(3):
        training.accumulate(batch(seed, 64 + 16 * seed), nll, 1)
    return training.gradients.views


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "huggingface"])
@pytest.mark.parametrize("lora", [None, Lora(r=4), Lora(r=4, dropout=0.4)], ids=["all", "lora", "dropout"])
def test_gradients_stay_equal_to_the_bit(tiny: str, native: bool, lora: Lora | None, how: str) -> None:
    wanted = gradients(tiny, native, lora, "none")
    assert all(torch.equal(one, two) for one, two in zip(gradients(tiny, native, lora, how), wanted, strict=True))
    assert all(view.any() for view in wanted)


def kept(how: str, folder: str) -> float:
    """Numbers a token and block that a forward pass keeps for its backward pass."""
    model = load(folder)
    prepare(model, lora=None, recomputed=how, compiled=False)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own and tensor.is_floating_point():
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // NUMBER
        return tensor

    part = next(passes(batch(0, 64), 1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _alive = packed_logprobs(model, part)
    return sum(found.values()) / len(part.tokens)


def test_what_is_kept_is_what_is_said(tmp_path) -> None:
    """A block's share is the difference of models of six and of two blocks."""
    small, large = (tiny_model(tmp_path / str(layers), layers=layers) for layers in (2, 6))
    hidden, inside = 64, 128
    none, selective, full = ((kept(how, large) - kept(how, small)) / 4 for how in RECOMPUTE)
    assert full == hidden
    assert none - selective == 4 * inside
    assert none > selective > 5 * hidden
    shapes = [read_shape(json.loads(Path(folder, "config.json").read_text())) for folder in (small, large)]
    for how, found in zip(RECOMPUTE, (none, selective, full), strict=True):
        few, many = (training(shape, tokens=1, recompute=how).activations for shape in shapes)
        assert ESTIMATED * found <= (many - few) / 4 * 1e9 / NUMBER <= found


def test_settings_know_what_there_is() -> None:
    assert policy.RECOMPUTE == RECOMPUTE


@pytest.mark.parametrize(("how", "lora"), [("none", None), ("full", None), ("selective", Lora(r=4))])
def test_compiled_blocks_give_the_same_gradients(tmp_path, how: str, lora: Lora | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as in a run, but not made into machine code, which takes minutes."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, example)

    monkeypatch.setattr("rolecall.roles.policy.training.compile_blocks", lambda net, whole: compile_blocks(net, backend, whole=whole))
    torch._dynamo.reset()
    folder = tiny_model(tmp_path, layers=4)
    found, wanted = gradients(folder, True, lora, how, compiled=True), gradients(folder, True, lora, "none")
    for one, two in zip(found, wanted, strict=True):
        assert (one - two).abs().max() <= COMPILED * two.abs().max()
    # Two pieces of a block or three of the model, for the first width and for any other; not anew for each block.
    assert len(graphs) <= 6


def test_a_piece_is_one_graph_where_a_gpu_has_kernels_too(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where norm and turn are an operation of their own; here it computes by the formula."""
    from rolecall.kernels import norm_rotary

    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(norm_rotary, "_quick", lambda x: True)
    torch._dynamo.reset()
    model = load(tiny_model(tmp_path, layers=4))
    compile_blocks(model.net, backend)
    packed_logprobs(model, next(passes(batch(0, 64), 1)))[0].sum().backward()
    calls = [sum(node.target is torch.ops.rolecall.norm_rotary.default for node in graph.graph.nodes) for graph in graphs]
    assert calls == [2, 2, 0]  # first, between, last


@pytest.mark.slow
def test_a_compiled_policy_trains_as_a_plain_one(tiny: str) -> None:
    torch._dynamo.reset()
    roles = [Policy(tiny, compile=compiled) for compiled in (False, True)]
    for role in roles:
        role.setup(Member())
        role.accumulate(batch(), nll)
    for one, two in zip(*(role._training.gradients.views for role in roles), strict=True):
        assert (one - two).abs().max() <= COMPILED * two.abs().max()


def test_models_without_known_blocks_are_refused() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"blocks of Sequential are not found.*Do: set recompute"):
        blocks_of(net)
    net.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(ModelError, match="no MLP of that name"):
        recompute(net, "selective")

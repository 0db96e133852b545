"""The count of operations is torch's own, product by product, whatever is frozen, adapted, windowed or packed."""

from __future__ import annotations

import dataclasses
import re
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels import attention
from rolecall.kernels.attention import Packed, attend_plain
from rolecall.kernels.lora import lora_linear_plain
from rolecall.roles.models import adapters
from rolecall.roles.models.adapters import attach
from rolecall.roles.models.decoder import Decoder
from rolecall.roles.models.flops import attended, count, linears, training_flops
from rolecall.roles.models.lora import Lora, names_of
from rolecall.roles.models.spec import Experts, ModelSpec, Rope
from torch.utils.flop_counter import FlopCounterMode

ROWS, SLOTS = 2, 7


def spec(**changes: object) -> ModelSpec:
    """Sizes of which no two are equal."""
    whole = ModelSpec(
        layers=3,
        heads=6,
        kv_heads=2,
        head_dim=4,
        hidden=10,
        vocab=13,
        max_positions=64,
        tied=False,
        stops=(),
        windows=(0, 0, 0),
        family="llama",
        intermediate=14,
        ropes=(Rope(theta=10000.0),),
        rope_of=(0, 0, 0),
        scale=0.5,
    )
    return dataclasses.replace(whole, **changes)


def counted(model: Decoder, predicted: int) -> int:
    """What torch counts in a forward and backward pass whose attention is two plain products over all pairs of slots."""
    tokens = torch.arange(ROWS * SLOTS).view(ROWS, SLOTS) % 13
    positions = torch.arange(SLOTS).expand(ROWS, -1)
    segments = torch.arange(ROWS)[:, None].expand(-1, SLOTS)
    where = Packed(segments, torch.full((ROWS,), -1), positions)
    with FlopCounterMode(display=False) as mode:
        hidden = model(tokens, positions, where).flatten(0, 1)[:predicted]
        total = (hidden @ model.head.weight.T).sum()
        if total.requires_grad:
            total.backward()
    return mode.get_total_flops()


def pairs(window: int) -> float:
    return float(ROWS * SLOTS * SLOTS)  # the plain form computes them all and masks afterwards


@pytest.fixture(autouse=True)
def _products_that_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter does not look into operators of ours, so attention and adapters are computed by their formulas."""
    monkeypatch.setattr(attention, "attend", attend_plain)
    monkeypatch.setattr(adapters, "lora_linear", lora_linear_plain)


def made(sizes: ModelSpec) -> Decoder:
    model = Decoder(sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


SPECS = {
    "plain": {},
    "tied": {"tied": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "norms": {"qk_norm": True, "sandwich": True, "sinks": True},
    "experts": {"experts": Experts(number=5, active=2, intermediate=9, layers=(True, False, True))},
    "clamped": {"experts": Experts(number=5, active=3, intermediate=9, layers=(True,) * 3, kind="top_softmax"), "sinks": True},
}
FROZEN = {
    "nothing": (),
    "embedding": ("embed",),
    "all but the head": ("embed", "blocks", "norm"),
    "the first two blocks": ("embed", r"blocks\.[01]\."),
    "all weights but a gain": ("embed", "head", "norm", r"blocks\.[012]\.(attention|mlp|norms\.mlp)"),
    "all but values": ("embed", "head", "norm", r"blocks\.\d\.(mlp|norms|attention\.(?!v))"),
    "the MLPs but their last product": (r"blocks\.\d\.mlp\.(?!.*down)", "embed"),
    "all but routers": ("embed", "head", "norm", r"blocks\.\d\.(mlp\.(?!router)|norms|attention)"),
}


@pytest.mark.parametrize(("sizes", "frozen"), list(product(SPECS, FROZEN)))
def test_frozen_parts_are_counted_as_torch_counts(sizes: str, frozen: str) -> None:
    model = made(spec(**SPECS[sizes]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(re.match(pattern, name) for pattern in FROZEN[frozen]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = count(model.spec, [SLOTS] * ROWS, predicted=5, trained=trained, pairs=pairs)
    assert found.total == counted(model, 5)
    assert (found.backward > 0) == bool(trained)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("mlp.down", "attention.o"), r"blocks\.1\..*"])
@pytest.mark.parametrize("sizes", SPECS)
def test_adapters_are_counted_as_torch_counts(sizes: str, targets: str | tuple[str, ...]) -> None:
    model, lora = made(spec(**SPECS[sizes])), Lora(r=3, targets=targets)
    attach(model, lora)
    ranks = {name: 3 for name in linears(model.spec) if lora.hits(*names_of(name))}
    found = count(model.spec, [SLOTS] * ROWS, predicted=5, trained=(), ranks=ranks, pairs=pairs)
    assert found.total == counted(model, 5)


@settings(deadline=None, max_examples=50)
@given(
    segments=st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=6),
    window=st.integers(0, 8),
)
def test_pairs_are_those_of_the_mask(segments: list[tuple[int, bool]], window: int) -> None:
    """In one row, each segment may continue the one before it."""
    parents, before, slots, positions = [], [], [], []
    for number, (size, continues) in enumerate(segments):
        continues = continues and number > 0
        parents.append(number - 1 if continues else -1)
        before.append(before[-1] + segments[number - 1][0] if continues else 0)
        slots += [number] * size
        positions += range(before[-1], before[-1] + size)
    where = Packed(torch.tensor([slots], dtype=torch.long), torch.tensor(parents), torch.tensor([positions], dtype=torch.long))
    assert attended([size for size, _ in segments], before=before, window=window) == int(where.dense(window).sum())


def test_a_model_trained_whole_costs_six_a_weight_and_twelve_a_pair() -> None:
    sizes = spec(windows=(0, 5, 0))
    weights = sum(p.numel() for name, p in made(sizes).named_parameters() if p.ndim > 1 and name != "embed.weight")
    lengths = np.array([1, 4, 9])
    seen = 2 * attended(lengths) + attended(lengths, window=5)
    assert training_flops(sizes, lengths) == 6 * weights * 14 + 12 * 6 * 4 * seen
    assert training_flops(sizes, lengths) > training_flops(sizes, lengths, predicted=3)
    assert training_flops(sizes, [14]) > training_flops(sizes, lengths)


def test_adapters_cost_four_a_frozen_weight_and_six_a_weight_of_their_own() -> None:
    """But for the first block's queries, keys and values, to whose input no gradient goes."""
    sizes, lora = spec(), Lora(r=3)
    model = made(sizes)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1 and name != "embed.weight")
    attach(model, lora)
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    first = 2 * (10 * (24 + 8 + 8) + 3 * 3 * 10)
    assert training_flops(sizes, [7], lora=lora) == 7 * (4 * weights + 6 * own - first) + 12 * 3 * 6 * 4 * attended([7])


def test_a_model_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="Hugging Face class"):
        training_flops(spec(family=""), [7])

"""Whatever lies beside a sequence in a packed row, before it or after it, changes nothing; token ids are looked at first."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import msgspec
import numpy as np
import pytest
import torch
from families import VOCAB, family_model
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels.attention import Packed
from rolecall.protocols.errors import ModelError
from rolecall.roles.models import load
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.packed import packed_logprobs, packed_nll
from rolecall.roles.packing import pack_samples
from tiny import tiny_samples

STATES = 2e-4  # float32, states of size 1 to 3: sums in another order
NAMES = ("llama-tied-one-key-head", "qwen3-sliding", "gemma3", "gpt-oss")


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    return load(family_model(request.param, tmp_path_factory.mktemp(request.param)))


@dataclass
class Rows:
    """Packed rows and, of each segment, its tokens from the first ancestor on and where its own slots are."""

    tokens: torch.Tensor
    where: Packed
    whole: list[list[int]]
    slots: list[tuple[int, int, int]]  # row, from, to


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """One to three rows of trees of segments, with unused slots between and behind them."""
    tokens, segments, positions, parents = [], [], [], []
    whole: list[list[int]] = []
    slots: list[tuple[int, int, int]] = []
    for row in range(draw(st.integers(1, 3))):
        line: list[tuple[int, int, int]] = []
        first = len(parents)
        for _ in range(draw(st.integers(0, 5))):
            parent = draw(st.sampled_from([-1, *range(first, len(parents))]))
            before = [] if parent < 0 else whole[parent]
            own = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14))
            slots.append((row, len(line), len(line) + len(own)))
            line += [(token, len(parents), len(before) + place) for place, token in enumerate(own)]
            whole.append(before + own)
            parents.append(parent)
            line += [(0, -1, 0)] * draw(st.sampled_from([0, 0, 0, 2]))
        for each, column in zip((tokens, segments, positions), range(3), strict=True):
            each.append([slot[column] for slot in line])
    width = max(1, max(map(len, tokens))) + draw(st.integers(0, 3))
    square = [
        torch.tensor([line + [fill] * (width - len(line)) for line in each]) for each, fill in ((tokens, 0), (segments, -1), (positions, 0))
    ]
    return Rows(square[0], Packed(square[1], torch.tensor(parents or [-1]), square[2]), whole, slots)


@settings(deadline=None, max_examples=12)
@given(found=rows())
def test_segments_of_any_packing_are_as_if_alone(model: CausalModel, found: Rows) -> None:
    with torch.no_grad():
        states = model.hidden(found.tokens, found.where.positions, found.where)
        assert states.isfinite().all()
        for tokens, (row, start, end) in zip(found.whole, found.slots, strict=True):
            places = torch.arange(len(tokens))[None]
            alone = model.hidden(torch.tensor(tokens)[None], places, Packed(places * 0, torch.tensor([-1]), places))[0]
            torch.testing.assert_close(states[row, start:end], alone[start - end :], rtol=0, atol=STATES)


def test_unused_slots_get_no_gradient_and_give_none(model: CausalModel) -> None:
    places = torch.arange(20)[None]
    tokens = (places * 7 + 1) % VOCAB
    bare = Packed(places * 0, torch.tensor([-1]), places)
    padded = Packed(torch.cat((bare.segments, torch.full((1, 12), -1)), 1), torch.tensor([-1]), torch.cat((places, places[:, :12] * 0), 1))
    gradients = []
    for where, row in ((bare, tokens), (padded, torch.cat((tokens, torch.full((1, 12), 5)), 1))):
        model.hidden(row, where.positions, where)[:, :20].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        for parameter in model.parameters():
            parameter.grad = None
    for with_padding, without in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(with_padding, without, rtol=0, atol=2e-4 * float(without.abs().max()))


def test_token_ids_out_of_range_are_refused_before_the_model_runs(model: CausalModel) -> None:
    batch = pack_samples(tiny_samples(vocab=VOCAB), np.ones(12), np.ones(12), capacity=64)
    for wrong, words in ((VOCAB, f"to {VOCAB}. There is: 0 to {VOCAB - 1}"), (-1, "token ids -1 to")):
        for name, function in product(("tokens", "targets"), (packed_logprobs, packed_nll)):
            values = getattr(batch, name).copy()
            values[5] = wrong
            with pytest.raises(ModelError, match=words):
                function(model, msgspec.structs.replace(batch, **{name: values}))

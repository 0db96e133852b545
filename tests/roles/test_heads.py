"""Heads beside the model's own: what they compute, that they are trained and saved with it; and the vocabulary that grows."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.kernels.attention import Packed
from rolecall.kernels.losses import nll
from rolecall.protocols.errors import ConfigError, ModelError
from rolecall.roles.base import Member
from rolecall.roles.models import load
from rolecall.roles.models.heads import HEADS, REWARD, VALUE, Head, HeadSpec, last_slots, read_heads
from rolecall.roles.models.lora import Lora
from rolecall.roles.packing import pack_samples
from rolecall.roles.policy import Policy
from rolecall.roles.tokens import load_tokenizer
from safetensors.torch import load_file, save_file
from tiny import tiny_samples
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

D = 64
PROJECTION = HeadSpec(outputs=5, inner=7, unit=True)
CLOSE = 2e-5


def states(count: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_values_scores_and_projections() -> None:
    for spec, shape in ((VALUE, (3,)), (REWARD, (3,)), (HeadSpec(outputs=4), (3, 4)), (PROJECTION, (3, 5))):
        found = Head(spec, D)(states())
        assert (found.shape, found.dtype) == (shape, torch.float32)
        assert torch.equal(found, Head(spec, D)(states()))
        assert not torch.equal(found, Head(spec, D, seed=1)(states()))
    assert torch.allclose(Head(PROJECTION, D)(states()).norm(dim=-1), torch.ones(3))
    head = Head(VALUE, D)
    assert torch.allclose(head(states()), states() @ head.layers[0].weight[0] + head.layers[0].bias)
    assert 0.5 < float(Head(HeadSpec(outputs=500), D)(states(500)).detach().std()) < 2
    assert head(states(dtype=torch.bfloat16)).dtype == torch.float32
    for wrong in ({"outputs": 0}, {"inner": -1}, {"unit": True}):
        with pytest.raises(ConfigError, match="A head can't be made"):
            Head(HeadSpec(**wrong), D)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=6), st.integers(0, 3))
def test_the_last_slot_of_each_sequence(segments: list[tuple[int, bool]], padding: int) -> None:
    parents = [number - 1 if number and joined else -1 for number, (_, joined) in enumerate(segments)]
    slots = [number for number, (size, _) in enumerate(segments) for _ in range(size)] + [-1] * padding
    ends = [max(slot for slot, owner in enumerate(slots) if owner == number) for number in range(len(segments))]
    wanted = [end for number, end in enumerate(ends) if number not in parents]
    assert last_slots(torch.tensor([slots]), torch.tensor(parents)).tolist() == wanted


def test_scores_are_those_of_a_classifier_of_transformers(tiny: str) -> None:
    """Its `score` as our head, two sequences packed in a row: the number it gives to each alone."""
    net = LlamaForSequenceClassification.from_pretrained(tiny, num_labels=1).eval()
    model = load(tiny)
    head = model.add_head("score", REWARD)
    head.load_state_dict({"layers.0.weight": net.score.weight.detach()})
    parts = [torch.arange(4, 12), torch.arange(30, 51)]
    segments = torch.cat([torch.full((len(part),), number) for number, part in enumerate(parts)])[None]
    positions, parents = torch.cat([torch.arange(len(part)) for part in parts])[None], torch.tensor([-1, -1])
    with torch.no_grad():
        hidden = model.hidden(torch.cat(parts)[None], positions, Packed(segments, parents, positions)).flatten(0, 1)
        found = head(hidden[last_slots(segments, parents)])
        wanted = torch.cat([net(input_ids=part[None]).logits[0] for part in parts])
    assert (found - wanted).abs().max() < CLOSE


def test_a_head_is_trained_saved_and_restored_with_the_model(tiny: str, tmp_path: Path) -> None:
    model, tokenizer = load(tiny), load_tokenizer(tiny)
    model.add_head("value", VALUE)
    model.add_head("embedding", PROJECTION)
    with pytest.raises(ModelError, match=r"name of its own.*'value'.*value, embedding"):
        model.add_head("value", VALUE)
    assert {"heads.value.layers.0.weight", "heads.embedding.layers.1.bias"} <= model.named_parameters().keys()
    folder = model.save(tmp_path / "model", tokenizer)
    again = load(folder, dtype="bfloat16")
    for name, head in model.heads.items():
        assert again.heads[name].spec == head.spec
        assert torch.equal(again.heads[name](states()), head(states()))
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(folder)(torch.arange(9)[None]).logits.isfinite().all()
    assert not load(tiny).heads
    for lora in (None, Lora(r=2)):
        policy, other = Policy(folder, lora=lora), Policy(folder, lora=lora)
        policy.setup(Member())
        other.setup(Member())
        training = policy._training
        hidden = states().requires_grad_()
        policy.accumulate(pack_samples(tiny_samples(1, 2), None, [0.1] * 2, capacity=64), nll)
        training.model.heads["value"](hidden).sum().backward()
        before = training.model.heads["value"](states())
        policy.update(1e-2)
        assert not torch.equal(training.model.heads["value"](states()), before)
        saved = policy.save(str(tmp_path / f"checkpoint-{lora is None}"))
        other.restore(saved)
        assert torch.equal(other._training.model.heads["value"](states()), training.model.heads["value"](states()))
        bare = Policy(tiny, lora=lora)
        bare.setup(Member())
        with pytest.raises(ModelError, match=r"has other heads.*Asked: none.*embedding, value"):
            bare.restore(saved)


def test_torn_heads_are_refused(tiny: str, tmp_path: Path) -> None:
    model = load(tiny)
    model.add_head("value", VALUE)
    folder = Path(model.save(tmp_path / "model", load_tokenizer(tiny)))
    with pytest.raises(ModelError, match=r"head 'value' .* is for another model.*size of 64"):
        read_heads(folder, hidden=32)
    tensors = load_file(folder / HEADS)
    about = {"heads": json.dumps({"value": {**msgspec.to_builtins(VALUE), "hidden": 64}})}
    save_file(tensors | {"value.layers.0.weight": tensors["value.layers.0.weight"] * torch.inf}, folder / HEADS, metadata=about)
    with pytest.raises(ModelError, match=r"not finite.*: value\.layers\.0\.weight\. Do: use an earlier checkpoint"):
        load(str(folder))
    save_file(tensors, folder / HEADS)
    with pytest.raises(ModelError, match="can't be read"):
        load(str(folder))
    save_file({"value.layers.0.weight": tensors["value.layers.0.weight"]}, folder / HEADS, metadata={"heads": '{"value": {"hidden": 64}}'})
    with pytest.raises(ModelError, match=r"can't be read.*bias"):
        load(str(folder))
    (folder / HEADS).write_bytes(b"torn")
    with pytest.raises(ModelError, match="can't be read"):
        load(str(folder))

"""Weights on their way: nothing torn, mixed or foreign gets through, and the error says which shard and tensor."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.protocols import decode, encode
from rolecall.protocols.errors import WeightsError
from rolecall.protocols.messages import Weights
from rolecall.roles.weights import assemble, divide, export, version_digest

MODEL = {
    "embed": torch.arange(60, dtype=torch.float32).view(12, 5) / 7,
    "gain": torch.linspace(-1, 1, 5),
    "inner": torch.arange(35, dtype=torch.float32).view(5, 7),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
}


def shards(count: int = 2, version: int = 3, dtype: str | None = None) -> list[Weights]:
    return [export(MODEL, version, shard, count, dtype) for shard in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_what_is_published_is_what_is_assembled(count: int) -> None:
    parts = shards(count)
    found = assemble(parts[::-1], MODEL)
    assert found.keys() == MODEL.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in MODEL.items())
    assert version_digest(parts) == version_digest(shards(1))
    assert version_digest(parts) != version_digest([export({**MODEL, "scalar": torch.tensor(3.25)}, 3)])


def test_through_a_frame_and_in_bfloat16() -> None:
    parts = [decode(encode(part)) for part in shards(2, dtype="bfloat16")]
    found = assemble(parts, {name: tuple(tensor.shape) for name, tensor in MODEL.items()})
    assert all(found[name].dtype == torch.bfloat16 for name in MODEL)
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in MODEL.items())
    assert parts[0].manifest[0].dtype == "bfloat16"


def test_the_message_is_a_copy() -> None:
    model = {"a": torch.ones(3)}
    part = export(model, 1)
    model["a"].zero_()
    assert torch.equal(assemble([part])["a"], torch.ones(3))


@given(st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_any_changed_byte_is_seen_and_named(place: int, change: int) -> None:
    parts = shards(2)
    shard = place % 2
    entries = [entry for entry in parts[shard].manifest if entry.nbytes]
    entry = entries[place // 2 % len(entries)]
    data = parts[shard].data.copy()
    data[entry.offset + place % entry.nbytes] ^= change
    parts[shard] = msgspec.structs.replace(parts[shard], data=data)
    with pytest.raises(WeightsError, match=f"version 3, shard {shard} of 2: tensor {entry.name} was damaged") as caught:
        assemble(parts, MODEL)
    assert (caught.value.fields["shard"], caught.value.fields["tensor"]) == (shard, entry.name)


def edit(part: Weights, **changes: object) -> Weights:
    """The part with other values in its first manifest entry that has bytes."""
    number = next(number for number, entry in enumerate(part.manifest) if entry.nbytes)
    entries = list(part.manifest)
    entries[number] = msgspec.structs.replace(entries[number], **changes)
    return msgspec.structs.replace(part, manifest=tuple(entries))


def test_shards_that_are_not_one_whole_version_are_refused() -> None:
    first, second = shards(2)
    newer = shards(2, version=4)[1]
    for parts, words in (
        ([], "not one shard"),
        ([first], r"missing \[1\]"),
        ([first, first], r"missing \[1\], doubled \[0\]"),
        ([first, second, second], r"doubled \[1\]"),
        ([first, newer], "Shard 1 holds version 4, shard 0 version 3"),
        ([first, export({**MODEL, "more": torch.ones(1)}, 3, 1, 2)], "another model"),
        ([edit(first, name="other"), second], "tensor other is not among the names"),
        ([edit(first, name=second.manifest[0].name), second], "comes twice"),
        ([msgspec.structs.replace(first, manifest=first.manifest[1:]), second], "are in no shard"),
        ([edit(first, dtype="float128"), second], "unknown dtype 'float128'"),
        ([edit(first, dtype="load"), second], "unknown dtype 'load'"),
        ([edit(first, shape=(1, 2)), second], "its shape and dtype make 8"),
        ([edit(first, shape=(-5, -12)), second], "says"),
        ([edit(first, offset=10**9), second], "reaches beyond"),
        ([edit(first, offset=-64), second], "reaches beyond"),
    ):
        with pytest.raises(WeightsError, match=words):
            assemble(parts, MODEL)


def test_weights_of_another_model_are_refused() -> None:
    parts = shards(2)
    with pytest.raises(WeightsError, match="lack tensor head"):
        assemble(parts, {**MODEL, "head": torch.ones(2)})
    with pytest.raises(WeightsError, match="tensor gain is unknown to the receiving model"):
        assemble(parts, {name: tensor for name, tensor in MODEL.items() if name != "gain"})
    with pytest.raises(WeightsError, match=r"tensor gain has shape \(5,\), the receiving model's is \(6,\)"):
        assemble(parts, {**MODEL, "gain": (6,)})


@given(st.dictionaries(st.text("ab", min_size=1), st.integers(0, 1000), max_size=30), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_division_is_whole_and_even(sizes: dict[str, int], count: int) -> None:
    parts = divide(sizes, count)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


def test_a_tensor_starts_where_its_dtype_may() -> None:
    assert all(entry.offset % 64 == 0 for part in shards(2, dtype="bfloat16") for entry in part.manifest)
    assert all(part.data.dtype == np.uint8 for part in shards())

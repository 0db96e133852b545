"""Every family, with awkward settings, against transformers: logits, packing, caching, gradients, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import CASES, VOCAB, family_model
from rolecall.kernels.attention import Dense, Packed
from rolecall.roles.models import load
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.models.native import NativeModel
from rolecall.roles.rollout.cache import PrefillCache
from transformers import AutoModelForCausalLM

LENGTH = 60  # longer than the windows, the stretched contexts' originals and the dynamic one's maximum
LOGITS = 2e-4  # float32, logits of size 10: sums in another order through three or four layers
NARROW = 1.5  # bfloat16: how much farther from float32 than transformers' own bfloat16 is (as a mean) we may be
GRADIENT = 2e-4  # float32: share of a tensor's largest entry


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return request.param, family_model(request.param, tmp_path_factory.mktemp(request.param))


def tokens_of(length: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def packed(lengths: list[int]) -> Packed:
    """Segments side by side in one row, no parents."""
    segments = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])[None]
    return Packed(segments, torch.full((len(lengths),), -1), torch.cat([torch.arange(length) for length in lengths])[None])


def logits_of(model: CausalModel, tokens: torch.Tensor) -> torch.Tensor:
    where = packed([tokens.shape[1]])
    return torch.cat([model.logits(model.hidden(row[None], where.positions, where)) for row in tokens])


def plain(folder: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **eager).eval()


@torch.no_grad()
def test_logits_are_those_of_transformers(case: tuple[str, str]) -> None:
    _, folder = case
    model = load(folder, native=True)
    assert isinstance(model, NativeModel)
    assert model.head.shape[0] == 320
    tokens = tokens_of(LENGTH, rows=2)
    theirs = plain(folder)(input_ids=tokens).logits
    ours = logits_of(model, tokens)
    assert ours.shape == theirs.shape == (2, LENGTH, VOCAB)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=LOGITS)
    short = tokens_of(11)  # within the original context of those that are stretched
    torch.testing.assert_close(logits_of(model, short), plain(folder)(input_ids=short).logits, rtol=0, atol=LOGITS)


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_transformers_is(case: tuple[str, str]) -> None:
    _, folder = case
    tokens = tokens_of(LENGTH, rows=4)
    exact = plain(folder)(input_ids=tokens).logits
    theirs = (plain(folder, torch.bfloat16)(input_ids=tokens).logits.float() - exact).abs().mean()
    ours = (logits_of(load(folder, dtype="bfloat16"), tokens) - exact).abs().mean()
    assert ours <= NARROW * theirs


@torch.no_grad()
def test_packed_segments_are_as_if_alone(case: tuple[str, str]) -> None:
    name, folder = case
    if "dynamic" in name or "longrope" in name:
        pytest.skip("its frequencies follow the longest sequence of the pass, as in transformers")
    model, lengths = load(folder), [17, 1, 30, 12]
    tokens, where = tokens_of(LENGTH), packed(lengths)
    ours = model.hidden(tokens, where.positions, where)[0].split(lengths)
    for part, own in zip(tokens[0].split(lengths), ours, strict=True):
        alone = packed([len(part)])
        torch.testing.assert_close(own, model.hidden(part[None], alone.positions, alone)[0], rtol=0, atol=LOGITS)


@torch.no_grad()
def test_a_cache_changes_nothing(case: tuple[str, str]) -> None:
    """Prefill of most of the row, then the rest after its keys and values: cached keys keep the angles they were made with."""
    name, folder = case
    if "dynamic" in name or "longrope" in name:
        pytest.skip("its frequencies follow the longest sequence of the pass, as in transformers")
    model, first = load(folder), 41
    spec, tokens = model.spec, tokens_of(LENGTH)
    whole = packed([LENGTH])
    wanted = model.hidden(tokens, whole.positions, whole)
    none = model.head.new_zeros((spec.layers, 2, spec.kv_heads, 0, spec.head_dim))
    start, places = PrefillCache(none), torch.arange(LENGTH)[None]
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    before = model.hidden(
        tokens[:, :first], places[:, :first], Dense(mask[:, :, :first, :first], places[:, :first], places[:, :first]), start
    )
    rest = Dense(mask[:, :, first:], places[:, first:], places)
    after = model.hidden(tokens[:, first:], places[:, first:], rest, PrefillCache(start.whole()))
    torch.testing.assert_close(torch.cat((before, after), dim=1), wanted, rtol=0, atol=LOGITS)


def test_gradients_are_those_of_transformers(case: tuple[str, str]) -> None:
    _, folder = case
    model, net, tokens = load(folder), plain(folder), tokens_of(40)
    goal = tokens_of(40, seed=1)[0]
    torch.nn.functional.cross_entropy(logits_of(model, tokens)[0], goal).backward()
    torch.nn.functional.cross_entropy(net(input_ids=tokens).logits[0], goal).backward()
    wanted = {name: parameter.grad for name, parameter in net.named_parameters()}
    own = dict(model.net.named_parameters())
    tensors = model.named_tensors()
    assert set(tensors) >= {name for name in wanted if ".experts." not in name}
    for name in model.family.names(model.spec):
        if name.theirs in wanted:
            found = own[name.ours].grad[name.index or ...]
            mine = wanted[name.theirs]
            if name.theirs == "model.embed_tokens.weight" and not model.spec.tied:
                mine[3] = found[3]  # transformers leaves the gradient of the padding token's embedding out
            assert (found - mine).abs().max() <= GRADIENT * mine.abs().max(), name
    for name, parameter in own.items():  # transformers has those of all experts in one tensor
        if name.endswith(("experts.gate_up", "experts.down")):
            theirs = wanted[name.replace("blocks", "model.layers") + "_proj"]
            assert (parameter.grad - theirs).abs().max() <= GRADIENT * theirs.abs().max(), name
    padding = own["head.weight" if not model.spec.tied else "embed.weight"].grad[VOCAB:]
    assert not padding.any()


@torch.no_grad()
def test_a_saved_model_is_what_transformers_saved(case: tuple[str, str], tmp_path: Path) -> None:
    from rolecall.roles.models.writing import write_config, write_tensors
    from safetensors.torch import load_file

    _, folder = case
    model = load(folder)
    write_config(tmp_path, model.config, model.generation, model.family.architecture, model.dtype)
    write_tensors(tmp_path, model.named_tensors(), limit=50_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    theirs = load_file(Path(folder, "model.safetensors"))
    ours = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    tokens = tokens_of(20)
    assert torch.equal(plain(str(tmp_path))(input_ids=tokens).logits, plain(folder)(input_ids=tokens).logits)
    again = load(str(tmp_path))
    assert torch.equal(again.head, model.head)

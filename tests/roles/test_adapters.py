"""Adapters do what peft's do, in our decoder and in transformers' classes, and travel both ways between us and peft."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from families import family_model
from peft import LoraConfig, PeftModel, get_peft_model
from rolecall.kernels.attention import Packed
from rolecall.protocols.errors import ConfigError, ModelError
from rolecall.roles.models import load
from rolecall.roles.models.adapters import Adapters, LoraLinear
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.models.flops import linears
from rolecall.roles.models.lora import Lora, read_lora, resolve
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

CLOSE = 2e-5  # float32 logits of size 10, sums in another order
FAMILY = 2e-4  # the same as for the families' logits without adapters
TOKENS = torch.arange(4, 34)[None]


def logits(model: CausalModel) -> torch.Tensor:
    positions = torch.arange(TOKENS.shape[1])[None]
    with torch.no_grad():
        return model.logits(model.hidden(TOKENS, positions, Packed(torch.zeros_like(TOKENS), torch.tensor([-1]), positions)))


def theirs(net: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net(input_ids=TOKENS).logits


def stir(adapters: Adapters, seed: int = 1) -> None:
    """Give B values too, else an adapter does nothing."""
    make = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters().values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=make) * 0.2)


def peft_on(model: str, **settings: object) -> PeftModel:
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).eval()
    make = torch.Generator().manual_seed(2)
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=make) * 0.2)
    return net


SETTINGS = {
    "all-linear": ({"r": 5, "alpha": 8.0}, {"r": 5, "lora_alpha": 8, "target_modules": "all-linear"}),
    "endings": (
        {"r": 3, "alpha": 6.0, "targets": ("q_proj", "down_proj")},
        {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    ),
    "pattern": (
        {"r": 4, "alpha": 4.0, "targets": r".*\.1\..*[kv]_proj", "rank_stabilised": True},
        {"r": 4, "lora_alpha": 4, "target_modules": r".*\.1\..*[kv]_proj", "use_rslora": True},
    ),
}


@pytest.mark.parametrize("native", [True, False], ids=["native", "huggingface"])
@pytest.mark.parametrize("case", SETTINGS)
def test_what_peft_saved_is_what_we_compute(tiny: str, tmp_path: Path, case: str, native: bool) -> None:
    ours, peft = SETTINGS[case]
    net = peft_on(tiny, **peft)
    net.save_pretrained(str(tmp_path / "theirs"))
    model = load(tiny, native=native)
    plain = logits(model)
    adapters = Adapters(model.net, Lora(**ours, start=str(tmp_path / "theirs")))
    assert (logits(model) - theirs(net)).abs().max() < CLOSE
    assert (plain - logits(model)).abs().max() > 0.1
    with adapters.off():
        assert torch.equal(logits(model), plain)
    found = resolve(Lora(start=str(tmp_path / "theirs")))
    assert (found.r, found.scale) == (peft["r"], Lora(**ours).scale)
    again = load(tiny, native=native)
    Adapters(again.net, found)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("native", [True, False], ids=["native", "huggingface"])
@pytest.mark.parametrize("case", SETTINGS)
def test_what_we_save_is_what_peft_computes(tiny: str, tmp_path: Path, case: str, native: bool) -> None:
    model = load(tiny, native=native)
    adapters = Adapters(model.net, Lora(**SETTINGS[case][0]))
    stir(adapters)
    adapters.save(tmp_path, tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of keys that it misses
        net = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(tmp_path)).eval()
    assert (logits(model) - theirs(net)).abs().max() < CLOSE
    merged = {name: adapters.merged(name, tensor) for name, tensor in model.named_tensors().items()}
    whole = net.merge_and_unload()
    for name, tensor in whole.named_parameters():
        assert (merged.pop(name) - tensor).abs().max() < CLOSE
    assert not merged


@pytest.mark.parametrize("family", ["llama-untied-biased", "qwen3-sliding", "gemma3", "qwen3-moe-mixed", "gpt-oss"])
def test_every_family_has_adapters_as_peft_does(family: str, tmp_path: Path) -> None:
    """All linears of dense models, those of attention where there are experts."""
    folder = family_model(family, tmp_path / "model")
    targets = "all-linear" if family in ("llama-untied-biased", "qwen3-sliding", "gemma3") else ["q_proj", "k_proj", "v_proj", "o_proj"]
    net = peft_on(folder, r=3, lora_alpha=6, target_modules=targets)
    net.save_pretrained(str(tmp_path / "theirs"))
    model = load(folder, native=True)
    plain = logits(model)
    adapters = Adapters(model.net, resolve(Lora(start=str(tmp_path / "theirs"))))
    assert len(adapters.linears) == sum("lora_A" in name for name, _ in net.named_parameters())
    assert len(adapters.linears) == (len(linears(model.spec)) if targets == "all-linear" else 4 * model.spec.layers)
    assert (logits(model) - theirs(net)).abs().max() < FAMILY
    assert (logits(model) - plain).abs().max() > 100 * FAMILY
    stir(adapters)
    (tmp_path / "ours").mkdir()
    adapters.save(tmp_path / "ours", folder)
    other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "ours")).eval()
    assert (logits(model) - theirs(other)).abs().max() < FAMILY
    with adapters.plain():
        whole = {name: tensor.clone() for name, tensor in model.named_tensors().items()}
    fresh = load(folder, native=True)
    fresh.load_tensors(whole)
    assert (logits(model) - logits(fresh)).abs().max() < FAMILY


def test_an_adapter_changes_nothing_at_first_and_starts_equal_everywhere(tiny: str) -> None:
    model, other = load(tiny), load(tiny)
    plain = logits(model)
    first, second = Adapters(model.net, Lora(r=4)), Adapters(other.net, Lora(r=4))
    assert torch.equal(logits(model), plain)
    assert len(first.linears) == 2 * 7
    for name, parameter in first.parameters().items():
        assert torch.equal(parameter, second.parameters()[name])
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound
            assert abs(float(parameter.detach().mean())) < 0.2 * bound
    values = [tuple(parameter.flatten()[:3].tolist()) for name, parameter in first.parameters().items() if "lora_A" in name]
    assert len(set(values)) == len(values)
    third = Adapters(load(tiny).net, Lora(r=4, seed=1))
    assert not torch.equal(next(iter(third.parameters().values())), next(iter(first.parameters().values())))


def test_only_adapters_are_trained(tiny: str) -> None:
    model = load(tiny)
    adapters = Adapters(model.net, Lora(r=2))
    stir(adapters)
    assert {id(each) for each in model.parameters() if each.requires_grad} == {id(each) for each in adapters.parameters().values()}
    assert not any("lora" in name for name in model.named_tensors())


def test_dropout_is_the_same_for_the_same_seeds_and_leaves_no_trace(tiny: str) -> None:
    model = load(tiny)
    adapters = Adapters(model.net, Lora(r=4, dropout=0.5))
    stir(adapters)
    plain, before = logits(model), torch.get_rng_state()
    with adapters.dropping(1, 2):
        first = logits(model)
    assert torch.equal(torch.get_rng_state(), before)
    with adapters.dropping(1, 2):
        assert torch.equal(logits(model), first)
    with adapters.dropping(1, 3):
        assert not torch.equal(logits(model), first)
    assert torch.equal(logits(model), plain)
    assert not torch.equal(first, plain)
    linear = next(iter(adapters.linears.values()))
    x = torch.randn(2000, linear.in_features)
    linear.dropping = True
    kept = linear(x) - torch.nn.functional.linear(x, linear.weight)
    linear.dropping = False
    whole = linear(x) - torch.nn.functional.linear(x, linear.weight)
    assert abs(float((kept * whole).sum() / whole.square().sum()) - 1) < 0.1  # right in the mean


def test_bfloat16_merges_in_float32(tiny: str) -> None:
    model = load(tiny, dtype="bfloat16")
    adapters = Adapters(model.net, Lora(r=4))
    stir(adapters)
    linear: LoraLinear = next(iter(adapters.linears.values()))
    exact = linear.weight.double() + linear.scale * linear.lora_B.double() @ linear.lora_A.double()
    assert linear.merged().dtype == torch.bfloat16
    assert torch.equal(linear.merged(), exact.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 0}, "r=0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"targets": ()}, "targets"),
        ({"targets": "(q_proj"}, r"targets is no regular expression.*Do: write one"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Lora(**settings).check()


def test_targets_that_hit_nothing_are_refused(tiny: str) -> None:
    with pytest.raises(ModelError, match=r"hit no linear.*query_proj.*q_proj.*Do:"):
        Adapters(load(tiny).net, Lora(targets=("query_proj",)))


def test_adapters_of_something_else_are_refused(tiny: str, tmp_path: Path) -> None:
    model = load(tiny)
    good = Adapters(model.net, Lora(r=2, targets=("q_proj", "v_proj")))
    stir(good)
    good.save(tmp_path, tiny)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first = sorted(tensors)[0]

    def fails(words: str, changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, tmp_path / "adapter_model.safetensors")
        other = Adapters(load(tiny).net, Lora(r=2, targets=("q_proj", "v_proj")))
        before = [parameter.clone() for parameter in other.parameters().values()]
        with pytest.raises(ModelError, match=words):
            other.load(tmp_path)
        assert all(torch.equal(one, two) for one, two in zip(before, other.parameters().values(), strict=True))

    fails("1 tensors are missing, 0 are unknown", {name: tensor for name, tensor in tensors.items() if name != first})
    fails(r"q_prox.*may be.*q_proj", {name.replace("0.self_attn.q_proj", "0.self_attn.q_prox"): tensor for name, tensor in tensors.items()})
    fails("another shape at", tensors | {first: tensors[first][:1].contiguous()})
    fails("NaN or infinity at", tensors | {first: tensors[first] * float("nan")})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="can't be read"):
        good.load(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, words in (({"use_dora": True}, "use_dora=True"), ({"peft_type": "IA3"}, "is not LoRA"), ({"r": None}, "no adapter in")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=words):
            read_lora(tmp_path)
    with pytest.raises(ModelError, match="no adapter in"):
        resolve(Lora(start=str(tmp_path / "nowhere")))

"""Model folders: what is wrong with one is said by name; what is right with one is read without a second copy of it."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import family_model
from rolecall.protocols.errors import ModelError
from rolecall.roles.models import load
from safetensors.torch import load_file, save_file

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(family_model("qwen3-untied", tmp_path_factory.mktemp("whole")))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> str:
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return str(folder)


def configure(folder: Path, **values: object) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return str(folder)


@pytest.mark.parametrize("native", [True, False], ids=["native", "huggingface"])
def test_missing_tensors_are_named_with_what_they_may_be_called(folder: Path, native: bool) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_project.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
        del tensors["lm_head.weight"]

    with pytest.raises(ModelError) as caught:
        load(change(folder, rename), native=native)
    for words in (
        "2 more tensors: lm_head.weight,",
        "model.layers.1.mlp.up_proj.weight (nearest: model.layers.1.mlp.up_project.weight)",
        "1 tensors that the model does not have: model.layers.1.mlp.up_project.weight",
        "Do: download or save the model again",
    ):
        assert words in str(caught.value)


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"15 more tensors: model\.layers\.3\..* and 9 more"):
        load(configure(folder, num_hidden_layers=4, layer_types=None))


def test_unknown_tensors_are_named(folder: Path) -> None:
    with pytest.raises(
        ModelError, match=r"15 tensors that a model of its config does not have: model\.layers\.2\..* and 9 more\. Do: use the config"
    ):
        load(configure(folder, num_hidden_layers=2, layer_types=None))
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(10)}))
    load(configure(folder, num_hidden_layers=3))  # a constant that old checkpoints hold


@pytest.mark.parametrize("native", [True, False], ids=["native", "huggingface"])
def test_misshapen_tensors_are_named(folder: Path, native: bool) -> None:
    words = r"9 tensors .* another shape .*mlp\.down_proj\.weight is \(48, 80\), its place \(48, 81\).*Do: use the config"
    with pytest.raises(ModelError, match=words):
        load(configure(folder, intermediate_size=81), native=native)


@pytest.mark.parametrize("native", [True, False], ids=["native", "huggingface"])
def test_numbers_that_are_not_finite_are_refused(folder: Path, native: bool) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = torch.nan
        tensors["model.layers.2.self_attn.k_proj.bias"][0] = torch.inf

    with pytest.raises(ModelError, match=r"2 tensors .*not finite.*k_proj\.bias, model\.norm\.weight.*Do: use an earlier checkpoint"):
        load(change(folder, spoil), native=native)


def test_numbers_beyond_float16_are_refused_there_alone(folder: Path) -> None:
    path = change(folder, lambda tensors: tensors["model.norm.weight"].fill_(7e4))
    with pytest.raises(ModelError, match=r"1 tensors .*too large for float16: model\.norm\.weight\. Do: load it with dtype=\"bfloat16\""):
        load(path, dtype="float16")
    assert load(path, dtype="bfloat16").named_tensors()["model.norm.weight"].max() > 6e4


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files_are_refused(folder: Path, kept: float) -> None:
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ModelError, match=rf"can't be loaded: {FILE} \({int(kept * len(data))} bytes\) is damaged or cut short"):
        load(str(folder))


def sharded(folder: Path) -> None:
    """Divide the weights over three files with an index, as hubs have them."""
    tensors = load_file(folder / FILE)
    places = {name: f"model-{number % 3 + 1:05}-of-00003.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name, place in places.items() if place == file}, folder / file)
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / FILE).unlink()


def test_shards_are_read_and_a_missing_one_is_named(whole: Path, folder: Path) -> None:
    sharded(folder)
    wanted = load(str(whole)).named_tensors()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in load(str(folder)).named_tensors().items())
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"files that are missing\. Asked: model-00002-of-00003\.safetensors\. There is: model-00001"):
        load(str(folder))
    (folder / f"{FILE}.index.json").write_text("{")
    with pytest.raises(ModelError, match="is no index of weights"):
        load(str(folder))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "palimpsest"}, r"palimpsest.*Do: use a model of a family that transformers 5\S* knows, best of llama, "),
        ({"num_key_value_heads": 3}, r"4 query heads are no multiple of 3 key heads"),
        ({"head_dim": 19}, r"heads of 19 numbers can't be rotated"),
        ({"hidden_size": "many"}, "can't be loaded"),
        ({"num_hidden_layers": 0, "layer_types": []}, "layers=0"),
        ({"layer_types": ["full_attention"]}, "layer"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}}, "low_freq_factor"),
    ],
)
def test_configs_that_make_no_sense_are_refused(folder: Path, values: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load(configure(folder, **values), native=None if "model_type" in values else True)


def test_dynamic_positions_make_the_context_longer(tmp_path: Path) -> None:
    spec = load(family_model("llama-dynamic", tmp_path)).spec
    assert (spec.ropes[0].max_positions, spec.max_positions) == (20, 60)


def test_settings_that_the_decoder_lacks_go_to_the_fallback(folder: Path) -> None:
    path = configure(folder, hidden_act="tanh")
    with pytest.raises(ModelError, match="no activation 'tanh'"):
        load(path, native=True)
    assert "no activation 'tanh'" in load(path).notes[0]


def test_devices_and_dtypes_that_are_not_there_are_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, device, words in (
        ("float8", "cpu", "no dtype 'float8'.*bfloat16"),
        ("float32", "warp", "no device 'warp'"),
        ("float64", "mps", "no float64"),
    ):
        with pytest.raises(ModelError, match=words):
            load(str(whole), dtype=dtype, device=device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ModelError, match=r"no device 'cuda:1'\. There is: 1 CUDA devices\. Do: give this pool GPUs"):
        load(str(whole), device="cuda:1")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(ModelError, match=r"Tesla T4 does not compute in bfloat16\. Do: use dtype=\"float16\""):
        load(str(whole), dtype="bfloat16", device="cuda:0")


def test_padding_is_a_matter_of_memory_alone(whole: Path) -> None:
    padded, plain = load(str(whole)), load(str(whole), pad_vocab=1)
    assert (len(padded.head), len(plain.head), padded.spec, plain.spec) == (320, 263, plain.spec, padded.spec)
    assert not padded.head[263:].any()
    tensors, others = padded.named_tensors(), plain.named_tensors()
    assert tensors["lm_head.weight"].shape == tensors["model.embed_tokens.weight"].shape == (263, 48)
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    hidden = torch.randn(5, 48)
    assert padded.logits(hidden).shape == (5, 263)
    with pytest.raises(ModelError, match=r"does not know\. Asked: token ids 0 to 263\. There is: 0 to 262"):
        padded.check_tokens(0, 263)
    with pytest.raises(ModelError, match="pad_vocab=0"):
        load(str(whole), pad_vocab=0)


SLACK = 1.4  # of the model: its largest tensor once more (a seventh), its bytes checked for NaN, what is small


def held() -> int:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="memory is measured on Linux with glibc")
def test_no_second_copy_is_made_while_loading(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 9001, "hidden_size": 384, "intermediate_size": 1280, "num_hidden_layers": 8, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(tmp_path)
    load(str(tmp_path))  # what libraries allocate on first use
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or else it would be used again unseen
    before, peak, done = held(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load(str(tmp_path))
    done.set()
    watcher.join()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert size > 75e6
    assert 0.5 * size < peak - before < SLACK * size

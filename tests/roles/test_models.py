"""The seam to the model's code: what it loads, what it refuses, what it saves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rolecall.kernels.attention import Packed
from rolecall.protocols.errors import ModelError, WeightsError
from rolecall.roles.models import check_model, load
from rolecall.roles.models.causal import CausalModel
from rolecall.roles.models.native import NativeModel
from rolecall.roles.tokens import identity, load_tokenizer, require_chat_template
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = torch.arange(4, 40)[None]
ALONE = Packed(torch.zeros(1, 36, dtype=torch.int64), torch.tensor([-1]), torch.arange(36)[None])  # one segment in the row
LOGITS = 1e-5  # float32 rounding: a mask takes another attention kernel than none


def logits_of(model: CausalModel) -> torch.Tensor:
    return model.logits(model.hidden(TOKENS, ALONE.positions, ALONE))


def copied(tiny: str, folder: Path, *leave_out: str) -> str:
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns(*leave_out))
    return str(folder)


def test_hidden_times_head_are_the_logits_of_transformers(tiny: str) -> None:
    model = load(tiny)
    assert isinstance(model, NativeModel)
    with torch.no_grad():
        ours = logits_of(model)
        theirs = AutoModelForCausalLM.from_pretrained(tiny)(input_ids=TOKENS).logits
    torch.testing.assert_close(ours, theirs, rtol=LOGITS, atol=LOGITS)
    assert (model.spec.layers, model.spec.heads, model.spec.kv_heads, model.spec.head_dim, model.spec.hidden) == (2, 4, 2, 16, 64)
    assert (model.spec.vocab, model.spec.max_positions, model.spec.tied, model.spec.stops, model.spec.window) == (260, 512, True, (2,), 0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_gives_the_same_logits_in_plain_transformers(tied: bool, tmp_path: Path) -> None:
    model = load(tiny_model(tmp_path / "model", tied=tied))
    names = model.named_tensors()
    assert ("lm_head.weight" in names) is not tied
    model.load_tensors({name: tensor * 1.25 for name, tensor in names.items()})
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    saved = model.save(tmp_path / "saved", tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=TOKENS).logits, logits_of(model), rtol=LOGITS, atol=LOGITS)
    assert identity(AutoTokenizer.from_pretrained(saved)) == identity(tokenizer)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(ModelError, match=r"exists already.*Do: give another name"):
        model.save(tmp_path / "saved", tokenizer)


def test_a_save_that_fails_leaves_nothing(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny)
    monkeypatch.setattr(model, "write", lambda folder, _: (folder / "half").write_text("x") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save(tmp_path / "saved", load_tokenizer(tiny))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("leave_out", "words"),
    [
        (("*.safetensors",), r"has no weights\. Asked: model.safetensors.*There is: .*tokenizer\.json.*Do: finish the download"),
        (("config.json",), r"has no config\.json"),
        (("tokenizer*",), r"has no tokenizer\. Asked: tokenizer\.json.*Do: copy tokenizer\.json"),
    ],
)
def test_folders_that_lack_something_are_refused(tiny: str, tmp_path: Path, leave_out: tuple[str, ...], words: str) -> None:
    folder = copied(tiny, tmp_path / "model", *leave_out)
    with pytest.raises(ModelError, match=words):
        check_model(folder)
    with pytest.raises(ModelError, match=words):
        load_tokenizer(folder) if "no tokenizer" in words else load(folder)


def test_a_folder_that_is_missing_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "neighbour").mkdir()
    with pytest.raises(ModelError, match=r"is missing.*There is: in .*: neighbour.*Do: give an existing"):
        load(str(tmp_path / "model"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        load(str(tmp_path / "file"))
    with pytest.raises(ModelError, match="is missing"):
        load_tokenizer("./nowhere/model")
    check_model("owner/name")  # a hub name: known to be wrong only when it is loaded


def test_a_hub_name_out_of_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"can't be loaded.*Do: check that .* the hub can be reached"):
        load("nobody/nothing-of-that-name")


def test_torn_weights_are_refused(tiny: str, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path / "model")
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(ModelError, match=r"not whole.*layers\.2\."):  # transformers alone would fill the layer with random numbers
        load(folder)
    Path(folder, "config.json").write_text(json.dumps(config))
    whole = Path(folder, "model.safetensors").read_bytes()
    Path(folder, "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="can't be loaded"):
        load(folder)


def test_unknown_dtypes_and_long_sequences_are_refused(tiny: str) -> None:
    with pytest.raises(ModelError, match="no dtype 'int4'"):
        load(tiny, dtype="int4")
    with pytest.raises(ModelError, match=r"longer than the model's context.*Asked: 513 tokens.*There is: 512 positions"):
        load(tiny).check_length(513)


def test_tensors_of_another_model_are_refused_before_any_is_copied(tiny: str) -> None:
    model = load(tiny)
    before = {name: tensor.clone() for name, tensor in model.named_tensors().items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    last = next(reversed(zeros))
    with pytest.raises(WeightsError, match="missing"):
        model.load_tensors({name: tensor for name, tensor in zeros.items() if name != last})
    with pytest.raises(WeightsError, match=f"Tensor {last} is"):
        model.load_tensors({**zeros, last: torch.zeros(3)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_tensors().items())


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer(tmp_path / "base", template=None))
    with pytest.raises(ModelError, match=r"no chat template.*Do: use an instruction-tuned model"):
        require_chat_template(tokenizer)


def test_the_identity_follows_vocabulary_and_template(tiny: str, tmp_path: Path) -> None:
    first, second = load_tokenizer(tiny), load_tokenizer(tiny)
    second("x" * 9, truncation=True, max_length=3, padding="max_length")  # settings of a call don't count
    assert identity(first) == identity(second)
    assert len(identity(first)) == 32
    assert "assistant" in require_chat_template(first)
    second.chat_template += " "
    assert identity(first) != identity(second)
    third = load_tokenizer(tiny)
    third.add_tokens(["<new>"])
    assert identity(first) != identity(third)


def test_the_controller_side_imports_no_torch() -> None:
    code = (
        "import sys, rolecall.roles.policy, rolecall.roles.reference, rolecall.roles.models, rolecall.roles.tokens;"
        "print(sorted({'torch', 'transformers', 'ray', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"

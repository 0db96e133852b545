"""`rolecall verify` agrees with every family, and finds the layer of a fault."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CASES, family_model
from rolecall.roles.models import verify as verifying
from rolecall.roles.models.native import NativeModel
from rolecall.roles.models.verify import AGREES, MISTAKEN, PARTS, verify
from tiny import tiny_model

SOME = ("llama-longrope", "qwen3-sliding", "gemma3-ropes", "qwen3-moe-mixed", "gpt-oss")


@pytest.mark.parametrize("name", SOME)
def test_families_agree(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dtypes = ("float32", "bfloat16") if name in ("gemma3-ropes", "qwen3-moe-mixed") else ("float32",)
    assert verify(family_model(name, tmp_path, tokenizer=True), dtypes=dtypes) == AGREES
    out = capsys.readouterr().out
    for dtype in dtypes:
        for inputs in ("random", "real"):
            for way in ("single", "packed", "cached"):
                assert f"{dtype:9} {inputs:7} {way:7} largest" in out
    assert "a head of 263 rows is slow, 64 does not divide it: it is padded to 320" in out
    assert out.splitlines()[-1] == "They agree."


def spoil_rotation(model: NativeModel) -> None:
    model.net.blocks[1].attention.k.weight.data[0] += 0.05


def spoil_mlp(model: NativeModel) -> None:
    model.net.blocks[0].mlp.down.weight.data *= 1.01


def spoil_head(model: NativeModel) -> None:
    model.net.norm.weight.data *= 1.01


def spoil_window(model: NativeModel) -> None:
    model.net.blocks[1].attention.window += 1


def spoil_with_nan(model: NativeModel) -> None:
    model.net.blocks[2].norms.mlp.weight.data[3] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "place"),
    [
        (spoil_rotation, r"blocks\.1\.attention"),
        (spoil_mlp, r"blocks\.0\.mlp"),
        (spoil_head, "the final norm or the head"),
        (spoil_window, r"blocks\.1\.attention"),
        (spoil_with_nan, r"blocks\.2\.mlp"),
    ],
)
def test_a_fault_is_found_and_placed(
    spoil: Callable[[Any], None], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = verifying.load_causal

    def spoilt(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        spoil(model)
        return model

    monkeypatch.setattr(verifying, "load_causal", spoilt)
    folder = family_model("qwen3-sliding", tmp_path, tokenizer=True)
    assert verify(folder, dtypes=("float32",)) == PARTS
    out = capsys.readouterr().out
    assert re.search(rf"float32   random  single  largest .* PARTS at {place}\n", out), out
    assert re.search(
        rf"float32 random single: after token \d+ of sequence \d \(id \d+, '.*'\), the logit of id \d+ .* of {place}\.", out
    ), out
    assert out.splitlines()[-1] == "They part."


def test_a_fallback_is_verified_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.5)).save_pretrained(
        tmp_path
    )
    assert verify(str(tmp_path), dtypes=("float32",)) == AGREES
    out = capsys.readouterr().out
    assert "runs as its Hugging Face class: there is no family 'mamba'" in out
    assert "no real inputs: The model folder" in out
    assert "float32   random  cached  not with this class" in out


def test_what_can_not_be_loaded_gives_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(str(tmp_path / "nowhere")) == MISTAKEN
    assert "is missing" in capsys.readouterr().err
    assert verify(str(tmp_path), dtypes=("int4",)) == MISTAKEN
    assert "no dtype 'int4'" in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model(tmp_path)
    command = [sys.executable, "-m", "rolecall.actors.cli", "verify", folder, "--dtypes", "float32", "--length", "9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("They agree.\n")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert verify(folder) == MISTAKEN
    assert "not whole" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_case_agrees(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(family_model(name, tmp_path, tokenizer=True)) == AGREES, capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_model_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    from rolecall.roles.models.fetch import FOLDER, is_intact

    if not is_intact(FOLDER):
        pytest.skip(f"{FOLDER} is not there: make model")
    assert verify(str(FOLDER)) == AGREES, capsys.readouterr().out

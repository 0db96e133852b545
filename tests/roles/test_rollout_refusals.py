"""What a rollout refuses, and that weights come in whole or not at all."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import numpy as np
import pytest
from prompting import prompts_of, random_rows
from rolecall.protocols.errors import DataError, UserError, WeightsError
from rolecall.roles.base import Member
from rolecall.roles.models import load
from rolecall.roles.rollout import Rollout
from rolecall.roles.weights import export
from tiny import tiny_model

PROMPTS = prompts_of(random_rows((4, 12, 7)))


@pytest.fixture
def rollout(tiny):
    role = Rollout(tiny, slots=4, max_tokens=12)
    role.setup(Member())
    return role


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    """Folder of another model of the same shape, and its weights as version 5 in three shards."""
    folder = tiny_model(tmp_path_factory.mktemp("newer"), seed=9)
    tensors = load(folder).named_tensors()
    return folder, [export(tensors, version=5, shard=shard, shards=3, dtype="float32") for shard in range(3)]


def test_new_weights_serve_and_are_echoed(rollout, newer):
    folder, parts = newer
    before = rollout.generate(PROMPTS, temperature=0)
    echo = rollout.load(parts)
    assert echo["version"] == rollout.version == 5
    assert echo["digest"]
    fresh = Rollout(folder, max_tokens=12)
    fresh.setup(Member())
    after = rollout.generate(PROMPTS, temperature=0)
    assert np.array_equal(after.tokens, fresh.generate(PROMPTS, temperature=0).tokens)
    assert not np.array_equal(after.tokens, before.tokens)
    assert after.span_versions.tolist() == [5]


def test_one_shard_alone_is_a_whole_version_too(rollout, newer):
    whole = export(load(newer[0]).named_tensors(), version=6, shard=0, shards=1, dtype="float32")
    assert rollout.load(whole)["version"] == 6


@pytest.mark.parametrize("fault", ["corrupt", "missing", "mixed"])
def test_faulty_weights_leave_the_old_version_serving(rollout, newer, fault):
    parts = list(newer[1])
    if fault == "corrupt":
        data = parts[1].data.copy()
        data[len(data) // 2] ^= 1
        parts[1] = msgspec.structs.replace(parts[1], data=data)
    elif fault == "missing":
        parts.pop(1)
    else:
        parts[1] = msgspec.structs.replace(parts[1], version=4)
    before = rollout.generate(PROMPTS, temperature=0)
    with pytest.raises(WeightsError, match="shard"):
        rollout.load(parts)
    after = rollout.generate(PROMPTS, temperature=0)
    assert rollout.version == 0
    assert np.array_equal(after.tokens, before.tokens)
    assert np.array_equal(after.logprobs, before.logprobs)


def test_weights_of_another_model_are_refused(rollout, tmp_path):
    other = load(tiny_model(tmp_path / "other", layers=3)).named_tensors()
    with pytest.raises(WeightsError):
        rollout.load(export(other, version=1, shard=0, shards=1, dtype="float32"))
    assert rollout.version == 0


@pytest.mark.parametrize("length", [512, 700])
def test_a_prompt_that_fills_the_context_is_refused_before_anything_runs(rollout, length):
    prompts = prompts_of(random_rows((4, length)), ids=("short", "novel"))
    with pytest.raises(DataError) as caught:
        rollout.generate(prompts)
    for word in ("novel", str(length), "512", "leave out prompts of more than 500 tokens"):
        assert word in str(caught.value)
    assert rollout._engine.prefilled == 0


def test_empty_and_unknown_tokens_are_refused(rollout):
    with pytest.raises(DataError, match="'p1' is empty"):
        rollout.generate(prompts_of([[5], []]))
    with pytest.raises(DataError, match="'p0' has tokens"):
        rollout.generate(prompts_of([[5, 260]]))
    with pytest.raises(DataError, match="another tokenizer"):
        rollout.generate(prompts_of([[5]], tokenizer="0" * 32))


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"engine": "warp"}, "native"),
        ({"slots": -1}, "slots"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_wrong_settings_are_refused_at_the_controller(wrong, word):
    with pytest.raises(UserError, match=word):
        Rollout("some/model", **wrong)


def test_wrong_overrides_are_refused(rollout):
    with pytest.raises(UserError, match="per_prompt"):
        rollout.generate(PROMPTS, per_prompt=0)
    with pytest.raises(UserError, match="temperature"):
        rollout.generate(PROMPTS, temperature=-1)
    with pytest.raises(UserError, match="max_tokens"):
        rollout.generate(PROMPTS, max_tokens=0)


def test_the_role_is_light_to_import():
    heavy = ("torch", "transformers", "ray")
    code = f"import sys, rolecall.roles.rollout as r; r.Rollout('a/b'); print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"

"""Runs of the GRPO controller: what a good one leaves in its folder, and what bad input is told, where nothing is lost."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import running
from rolecall.actors import Run, launch
from rolecall.actors.config import resolve
from rolecall.examples import grpo, rejection, rloo
from rolecall.placement.cluster import connect
from rolecall.protocols import ConfigError, ModelError
from rolecall.roles import Data, Reward

REFUSAL = 2.0  # seconds of CPU in which a wrong configuration is refused
ROUNDING = 1e-4  # nats between our packed rows and plain transformers, one sequence at a time, in float32
STANDARD = {
    "step", "reward/mean", "reward/failed", "policy/loss", "policy/kl", "policy/grad_norm", "policy/version", "rollout/version",
    "rollout/tokens_per_s", "rollout/completion_length", "time/rollout.generate_s", "time/policy.accumulate_s", "time/step_s",
    "controller/fetched_bytes", "controller/forwarded_bytes",
}  # fmt: skip

pytestmark = pytest.mark.timeout(300)


def coin(completion: str) -> float:
    """A reward that random completions get half the time."""
    return float(sum(map(ord, completion)) % 2)


def broken(completion: str) -> float:
    """A reward with a mistake in it."""
    raise KeyError("answer")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One local Ray for the runs of this module."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with connect(None):
        yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def finished(cluster: None, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of two steps: its folder, its arguments, and what the policy said of the last step's samples at the end."""
    where = tmp_path_factory.mktemp("finished")
    said: dict[str, Any] = {}
    log = Run.log

    def asking(run: Run, step: int, **what: Any) -> dict[str, float]:
        line = log(run, step, **what)
        policy = next(group for group in run._groups if group.name == "policy")
        said["samples"], said["logprobs"] = what["samples"].result(), policy.one(0).logprobs(what["samples"]).result()
        return line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "Reward", lambda function: Reward(coin))
        patch.setattr(Run, "log", asking)
        args = resolve(grpo.Args, running.arguments(where, tiny, "--group-size", "4"))
        grpo.main(args)
    return SimpleNamespace(folder=where / "run", args=args, **said)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller fails if it gets as far as placing anything."""

    def place(*_: Any, **__: Any) -> None:
        raise AssertionError("something was about to start")

    monkeypatch.setattr(grpo, "place", place)


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `launch` prints of a run that ends as a user's mistake."""
    with pytest.raises(SystemExit) as caught:
        launch(grpo.main, grpo.Args, argv)
    said = capsys.readouterr().err
    assert caught.value.code == 2, said
    assert "Traceback" not in said
    return said


def test_the_folder_holds_the_configuration_as_it_was(finished: Any) -> None:
    assert resolve(grpo.Args, ["--config", str(finished.folder / "config.toml")]) == finished.args


def test_a_line_of_metrics_a_step_with_the_standard_names(finished: Any) -> None:
    lines = [line for line in running.metrics(finished.folder) if "step" in line]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert set(line) >= STANDARD, STANDARD - set(line)
    evaluations = [line["evaluation"] for line in running.metrics(finished.folder) if "evaluation" in line]
    assert evaluations == ["before", "after"]
    assert {path.name for path in (finished.folder / "logs").iterdir()} >= {"policy-0.log", "rollout-0.log", "data-0.log"}


def test_samples_are_tables(finished: Any) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(finished.folder / "samples" / "step-000002.parquet")
    assert table.column_names == ["id", "prompt", "completion", "value", "reason"]
    assert table.num_rows == 3 * 4
    assert table["value"].to_pylist() == [coin(text) for text in table["completion"].to_pylist()]


def test_the_checkpoint_says_in_plain_transformers_what_the_policy_said(finished: Any, tiny: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert running.changed(tiny, finished.folder / "checkpoint") > 1e-3
    model = AutoModelForCausalLM.from_pretrained(finished.folder / "checkpoint", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(finished.folder / "checkpoint").chat_template
    samples, said = finished.samples, finished.logprobs.logprobs
    for start, end, prompt in zip(samples.cu_seqlens[:-1], samples.cu_seqlens[1:], samples.prompt_lengths, strict=True):
        tokens = torch.tensor(np.array(samples.tokens[start:end]))[None].long()
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        assert np.abs(logprobs[prompt - 1 :].numpy() - said[start + prompt : end]).max() < ROUNDING


def test_a_reward_that_always_raises_is_counted_and_teaches_nothing(
    cluster: None, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet

    monkeypatch.setattr(grpo, "Reward", lambda function: Reward(broken))
    grpo.main(resolve(grpo.Args, running.arguments(tmp_path, tiny, "--group-size", "4")))
    lines = [line for line in running.metrics(tmp_path / "run") if "step" in line]
    assert [line["reward/failed"] for line in lines] == [1.0, 1.0]
    assert [line["reward/all_failed_alike"] for line in lines] == [1.0, 1.0]
    assert not any("reward/mean" in line for line in lines), "an error is never a 0"
    table = pyarrow.parquet.read_table(tmp_path / "run" / "samples" / "step-000001.parquet")
    assert all("KeyError" in reason for reason in table["reason"].to_pylist())
    assert running.changed(tiny, tmp_path / "run" / "checkpoint") == 0.0


def test_a_run_folder_that_exists_is_left_as_it_is(no_ray: None, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("old\n")
    with pytest.raises(ConfigError, match="give another --name"):
        grpo.main(resolve(grpo.Args, running.arguments(tmp_path, tiny)))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "old\n"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_run_folder_that_can_not_be_made(no_ray: None, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("somebody's")
    said = refused([*running.arguments(tmp_path, tiny), "--runs", str(tmp_path / "file")], capsys)
    for words in (f"{tmp_path}/file/run can't be made", "Not a directory", "Do: give --runs"):
        assert words in said
    assert (tmp_path / "file").read_text() == "somebody's"


def test_a_checkpoint_that_is_not_there_is_told_before_anything_starts(
    no_ray: None, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused([*running.arguments(tmp_path, tiny), "--resume", str(tmp_path / "gone")], capsys)
    for words in ("There is no checkpoint in", "no such folder", "Do: give the folder of a run that saved one"):
        assert words in said
    assert not (tmp_path / "run").exists()


def test_a_cluster_that_does_not_answer_is_told_and_leaves_no_folder(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    said = refused([*running.arguments(tmp_path, tiny), "--address", "127.0.0.1:1"], capsys)
    for words in ("No Ray cluster answers", "Asked: 127.0.0.1:1", "Do: start one (ray start --head)"):
        assert words in said
    assert not (tmp_path / "run").exists()


def test_what_a_role_refuses_when_it_is_spawned_leaves_no_folder(
    cluster: None, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo, "Data", lambda task, **settings: Data(task, **{**settings, "ahead": -1}))  # the last of five roles
    said = refused(running.arguments(tmp_path, tiny), capsys)
    assert "ahead can't be negative. Asked: ahead=-1." in said
    assert not (tmp_path / "run").exists(), "its name can be used again"


@pytest.mark.parametrize(
    ("lost", "words"),
    [("model.safetensors", ["no weights", "finish the download"]), ("chat_template.jinja", ["no chat template", "instruction-tuned"])],
)
def test_half_a_model_is_refused_before_anything_starts(no_ray: None, tiny: str, tmp_path: Path, lost: str, words: list[str]) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / lost).unlink()
    with pytest.raises(ModelError) as caught:
        grpo.main(resolve(grpo.Args, running.arguments(tmp_path, str(tmp_path / "model"))))
    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "run").exists(), "its name can be used again"


def test_a_precision_that_there_is_not_is_refused_by_the_configuration() -> None:
    for module in (grpo, rejection, rloo):
        with pytest.raises(ConfigError, match="--dtype bfloat: expected one of 'float32', 'bfloat16'; did you mean 'bfloat16'"):
            resolve(module.Args, ["--model", "m", "--dtype", "bfloat"])


def test_group_size_1_is_refused_by_the_configuration_without_loading_anything(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "rolecall.examples.grpo"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([*command, *running.arguments(tmp_path, "m", "--group-size", "1")], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 2
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < REFUSAL
    imported = set(re.findall(r"^import time:.*\| +(\w+)$", ended.stderr, re.MULTILINE))
    assert "msgspec" in imported
    assert not imported & {"ray", "torch", "transformers"}
    said = "\n".join(line for line in ended.stderr.splitlines() if not line.startswith("import time:"))
    assert "--group-size 1: expected a whole number >= 2 (completions a prompt, compared with each other)" in said
    assert "Traceback" not in said


def test_pools_that_do_not_fit_are_a_table_of_reasons(
    cluster: None, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    pools = running.ONE_POOL.replace('name = "train"\n', 'name = "train"\ncpus = 4096\naccelerator = "H100"\n', 1)
    said = refused(running.arguments(tmp_path, tiny, pools=pools), capsys)
    for words in ("These pools don't fit", "asked", "there is", "do", "train", "H100", "Nothing was started."):
        assert words in said
    assert not (tmp_path / "run").exists(), "its name can be used again"


def test_a_dataset_that_holds_nothing_to_train_on(cluster: None, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused([*running.arguments(tmp_path, tiny), "--task.size", "4"], capsys)
    for words in ("data[0]", "held_out=4 and some to train on", "Do:", "log:"):
        assert words in said
    assert (tmp_path / "run" / "config.toml").exists()


@pytest.mark.slow
def test_prompts_longer_than_the_context(cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny import tiny_model

    model = tiny_model(tmp_path / "short", positions=32)
    said = refused(running.arguments(tmp_path, model), capsys)
    for words in ("rollout[0]", "leaves no room", "a context of 32 tokens", "Do: leave out prompts"):
        assert words in said

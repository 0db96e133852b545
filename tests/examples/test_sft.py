"""The SFT controller on real Ray and a tiny model: members and passes make no difference, and neither does stopping in between."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import ray
import running
import torch
from rolecall.actors.config import resolve
from rolecall.examples import sft, sft_grpo
from rolecall.kernels.losses import nll
from rolecall.roles.base import Member
from rolecall.roles.data import Documents
from rolecall.roles.data.report import Report
from rolecall.roles.packing import token_mean, weigh
from rolecall.roles.policy import Policy
from safetensors.numpy import load_file

ROOT = Path(sft.__file__).parent
LINES = 60
# One big batch, shared out or whole: the same gradient but for the order of sums; float64 shows the method, not the rounding.
# transformers computes norms and rotary angles in float32 whatever the model is, hence not less.
GRADIENT = 1e-5  # of the largest entry of each tensor
# Weights after a few updates, for the same reason; Adam divides by the gradient's size, so where that is all but 0 rounding decides.
WEIGHTS = 1e-5

pytestmark = pytest.mark.timeout(600)


def conversations(count: int) -> list[dict[str, Any]]:
    """Additions, worked out."""
    draw = random.Random(0)
    found = []
    for number in range(count):
        terms = [draw.randrange(100) for _ in range(draw.randrange(2, 9))]
        said = f"{number}: {' + '.join(map(str, terms))} = {sum(terms)}"
        user = {"role": "user", "content": f"{number}: add up {' and '.join(map(str, terms))}"}
        found.append({"messages": [user, {"role": "assistant", "content": said}], "answer": str(sum(terms))})
    return found


@pytest.fixture(scope="module")
def runs(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function that runs the controller under a name and gives the folder."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "records.jsonl").write_text("".join(json.dumps(each) + "\n" for each in conversations(400)))
    ray.init(address="local", num_cpus=8, log_to_driver=False, configure_logging=False, include_dashboard=False)

    def play(name: str, *more: str, train: int, data: int) -> Path:
        pools = "".join(
            f'[[pools]]\nname = "{pool}"\nmembers = {members}\ncpus = 0.5\n'
            for pool, members in (("train", train), ("sample", 1), ("judge", 1), ("data", data))
        )
        (folder / f"{name}.toml").write_text(pools)
        given = ["--config", str(folder / f"{name}.toml"), "--model", tiny, "--data", str(folder / "records.jsonl"), "--runs", str(folder)]
        given += ["--name", name, "--steps", "4", "--every", "2", "--rows", "6", "--row-tokens", "256", "--held-out", "6", "--one-in", "20"]
        sft.main(resolve(sft.Args, [*given, "--max-tokens", "8", "--learning-rate", "1e-3", *more]))
        return folder / name

    yield play
    ray.shutdown()


@pytest.fixture(scope="module")
def whole(runs: Any) -> Path:
    return runs("whole", train=2, data=2)


def weights(run: Path, step: int = 4) -> dict[str, np.ndarray]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "policy" / "model.safetensors")


def far(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_one_run(whole: Path, tiny: str) -> None:
    lines = running.metrics(whole)
    steps = [line for line in lines if "step" in line]
    looked = {line["evaluation"]: line for line in lines if "evaluation" in line}
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert list(looked) == ["before", "step-2", "step-4"]
    assert looked["step-4"]["loss"] < looked["before"]["loss"] - 0.1, "it learns"
    assert looked["before"]["count"] == 6
    said = [parquet.read_table(whole / "samples" / f"{word}.parquet").to_pylist() for word in looked]
    asked = {each["messages"][0]["content"] for each in conversations(400)}
    for made in said:
        assert len({each["prompt"] for each in made} & asked) == 6, "what was generated for each held-out record is kept"
        assert {each["value"] for each in made} <= {0.0, 1.0}
    assert [each["completion"] for each in said[0]] != [each["completion"] for each in said[-1]], "training changed what it says"
    assert {"policy/tokens_per_s", "policy/tflops", "data/wait_share", "policy/learning_rate"} <= steps[1].keys()
    assert [line["policy/learning_rate"] for line in steps] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4]), "a warmup, then a cosine"
    assert all(line["policy/loss"] > 0 for line in steps)
    told = json.loads((whole / "result.json").read_text())["records"]["data"]
    assert told["read"] >= told["used"] > 0
    assert told["read"] == sum(count for word, count in told.items() if word.startswith(("used", "dropped")))
    assert running.changed(tiny, whole / "checkpoints" / "step-000002" / "policy") > 1e-4


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(runs: Any, whole: Path) -> None:
    """From the checkpoint after step 2, with another number of data members: the same weights to the last bit."""
    resumed = runs("resumed", "--resume", str(whole / "checkpoints" / "step-000002"), train=2, data=3)
    assert [line["step"] for line in running.metrics(resumed) if "step" in line] == [3, 4]
    assert far(weights(resumed), weights(whole)) == 0.0
    told, asked = ([line for line in running.metrics(run) if line.get("step", 0) > 2] for run in (resumed, whole))
    for name in ("policy/loss", "policy/tokens", "policy/learning_rate", "policy/grad_norm"):
        assert [line[name] for line in told] == [line[name] for line in asked]


def test_members_make_no_difference(runs: Any, whole: Path) -> None:
    alone = runs("alone", train=1, data=1)
    assert far(weights(alone), weights(whole)) < WEIGHTS
    losses = [[line["policy/loss"] for line in running.metrics(run) if "step" in line] for run in (alone, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_adapters_alone_are_trained_and_saved(runs: Any) -> None:
    short = ("--lora.r", "4", "--steps", "2", "--every", "1", "--warmup", "0")
    run = runs("adapters", *short, train=1, data=1)
    saved = run / "checkpoints" / "step-000002" / "policy"
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {path.name for path in saved.iterdir()}
    again = runs("more", *short, "--resume", str(saved.parents[1] / "step-000001"), train=1, data=2)
    one, other = (load_file(folder / "checkpoints" / "step-000002" / "policy" / "adapter_model.safetensors") for folder in (run, again))
    assert far(one, other) == 0.0


def test_the_gradient_is_that_of_one_big_batch(tiny: str) -> None:
    """Rows of two calls, shared by three members in passes of two rows, against all records in one padded batch of transformers."""
    from transformers import AutoModelForCausalLM

    feed = Documents(conversations(48), model=tiny, row_tokens=256, block=48)
    feed.setup(Member())
    batch = feed.batch(0)
    policy = Policy(tiny, dtype="float64", rows_per_pass=2)
    policy.setup(Member())
    each = token_mean(batch.outline().lengths)
    ours = weigh(batch, each)
    deal = np.random.default_rng(0).permutation(len(batch.keys))
    for rows in np.array_split(deal, 6):  # three members, two calls each: their gradients are summed
        policy.accumulate(ours.take(rows), nll)
    net = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    tokens, labels = padded(feed, 48)
    logits = net(input_ids=tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100).backward()
    for view, parameter in zip(policy._training.gradients.views, net.parameters(), strict=True):
        assert parameter.grad is not None
        own = view[: len(parameter)]  # the head's matrix has rows for tokens that there are not
        assert (own - parameter.grad).abs().max() <= GRADIENT * parameter.grad.abs().max()
        assert not view[len(parameter) :].any()


def padded(feed: Documents, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The records of the first block one a row, as the ecosystem does it: labels of -100 where nothing is trained."""
    encoded = feed._encoded(feed._ready().at(0, count), Report())
    width = max(map(len, encoded))
    tokens, labels = torch.full((len(encoded), width), 3), torch.full((len(encoded), width), -100)
    for row, one in enumerate(encoded):
        tokens[row, : len(one)] = torch.tensor(one.tokens)
        labels[row, : len(one)] = torch.tensor(np.where(one.trained, one.tokens, -100))
    return tokens, labels


@pytest.mark.parametrize("name", ["sft", "sft_grpo", "grpo", "rloo", "rejection"])
def test_controllers_are_short(name: str) -> None:
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= LINES


@pytest.mark.slow
def test_what_is_shown_first_helps_afterwards(runs: Any, tiny: str, tmp_path: Path) -> None:
    """Both parts run in one controller, and steps are counted on."""
    given = ["--model", tiny, "--runs", str(tmp_path), "--name", "both", "--sft-steps", "2", "--grpo-steps", "2", "--held-out", "4"]
    sft_grpo.main(resolve(sft_grpo.Args, [*given, "--task.size", "60", "--worked.size", "60", "--prompts", "2", "--group-size", "2"]))
    lines = running.metrics(tmp_path / "both")
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4]
    assert [line["evaluation"] for line in lines if "evaluation" in line] == ["before", "shown", "after"]
    assert ["worked/wait_share" in line for line in lines if "step" in line] == [True, True, False, False]
    assert (tmp_path / "both" / "checkpoints" / "step-000004" / "policy" / "model.safetensors").is_file()

"""The three people Rolecall is for, each with the file that they would write, run on a real Ray of unlike nodes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import running
from ray.cluster_utils import Cluster
from rolecall.actors.config import resolve
from rolecall.examples import custom_reward, grpo, rejection, rloo
from rolecall.placement.command import FITS, plan
from rolecall.placement.nodes import ACCELERATOR_LABEL, live
from rolecall.roles import Reward

TYPES = ("H100", "L40S", "A10G")
ROOT = Path(custom_reward.__file__).parent
UNLIKE = """
[[pools]]
name = "train"
members = 2
accelerator = "H100"
[[pools]]
name = "sample"
accelerator = "L40S"
[[pools]]
name = "reference"
accelerator = "A10G"
[[pools]]
name = "judge"
resources = { plain = 1 }
[[pools]]
name = "data"
cpus = 0.5
resources = { plain = 1 }
"""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def types() -> Iterator[dict[str, str]]:
    """Node id → type of accelerator of a simulated cluster: a plain head, and a node of each type (without its devices)."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "resources": {"plain": 2}})
    for accelerator in TYPES:
        made.add_node(num_cpus=2, labels={ACCELERATOR_LABEL: accelerator})
    ray.init(address=made.address, log_to_driver=False, configure_logging=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield {node.name: node.accelerator for node in live(free=False)}
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()
    made.shutdown()


def coin(completion: str) -> float:
    """A reward that random completions get half the time."""
    return float(sum(map(ord, completion)) % 2)


@pytest.mark.usefixtures("types")
def test_a_reward_actor_of_ones_own_in_grpo(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swapping it in is one line of the controller: `Reward(last_number)` becomes `Brevity(4)`."""
    lines = (ROOT / "custom_reward.py").read_text().partition("class Brevity")[2].splitlines()
    assert len([line for line in lines if line.strip()]) <= 15
    seen = running.watch(monkeypatch)
    monkeypatch.setattr(grpo, "Reward", lambda function: custom_reward.Brevity(4))
    grpo.main(resolve(grpo.Args, running.arguments(tmp_path, tiny, "--group-size", "4")))
    assert [line["reward/length"] for line in seen.lines] == pytest.approx([6.0, 6.0], abs=1.0)
    assert seen.lines[0]["reward/mean"] == pytest.approx(0.5, abs=0.2), "6 tokens where 4 are asked"
    assert seen.lines[0]["reward/failed"] == 0.0
    assert len({node for nodes in seen.nodes.values() for node in nodes}) == 1, "all roles are in one pool, so on one node"


@pytest.mark.usefixtures("types")
@pytest.mark.parametrize("module", [pytest.param(rloo, id="rloo"), pytest.param(rejection, id="rejection", marks=pytest.mark.slow)])
def test_a_controller_for_another_algorithm(module: Any, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = running.watch(monkeypatch)
    monkeypatch.setattr(module, "Reward", lambda function: Reward(coin))
    pools = running.ONE_POOL
    if module is rejection:
        pools = pools.replace('[[pools]]\nname = "reference"\ncpus = 0\nshares = "train"\n', "")
    module.main(resolve(module.Args, running.arguments(tmp_path, tiny, pools=pools)))
    assert seen.versions == [[0], [1]], "each step samples with the weights that the step before made"
    assert [line["rollout/version"] for line in seen.lines] == [1, 2]
    assert 0.1 < seen.lines[0]["reward/mean"] < 0.9
    assert all(line["policy/grad_norm"] > 0 for line in seen.lines)
    assert running.changed(tiny, tmp_path / "run" / "checkpoint") > 1e-3
    assert ("policy/kl" in seen.lines[1]) == (module is rloo)


def test_the_same_controller_on_unlike_nodes_by_configuration_alone(
    types: dict[str, str], tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = running.watch(monkeypatch)
    monkeypatch.setattr(grpo, "Reward", lambda function: Reward(coin))  # without any success, no step would move the weights
    grpo.main(resolve(grpo.Args, running.arguments(tmp_path, tiny, "--group-size", "4", pools=UNLIKE)))
    where = {role: [types[node] for node in nodes] for role, nodes in seen.nodes.items()}
    assert where == {"policy": ["H100", "H100"], "rollout": ["L40S"], "reference": ["A10G"], "reward": [""], "data": [""]}
    assert seen.versions == [[0], [1]]


def test_the_recipe_for_unlike_devices_fits_its_cluster(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert plan(ROOT / "grpo-unlike.toml", ROOT / "cluster-unlike.toml") == FITS
    shown = capsys.readouterr().out
    for words in ("trainer×4", "sampler-0×4, sampler-1×4", "small×2", "plain-0×8, plain-1×8"):
        assert words in shown
    pools = resolve(grpo.Args, ["--config", str(ROOT / "grpo-unlike.toml"), "--model", "m"]).pools
    assert {pool.accelerator for pool in pools} == {*TYPES, ""}

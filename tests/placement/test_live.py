"""Pools on a real Ray: three types of accelerator simulated on one host."""

import os
import subprocess
import sys
import time

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from rolecall.placement import Pool, place
from rolecall.placement.cluster import Connection, connect
from rolecall.placement.command import FITS, REFUSED, plan
from rolecall.placement.nodes import ACCELERATOR_LABEL, live
from rolecall.protocols.errors import ConfigError, DeadlineExceeded, MemberLost, PlanError, UserError

REFUSAL = 1.0  # seconds of CPU in which a pool that can't be is refused, once connected
GONE = 60.0  # seconds until Ray has taken back what a dead driver held
PENDING = 3.0  # seconds for which Ray alone is watched waiting; it would for ever

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster():
    """A head with CPUs alone, two nodes of "H100", one of "L40S" with a custom resource, one of "A10G"."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    for accelerator, gpus, more in (("H100", 2, {}), ("L40S", 2, {"nvme": 2}), ("A10G", 1, {})):
        made.add_node(num_cpus=2, num_gpus=gpus, labels={ACCELERATOR_LABEL: accelerator}, resources=more)
    ray.init(address=made.address, log_to_driver=False, configure_logging=False)
    yield made
    ray.shutdown()
    made.shutdown()


@ray.remote
class Where:
    def tell(self):
        context = ray.get_runtime_context()
        return context.get_node_id(), ray.get_gpu_ids()


def ask(placed):
    """What each member of a placed pool says of its place."""
    actors = [Where.options(**placed.options(rank)).remote() for rank in range(placed.members)]
    try:
        return ray.get([actor.tell.remote() for actor in actors], timeout=120)
    finally:
        for actor in actors:
            ray.kill(actor)


def states():
    return [table["state"] for table in placement_group_table().values()]


def accelerators():
    return {node.name: node.accelerator for node in live(free=False)}


def test_unlike_pools_run_where_the_plan_says(cluster):
    pools = [
        Pool("any", members=1, gpus=1),  # could take the H100 that "train" needs; Ray by itself might let it
        Pool("train", members=2, gpus=1, accelerator="H100", strategy="STRICT_PACK"),
        Pool("sample", members=2, gpus=0.5, accelerator="L40S", resources={"nvme": 1}, cpus=0.5),
        Pool("reference", members=3, cpus=0.25, shares="sample"),
        Pool("judge", members=3, cpus=0.5),
    ]
    types = accelerators()
    with place(pools) as placed:
        assert set(placed) == {"any", "train", "sample", "reference", "judge"}
        assert {types[node] for node, _ in ask(placed["train"])} == {"H100"}
        samplers = ask(placed["sample"])
        assert {types[node] for node, _ in samplers} == {"L40S"}
        assert all(len(devices) == 1 for _, devices in samplers)
        for name in placed:
            told = [node for node, _ in ask(placed[name])]
            assert told == [placed[name].node(rank) for rank in range(placed[name].members)], name
        group, _ = placed["sample"].bundle(0)
        assert [placed["reference"].bundle(rank) for rank in range(3)] == [(group, 0), (group, 1), (group, 0)]
        assert placed["judge"].threads == 1
        assert states().count("CREATED") == 4
    assert "CREATED" not in states()


def test_what_can_not_fit_is_refused_at_once_where_ray_waits_for_ever(cluster):
    start = time.process_time()  # of this process alone: others share the cores
    with pytest.raises(PlanError) as caught, place([Pool("train", members=8, gpus=1, accelerator="H100", strategy="STRICT_PACK")]):
        pass
    assert time.process_time() - start < REFUSAL
    assert "members<=2" in str(caught.value)

    group = placement_group([{"GPU": 1}] * 8, strategy="STRICT_PACK", bundle_label_selector=[{ACCELERATOR_LABEL: "H100"}] * 8)
    try:
        assert not ray.wait([group.ready()], timeout=PENDING)[0]
        assert placement_group_table(group)["state"] == "PENDING"
    finally:
        remove_placement_group(group)


def test_only_what_is_free_counts(cluster):
    first, second = Pool("first", members=2, gpus=1, accelerator="H100"), Pool("second", gpus=1, accelerator="H100")
    with place([first]), pytest.raises(PlanError, match="'H100'"), place([second]):
        pass
    with place([second]):
        pass


def test_groups_are_removed_after_an_exception(cluster):
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), place([Pool("a", cpus=0.5)]):
            raise error
        assert "CREATED" not in states()


def test_a_place_that_somebody_took_meanwhile_is_a_deadline_with_names(cluster, monkeypatch):
    held = placement_group([{"CPU": 2}], bundle_label_selector=[{ACCELERATOR_LABEL: "A10G"}])
    ray.get(held.ready(), timeout=60)
    try:
        nodes = live(free=False)  # as they were before somebody took it
        monkeypatch.setattr("rolecall.placement.groups.live", lambda: nodes)
        with pytest.raises(DeadlineExceeded) as caught, place([Pool("late", cpus=2, gpus=1, accelerator="A10G")], deadline=1.5):
            pass
    finally:
        remove_placement_group(held)
    for word in ("'late'", "1.5 s", "'GPU': 1.0", cluster.address):
        assert word in str(caught.value)


def test_a_plan_of_the_live_cluster(cluster, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    config = tmp_path / "run.toml"
    config.write_text('[[pools]]\nname = "train"\nmembers = 2\ngpus = 1\naccelerator = "H100"\n')
    assert plan(config, None, cluster.address) == FITS
    shown = capsys.readouterr().out
    for word in ("train", "H100", "L40S", "A10G", "2 nvme", "The pools fit."):
        assert word in shown
    config.write_text(config.read_text().replace("members = 2", "members = 3"))
    assert plan(config, None, cluster.address) == REFUSED
    assert "members<=2" in capsys.readouterr().out


DRIVER = """
import os, sys, time
import ray
from rolecall.placement import Pool, place

@ray.remote
class Idle:
    def process(self):
        return os.getpid()

with place([Pool("a", cpus=0.5)], address=sys.argv[1]) as placed:
    actor = Idle.options(**placed["a"].options(0)).remote()
    print(ray.get(actor.process.remote(), timeout=60), flush=True)
    time.sleep(600)
"""


def test_a_killed_driver_leaves_nothing_on_a_cluster_that_it_joined(cluster):
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, cluster.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        member = driver.stdout.readline().strip()
        assert member, driver.communicate()[1][-2000:]
        assert "CREATED" in states()
        driver.kill()
        end = time.monotonic() + GONE
        while "CREATED" in states() or os.path.exists(f"/proc/{member}"):
            assert time.monotonic() < end, (states(), member)
            time.sleep(0.1)
    finally:
        driver.kill()
        driver.communicate()


def test_addresses_that_are_none(cluster):
    connected = ray.get_runtime_context().gcs_address
    with connect("127.0.0.1:1") as connection:
        assert connection == Connection(connected, started=False), "a connection that is there is used"
    script = "from rolecall.placement.cluster import connect\nimport sys\nwith connect(sys.argv[1]): pass"
    wrong = {
        "127.0.0.1:1": (UserError, "No Ray cluster answers"),
        "nonsense": (ConfigError, "no address"),
        "ray://x:1": (ConfigError, "client"),
    }
    for address, (error, word) in wrong.items():
        result = subprocess.run([sys.executable, "-c", script, address], capture_output=True, text=True, timeout=120)
        assert error.__name__ in result.stderr
        assert word in result.stderr


def test_a_cluster_that_disappears_is_a_clear_error(cluster):
    gone = Connection("127.0.0.1:1", started=False)
    with pytest.raises(MemberLost) as caught:
        gone.check("the answer of 'policy'")
    for word in ("127.0.0.1:1", "'policy'", "Do:"):
        assert word in str(caught.value)


LOCAL = """
import os, signal, subprocess, sys, time
import ray
from rolecall.placement import Pool, place
from rolecall.protocols.errors import MemberLost
try:
    with place([Pool("a", members=2, cpus=0.5)]) as placed:
        connection = placed["a"].connection
        listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True).stdout.splitlines()
        from rolecall.placement.reaper import marked
        ours = {str(pid) for pid in [*marked(str(connection.folder)), os.getpid()]}
        for line in listening:
            if any(f"pid={pid}," in line for pid in ours):
                print("listens", line.split()[3])
        print("token", os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"]), oct(connection.folder.stat().st_mode & 0o777))
        head = [pid for pid in marked(str(connection.folder)) if "gcs_server" in open(f"/proc/{pid}/cmdline").read().split("\\0")[0]]
        os.kill(head[0], signal.SIGKILL)
        time.sleep(0.5)
        connection.check("a test")
except MemberLost as error:
    print("lost", error)
print("after", ray.is_initialized(), os.environ.get("RAY_AUTH_TOKEN"))
"""


def test_a_local_cluster_listens_on_loopback_alone_and_its_loss_is_told():
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    result = subprocess.run([sys.executable, "-c", LOCAL], capture_output=True, text=True, timeout=240, env=environment)
    lines = result.stdout.splitlines()
    listens = [line.split()[1] for line in lines if line.startswith("listens")]
    assert len(listens) >= 5, result.stderr[-2000:]
    assert all(address.startswith(("127.0.0.1:", "[::ffff:127.0.0.1]:", "[::1]:")) for address in listens), listens
    assert "token token 64 0o700" in lines
    assert any(line.startswith("lost The Ray cluster at 127.0.0.1") for line in lines), result.stderr[-2000:]
    assert lines[-1] == "after False None"

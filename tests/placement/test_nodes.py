"""Descriptions of a cluster in TOML."""

import pytest
from rolecall.placement.nodes import ACCELERATOR_LABEL, GPU_MEMORY_LABEL, Node, _live_node, read_cluster
from rolecall.protocols.errors import ConfigError


def write(folder, text):
    path = folder / "cluster.toml"
    path.write_text(text)
    return path


def test_counted_nodes_are_equal_and_numbered(tmp_path):
    text = '[[node]]\nname = "h"\ncount = 2\ncpus = 8\ngpus = 4\naccelerator = "H100"\n[[node]]\ncpus = 16\nresources = {nvme = 1}\n'
    nodes = read_cluster(write(tmp_path, text))
    h100 = {"cpus": 8, "gpus": 4, "accelerator": "H100"}
    assert nodes == (Node("h-0", **h100), Node("h-1", **h100), Node("node1", cpus=16, resources={"nvme": 1.0}))


def test_the_label_gives_the_accelerator(tmp_path):
    (node,) = read_cluster(write(tmp_path, f'[[node]]\nlabels = {{"{ACCELERATOR_LABEL}" = "L40S"}}\n'))
    assert node.accelerator == "L40S"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[node]]\ngpu = 1\n", ["node[0]", "'gpu'", "'gpus'"]),
        ("[[node]]\ncpus = 'x'\n", ["node[0].cpus"]),
        ("[[nodes]]\ncpus = 1\n", ["'nodes'", "[[node]]"]),
        ("[[node]]\ncount = 0\n", ["count"]),
        ("[[node]]\ncpus = -1\n", ["cpus"]),
        ("[[node]]\ncpus = nan\n", ["cpus", "finite"]),
        ("", ["no node"]),
        ("node = 3", ["no node"]),
        ("x = [", ["no TOML"]),
        ('[[node]]\nname = "a"\n[[node]]\nname = "a"\n', ["two nodes", "'a'"]),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        read_cluster(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_is_a_users_mistake(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        read_cluster(tmp_path / "none.toml")


def test_a_live_node_counts_what_is_free():
    entry = {
        "NodeID": "ab",
        "NodeManagerAddress": "10.0.0.1",
        "Labels": {ACCELERATOR_LABEL: "H100", GPU_MEMORY_LABEL: "80"},
        "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": 64e9, "accelerator_type:A100": 1.0},
    }
    free = {"CPU": 3.0, "nvme": 1.0, "node:10.0.0.1": 1.0, "object_store_memory": 1e9, "CPU_group_abc": 1.0, "bundle_group_abc": 1000.0}
    node = _live_node(entry, free)
    assert (node.name, node.cpus, node.gpus, node.accelerator, node.gpu_memory_gb) == ("ab", 3.0, 0.0, "H100", 80.0)
    assert node.resources == {"nvme": 1.0}
    assert node.steps()["memory"] == 1, "all memory is taken, which is not the same as unknown"

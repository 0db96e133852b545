"""Pools by themselves: what is refused, and what bundles come of them."""

import pickle

import pytest
from rolecall.placement.pools import Pool, bundle_of, bundles, check_pools, read_pools
from rolecall.protocols.errors import ConfigError


@pytest.mark.parametrize(
    ("pools", "words"),
    [
        ([Pool("a", members=0)], ["'a'", "members=0", "members=1"]),
        ([Pool("a", cpus=-1)], ["cpus", "-1"]),
        ([Pool("a", cpus=float("nan"))], ["cpus", "finite"]),
        ([Pool("a", gpus=1.5)], ["gpus=1.5", "gpus=1 or gpus=2"]),
        ([Pool("a", cpus=0.00001)], ["finer"]),
        ([Pool("a", cpus=0)], ["at least one resource"]),
        ([Pool("a", strategy="pack")], ["'pack'", "use 'PACK'"]),
        ([Pool("a", resources={"GPU": 1})], ["'GPU'", "field gpus"]),
        ([Pool("a"), Pool("a")], ["Two pools", "'a'"]),
        ([], ["no pool"]),
        ([Pool("train"), Pool("b", shares="trian")], ["'trian'", "use 'train'"]),
        ([Pool("a", shares="b"), Pool("b", shares="a")], ["circle", "a → b → a"]),
        ([Pool("a", shares="a")], ["circle"]),
        ([Pool("a", accelerator="H100"), Pool("b", shares="a", accelerator="L40S")], ["contradicts", "'L40S'"]),
        ([Pool("a"), Pool("b", shares="a", strategy="STRICT_SPREAD")], ["strategy contradicts"]),
    ],
)
def test_nonsense_is_refused_with_the_remedy(pools, words):
    with pytest.raises(ConfigError) as caught:
        check_pools(pools)
    for word in words:
        assert word in str(caught.value)


def test_all_mistakes_come_at_once():
    with pytest.raises(ConfigError) as caught:
        check_pools([Pool("a", members=0), Pool("b", cpus=-1), Pool("c", shares="d")])
    assert len(caught.value.fields["problems"]) == 3
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_bundles_are_the_sum_of_their_sharers():
    pools = [
        Pool("train", members=2, cpus=2, gpus=1, resources={"nvme": 1}),
        Pool("reference", members=3, cpus=0.5, gpus=0.5, memory_gb=1, shares="train"),
        Pool("probe", members=2, cpus=0.25, shares="reference"),
    ]
    check_pools(pools)
    first, second = bundles(pools)["train"]
    # reference members 0 and 2 and probe member 0 are in bundle 0; reference 1 and probe 1 in bundle 1
    assert first == {"CPU": 32_500, "GPU": 20_000, "nvme": 10_000, "memory": 2_000_000_000}
    assert second == {"CPU": 27_500, "GPU": 15_000, "nvme": 10_000, "memory": 1_000_000_000}
    by_name = {pool.name: pool for pool in pools}
    assert [bundle_of(pools[1], rank, by_name) for rank in range(3)] == [0, 1, 0]


@pytest.mark.parametrize(("cpus", "threads"), [(0.1, 1), (1, 1), (3.9, 3), (16, 16)])
def test_threads_are_what_the_share_pays_for(cpus, threads):
    assert Pool("a", cpus=cpus).threads == threads


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"name": "a", "member": 2}, ["pools[0]", "'member'", "'members'"]),
        ({"name": "a", "members": "2"}, ["pools[0].members", "int"]),
        ({"members": 2}, ["pools[0]", "name"]),
        ({"name": "a", "strategy": "SPRED"}, ["pools[0].strategy", "SPRED"]),
        ("a", ["no table"]),
    ],
)
def test_toml_is_read_strictly(entry, words):
    with pytest.raises(ConfigError) as caught:
        read_pools([entry])
    for word in words:
        assert word in str(caught.value)


def test_toml_pools_equal_python_pools():
    entry = {"name": "a", "members": 2, "cpus": 1, "gpus": 0.5, "resources": {"nvme": 1}, "strategy": "SPREAD"}
    assert read_pools([entry]) == (Pool("a", members=2, gpus=0.5, resources={"nvme": 1.0}, strategy="SPREAD"),)

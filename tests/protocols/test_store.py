"""Through Ray's object store a frame costs one copy in and none out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from rolecall.protocols import Frame, Tensor, Weights, decode, encode

MANY = 200_000_000  # bytes of the large message
LITTLE = 20_000_000  # bytes a reader's private memory may grow meanwhile: a tenth of one copy


@pytest.fixture(scope="module")
def store() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test
    ray.init(address="local", num_cpus=2, object_store_memory=600_000_000, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def large() -> Weights:
    tensor = Tensor(name="a", dtype="uint8", shape=(MANY,), offset=0, nbytes=MANY, digest="0" * 32)
    return Weights(version=1, shard=0, shards=1, names=("a",), manifest=(tensor,), data=np.arange(MANY, dtype=np.uint8))


def mapped(address: int) -> str:
    """What the memory at this address belongs to."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= address < high:
            return name
    return ""


def private() -> int:
    """Bytes of this process's own memory, what it maps from the store not counted."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


@ray.remote
class Reader:
    def read(self, frame: Frame) -> dict[str, Any]:
        before = private()
        message = decode(frame)
        return {
            "sum": int(message.data[:: MANY // 1000].sum()),
            "writable": message.data.flags.writeable,
            "mapped": mapped(message.data.ctypes.data),
            "aligned": message.data.ctypes.data % 64,
            "grown": private() - before,
        }


def test_a_reader_maps_the_store(store: None) -> None:
    message = large()
    reference = ray.put(encode(message))
    found = ray.get(Reader.remote().read.remote(reference), timeout=60)
    assert found["sum"] == int(message.data[:: MANY // 1000].sum())
    assert not found["writable"]
    assert found["aligned"] == 0
    assert "plasma" in found["mapped"]
    assert found["grown"] < LITTLE


def test_views_keep_the_object_alive(store: None) -> None:
    before = private()
    frame = ray.get(ray.put(encode(large())), timeout=60)
    data = decode(frame).data
    del frame
    for number in range(3):  # the store holds three such objects, so it must take back what nobody reads
        ray.put(encode(large())) if number else None
        assert "plasma" in mapped(data.ctypes.data)
    assert data[MANY - 1] == np.arange(MANY, dtype=np.uint8)[MANY - 1]
    assert private() - before < LITTLE
    with pytest.raises(ValueError, match="read-only"):
        data[0] = 1

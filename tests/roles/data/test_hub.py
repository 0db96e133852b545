"""Hub: a dataset by name against a hub on this machine, folders in its layout, folders that `datasets` saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import COMMIT, FakeHub
from rolecall.protocols import DataError
from rolecall.roles.data import Hub, Stream
from rolecall.roles.data.sources.patience import Patience

CARD = b"""---
configs:
- config_name: easy
  data_files:
  - split: train
    path: data/train-*.jsonl
  - split: test
    path: data/test-*.jsonl
- config_name: hard
  data_files: data/test-*.jsonl
---
"""
QUICK = Patience(deadline=60.0, attempts=1)
READ = """
import json, sys
from rolecall.roles.data import Hub, Stream
stream = Stream(Hub(sys.argv[1], "easy", sys.argv[2]))
found = [(raw.place, raw.columns) for raw in stream.at(0, int(sys.argv[3]))]
print(json.dumps(sorted(found)))
"""


def lines(*numbers: int) -> bytes:
    return b"".join(b'{"n": %d}\n' % number for number in numbers)


FILES = {"README.md": CARD, "data/train-0.jsonl": lines(*range(40)), "data/train-1.jsonl": lines(40, 41), "data/test-0.jsonl": lines(7)}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return str(tmp_path)


def numbers(source: Hub) -> list[int]:
    return [record["n"] for _, record in source.records(repeats=False)]


def test_a_name_on_the_hub_is_streamed_by_ranges(tmp_path: Path):
    """In a process of its own: the address of the hub is read when its library is imported."""
    with FakeHub("me/sums", FILES) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", READ, "me/sums", "train", "42"]
        run = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert sorted(record["n"] for _, record in found) == list(range(42))
    assert found[0][0] == f"hf://datasets/me/sums@{COMMIT}/data/train-0.jsonl:1"
    assert all(wanted for name, wanted in hub.asked if name.endswith(".jsonl"))
    assert not [name for name, _ in hub.asked if name.startswith("test-")]


def test_a_folder_in_the_hubs_layout(folder: str):
    assert numbers(Hub(folder, "easy")) == list(range(42))
    assert numbers(Hub(folder, "easy", "test")) == [7]
    assert numbers(Hub(folder, "hard")) == [7]
    assert sorted(raw.columns["n"] for raw in Stream(Hub(folder, "easy")).at(0, 42)) == list(range(42))


def test_configurations_and_splits_that_are_not_there_are_named(folder: str):
    with pytest.raises(DataError, match=r"no configuration 'soft'.*'easy', 'hard'"):
        numbers(Hub(folder, "soft", patience=QUICK))
    with pytest.raises(DataError, match=r"no configuration ''.*easy"):
        numbers(Hub(folder, patience=QUICK))
    with pytest.raises(DataError, match=r"no split 'valid'.*There is: train, test"):
        numbers(Hub(folder, "easy", "valid"))


def test_folders_that_datasets_saved(tmp_path: Path):
    import datasets

    rows = [{"n": number, "messages": [{"role": "user", "content": str(number)}]} for number in range(50)]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict({"train": whole, "test": whole.select([3])}).save_to_disk(tmp_path / "two")
    assert [record for _, record in Hub(str(tmp_path / "one")).records(repeats=False)] == rows
    assert numbers(Hub(str(tmp_path / "two"))) == list(range(50))
    assert numbers(Hub(str(tmp_path / "two"), split="test")) == [3]
    with pytest.raises(DataError, match=r"no split 'valid'.*There is: test, train"):
        numbers(Hub(str(tmp_path / "two"), split="valid"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json is damaged"):
        numbers(Hub(str(tmp_path / "one")))


def test_a_dataset_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="the dataset me/nothing can't be read"):
        numbers(Hub("me/nothing", patience=QUICK))

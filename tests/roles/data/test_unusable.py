"""Records that can't be used, through the whole data role: each is dropped and counted by its reason, or refused with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chats import tokenizer
from rolecall.protocols import DataError
from rolecall.roles.base import Member
from rolecall.roles.data import Documents, Files

ASK, SAY = {"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}
BAD = {
    "an empty conversation": {"messages": []},
    "only a system message": {"messages": [{"role": "system", "content": "Be."}]},
    "no trained token": {"messages": [ASK]},
    "a message without a role": {"messages": [ASK, {"content": "Answer."}]},
    "a message without content": {"messages": [ASK, {"role": "assistant"}]},
    "content that is no text": {"messages": [ASK, {"role": "assistant", "content": 5}]},
    "no list of messages": {"messages": "7"},
    "no JSON in a column": {"messages": "hello"},
    "no messages": {"messages": None},
    "refused by the chat template": {"messages": [ASK, SAY, SAY]},
    "a tool call that the template leaves out": {
        "messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]
    },
    "a tool call without a name": {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [{"arguments": "{}"}]}]},
    "tools of a wrong type": {"messages": [ASK, SAY], "tools": 5},
    "options of a wrong type": {"messages": [ASK, SAY], "options": [1]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer("gemma").save_pretrained(str(folder))
    return str(folder)


def role(path: Path, records: list[dict], model: str, **settings) -> Documents:
    path.write_text("\n".join(json.dumps(record) for record in records))
    made = Documents(Files(str(path)), model=model, row_tokens=256, block=len(records), **settings)
    made.setup(Member(role="data"))
    return made


def test_each_is_counted_by_its_reason_and_the_good_ones_are_used(tmp_path: Path, model: str):
    records = [record for bad in BAD.values() for record in (bad, {"messages": [ASK, SAY]})]
    data = role(tmp_path / "talk.jsonl", records, model)
    batch = data.batch(0)
    assert len(set(batch.samples.tolist())) == len(BAD)
    report = data.report()
    for number, why in enumerate(BAD):
        assert report[f"dropped: {why} (first: {tmp_path}/talk.jsonl:{2 * number + 1})"] == 1, why
    assert report["used"] == len(BAD)
    assert report["read"] == 2 * len(BAD)
    data.close()


@pytest.mark.parametrize("why", BAD)
def test_or_it_is_refused_with_its_place(tmp_path: Path, model: str, why: str):
    data = role(tmp_path / "talk.jsonl", [{"messages": [ASK, SAY]}, BAD[why]], model, unusable="refuse")
    with pytest.raises(DataError, match=r"talk\.jsonl:2"):
        data.batch(0)
    data.close()


def test_missing_columns_are_named_with_the_nearest(tmp_path: Path, model: str):
    data = role(tmp_path / "talk.jsonl", [{"mesages": [ASK, SAY]}], model)
    with pytest.raises(DataError, match=r"talk\.jsonl:1: .*There is: mesages\. Do: map 'messages' to 'mesages'"):
        data.batch(0)
    data.close()

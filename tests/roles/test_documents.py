"""Rows of documents: the same whoever makes them, resumed anywhere, everything that happens to a record counted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import mail
import numpy as np
import pytest
from rolecall.protocols import PackedBatch, check
from rolecall.protocols.errors import ConfigError, DataError
from rolecall.roles.base import Member
from rolecall.roles.data import Documents, Files, Mix
from rolecall.roles.data.packer import ROWS

BLOCK = 16


def conversations(count: int, seed: int = 0) -> list[dict[str, object]]:
    """Sums, worked out at various lengths."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        terms = [draw.randrange(100) for _ in range(draw.randrange(2, 6))]
        worked = "\n".join(f"{sum(terms[:k])} + {terms[k]} = {sum(terms[: k + 1])}" for k in range(1, len(terms)))
        question = {"role": "user", "content": f"{number}: " + " + ".join(map(str, terms))}
        found.append({"messages": [question, {"role": "assistant", "content": worked}], "answer": str(sum(terms))})
    return found


def ready(model: str, source: object, rank: int = 0, world: int = 1, **settings: object) -> Documents:
    role = Documents(source, **{"model": model, "row_tokens": 256, "block": BLOCK, **settings})
    role.check()
    role.setup(Member(rank=rank, world=world, seed=3))
    return role


def rows(batches: list[PackedBatch]) -> PackedBatch:
    return PackedBatch.join([batch for batch in batches if len(batch.keys)])


def test_only_what_the_assistant_says_is_trained(tiny: str) -> None:
    from rolecall.roles.tokens import load_tokenizer

    role = ready(tiny, conversations(20))
    batch = role.batch(0)
    check(batch)
    tokenizer = load_tokenizer(tiny)
    said = {tokenizer.decode(batch.targets[batch.samples == sample]) for sample in np.unique(batch.samples)}
    answers = {record["messages"][1]["content"] + "<|im_end|>" for record in conversations(20)}
    assert len(said) == BLOCK
    assert said <= answers
    assert batch.tokenizer
    sums = role.meter.drain()
    assert sums["used"][0] == BLOCK
    assert 0.5 < sums["fill"][0] / sums["fill"][1] <= 1


@pytest.mark.parametrize("members", [1, 2, 3])
def test_rows_do_not_depend_on_who_makes_them(tiny: str, members: int) -> None:
    source = Mix({"a": conversations(50), "b": conversations(30, seed=1)}, weights={"a": 2, "b": 1})
    alone = [ready(tiny, source).batch(block) for block in range(6)]
    roles = [ready(tiny, source, rank, members) for rank in range(members)]
    for block, batch in enumerate(alone):
        assert mail.differences(roles[block % members].batch(block), batch) == []
    keys = np.concatenate([batch.keys for batch in alone])
    assert len(np.unique(keys)) == len(keys)
    assert (keys // ROWS).tolist() == sorted(keys // ROWS)


def test_a_resumed_stream_goes_on_with_the_same_rows(tiny: str, tmp_path: Path) -> None:
    """From 20 random places, with other numbers of members: nothing twice, nothing lost, the same packing."""
    draw = random.Random(5)
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in conversations(40, seed)))
    source = Mix({name: Files(str(tmp_path / f"{name}.jsonl")) for name in "ab"}, epochs={"a": 2.5, "b": 1}, window=8)
    whole = [ready(tiny, source).batch(block) for block in range(10)]
    assert [len(batch.keys) > 0 for batch in whole] == [True] * 9 + [False], "140 records are nine blocks of 16, the last not full"
    everything = rows(whole)
    first = {world: [ready(tiny, source, rank, world) for rank in range(world)] for world in (1, 2, 3)}
    again = {world: [ready(tiny, source, rank, world) for rank in range(world)] for world in (1, 2, 3)}
    for _ in range(20):
        block = draw.randrange(9)
        row = draw.randrange(len(whole[block].keys))
        before, after = draw.choice([1, 2, 3]), draw.choice([1, 2, 3])
        made = [first[before][number % before].batch(number) for number in range(block + 1)]
        state = first[before][0].state(block, row)
        assert all(isinstance(value, int) for value in state.values())
        for role in again[after]:
            role.restore(json.loads(json.dumps(state)))
        made[-1] = made[-1].take(range(row))
        rest = [again[after][number % after].batch(number) for number in range(state["block"], 10)]
        rest[0] = rest[0].take(range(state["row"], len(rest[0].keys)))
        joined = rows([*made, *rest])
        assert set(mail.differences(joined, everything)) <= {"samples"}, "samples are numbered within what was joined"
        np.testing.assert_array_equal(joined.runs(), everything.runs())


def test_what_can_not_be_used_is_counted_or_refused(tiny: str, tmp_path: Path) -> None:
    bad = [{"messages": [{"role": "user", "content": "hm?"}]}, {"messages": []}, {"messages": [{"role": "system", "content": "be"}]}]
    good = conversations(5)
    long = {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "x" * 2000}]}
    role = ready(tiny, Mix({"all": [*good, *bad, long]}, epochs={"all": 1}))
    batch = role.batch(0)
    assert len(np.unique(batch.samples)) == 6
    report = role.report()
    assert (report["read"], report["used"]) == (9, 6)
    assert sum(count for word, count in report.items() if word.startswith("dropped")) == 3
    assert any(word.startswith("cut: too long (first: ") for word in report)
    assert len(role.batch(1).keys) == 0, "the end"
    with pytest.raises(DataError):
        ready(tiny, Mix({"all": [*good, *bad]}, epochs={"all": 1}), unusable="refuse").batch(0)
    with pytest.raises(DataError, match=r"too long for a row.*room for 256"):
        ready(tiny, [*good, long], too_long="refuse").batch(0)
    with pytest.raises(DataError, match=r"None of the 16 records from position 0 on can be trained.*16 dropped"):
        ready(tiny, [bad[0]]).batch(0)


def test_held_out_records_are_questions_and_rows_and_never_trained(tiny: str) -> None:
    records = conversations(200)
    role = ready(tiny, Mix({"all": records}, epochs={"all": 1}), held_out=10)
    held, asked = role.held_out(8), role.questions(8)
    check(asked)
    check(held)
    assert len(np.unique(held.samples)) == len(asked.keys) == 8
    by_text = {record["messages"][0]["content"]: record for record in records}
    assert [by_text[text]["answer"] for text in asked.texts] == list(asked.columns["answer"])
    assert set(asked.columns) == {"answer"}
    trained = rows([role.batch(block) for block in range(13)])
    from rolecall.roles.tokens import load_tokenizer

    tokenizer = load_tokenizer(tiny)
    seen = tokenizer.decode(trained.tokens)
    assert not any(text + "<|im_end|>" in seen for text in asked.texts)
    assert tokenizer.decode(asked.tokens[: asked.cu_seqlens[1]]).endswith("<|im_start|>assistant\n")
    other = ready(tiny, Mix({"all": records}, epochs={"all": 1}), held_out=10, seed=9)
    assert mail.differences(other.questions(8), asked) == []
    with pytest.raises(DataError, match="not held out"):
        role.held_out(150)


def test_held_out_records_that_can_not_be_used_are_noted_and_others_take_their_place(tiny: str) -> None:
    """Else a measurement would be of fewer records than were asked for, or a run would end at its first look."""
    good = conversations(200)
    dumb = [{"messages": [{"role": "user", "content": f"hm {number}?"}], "answer": ""} for number in range(60)]
    curt = [{"messages": [{"role": "assistant", "content": f"well {number}"}], "answer": ""} for number in range(60)]
    role = ready(tiny, [*dumb, *curt, *good], held_out=4)
    held, asked = role.held_out(40), role.questions(40)
    assert len(np.unique(held.samples)) == len(asked.keys) == 40
    assert all(": " in text and "+" in text for text in asked.texts)
    assert asked.keys[0] < -1, "the first were left out"
    report = role.report()
    left_out, mute = (next(word for word in report if word.startswith(f"noted: held out and not {what}: ")) for what in ("used", "asked"))
    assert left_out.startswith("noted: held out and not used: no trained token (first: record ")
    assert mute.startswith("noted: held out and not asked: nothing before the assistant's turn (first: record ")
    assert 5 <= report[left_out] <= 30, "one in four of 60"
    assert report[mute] >= 1
    assert role.questions(40).ids == asked.ids
    assert role.report() == report, "each is noted once"
    strict = ready(tiny, [*dumb, *good], held_out=4, unusable="refuse")
    for verb in (strict.held_out, strict.questions):
        with pytest.raises(DataError, match="no token of the record is trained"):
            verb(40)
    with pytest.raises(DataError, match=r"there is no question in a text.*hold out conversations"):
        ready(tiny, [{"text": f"a {number}"} for number in range(50)], held_out=4).questions(2)


def test_states_of_other_data_are_refused(tiny: str) -> None:
    role = ready(tiny, conversations(40))
    state = role.state(1, 0)
    with pytest.raises(DataError, match="settings differs"):
        ready(tiny, conversations(40), row_tokens=128).restore(state)
    with pytest.raises(DataError, match="data differs"):
        ready(tiny, conversations(41)).restore(state)
    with pytest.raises(DataError, match="seed differs"):
        ready(tiny, conversations(40), seed=4).restore(state)


def test_preferences_are_packed_with_both_sides(tiny: str) -> None:
    pairs = [{"prompt": f"{n}+{n}?", "chosen": f"{2 * n}", "rejected": f"{3 * n + 1}"} for n in range(1, 30)]
    batch = ready(tiny, pairs).batch(0)
    check(batch)
    assert sorted(np.unique(batch.samples).tolist()) == list(range(2 * BLOCK))
    assert (batch.parents >= 0).sum() == 2 * BLOCK


@pytest.mark.parametrize("settings", [{"row_tokens": 1}, {"block": 0}, {"held_out": 1}, {"too_long": "shorten"}, {"train": "none"}])
def test_settings_that_can_not_work_are_refused(tiny: str, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Documents([{"text": "a"}], **{"model": tiny, **settings}).check()


def test_columns_of_other_names_are_mapped_for_all_sources_or_by_the_source(tiny: str, tmp_path: Path) -> None:
    records = [{"topic": f"{n}+{n}?", "solution": f"{2 * n}", "answer": f"{2 * n}"} for n in range(60)]
    mapping = {"prompt": "topic", "completion": "solution"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    by_all = ready(tiny, str(tmp_path / "a.jsonl"), columns=mapping, held_out=4)
    by_source = ready(tiny, Files(str(tmp_path / "a.jsonl"), columns=mapping), held_out=4)
    assert mail.differences(by_all.batch(0), by_source.batch(0)) == []
    assert by_all.questions(5).texts == by_source.questions(5).texts
    with pytest.raises(DataError, match="settings differs"):
        by_source.restore(by_all.state(1, 0))
    with pytest.raises(DataError, match=r"no column 'solutoin' \(mapped as 'completion'\).*use 'solution'"):
        ready(tiny, str(tmp_path / "a.jsonl"), columns={**mapping, "completion": "solutoin"}).batch(0)


def test_a_source_that_runs_dry_ends_is_left_or_begins_again(tiny: str) -> None:
    """The report tells of each record once an epoch, and the end is an empty block."""
    sources = {"a": conversations(30), "b": conversations(5, seed=1)}
    for dry, read in (("stop", range(8, 13)), ("leave", range(35, 36)), ("repeat", range(160, 161))):
        role = ready(tiny, Mix(sources, dry=dry))
        made = [role.batch(block) for block in range(10)]
        report = role.report()
        assert report["read"] == report["used"]
        assert report["read"] in read
        assert (len(made[-1].keys) == 0) == (dry != "repeat")

"""Data: the stream, its order, shares and state; what is held out; templates; preparing ahead."""

from __future__ import annotations

import itertools
import json
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.protocols import DataError, Prompts, check, encode
from rolecall.roles.base import Member
from rolecall.roles.data import Data, Mix, ReasoningGym, Records
from rolecall.roles.data.ahead import Ahead
from tiny import tiny_tokenizer

LIMIT = 29  # tokens of "question 9" in the template
WAIT = 30.0  # seconds a test waits for the thread, on a busy machine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of one token a byte."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make(model: str):
    """Set up Data roles, and close them at the end."""
    made = []

    def build(source, *, rank: int = 0, world: int = 1, run_seed: int = 0, **settings) -> Data:
        role = Data(source, **{"model": model, "held_out": 0, **settings})
        made.append(role)
        role.setup(Member(role="data", rank=rank, world=world, seed=run_seed))
        return role

    yield build
    for role in made:
        role.close()


def records(count: int) -> list[dict]:
    return [{"prompt": f"question {number}", "answer": str(number)} for number in range(count)]


def read(role: Data, *counts: int) -> list[tuple[int, str]]:
    """Keys and texts of the next batches."""
    found = []
    for count in counts:
        prompts = role.prompts(count)
        check(prompts)
        found += zip(prompts.keys.tolist(), prompts.texts, strict=True)
    return found


def test_a_prompt_carries_its_template_columns_and_identity(make, model: str):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    source = [{"prompt": "one plus one?", "answer": "2", "metadata": {"terms": (1, 1)}}, {"prompt": "and then?", "level": 3}]
    role = make(source, shuffle=False, suffix=" Be brief.", system="You add.")
    prompts = role.prompts(2)
    check(prompts)
    expected = "<|im_start|>system\nYou add.<|im_end|>\n<|im_start|>user\none plus one? Be brief.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompts.tokens[: prompts.cu_seqlens[1]]) == expected
    assert prompts.texts == ("one plus one?", "and then?")
    assert prompts.columns == {"answer": ("2", None), "level": (None, 3), "metadata": ({"terms": [1, 1]}, None)}
    assert len(set(prompts.ids)) == 2
    from rolecall.roles.tokens import identity

    assert prompts.tokenizer == identity(tokenizer)


def test_a_prompt_may_be_messages_and_brings_its_own_system_message(make, model: str):
    from transformers import AutoTokenizer

    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]
    prompts = make([{"prompt": messages}], suffix=" = ?", system="Subtract.").prompts(1)
    assert prompts.texts == ("1 + 1",)
    expected = "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1 + 1 = ?<|im_end|>\n<|im_start|>assistant\n"
    assert AutoTokenizer.from_pretrained(model).decode(prompts.tokens) == expected


def test_every_epoch_gives_each_problem_once_in_another_order(make):
    role = make(records(7))
    first, second = read(role, 3, 4), read(role, 7)
    assert [key for key, _ in first + second] == list(range(14))
    assert sorted(text for _, text in first) == sorted(text for _, text in second) == [f"question {number}" for number in range(7)]
    assert [text for _, text in first] != [text for _, text in second]
    role.meter.drain()
    role.prompts(1)
    assert role.meter.drain()["epoch"] == (2.0, 1.0)


def test_the_order_depends_on_the_seed_alone(make):
    one, same, other = make(records(50), seed=1), make(records(50), run_seed=1), make(records(50), seed=2)
    texts = [[text for _, text in read(role, *counts)] for role, counts in ((one, (50,)), (same, (8, 42)), (other, (50,)))]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert sorted(texts[0]) == sorted(texts[2])


def test_unshuffled_is_the_order_of_the_source(make):
    assert [text for _, text in read(make(records(3), shuffle=False), 4)] == ["question 0", "question 1", "question 2", "question 0"]


@pytest.mark.parametrize("world", [2, 3])
def test_members_share_the_stream_without_overlap(make, world: int):
    whole = dict(read(make(records(10)), 24))
    shares = [read(make(records(10), rank=rank, world=world), 24 // world) for rank in range(world)]
    for rank, share in enumerate(shares):
        assert [key for key, _ in share] == list(range(rank, 24, world))
    assert dict(pair for share in shares for pair in share) == whole


@settings(deadline=None, max_examples=25)
@given(
    before=st.lists(st.integers(1, 9), max_size=5),
    after=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    world=st.integers(1, 3),
    ahead=st.integers(0, 3),
    data=st.data(),
)
def test_a_restored_stream_goes_on_exactly(model: str, before: list[int], after: list[int], world: int, ahead: int, data: st.DataObject):
    member = Member(role="data", rank=data.draw(st.integers(0, world - 1)), world=world)
    roles = []
    try:
        for _ in range(2):
            # two digits make a prompt too long: the stream has gaps
            roles.append(Data(records(15), model=model, held_out=1, ahead=ahead, max_prompt_tokens=LIMIT, too_long="drop"))
            roles[-1].setup(member)
        read(roles[0], *before)
        state = json.loads(json.dumps(roles[0].state()))
        assert all(isinstance(value, int) for value in state.values())
        read(roles[1], *after[:1])  # elsewhere in the stream
        roles[1].restore(state)
        assert read(roles[0], *after) == read(roles[1], *after)
        assert roles[0].state() == roles[1].state()
    finally:
        for role in roles:
            role.close()


def test_restarted_with_other_numbers_of_members_every_prompt_is_given_once(make):
    """Members give unequal numbers of prompts before each of 20 restarts; every member's last prompts may not have been reached."""
    choose = random.Random(3)
    whole = dict(read(make(records(13)), 700))
    found: dict[int, str] = {}
    states: list[dict[str, int]] = []
    for _ in range(20):
        world = choose.randint(1, 4)
        members = [make(records(13), rank=rank, world=world) for rank in range(world)]
        for member in members:
            if states:
                member.restore(json.loads(json.dumps(states)))
            for count in (choose.randint(1, 6) for _ in range(choose.randint(0, 3))):
                part = dict(read(member, count))
                assert not part.keys() & found.keys(), "a prompt was given twice"
                found |= part
        states = [member.state() for member in members]
        assert all(len(state) <= 40 for state in states)  # what lies behind is forgotten
        for member in members:
            member.close()
    last = make(records(13))
    last.restore(states)
    while len(found) < len(range(max(found) + 1)):  # up to where the furthest member was
        found |= dict(read(last, 1))
    assert dict(sorted(found.items())) == {key: whole[key] for key in range(max(found) + 1)}


def test_prompts_of_a_mix_keep_their_shares_and_what_is_held_out_comes_from_all(make):
    sums = [{"prompt": f"sum {number}", "answer": "1"} for number in range(60)]
    texts = [{"question": f"text {number}", "level": number} for number in range(20)]
    role = make(Mix({"sums": sums, "texts": Records(texts, {"prompt": "question"})}, weights={"sums": 1, "texts": 3}), held_out=16)
    prompts = role.prompts(80)
    assert sum(text.startswith("text") for text in prompts.texts) in range(58, 63)
    assert set(prompts.columns) == {"answer", "level"}
    held = role.held_out(16).texts
    assert {text.split()[0] for text in held} == {"sum", "text"}
    assert not set(held) & set(role.prompts(200).texts)
    ending = make(Mix({"sums": sums[:9]}, epochs={"sums": 1}))
    assert len(ending.prompts(5).texts) + len(ending.prompts(5).texts) == 9
    with pytest.raises(DataError, match=r"The data has ended.*9 positions"):
        ending.prompts(1)


def test_what_became_of_the_prompts_is_reported(make):
    role = make([{"prompt": "x" * 5}, {"prompt": "x" * 500}, {"prompt": "y" * 5}], max_prompt_tokens=60, too_long="drop", ahead=0)
    role.prompts(4)
    said = role.report()
    assert said["used"] == 4
    assert said["dropped: too long (first: record 1)"] in (1, 2)


def test_a_state_of_other_data_is_refused_and_changes_nothing(make):
    role = make(records(9))
    expected = read(make(records(9)), 4)
    for other, message in (
        (make(records(8)), "data differs"),
        (make(records(9), seed=5), "seed=5"),
        (make(records(9), world=2), "states of all earlier ones are needed"),
    ):
        with pytest.raises(DataError, match=message):
            role.restore(other.state())
    with pytest.raises(DataError, match="next"):
        role.restore({**role.state(), "next": -1})
    assert read(role, 4) == expected


def texts_of(role: Data, count: int, held: int) -> tuple[set[str], list[str]]:
    return {text for _, text in read(role, count)}, list(role.held_out(held).texts)


def test_training_and_held_out_problems_differ_by_text_on_chain_sum(make):
    task = ReasoningGym("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}, size=600)
    role = make(task, held_out=256)
    training, held = texts_of(role, 600 - 256, 256)
    assert len(training) == 344  # a whole epoch without a repetition
    assert len(set(held)) == 256
    assert not training & set(held)
    again, same = texts_of(make(task, held_out=256, seed=9), 344, 256)
    assert same == held  # runs with other seeds are measured on the same problems
    assert again == training
    prompts = role.held_out(2, start=3)
    assert list(prompts.texts) == held[3:5]
    assert set(prompts.columns) == {"answer", "data_source", "metadata"}
    assert prompts.columns["metadata"][0]["source_dataset"] == "chain_sum"


def test_repeats_keep_the_proportions_of_the_generator_and_still_never_show_what_is_held_out(make):
    role = make(ReasoningGym("chain_sum", {"max_terms": 2, "max_digits": 1}, size=500), held_out=50, repeats=True)
    prompts = role.prompts(300)
    assert len(set(prompts.texts)) <= 150  # of 200 there are
    assert len(set(prompts.ids)) == 300  # samples are seeded by id: repetitions must differ
    assert not set(prompts.texts) & set(role.held_out(50).texts)


def test_too_few_distinct_problems_are_refused_with_their_number(make):
    with pytest.raises(DataError, match=r"chain_sum with .* has only 200 distinct problems.*Asked: 2000 distinct.*set size=200"):
        make(ReasoningGym("chain_sum", {"max_terms": 2, "max_digits": 1}), held_out=10)
    with pytest.raises(DataError, match=r"has only 3 distinct problems \(6 records\).*held_out=3"):
        make(records(3) * 2, held_out=3)


def test_texts_that_differ_in_blanks_alone_are_one_problem(make):
    role = make([{"prompt": "1 + 1", "answer": "first"}, {"prompt": " 1  +\n1 ", "answer": "second"}, {"prompt": "2 + 2"}])
    assert sorted(role.prompts(2).texts) == ["1 + 1", "2 + 2"]
    assert "first" in role.prompts(2).columns["answer"]


def test_asking_for_more_than_is_held_out(make):
    role = make(records(9), held_out=4)
    for count, start in ((5, 0), (1, 4), (0, 0), (1, -1)):
        with pytest.raises(DataError, match=r"not held out.*There is: 4 held out"):
            role.held_out(count, start)


def test_prompts_are_prepared_ahead_and_no_further(make):
    role = make(records(1000), ahead=3)
    role.prompts(5)
    assert role._queue.wait_idle(WAIT)
    assert role._queue.made == 5 + 3 * 5
    role.prompts(5)
    assert role._queue.wait_idle(WAIT)
    assert role._queue.made == 5 + 5 + 3 * 5
    none = make(records(1000), ahead=0)
    none.prompts(5)
    assert none._queue.wait_idle(WAIT)
    assert none._queue.made == 5


def test_what_goes_wrong_in_the_thread_is_told_by_the_next_call_with_its_cause():
    def items():
        yield from ((index, index) for index in range(4))
        raise KeyError("the fifth")

    ahead = Ahead(items(), patience=1)
    try:
        assert ahead.take(3, keep=9, deadline=WAIT) == [(0, 0), (1, 1), (2, 2)]
        for _ in range(2):
            with pytest.raises(DataError, match="KeyError: 'the fifth'") as caught:
                ahead.take(2, keep=9, deadline=WAIT)
            assert isinstance(caught.value.__cause__, KeyError)
    finally:
        ahead.close()


def test_waiting_has_a_deadline():
    gate = threading.Event()
    ahead = Ahead(((index, gate.wait(WAIT)) for index in itertools.count()), patience=1)
    try:
        with pytest.raises(DataError, match=r"Preparing 2 prompts took longer than 0\.1 s\. There is: 0 of them"):
            ahead.take(2, keep=0, deadline=0.1)
        gate.set()
        assert len(ahead.take(2, keep=0, deadline=WAIT)) == 2  # nothing was lost
    finally:
        ahead.close()


def test_close_ends_the_thread(make):
    role = make(records(5), ahead=4)
    role.prompts(2)
    thread = role._queue._thread
    role.close()
    assert not thread.is_alive()
    with pytest.raises(DataError, match="not set up, or was closed"):
        role.prompts(1)


def test_prompts_that_are_too_long_are_dropped_and_counted(make):
    role = make([{"prompt": "x" * 5}, {"prompt": "x" * 500}, {"prompt": "y" * 5}], max_prompt_tokens=60, too_long="drop")
    prompts = role.prompts(4)
    assert sorted(set(prompts.texts)) == ["xxxxx", "yyyyy"]
    assert np.diff(prompts.cu_seqlens).max() <= 60
    assert role._queue.wait_idle(WAIT)
    role.prompts(4)
    assert role.meter.drain()["dropped"][0] >= 2  # at least one in each of the first two epochs


def test_prompts_that_are_too_long_are_refused_at_the_start(make):
    with pytest.raises(
        DataError, match=r"1 of 2 prompts are too long; the longest has \d+ tokens \(record 1\).*at most 60 tokens.*too_long=\"drop\""
    ):
        make([{"prompt": "short"}, {"prompt": "x" * 500}], max_prompt_tokens=60)
    role = make([{"prompt": "x" * 500}, {"prompt": "y" * 500}], max_prompt_tokens=60, too_long="drop")
    with pytest.raises(DataError, match="were all too long"):
        role.prompts(1)


def test_a_file_of_json_lines(make, tmp_path: Path):
    file = tmp_path / "problems.jsonl"
    file.write_text('{"prompt": "a?", "answer": 1}\n\n{"prompt": "b?", "answer": 2}\n')
    prompts = make(file, shuffle=False).prompts(2)
    assert prompts.texts == ("a?", "b?")
    assert prompts.columns == {"answer": (1, 2)}


def test_what_cannot_travel_in_a_message_goes_in_words() -> None:
    """gsm_symbolic keeps fractions in its metadata, in some of its problems."""
    source = ReasoningGym("gsm_symbolic", size=300, completion="answer_cot")
    for _, record in source.records(repeats=True):
        columns = {name: (record[name],) for name in ("answer", "metadata")}
        encode(
            Prompts(
                keys=np.zeros(1, np.int64),
                ids=("a",),
                tokens=np.zeros(1, np.int32),
                cu_seqlens=np.array([0, 1], np.int64),
                texts=(record["prompt"],),
                columns=columns,
            )
        )

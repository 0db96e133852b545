"""Data: everything that can't be used is refused with its place and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from rolecall.protocols import DataError, ModelError
from rolecall.roles.base import Member
from rolecall.roles.data import Data, Files, ReasoningGym, Records
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def refused(source, model: str, message: str, error: type[Exception] = DataError, **settings) -> None:
    """Setting up must fail with this message."""
    role = Data(source, **{"model": model, "held_out": 0, **settings})
    with pytest.raises(error, match=message):
        role.setup(Member(role="data"))
    role.close()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "The dataset is empty.*at least one prompt"),
        ("\n \n", "The dataset is empty"),
        ('{"prompt": "a"}\n{"prompt": \n', r"bad\.jsonl:2: this is no JSON"),
        ('{"prompt": "a"}\n\n["b"]\n', r"bad\.jsonl:3: a record must be an object with columns, not list"),
        ('{"prompt": "a"}\n{"question": "b", "answer": 1}\n', r"bad\.jsonl:2: the column 'prompt' is missing.*question, answer"),
        ('{"prompt": 7}\n', r"bad\.jsonl:1: the column 'prompt' is neither a text nor a list of messages.*int '7'"),
        ('{"prompt": [{"role": "user"}]}\n', r"bad\.jsonl:1, message 1: it has no content"),
        ('{"prompt": []}\n', r"bad\.jsonl:1: the column 'prompt' is neither a text nor a list of messages.*list '\[\]'"),
        ('{"prompt": [{"role": "assistant", "content": "hi"}]}\n', r"bad\.jsonl:1: the prompt does not end"),
        ('{"prompt": "  "}\n', r"bad\.jsonl:1: the prompt is empty"),
        (b'{"prompt": "\xff"}\n', r"bad\.jsonl:1: this is no JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, model: str, lines: str | bytes, message: str):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    refused(str(file), model, message)


def test_a_missing_file(tmp_path: Path, model: str):
    refused(tmp_path / "none.jsonl", model, r"none\.jsonl can't be read: no such file")
    refused(tmp_path, model, "names no file of records")


def test_bad_records(model: str):
    refused([], model, "The dataset is empty")
    refused([{"prompt": "a"}, {"prompt": "b", "x": object()}], model, r"record 1: a column holds what is no plain data.*object")
    refused(7, model, "Data can't be read from this.*int '7'")
    refused(Records([{"question": "b"}], {"prompt": "text"}), model, "record 0: The dataset has no column 'text'.*question")


def test_bad_tasks(model: str):
    refused(ReasoningGym("chain_sums"), model, "has no task 'chain_sums'.*write 'chain_sum'")
    refused(ReasoningGym("chain_sum", {"max_term": 2}), model, "no setting 'max_term'.*write 'max_terms'")
    refused(ReasoningGym("chain_sum", {"min_terms": 9}), model, "refuses its settings: max_terms must be >= min_terms")
    refused(ReasoningGym("chain_sum", size=0), model, "at least one problem")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": -1}, "held_out can't be negative"),
        ({"ahead": -1}, "ahead can't be negative"),
        ({"max_prompt_tokens": -1}, "max_prompt_tokens can't be negative"),
        ({"too_long": "cut"}, "'cut'.*'refuse' and 'drop'"),
        ({"unusable": "skip"}, "prompts that can't be used.*'skip'.*'refuse' and 'drop'"),
        ({"deadline": 0.0}, "positive number of seconds"),
    ],
)
def test_settings_that_make_no_sense_are_refused_without_reading_anything(settings: dict, message: str):
    with pytest.raises(DataError, match=message):
        Data([{"prompt": "a"}], **{"model": "/nowhere", **settings}).check()


def test_a_model_without_a_chat_template_or_tokenizer(tmp_path: Path):
    refused([{"prompt": "a"}], tiny_tokenizer(tmp_path / "base", template=None), "no chat template", ModelError)
    refused([{"prompt": "a"}], str(tmp_path / "nowhere"), "missing", ModelError)


def test_messages_that_the_template_refuses(tmp_path: Path):
    strict = tiny_tokenizer(tmp_path / "strict", template="{{ raise_exception('only one turn') }}")
    role = Data([{"prompt": "a"}], model=strict, held_out=0)
    role.setup(Member(role="data"))
    with pytest.raises(DataError, match=r"record 0: the chat template refuses .*TemplateError: only one turn.*messages of user"):
        role.prompts(1)
    role.close()


def test_at_least_one_prompt_is_asked_for(model: str):
    role = Data([{"prompt": "a"}], model=model, held_out=0)
    role.setup(Member(role="data"))
    with pytest.raises(DataError, match="At least one prompt"):
        role.prompts(0)
    role.close()


MESSY = (
    '{"prompt": "good 1"}',
    "{broken",
    '{"prompt": "  "}',
    '{"prompt": 7}',
    '{"answer": "no prompt"}',
    '{"prompt": "good 2"}',
    '{"prompt": "bad, bad"}',
    '{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
    '{"prompt": "good 1"}',
)
PICKY = "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('bad word') }}{% endif %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("rank", [0, 1])
def test_what_can_not_be_used_is_counted_with_its_reason_and_place(tmp_path: Path, rank: int):
    """Every member lists all records; what became of them at that is told by the first alone."""
    file = tmp_path / "messy.jsonl"
    file.write_text("\n".join(MESSY))
    strict = tiny_tokenizer(tmp_path / "strict", template=PICKY)
    role = Data(Files(str(file), on_error="skip"), model=strict, held_out=0, unusable="drop", ahead=0)
    role.setup(Member(role="data", rank=rank, world=2))
    assert set(role.prompts(6).texts) == {"good 1", "good 2"}
    report = role.report()
    role.close()
    assert report["used"] == 6
    listing = {
        f"dropped: malformed (first: {file}:2)": 1,
        f"dropped: an empty prompt (first: {file}:3)": 1,
        f"dropped: a column of a wrong type (first: {file}:4)": 1,
        f"dropped: no prompt (first: {file}:5)": 1,
        f"dropped: a prompt that ends with the assistant (first: {file}:8)": 1,
        "noted: left out: a text that came before": 1,
    }
    assert {word: count for word, count in report.items() if word in listing} == (listing if rank == 0 else {})
    refused_by_template = report[f"dropped: refused by the chat template (first: {file}:7)"]
    assert refused_by_template >= 1
    assert report["read"] >= report["used"] + refused_by_template + (5 if rank == 0 else 0)


def test_held_out_prompts_that_the_template_refuses_are_noted(tmp_path: Path):
    strict = tiny_tokenizer(tmp_path / "strict", template=PICKY)
    records = [{"prompt": f"{'bad' if number % 2 else 'good'} {number}"} for number in range(40)]
    role = Data(records, model=strict, held_out=20, unusable="drop", max_prompt_tokens=100)
    role.setup(Member(role="data"))
    noted = next(count for word, count in role.report().items() if word.startswith("noted: held out and not used: refused by the chat"))
    assert 0 < noted < 20
    assert all(text.startswith("good") for text in role.held_out(20 - noted).texts)
    with pytest.raises(DataError, match=f"There is: {20 - noted} held out"):
        role.held_out(20)
    role.close()
    refused(records, strict, r"the chat template refuses .*bad word", held_out=20)

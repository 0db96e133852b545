"""Worked problems of task generators: what is trained, and metadata that can travel."""

from __future__ import annotations

import msgspec
import pytest
from rolecall.protocols import decode, encode
from rolecall.protocols.errors import DataError
from rolecall.roles.base import Member
from rolecall.roles.data import Documents, ReasoningGym


def test_worked_answers_are_completions() -> None:
    source = ReasoningGym("gsm_symbolic", size=300, completion="answer_cot")
    records = [record for _, record in source.records(repeats=False)]
    assert len({record["prompt"] for record in records}) == 300
    assert all(record["completion"] == record["metadata"]["answer_cot"] for record in records)
    msgspec.msgpack.encode(records)  # fractions among the metadata are texts
    plain = next(iter(ReasoningGym("spell_backward", size=3, completion="answer").records(repeats=False)))[1]
    assert plain["completion"] == plain["answer"]
    assert "completion" not in next(iter(ReasoningGym("gsm_symbolic", size=3).records(repeats=False)))[1]


def test_a_task_without_such_a_text_says_what_there_is() -> None:
    with pytest.raises(DataError, match=r"no text 'answer_cott'.*There is: answer, answer_cot.*write 'answer_cot'"):
        next(iter(ReasoningGym("gsm_symbolic", size=3, completion="answer_cott").records(repeats=False)))


def test_held_out_questions_travel(tiny: str) -> None:
    feed = Documents(ReasoningGym("gsm_symbolic", size=1000, completion="answer_cot"), model=tiny, held_out=4)
    feed.setup(Member())
    asked = feed.questions(200)
    again = decode(encode(asked))
    assert again.columns["answer"] == asked.columns["answer"]
    assert set(asked.columns) == {"answer", "metadata", "data_source"}

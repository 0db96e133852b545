"""Layouts recognised by their columns, records read into one form, and what is said of those that can't be."""

from __future__ import annotations

import contextlib
import json

import pytest
from chats import tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.protocols import DataError
from rolecall.roles.data.encode import Encoder
from rolecall.roles.data.records import Completion, Conversation, Preference, Question, Text, recognise

ENCODER = Encoder(tokenizer("qwen3"))
ASK, YES, NO = {"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
SUM = {"name": "add", "description": None, "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
TOOL = {"type": "function", "function": SUM}


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (("messages",), "conversation"),
        (("prompt", "prompt_id", "messages"), "conversation"),
        (("conversations", "source"), "conversation"),
        (("messages", "tools"), "conversation"),
        (("prompt", "completion"), "completion"),
        (("instruction", "input", "output"), "completion"),
        (("query", "response"), "completion"),
        (("text", "url"), "text"),
        (("chosen", "rejected"), "preference"),
        (("prompt", "chosen", "rejected", "messages", "score_chosen"), "preference"),
        (("prompt", "answer"), "question"),
        (("question", "answer"), "question"),
        (("data_source", "prompt", "ability", "reward_model", "extra_info"), "question"),
    ],
)
def test_layouts_are_recognised_by_their_columns(columns, kind):
    assert recognise(columns).kind == kind


def test_a_mapping_names_other_columns_and_tells_what_is_meant():
    layout = recognise(["question", "answer", "text"], {"prompt": "question", "completion": "answer"})
    assert layout.read({"question": "1+1", "answer": "2", "text": "-"}, "f:1") == Completion(prompt="1+1", completion="2", place="f:1")
    assert recognise(["messages", "body"], {"text": "body"}).kind == "text"


def test_the_caller_may_want_some_kinds_alone():
    assert recognise(["prompt", "completion"], want=("question",)).kind == "question"
    layout = recognise(["messages", "answer"], want=("question",))
    assert layout.read({"messages": [ASK], "answer": "4"}) == Question(prompt=(ASK,), columns={"answer": "4"})
    with pytest.raises(DataError, match="end it with a message of the user"):
        layout.read({"messages": [ASK, YES], "answer": "4"})
    with pytest.raises(DataError, match=r"Asked: chosen \+ rejected\. There is: text"):
        recognise(["text"], want=("preference",))


def test_missing_columns_are_shown_with_the_nearest():
    with pytest.raises(DataError, match=r"There is: mesages, id\. Do: map 'messages' to 'mesages'"):
        recognise(["mesages", "id"])
    with pytest.raises(DataError, match=r"no column 'qestion' \(mapped as 'prompt'\)\. There is: question, answer\. Do: use 'question'"):
        recognise(["question", "answer"], {"prompt": "qestion"})
    with pytest.raises(DataError, match=r"no column called 'promt' to map to.*use 'prompt'"):
        recognise(["question"], {"promt": "question"})
    with pytest.raises(DataError, match="no column at all"):
        recognise([])
    layout = recognise(["prompt", "completion"])
    with pytest.raises(DataError, match=r"f:3: the column 'completion' is missing\. There is: prompt, completions\. Do: use 'completions'"):
        layout.read({"prompt": "a", "completions": "b"}, "f:3")
    with pytest.raises(DataError, match=r"f:4: the column 'completion' is empty \(null\)"):
        layout.read({"prompt": "a", "completion": None}, "f:4")


@pytest.mark.parametrize(
    ("columns", "record", "words"),
    [
        (("text",), {"text": 7}, "'text' holds no text. There is: int '7'"),
        (("prompt", "completion"), {"prompt": 1.5, "completion": "x"}, "'prompt' is neither a text nor a list of messages"),
        (("prompt", "completion"), {"prompt": "  ", "completion": "x"}, "the prompt is empty"),
        (("messages",), {"messages": []}, "the conversation in 'messages' is empty"),
        (("messages",), {"messages": [{"role": "system", "content": "Be."}]}, "holds only a system message"),
        (("messages",), {"messages": "hello"}, "is a text that is no JSON"),
        (("messages",), {"messages": {"role": "user"}}, "holds no list of messages"),
        (("messages",), {"messages": ["hello"]}, "holds no list of messages"),
        (("messages",), {"messages": [{"content": "x"}]}, "message 1: it has no role. There is: content"),
        (("messages",), {"messages": [ASK, {"role": "assistant"}]}, "message 2: it has no content"),
        (("messages",), {"messages": [{"role": "user", "content": 5}]}, "its content is no text"),
        (
            ("messages",),
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "parts that are no text. There is: image",
        ),
        (("messages",), {"messages": [ASK, {"role": "assistant", "tool_calls": [{"arguments": {}}]}]}, "names no function"),
        (("messages", "tools"), {"messages": [ASK, YES], "tools": [{"parameters": {}}]}, "a tool has no name"),
        (("messages", "tools"), {"messages": [ASK, YES], "tools": "{"}, "'tools' is a text that is no JSON"),
        (("chosen", "rejected"), {"chosen": [ASK, YES], "rejected": [ASK, YES]}, "are the same"),
        (
            ("chosen", "rejected"),
            {"chosen": [ASK, YES], "rejected": [{"role": "user", "content": "other"}, NO]},
            "don't begin with the same message",
        ),
        (("prompt", "chosen", "rejected"), {"prompt": "q", "chosen": "", "rejected": "b"}, "the chosen answer is empty"),
    ],
)
def test_bad_records_are_told_with_their_place(columns, record, words):
    with pytest.raises(DataError) as caught:
        recognise(columns).read(record, "data.jsonl:9")
    assert str(caught.value).startswith("data.jsonl:9")
    assert words in str(caught.value)


def test_sharegpt_conversations_become_messages():
    record = {
        "system": "Be.",
        "conversations": [
            {"from": "human", "value": "weather?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "7"},
            {"from": "gpt", "value": "seven"},
        ],
    }
    read = recognise(record).read(record, "s:1")
    assert isinstance(read, Conversation)
    assert [message["role"] for message in read.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert read.messages[2]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    assert read.messages[2]["content"] == ""


def test_tool_calls_and_tools_come_as_objects_or_as_json():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
    ]
    plain = recognise(["messages", "tools"]).read({"messages": messages, "tools": [TOOL["function"]]})
    texts = recognise(["messages", "tools"]).read({"messages": json.dumps(messages), "tools": json.dumps([TOOL])})
    assert plain == texts
    assert plain.tools == (TOOL,)
    assert plain.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**call, "function": {"name": "add", "arguments": {"a": 1}}}],
    }


def test_what_a_table_fills_in_with_null_is_left_out():
    """Arrow gives every object the fields of all of them."""
    call = {"type": "function", "id": None, "function": {"name": "add", "arguments": {"a": None, "city": None}}}
    messages = [{"role": "user", "content": "q", "tool_calls": None}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tool = {
        "type": "function",
        "function": {"name": "add", "strict": None, "parameters": {"properties": {"a": {"type": "number", "enum": None}}}},
    }
    read = recognise(["messages", "tools"]).read({"messages": messages, "tools": [tool]})
    assert read.messages[0] == {"role": "user", "content": "q"}
    assert read.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": None}  # it is an argument of that function
    parameters = {"properties": {"a": {"type": "number"}}}
    assert read.tools == ({"type": "function", "function": {"name": "add", "description": None, "parameters": parameters}},)


def test_content_in_parts_is_joined_as_vllm_does():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    read = recognise(["messages"]).read({"messages": [{"role": "user", "content": parts}, YES]})
    assert read.messages[0]["content"] == "one\ntwo"


def test_an_instruction_with_input_and_a_system_prompt():
    record = {"instruction": "Add.", "input": "1 1", "output": "2", "system": "Be."}
    read = recognise(record).read(record)
    assert read == Completion(
        prompt=({"role": "system", "content": "Be."}, {"role": "user", "content": "Add.\n\n1 1"}),
        completion=({"role": "assistant", "content": "2"},),
    )


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
        {"prompt": "q", "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"chosen": [ASK, YES], "rejected": [ASK, NO]},
        {"prompt": [ASK], "chosen": YES, "rejected": NO},
        {"prompt": [ASK], "chosen": "yes", "rejected": "no"},
    ],
)
def test_preferences_with_and_without_a_prompt(record):
    read = recognise(record).read(record)
    assert isinstance(read, Preference)
    said = [words if isinstance(words, str) else words[-1]["content"] for words in (read.prompt, read.chosen, read.rejected)]
    assert said == ["q", "yes", "no"]
    assert all(isinstance(words, str) or len(words) == 1 for words in (read.prompt, read.chosen, read.rejected))


def test_a_preference_over_several_turns_shares_what_came_before():
    later = {"role": "user", "content": "sure?"}
    record = {"chosen": [ASK, YES, later, YES], "rejected": [ASK, YES, later, NO]}
    read = recognise(record).read(record)
    assert (len(read.prompt), read.chosen, read.rejected) == (3, (YES,), (NO,))


def test_plain_texts_without_a_prompt_are_compared_whole():
    assert recognise(["chosen", "rejected"]).read({"chosen": "a b", "rejected": "a c"}) == Preference(
        prompt="", chosen="a b", rejected="a c"
    )


def test_texts_and_identities():
    assert recognise(["text", "id"]).read({"text": "x", "id": 7}) == Text(text="x", id="7")


def test_columns_of_a_question_are_what_rewards_read():
    record = {"data_source": "gsm", "prompt": [ASK], "reward_model": {"ground_truth": "4"}, "extra_info": {"index": 1}}
    read = recognise(record).read(record)
    assert read == Question(prompt=(ASK,), columns={name: record[name] for name in ("data_source", "reward_model", "extra_info")})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_is_known_under_the_name_that_the_template_has(name: str):
    read = recognise(["messages"]).read({"messages": [ASK, {"role": "assistant", "content": "yes", name: "hm"}]})
    assert read.messages[1] == {**YES, "reasoning_content": "hm", "reasoning": "hm", "thinking": "hm"}


KEYS = ["role", "from", "content", "value", "text", "type", "tool_calls", "function", "name", "arguments", "weight", "thinking"]
WORDS = ["user", "assistant", "system", "function_call", '{"a": 1}', "[]", '[{"role": "user"}]', "{"]
simple = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=6) | st.sampled_from(WORDS)
plain = st.recursive(
    simple, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4), max_leaves=12
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"]), "content": st.text(max_size=6) | plain},
    optional={"tool_calls": plain, "thinking": plain, "weight": plain},
)
NAMES = ["messages", "prompt", "completion", "text", "chosen", "rejected", "tools", "system", "options", "id", "input", "instruction"]


@settings(deadline=None, max_examples=150)
@given(record=st.dictionaries(st.sampled_from(NAMES), plain | st.lists(message, min_size=1, max_size=4) | st.text(), min_size=1))
def test_whatever_stands_in_a_record_it_is_read_or_refused(record):
    """No other error than ours, whatever the types; and what is read can be encoded or is refused."""
    with contextlib.suppress(DataError):
        ENCODER.encode(recognise(record).read(record, "fuzz:1"))

"""Loss masks, proven by decoding what is trained: the assistant's words and the token that ends its turn, no header, nobody else's."""

from __future__ import annotations

import numpy as np
import pytest
from chats import ENDS, NAMES, TEMPLATES, said, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.protocols import DataError, ModelError
from rolecall.roles.data.encode import Encoder
from rolecall.roles.data.records import Completion, Conversation, Preference, Question, Text
from rolecall.roles.data.report import Report
from rolecall.roles.data.turns import MARK

TOOLS = (
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {"type": "object", "properties": {}}}},
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TALK = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second answer."},
)
ERRAND = (
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny and 20"},
    {"role": "assistant", "content": "It is sunny."},
)
THOUGHT = (
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First answer.", "reasoning_content": "early thought", "thinking": "early thought"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second answer.", "reasoning_content": "late thought", "thinking": "late thought"},
)

PLAIN = {name: ["First answer." + ENDS[name], "Second answer." + ENDS[name]] for name in NAMES}
PLAIN |= {
    "harmony": ["<|channel|>final<|message|>First answer.<|end|>", "<|channel|>final<|message|>Second answer.<|return|>"],
    "mistral": [" First answer.</s>", " Second answer.</s>"],
    "qwen3": ["First answer.<|im_end|>", "<think>\n\n</think>\n\nSecond answer.<|im_end|>"],
    "thinking": ["First answer.<|im_end|>", "</think>\n\nSecond answer.<|im_end|>"],  # the header ends within the token of two line breaks
}
BYTES = PLAIN | {"thinking": ["First answer.<|im_end|>", "\n</think>\n\nSecond answer.<|im_end|>"]}  # a token a byte: no token is cut
CALLED = {
    "qwen3": [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nIt is sunny.<|im_end|>",
    ],
    "tools": ['<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>', "It is sunny.<|im_end|>"],
    "harmony": [
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
        "<|channel|>final<|message|>It is sunny.<|return|>",
    ],
    "deepseek": ["<｜tool▁call▁begin｜>weather<｜tool▁call▁end｜><｜end▁of▁sentence｜>", "It is sunny.<｜end▁of▁sentence｜>"],
}
THINKING = {
    "qwen3": ["First answer.<|im_end|>", "<think>\nlate thought\n</think>\n\nSecond answer.<|im_end|>"],
    "thinking": ["First answer.<|im_end|>", "late thought\n</think>\n\nSecond answer.<|im_end|>"],
    "harmony": [
        "<|channel|>final<|message|>First answer.<|end|>",
        "<|channel|>analysis<|message|>late thought<|end|><|start|>assistant<|channel|>final<|message|>Second answer.<|return|>",
    ],
}


def encoded(name: str, messages, *, merges: bool = True, tools=None, **settings):
    """What is trained of a conversation, decoded, after its ids were compared with transformers'."""
    words = tokenizer(name, merges=merges)
    options = settings.pop("options", {})
    record = Conversation(messages=tuple(messages), tools=tools, options=options, place="talk.jsonl:1")
    found = Encoder(words, **settings).encode(record)
    expected = words.apply_chat_template(list(messages), tools=tools and list(tools), tokenize=True, return_dict=False, **options)
    assert found.tokens.tolist() == expected
    assert found.tokens.dtype == np.int32
    return said(found.tokens, found.trained, words)


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_is_what_the_assistant_says_and_the_end_of_its_turn(name: str, merges: bool):
    assert encoded(name, TALK, merges=merges) == (PLAIN if merges else BYTES)[name]


@pytest.mark.parametrize("name", CALLED)
def test_tool_calls_are_trained_and_the_answers_of_tools_are_not(name: str):
    assert encoded(name, ERRAND, tools=TOOLS) == CALLED[name]


@pytest.mark.parametrize("name", THINKING)
def test_templates_that_rewrite_earlier_turns(name: str):
    assert encoded(name, THOUGHT) == THINKING[name]
    within = [dict(message) for message in THOUGHT]
    for message in within:
        thought = message.pop("reasoning_content", None)
        message.pop("thinking", None)
        if thought and name == "qwen3":
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
    if name == "qwen3":
        assert encoded(name, within) == THINKING[name]


def test_options_of_the_template_belong_to_the_prompt():
    assert encoded("qwen3", TALK, options={"enable_thinking": False}) == ["First answer.<|im_end|>", "Second answer.<|im_end|>"]
    assert encoded("harmony", TALK, options={"reasoning_effort": "high"}) == PLAIN["harmony"]


def test_options_for_all_records_and_a_date_that_stays():
    """A template that writes the date would give other tokens tomorrow: a run could not go on exactly."""
    dated = "{{ strftime_now('%d %b %Y') }}" + tokenizer("qwen3").chat_template
    words = _with_template(dated)
    encoder = Encoder(words, options={"today": "2024-02-29", "enable_thinking": False})
    assert words.decode(encoder.encode(Conversation(messages=TALK)).tokens).startswith("29 Feb 2024<|im_start|>system")
    own = Conversation(messages=TALK[:3], options={"today": "2025-01-01"})
    assert words.decode(encoder.encode(own).tokens).startswith("01 Jan 2025")
    found = encoder.encode(Conversation(messages=TALK[:3]))
    assert said(found.tokens, found.trained, words) == ["First answer.<|im_end|>"]  # no thinking was asked for
    with pytest.raises(DataError, match=r"The option today is no date\. Asked: 'today'"):
        Encoder(words, options={"today": "today"}).encode(Conversation(messages=TALK))


@pytest.mark.parametrize("name", NAMES)
def test_the_last_turn_alone_or_everything(name: str):
    assert encoded(name, TALK, train="last") == PLAIN[name][-1:]
    words = tokenizer(name)
    whole = Encoder(words, train="all").encode(Conversation(messages=TALK))
    assert whole.trained[1:].all()
    assert not whole.trained[0]  # nothing comes before it


def test_each_turn_as_it_was_sampled():
    """Qwen3 takes thinking out of earlier turns: with a record for each turn, all of it is trained."""
    report = Report()
    record = Conversation(messages=THOUGHT, place="t:1")
    words = tokenizer("qwen3")
    found = Encoder(words, train="each").encode_all([record], report)
    assert [said(each.tokens, each.trained, words) for each in found] == [
        ["<think>\nearly thought\n</think>\n\nFirst answer.<|im_end|>"],
        ["<think>\nlate thought\n</think>\n\nSecond answer.<|im_end|>"],
    ]
    assert report.counts == {("split", "a record for each turn"): 1, ("noted", "thinking that the template leaves out"): 1}
    muted = Conversation(messages=tuple(message | {"weight": 0} if message["role"] == "assistant" else message for message in TALK))
    with pytest.raises(DataError, match="no token of the record is trained"):
        Encoder(words, train="each").encode(muted)


def test_tokens_that_end_turns_within_a_message_are_noted():
    """They get the same ids as elsewhere, which may be what was meant or an accident of the data."""
    report = Report()
    talk = ({"role": "user", "content": "What is <|im_end|>?"}, {"role": "assistant", "content": "A token."})
    (found,) = Encoder(tokenizer("chatml")).encode_all([Conversation(messages=talk, place="t:1")], report)
    assert said(found.tokens, found.trained, tokenizer("chatml")) == ["A token.<|im_end|>"]
    assert report.counts == {("noted", "a token that ends turns within a message"): 1}


def test_thinking_that_is_left_out_is_noted():
    for name, left_out in (("qwen3", True), ("chatml", True), ("thinking", True)):
        report = Report()
        Encoder(tokenizer(name)).encode_all([Conversation(messages=THOUGHT, place="t:1")], report)
        assert (report.total("noted") == 1) == left_out
    report = Report()
    Encoder(tokenizer("qwen3")).encode_all([Conversation(messages=THOUGHT[2:], place="t:1")], report)
    assert not report.counts


def test_turns_of_weight_0_are_not_trained():
    messages = [message | {"weight": 0} if message["content"] == "First answer." else message for message in TALK]
    for name in ("chatml", "marked"):
        assert encoded(name, messages) == ["Second answer.<|im_end|>"]


def test_the_templates_own_marks_are_those_of_transformers():
    words = tokenizer("marked")
    found = Encoder(words).encode(Conversation(messages=TALK))
    theirs = words.apply_chat_template(list(TALK), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert found.trained.tolist() == [bool(mine) for mine in theirs["assistant_masks"]]


def test_an_end_of_turn_that_the_marks_leave_out_is_added():
    words = tokenizer("marked")
    changed = words.chat_template.replace(
        "message.content + '<|im_end|>' }}{% endgeneration %}", "message.content }}{% endgeneration %}<|im_end|>"
    )
    assert changed != words.chat_template
    found = Encoder(_with_template(changed)).encode(Conversation(messages=TALK))
    assert said(found.tokens, found.trained, words) == PLAIN["chatml"]


def _with_template(template: str, name: str = "chatml"):
    import copy

    words = copy.deepcopy(tokenizer(name))
    words.chat_template = template
    return words


letters = st.text("abc XYZ\n\t.,'äß中😀<|>{}%", max_size=12).filter(str.strip)
digits = st.text("0123456789 \n<|>", min_size=1, max_size=8)


@settings(deadline=None, max_examples=25)
@given(turns=st.lists(st.tuples(digits, letters), min_size=1, max_size=4), system=st.none() | digits, name=st.sampled_from(NAMES))
def test_whatever_is_said_the_assistants_words_alone_are_trained(turns, system, name: str):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    spans = encoded(name, messages)
    assert len(spans) == len(turns)
    for span, (_, answer) in zip(spans, turns, strict=True):
        assert not any(letter.isdigit() for letter in span)
        assert answer.strip() in span
        assert span.endswith(("<|end|>", ENDS[name]) if name == "harmony" else ENDS[name])


def test_a_batch_is_the_records_one_by_one():
    encoder = Encoder(tokenizer("qwen3"))
    records = [Conversation(messages=messages, place=str(number)) for number, messages in enumerate((TALK, THOUGHT, ERRAND) * 3)]
    for one, many in zip((encoder.encode(record) for record in records), encoder.encode_all(records), strict=True):
        assert one.tokens.tolist() == many.tokens.tolist()
        assert one.trained.tolist() == many.trained.tolist()


# what can't be masked is told, never trained wrongly


def refusal(name: str, messages, **settings) -> str:
    with pytest.raises(DataError) as caught:
        encoded(name, messages, **settings)
    assert "talk.jsonl:1" in str(caught.value)
    return str(caught.value)


def test_a_template_that_raises_is_named_with_its_words():
    text = refusal("gemma", [TALK[1], TALK[3], TALK[4]])
    assert "Conversation roles must alternate" in text
    assert "messages of user, user, assistant" in text


def test_a_template_that_leaves_a_tool_call_out():
    assert "leaves the tool call of message 2 out" in refusal("chatml", ERRAND)


def test_a_template_that_leaves_the_answer_out():
    words = _with_template("{% for message in messages %}<|im_start|>{{ message.role }}\n{% endfor %}")
    with pytest.raises(DataError, match="leaves out or changes what the assistant says in message 3"):
        Encoder(words).encode(Conversation(messages=TALK))


def test_a_template_without_a_loop_over_messages():
    words = _with_template("{{ messages | map(attribute='content') | join('<|im_end|>') }}")
    with pytest.raises((DataError, ModelError)):
        Encoder(words).encode(Conversation(messages=TALK))


def test_a_tool_answer_written_within_the_assistants_turn():
    words = _with_template(
        "{% for message in messages if message.role != 'tool' %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "{% for call in message.tool_calls or [] %}{{ call.function.name }}: {{ messages[2].content }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match=r"writes message 3 \(tool\) into the assistant's turn"):
        Encoder(words).encode(Conversation(messages=ERRAND))


def test_a_turn_that_begins_otherwise_than_the_generation_prompt():
    words = _with_template(
        "{% for message in messages %}{{ '[BOT]' if message.role == 'assistant' else '[USER]' }}{{ message.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match=r"begins otherwise than the template's generation prompt.*\[BOT\]"):
        Encoder(words).encode(Conversation(messages=TALK))


def test_the_character_that_marks_turns_is_refused_in_a_record():
    assert "U+FDD0" in refusal("chatml", [TALK[1], {"role": "assistant", "content": f"a{MARK}b"}])


def test_no_trained_token_is_refused_or_counted():
    silent = [TALK[1], {"role": "assistant", "content": "Hidden.", "weight": 0}]
    assert "no token of the record is trained" in refusal("chatml", silent)
    report = Report()
    records = [
        Conversation(messages=tuple(messages), place=f"f:{number}") for number, messages in enumerate((TALK, silent, TALK[:2], TALK))
    ]
    assert len(Encoder(tokenizer("chatml")).encode_all(records, report)) == 2
    assert report.counts == {("dropped", "no trained token"): 2}
    assert report.first == {("dropped", "no trained token"): "f:1"}


def test_a_tokenizer_without_a_template():
    with pytest.raises(ModelError, match="has no chat template"):
        Encoder(tokenizer()).encode(Conversation(messages=TALK))


def test_templates_that_teach_no_end_are_known():
    from rolecall.roles.data.tokenizer import Tokenizer

    for name in NAMES:
        assert Tokenizer(tokenizer(name)).spans().ends, name
    assert not Tokenizer(_with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")).spans().ends


def test_the_template_files_are_all_tested():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(PLAIN)


# texts without a template

MARKS = [("<s>", 1), ("<|endoftext|>", 0)]


@pytest.mark.parametrize("wrapped", ["", "<s> $A", "<s> $A <|endoftext|>"])
def test_plain_texts_and_completions(wrapped: str):
    """What the tokenizer begins texts with is kept; the end of text is added once, and trained."""
    import copy

    from tokenizers import processors

    words = copy.deepcopy(tokenizer())
    if wrapped:
        words.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=wrapped, special_tokens=[("<s>", 1), ("<|endoftext|>", 0)]
        )
    begin, end = [1] if wrapped else [], [words.eos_token_id]
    ids = lambda text: [*words(text)["input_ids"], *([] if "endoftext" in wrapped else end)]  # noqa: E731
    encoder = Encoder(words, plain=True)
    text = encoder.encode(Text(text="It can't find the way."))
    inner = words("It can't find the way.", add_special_tokens=False)["input_ids"]
    assert text.tokens.tolist() == ids("It can't find the way.") == begin + inner + end
    assert text.trained.tolist() == [False] + [True] * (len(inner) + len(begin))
    for prompt, completion in (("The answer is", " 42."), ("def main():\n", "print(1)"), ("The ans", "wer is 42"), ("A: ", "yes")):
        found = encoder.encode(Completion(prompt=prompt, completion=completion))
        assert found.tokens.tolist() == ids(prompt + completion)
        assert words.decode(found.tokens[found.trained], skip_special_tokens=False).strip() in f"{completion}<|endoftext|>".strip()
        assert found.trained[-1]
    pair = encoder.encode(Preference(prompt="The answer is", chosen=" 42.", rejected=" 41."))
    assert words.decode(pair.chosen.tokens[: pair.shared], skip_special_tokens=True) == "The answer is"


def test_an_instruction_is_templated_unless_it_is_plain():
    words = tokenizer("chatml")
    record = Completion(prompt="Who?", completion="Me.")
    found = Encoder(words, system="Be.").encode(record)
    assert said(found.tokens, found.trained, words) == ["Me.<|im_end|>"]
    assert words.decode(found.tokens).startswith("<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n")
    talk = Completion(prompt=TALK[:4], completion=(TALK[4],))  # what the prompt holds of the assistant is not trained
    found = Encoder(words).encode(talk)
    assert said(found.tokens, found.trained, words) == ["Second answer.<|im_end|>"]


def test_a_question_ends_where_the_assistant_begins():
    words = tokenizer("qwen3")
    record = Question(prompt=TALK[:2], tools=TOOLS, options={"enable_thinking": False})
    found = Encoder(words, suffix=" Briefly.").encode(record)
    expected = [TALK[0], {"role": "user", "content": "One? Briefly."}]
    ids = words.apply_chat_template(expected, tools=list(TOOLS), add_generation_prompt=True, enable_thinking=False, return_dict=False)
    assert found.tokens.tolist() == ids
    assert not found.trained.any()


@pytest.mark.parametrize("name", NAMES)
def test_both_sides_of_a_preference_share_what_comes_before_them(name: str):
    words = tokenizer(name)
    answers = [({"role": "assistant", "content": text},) for text in ("Good answer.", "Good, but worse, answer.")]
    pair = Encoder(words).encode(Preference(prompt=TALK[:4], chosen=answers[0], rejected=answers[1]))
    assert np.array_equal(pair.chosen.tokens[: pair.shared], pair.rejected.tokens[: pair.shared])
    assert pair.chosen.trained.argmax() == pair.rejected.trained.argmax() == pair.shared
    assert len(said(pair.chosen.tokens, pair.chosen.trained, words)) == 1
    for side, text in ((pair.chosen, "Good answer."), (pair.rejected, "Good, but worse, answer.")):
        assert text in said(side.tokens, side.trained, words)[0]

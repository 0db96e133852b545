"""`rolecall data show`: what it prints, in colour and without, and what becomes of records that can't be used."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
from chats import tokenizer
from rolecall.protocols import DataError
from rolecall.roles.data.show import show, visible

ASK = {"role": "user", "content": "Question?"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer("chatml").save_pretrained(str(folder))
    return str(folder)


def shown(path: Path, records: list[dict], model: str, *, terminal: bool = False, **settings) -> tuple[int, str]:
    from rich.console import Console

    path.write_text("\n".join(json.dumps(record) for record in records))
    out = io.StringIO()
    console = Console(
        file=out, markup=False, highlight=False, width=200, force_terminal=terminal, color_system="standard" if terminal else None
    )
    return show(str(path), model, console=console, **settings), out.getvalue()


def test_trained_tokens_are_marked_and_the_rest_is_counted(tmp_path: Path, model: str):
    records = [
        {"messages": [ASK, {"role": "assistant", "content": "[bold]Answer[/bold]"}]},
        {"messages": [{"role": "system", "content": "Be."}]},
        {"messages": [ASK]},
        {"messages": [ASK, {"role": "assistant", "content": "Another."}]},
    ]
    code, text = shown(tmp_path / "talk.jsonl", records, model, count=1)
    assert code == 0
    assert "<|im_start|>user\nQuestion?<|im_end|>\n<|im_start|>assistant\n⟦[bold]Answer[/bold]<|im_end|>⟧\n" in text
    assert "talk.jsonl:1 · conversation" in text
    assert "Another." not in text
    counts = text[text.index("counts") :]
    for line in ("4  read", "2  used", "1  dropped: only a system message (first: ", "1  dropped: no trained token (first: "):
        assert line in counts


def test_on_a_terminal_they_are_green(tmp_path: Path, model: str):
    _, text = shown(tmp_path / "talk.jsonl", [{"messages": [ASK, {"role": "assistant", "content": "Answer"}]}], model, terminal=True)
    assert "\x1b[1;32mAnswer<|im_end|>\x1b[0m" in text
    assert "⟦" not in text


def test_a_preference_shows_its_prompt_once(tmp_path: Path, model: str):
    _, text = shown(tmp_path / "pairs.jsonl", [{"prompt": "Question?", "chosen": "good", "rejected": "bad"}], model)
    assert text.count("Question?") == 1
    assert "⟦good<|im_end|>⟧" in text
    assert "⟦bad<|im_end|>⟧" in text


def test_columns_are_mapped(tmp_path: Path, model: str):
    records = [{"question": "1+1", "solution": "2"}]
    _, text = shown(tmp_path / "q.jsonl", records, model, columns={"completion": "solution"})
    assert "⟦2<|im_end|>⟧" in text
    with pytest.raises(DataError, match=r"no column 'solutoin'.*use 'solution'"):
        shown(tmp_path / "q.jsonl", records, model, columns={"completion": "solutoin"})


def test_no_usable_record_is_exit_code_1(tmp_path: Path, model: str):
    assert shown(tmp_path / "t.jsonl", [{"messages": [ASK]}], model)[0] == 1


def test_a_record_can_not_steer_the_terminal():
    assert visible("a\x1b[31m\x07b\x9bc\u202ed\n\te") == "a␛[31m␇b�c�d\n\te"


def test_the_command(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]):
    from rolecall.actors.cli import app

    (tmp_path / "t.jsonl").write_text(json.dumps({"question": "1+1", "answer": "2"}))
    arguments = ["data", "show", str(tmp_path / "t.jsonl"), "--model", model, "--columns.completion", "answer"]
    with pytest.raises(SystemExit) as end:
        app(arguments)
    assert end.value.code == 0
    assert "⟦2<|im_end|>⟧" in capsys.readouterr().out


def test_options_of_the_command_reach_the_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from rolecall.actors.cli import app

    words = copy.deepcopy(tokenizer("chatml"))
    template = "{% if loud %}LOUD{{ level + 1 }}{{ word }}{% endif %}"
    words.chat_template = template + words.chat_template
    words.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "1+1", "completion": "2"}))
    arguments = ["data", "show", str(tmp_path / "t.jsonl"), "--model", str(tmp_path / "model")]
    for more, said in (([], False), (["--options.loud", "true", "--options.level", "1", "--options.word", "x y"], True)):
        with pytest.raises(SystemExit) as end:
            app([*arguments, *more])
        assert end.value.code == 0
        assert ("LOUD2x y" in capsys.readouterr().out) == said

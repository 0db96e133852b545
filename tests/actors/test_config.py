"""The configuration: layers, strictness with places and suggestions, help, and dump as the inverse of parse."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rolecall.actors.config import dump, parse, resolve
from rolecall.actors.config.toml import key_lines
from rolecall.placement.pools import Pool
from rolecall.protocols.errors import ConfigError


class Optimiser(msgspec.Struct, frozen=True):
    """Of the policy."""

    learning_rate: float = 1e-5  # peak, after the warm-up
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float | None = None


class Part(msgspec.Struct, frozen=True):
    name: str
    weight: float = 1.0
    tags: tuple[str, ...] = ()


class Args(msgspec.Struct, frozen=True, kw_only=True):
    """A controller's arguments."""

    model: str
    steps: Annotated[int, msgspec.Meta(ge=1, description="optimiser steps")] = 10
    debug: bool = False
    mode: Literal["fast", "slow"] = "fast"
    stop: tuple[str, ...] = ()
    sizes: list[int] = []
    limit: int | None = None
    note: str | None = None
    extra: dict[str, float] = {}
    policy: Optimiser = Optimiser(learning_rate=2e-5)
    parts: tuple[Part, ...] = (Part("accuracy"), Part("format", weight=0.2))
    pools: list[Pool] = msgspec.field(default_factory=lambda: [Pool("train", members=2), Pool("sample")])


class Contradiction(msgspec.Struct, frozen=True):
    low: int = 0
    high: int = 1

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")


class Checked(msgspec.Struct, frozen=True):
    span: Contradiction = Contradiction()


def mistakes(*argv: str, kind: type[msgspec.Struct] = Args) -> list[str]:
    argv = argv if kind is not Args else ("--model", "m", *argv)
    with pytest.raises(ConfigError) as caught:
        resolve(kind, argv)
    return list(caught.value.fields["mistakes"])


def write(tmp_path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


def test_defaults_then_file_then_arguments(tmp_path):
    file = write(tmp_path, 'model = "a"\nsteps = 20\nstop = ["x"]\n[policy]\nlearning_rate = 1\n')
    args = resolve(Args, ["--steps", "30", "--config", file, "--policy.betas", "[0.8, 0.9]"])
    assert args == Args(model="a", steps=30, stop=("x",), policy=Optimiser(learning_rate=1.0, betas=(0.8, 0.9)))


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--steps=7"], "steps", 7),
        (["--debug"], "debug", True),
        (["--debug", "--no-debug"], "debug", False),
        (["--debug", "true"], "debug", True),
        (["--stop", '["a", "b"]'], "stop", ("a", "b")),
        (["--sizes", "[1, 2]"], "sizes", [1, 2]),
        (["--limit", "3"], "limit", 3),
        (["--limit", "3", "--limit", "none"], "limit", None),
        (["--extra.a", "1.5", "--extra.b=2"], "extra", {"a": 1.5, "b": 2.0}),
        (["--extra", '{"a": 1}'], "extra", {"a": 1.0}),
        (["--extra", "{a = 1}"], "extra", {"a": 1.0}),
        (["--policy.learning-rate", "1e-6"], "policy", Optimiser(learning_rate=1e-6)),
        (["--policy.learning_rate", "-1"], "policy", Optimiser(learning_rate=-1.0)),
        (["--parts.format.weight", "0"], "parts", (Part("accuracy"), Part("format", weight=0.0))),
        (["--parts.0.tags", '["x"]'], "parts", (Part("accuracy", tags=("x",)), Part("format", weight=0.2))),
        (["--model", "123"], "model", "123"),
        (["--mode", "slow"], "mode", "slow"),
    ],
)
def test_arguments(argv, field, value):
    assert getattr(resolve(Args, ["--model", "m", *argv]), field) == value


def test_pools_by_name(tmp_path):
    args = resolve(Args, ["--model", "m", "--pools.train.members", "4", "--pools.sample.resources.slot", "2"])
    assert args.pools == [Pool("train", members=4), Pool("sample", resources={"slot": 2.0})]
    patched = resolve(Args, ["--model", "m", "--config", write(tmp_path, "[pools.sample]\ncpus = 3\n")])
    assert patched.pools == [Pool("train", members=2), Pool("sample", cpus=3.0)]
    replaced = resolve(Args, ["--model", "m", "--config", write(tmp_path, '[[pools]]\nname = "one"\n'), "--pools.one.gpus", "1"])
    assert replaced.pools == [Pool("one", gpus=1.0)]


def test_every_mistake_in_a_file_has_its_line(tmp_path):
    text = """\
# a comment
stepz = 3
stop = ["a",
        "b", 3]
learning_rate = 1
[policy]
learning_rat = 1
betas = [1]
[[pools]]
name = "a"
membres = 3
[[pools]]
name = "b"
strategy = "PACKED"
"""
    file = write(tmp_path, text)
    said = mistakes("--config", file)
    expected = [
        (2, "unknown key 'stepz'; did you mean 'steps'?"),
        (5, "unknown key 'learning_rate'; did you mean 'policy.learning_rate'?"),
        (3, "stop.2 = 3: expected text"),
        (7, "unknown key 'learning_rat' in policy; did you mean 'learning_rate'?"),
        (8, "policy.betas = [1]: expected a list of 2: a number, a number"),
        (11, "unknown key 'membres' in pools.0; did you mean 'members'?"),
        (14, "pools.1.strategy = 'PACKED': expected one of"),
    ]
    assert len(said) == len(expected)
    for line, text in expected:
        assert any(each.startswith(f"{file}:{line}: {text}") for each in said), (line, text, said)
    assert said[-1].endswith("did you mean 'PACK'?")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--stepz", "3"], "--stepz 3: unknown key; did you mean --steps?"),
        (["--learning-rate", "3"], "--learning-rate 3: unknown key; did you mean --policy.learning-rate?"),
        (["--steps", "x"], "--steps x: expected a whole number"),
        (["--steps", "1.5"], "--steps 1.5: expected a whole number"),
        (["--steps", "0"], "--steps 0: expected a whole number >= 1 (optimiser steps)"),
        (["--steps"], "--steps: needs a value, a whole number"),
        (["--debug", "maybe"], "--debug maybe: expected true or false"),
        (["--no-steps"], "--no-steps: unknown key; did you mean --steps?"),
        (["--mode", "fats"], "--mode fats: expected one of 'fast', 'slow'; did you mean 'fast'?"),
        (["--stop", "a"], "--stop a: expected a list of texts"),
        (["--limit", "x"], '--limit x: expected a whole number, or "none"'),
        (["--extra.a", "x"], "--extra.a x: expected a number"),
        (["--steps.a", "1"], "--steps.a 1: steps is a whole number and has no 'a'"),
        (["--policy", "3"], "--policy 3: policy is a table of its own, not 3"),
        (["--pools.trian.members", "1"], "--pools.trian.members 1: pools has no 'trian'; did you mean 'train'?"),
        (["--pools.train.membres", "1"], "--pools.train.membres 1: unknown key; did you mean --pools.train.members?"),
        (["steps"], "unexpected argument 'steps'; keys are written --key value"),
        (["--config"], "--config: needs the name of a TOML file"),
    ],
)
def test_wrong_arguments(argv, text):
    assert mistakes(*argv) == [text]


def test_other_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="model is missing: text"):
        resolve(Args, [])
    file = write(tmp_path, "steps = \n")
    assert mistakes("--config", file)[0].startswith(f"{file}: not valid TOML")
    near = mistakes("--config", str(tmp_path / "runn.toml"))[0]
    assert "No such file" in near
    assert near.endswith(f"did you mean {file}?")
    (said,) = mistakes("--config", write(tmp_path, "[pools.tarin]\nmembers = 1\n"))
    assert said == f"{file}:1: pools has no 'tarin'; did you mean 'train'?; a new one is written [[pools]]"
    (said,) = mistakes("--config", write(tmp_path, 'debug = "yes"\n'))
    assert said == f"{file}:1: debug = 'yes': expected true or false"
    (said,) = mistakes("--span.low", "5", kind=Checked)
    assert said == "low=5 is above high=1"


def test_places_follow_the_last_word(tmp_path):
    """A value that an argument replaced is blamed on the argument, not on the file."""
    file = write(tmp_path, "steps = 3\n")
    assert mistakes("--config", file, "--steps", "x") == ["--steps x: expected a whole number"]


def test_key_lines_of_awkward_toml():
    text = """\
a = '''
[b]
c = 1
'''
"quoted key" = 1
[x . "y"] # comment
z = {k = 1, l = [
 1] }
[[t]]
[[t.u]]
v = 1
[[t.u]]
[[t]]
w = 2
"""
    assert key_lines(text) == {
        ("a",): 1,
        ("quoted key",): 5,
        ("x",): 6,
        ("x", "y"): 6,
        ("x", "y", "z"): 7,
        ("x", "y", "z", "k"): 7,
        ("x", "y", "z", "l"): 7,
        ("x", "y", "z", "l", 0): 7,
        ("t",): 9,
        ("t", 0): 9,
        ("t", 0, "u"): 10,
        ("t", 0, "u", 0): 10,
        ("t", 0, "u", 0, "v"): 11,
        ("t", 0, "u", 1): 12,
        ("t", 1): 13,
        ("t", 1, "w"): 14,
    }


def test_help_shows_every_field(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Args, ["--help"], name="demo")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for line in (
        "usage: demo [--config FILE.toml] [--key value ...]",
        "A controller's arguments.",
        "--model   text (required)",
        "--steps   a whole number (default 10)",
        "optimiser steps",
        "--policy.learning-rate   a number (default 2e-05)",
        "peak, after the warm-up",
        '--limit   a whole number, or "none" (default none)',
        "--pools.<name>.members   a whole number (default 1)",
        "number of processes, one bundle each.",
        "<name> of pools: train, sample",
    ):
        assert line in text


SCRIPT = """
import msgspec
from rolecall.actors.config import parse
class Args(msgspec.Struct, frozen=True):
    steps: int = 1
parse(Args)
"""


def test_a_mistake_ends_the_process_without_a_traceback(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    run = subprocess.run([sys.executable, script, "--stps", "2"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stdout == ""
    assert (
        run.stderr
        == "mine: a mistake in the configuration:\n  --stps 2: unknown key; did you mean --steps?\nmine: --help lists every key\n"
    )


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NOTE = st.none() | TEXT.filter(lambda text: text != "none")
FLOAT = st.floats(allow_nan=False)
POOL = st.builds(Pool, TEXT, members=st.integers(1, 9), cpus=FLOAT, resources=st.dictionaries(TEXT, FLOAT, max_size=2))
ARGS = st.builds(
    Args,
    model=TEXT,
    steps=st.integers(1, 2**62),
    debug=st.booleans(),
    mode=st.sampled_from(["fast", "slow"]),
    stop=st.lists(TEXT, max_size=3).map(tuple),
    sizes=st.lists(st.integers(-(2**62), 2**62), max_size=3),
    limit=st.none() | st.integers(-9, 9),
    note=NOTE,
    extra=st.dictionaries(TEXT, FLOAT, max_size=3),
    policy=st.builds(Optimiser, FLOAT, st.tuples(FLOAT, FLOAT), st.none() | FLOAT),
    parts=st.lists(st.builds(Part, TEXT, FLOAT, st.lists(TEXT, max_size=2).map(tuple)), max_size=2).map(tuple),
    pools=st.lists(POOL, max_size=2),
)


@settings(deadline=None, max_examples=150)
@given(ARGS)
def test_dump_is_read_back_equal(tmp_path_factory, args):
    file = tmp_path_factory.getbasetemp() / "dumped.toml"
    text = dump(args)
    file.write_text(text)
    assert resolve(Args, ["--config", str(file)]) == args
    assert all(0 < line <= text.count("\n") for line in key_lines(text).values())

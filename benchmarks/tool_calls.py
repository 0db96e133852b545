"""Conversations with tool calls, made from the questions and answers in the package bfcl-eval (Apache-2.0).

    pip install --no-deps bfcl-eval
    python benchmarks/tool_calls.py calls.jsonl

Each line has `messages` (the functions that there are, what the user wants, the calls) and `answer` (the calls, as the assistant writes
them). Where several values of an argument are right, the first one stands; where that is none, the argument is left out. A question
that comes again, with other functions, is left out too, so that held-out questions are not among the others.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SETS = ("simple_python", "multiple", "parallel", "live_simple", "live_multiple")
SYSTEM = "Answer with calls of these functions, one a line, as JSON.\n"
LONGEST = 6000  # characters of what is said before the calls: some questions bring a hundred functions


def conversations(folder: Path) -> Iterator[dict[str, Any]]:
    """All questions that have one turn and known answers."""
    seen: set[str] = set()
    for name in SETS:
        answers = {line["id"]: line["ground_truth"] for line in _lines(folder / "possible_answer" / f"BFCL_v4_{name}.json")}
        for line in _lines(folder / f"BFCL_v4_{name}.json"):
            asked = line["question"][0]
            said = SYSTEM + "\n".join(_signature(function) for function in line["function"])
            said = "\n".join([said, *(message["content"] for message in asked if message["role"] == "system")])
            user = [message for message in asked if message["role"] == "user"]
            if line["id"] not in answers or len(line["question"]) > 1 or len(user) != 1 or len(said) > LONGEST:
                continue
            if user[0]["content"] in seen:
                continue
            seen.add(user[0]["content"])
            calls = "\n".join(json.dumps({name: _arguments(given) for name, given in call.items()}) for call in answers[line["id"]])
            yield {
                "id": line["id"],
                "messages": [{"role": "system", "content": said}, user[0], {"role": "assistant", "content": calls}],
                "answer": calls,
            }


def _signature(function: dict[str, Any]) -> str:
    """A function as one line: name(argument: type, …): what it does."""
    needed = function["parameters"].get("required", [])
    given = function["parameters"].get("properties", {})
    words = [f"{name}{'' if name in needed else '?'}: {about.get('type', 'any')}" for name, about in given.items()]
    about = (function.get("description") or "").partition("\n")[0]
    return f"{function['name']}({', '.join(words)}): {about}"


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The first right value of each argument, of nested ones too."""
    found = {}
    for name, values in given.items():
        value = values[0] if isinstance(values, list) and values else values
        if value == "" and len(values) > 1:
            continue
        found[name] = _arguments(value) if isinstance(value, dict) else value
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            yield json.loads(line)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file of JSON lines to write")
    parser.add_argument("--folder", type=Path, help="the package's data folder; found without it where the package is installed")
    given = parser.parse_args()
    folder = given.folder
    if folder is None:
        spec = importlib.util.find_spec("bfcl_eval")
        if spec is None or not spec.submodule_search_locations:
            parser.error("the package bfcl-eval is missing: pip install --no-deps bfcl-eval")
        folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    records = list(conversations(folder))
    given.out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"{len(records)} conversations in {given.out}")


if __name__ == "__main__":
    main()

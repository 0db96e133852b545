"""What the documentation names is there: files, links, make targets, modules, classes, functions."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from rolecall.placement.command import FITS, plan

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "actors|benchmarks|docs|examples|kernels|placement|protocols|roles|scripts|tests"
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAME = re.compile(r"\brolecall(?:\.[A-Za-z_]\w*)+")
MAKE = re.compile(r"\bmake ([a-z][a-z-]*[a-z])(?![\w-])")
FILE = re.compile(rf"\b(?:{FOLDERS})/[\w./-]*\w\.(?:py|toml|md|json|jsonl|sh)\b")
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
MACHINE = re.compile(r"(?<![\w.])/(?:work|home|root|tmp)/\w")
BLOCKS = [(page, block) for page in PAGES for block in PYTHON.findall(page.read_text(encoding="utf-8"))]


def anchors(page: Path) -> set[str]:
    """What headings are linked by."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def dead_links(page: Path, text: str) -> list[str]:
    found = []
    for target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(target)
    return found


def module_of(parts: list[str]) -> tuple[Path, list[str]] | None:
    """File of the longest front of a dotted name, and the rest of it."""
    for size in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:size])
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file, parts[size:]
        if base.is_dir():
            return base, parts[size:]
    return None


def defined(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Names that statements define or import."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update({(each.asname or each.name): node for each in node.names})
        elif isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = node
        elif isinstance(node, ast.Assign):
            found.update({ast.unparse(target): node for target in node.targets})
        elif isinstance(node, ast.If):  # TYPE_CHECKING
            found.update(defined(node.body))
    return found


def exists(name: str) -> bool:
    """Whether `rolecall.a.b.c` is a module, or something defined in one."""
    place = module_of(name.split(".")[1:])
    if place is None:
        return False
    file, rest = place
    if not rest:
        return True
    if file.is_dir():
        return False
    names = defined(ast.parse(file.read_text(encoding="utf-8")).body)
    if rest[0] not in names:
        return False
    node = names[rest[0]]
    return len(rest) == 1 or (rest[1] in defined(node.body) if isinstance(node, ast.ClassDef) else True)


def unknown_imports(code: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rolecall"):
            found += [f"{node.module}.{each.name}" for each in node.names if not exists(f"{node.module}.{each.name}")]
    return found


def unknown_targets(text: str) -> list[str]:
    """Targets of make, in code, that the Makefile doesn't have."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    there = {line.split(":")[0] for line in lines if re.match(r"[a-z%-]+:", line)}
    asked = {target for code in CODE.findall(text) for target in MAKE.findall(code)}
    scripts = {f"bench-{file.stem}" for file in (ROOT / "benchmarks").glob("*.py")} if "bench-%" in there else set()
    return sorted(target for target in asked - there - scripts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert not dead_links(page, text)
    assert not [name for name in NAME.findall(text) if not exists(name)]
    assert not [file for file in FILE.findall(text) if not (ROOT / file).exists()]
    assert not unknown_targets(text)
    assert not MACHINE.findall(text), "a path of somebody's machine"


@pytest.mark.parametrize(("page", "code"), BLOCKS, ids=[f"{page.stem}-{number}" for number, (page, _) in enumerate(BLOCKS)])
def test_python_in_a_page_parses_and_imports_what_is_there(page, code):
    assert not unknown_imports(code), page.name


@pytest.mark.parametrize(
    ("page", "file"),
    [("README.md", "examples/grpo.py"), ("README.md", "examples/custom_reward.py"), ("docs/rewards.md", "examples/custom_reward.py")],
)
def test_a_file_that_is_shown_in_full_is_the_file(page, file):
    shown = PYTHON.findall((ROOT / page).read_text(encoding="utf-8"))
    assert (ROOT / file).read_text(encoding="utf-8") in shown, f"copy {file} into {page}"


def test_the_page_of_messages_is_what_the_classes_say():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    committed = (ROOT / "docs" / "messages.md").read_text(encoding="utf-8")
    assert committed == generate.page(), "run: python docs/generate.py messages"


def test_the_plan_in_the_page_of_placement_is_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert plan(ROOT / "examples" / "grpo-unlike.toml", ROOT / "examples" / "cluster-unlike.toml") == FITS
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert printed in (ROOT / "docs" / "placement.md").read_text(encoding="utf-8"), "run it with COLUMNS=100 and paste what it prints"


def test_the_rules_can_fail():
    page = ROOT / "docs" / "messages.md"
    assert dead_links(page, "[a](gone.md) [b](messages.md) [c](messages.md#nothing) [d](https://a.b/c)") == [
        "gone.md",
        "messages.md#nothing",
    ]
    assert exists("rolecall.actors.Run")
    assert exists("rolecall.actors.run.Run.spawn")
    assert exists("rolecall.kernels.losses")
    assert not exists("rolecall.actors.Trainer")
    assert not exists("rolecall.actors.run.Run.fit")
    assert not exists("rolecall.engines")
    assert unknown_imports("from rolecall.actors import Run, Trainer") == ["rolecall.actors.Trainer"]
    assert unknown_targets("we make do; `make test`, `make bench-codec`, `make sense`") == ["sense"]

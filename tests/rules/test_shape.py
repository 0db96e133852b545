"""What every file looks like: short, finished, annotated and documented."""

from __future__ import annotations

import ast
import re

import pytest

FILE_LINES = 400
FUNCTION_LINES = 60
CONTROLLER_LINES = 60
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError\(\)")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def public(tree: ast.Module):
    """Public classes and functions at the top of the module, and the public methods of public classes."""
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield node, node.name
            if isinstance(node, ast.ClassDef):
                methods = [each for each in node.body if isinstance(each, FUNCTIONS) and not each.name.startswith("_")]
                yield from ((each, f"{node.name}.{each.name}") for each in methods)


def is_override(node) -> bool:
    return any(ast.unparse(each).endswith(("override", "overload", ".setter")) for each in node.decorator_list)


def size_faults(source) -> list[str]:
    found = []
    lines = source.text.count("\n")
    if lines > FILE_LINES:
        found.append(f"{source.path}: {lines} lines, {FILE_LINES} at most")
    for node in ast.walk(source.tree):
        if isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
            found.append(
                f"{source.path}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines, {FUNCTION_LINES} at most"
            )
    for number, line in enumerate(source.text.splitlines(), 1):
        if UNFINISHED.search(line):
            found.append(f"{source.path}:{number}: unfinished: {line.strip()}")
    return found


def annotation_faults(source) -> list[str]:
    found = []
    for node, name in public(source.tree):
        if isinstance(node, FUNCTIONS):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            bare = [each.arg for each in arguments if each and each.annotation is None and each.arg not in ("self", "cls")]
            if bare or node.returns is None:
                found.append(f"{source.path}:{node.lineno}: {name} lacks annotations: {', '.join(bare) or 'return'}")
    return found


def document_faults(source) -> list[str]:
    found = [] if ast.get_docstring(source.tree) or not source.text.strip() else [f"{source.path}:1: no docstring"]
    if source.folder == "examples":  # short enough to have everything in the module's own
        return found
    for node, name in public(source.tree):
        if not ast.get_docstring(node) and not is_override(node):
            found.append(f"{source.path}:{node.lineno}: {name} has no docstring")
    return found


@pytest.mark.parametrize("rule", [size_faults, annotation_faults, document_faults])
def test_shape(sources, rule):
    assert not [fault for source in sources for fault in rule(source)]


def test_controllers_stay_short(sources):
    """Every example is a controller or a role that somebody reads in one go."""
    for source in sources:
        if source.folder == "examples":
            assert source.text.count("\n") <= CONTROLLER_LINES, source.path


def private_names(source) -> list[str]:
    """Names with an underscore in front that the file takes from elsewhere."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom):
            words = [*(node.module or "").split("."), *(each.name for each in node.names)]
        elif isinstance(node, ast.Attribute):
            words = [node.attr]
        else:
            continue
        found += [f"{source.path}:{node.lineno}: {word}" for word in words if word.startswith("_") and word != "__future__"]
    return [name for name in found if not name.endswith("__")]


def test_controllers_use_public_names_alone(sources):
    assert not [name for source in sources if source.folder == "examples" for name in private_names(source)]


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (size_faults, "x = 1\n" * (FILE_LINES + 1)),
        (size_faults, "def f():\n" + "    x = 1\n" * FUNCTION_LINES),
        (size_faults, "# TO" + "DO: later"),
        (annotation_faults, "def f(x) -> None: ..."),
        (annotation_faults, "class A:\n    def f(self): ..."),
        (private_names, "from rolecall.actors.run import _script"),
        (private_names, "def f(run):\n    return run._groups"),
        (document_faults, "x = 1"),
        (document_faults, '"""Doc."""\ndef f() -> None: ...'),
    ],
)
def test_the_rule_can_fail(source, rule, text):
    assert rule(source("roles/a.py", text))

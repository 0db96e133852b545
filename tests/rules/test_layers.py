"""Who may import what: the layers of the repository, and the libraries that only some of them know."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

OURS = {
    "protocols": {"protocols"},
    "kernels": {"kernels"},
    "placement": {"placement", "protocols"},
    "roles": {"roles", "protocols", "kernels"},
    "actors": {"actors", "protocols", "placement", "roles"},
    "examples": {"examples", "protocols", "kernels", "placement", "roles", "actors"},
}
LIBRARIES = {  # library → folders that may import it
    "ray": {"placement", "actors"},
    "transformers": {"roles"},
    "vllm": {"roles"},
    "datasets": {"roles"},
    "tokenizers": {"roles"},
    "triton": {"kernels"},
}
VERL_ADAPTER = "verl"  # how the file names of the adapters begin; nothing else imports verl, and they do so in functions


def imports(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """(module, line, whether it stands in a function) of every import, dynamic ones with a constant name too."""
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        within = id(node) in inner
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, within) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "rolecall":
                yield from ((f"rolecall.{alias.name}", node.lineno, within) for alias in node.names)
            else:
                yield "." * node.level + (node.module or ""), node.lineno, within
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called.endswith(("import_module", "__import__")):
                yield str(node.args[0].value), node.lineno, within


def faults(source) -> list[str]:
    found = []
    name = source.path.rsplit("/", 1)[-1]
    for module, line, within in imports(source.tree):
        top, _, rest = module.partition(".")
        said = f"{source.path}:{line}: "
        if module.startswith("."):
            found.append(f"{said}relative import {module!r}; write rolecall.{source.folder}...")
        elif top in OURS and top not in LIBRARIES:
            found.append(f"{said}imports {module!r} as a top-level package; write rolecall.{module}")
        elif top == "rolecall" and rest.split(".")[0] not in OURS[source.folder]:
            found.append(f"{said}{source.folder}/ must not import {module}")
        elif source.folder not in LIBRARIES.get(top, {source.folder}):
            found.append(f"{said}only {', '.join(sorted(LIBRARIES[top]))} may import {top}")
        elif top == "verl" and not (name.startswith(VERL_ADAPTER) and within):
            found.append(f"{said}verl is imported only inside functions of the adapters ({VERL_ADAPTER}*.py)")
    return found


def test_layers(sources):
    assert not [fault for source in sources for fault in faults(source)]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("protocols/a.py", "from rolecall.roles.base import Role"),
        ("roles/a.py", "import ray"),
        ("roles/a.py", "def f():\n    from ray.util import x"),
        ("kernels/a.py", "from rolecall.protocols import Samples"),
        ("actors/a.py", "from rolecall import kernels"),
        ("actors/a.py", "import importlib\nimportlib.import_module('transformers')"),
        ("roles/a.py", "import triton.language as tl"),
        ("roles/a/b.py", "from ..base import Role"),
        ("roles/a.py", "from protocols.messages import Samples"),
        ("kernels/a.py", "def f():\n    import verl"),
        ("kernels/verl_losses.py", "from verl.trainer import x"),
    ],
)
def test_the_rule_can_fail(source, path, text):
    assert faults(source(path, text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("actors/a.py", "import ray\nfrom rolecall.placement import place"),
        ("kernels/verl_losses.py", "def f():\n    import verl"),
        ("roles/a.py", "from rolecall.kernels.losses import nll\nimport transformers"),
    ],
)
def test_the_rule_can_pass(source, path, text):
    assert not faults(source(path, text))

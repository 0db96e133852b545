"""Folders that are there whole or not at all: written aside, flushed to disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rolecall.protocols.errors import UserError


@contextmanager
def new_folder(folder: str | Path, error: type[UserError] = UserError) -> Iterator[Path]:
    """Give an empty folder to write into; it becomes `folder` when the block ends well and vanishes when it does not.

    Raises:
        error: `folder` exists already; nothing is overwritten.
    """
    target = Path(folder).absolute()
    if target.exists():
        raise error(f"{target} exists already.", ask="a new folder", remedy="give another name, or move the old folder away")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in sorted(aside.rglob("*")):
            _flush(path)
        _flush(aside)
        os.rename(aside, target)  # fails if somebody else made the target meanwhile and put files into it
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    """Make sure that a file's bytes (or a folder's entries) are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

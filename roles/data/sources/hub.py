"""Datasets of the Hugging Face hub, and folders in its forms: their data files are read like any others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from rolecall.protocols.errors import DataError
from rolecall.roles.data.report import Report
from rolecall.roles.data.sources.base import Found, Table
from rolecall.roles.data.sources.files import Files
from rolecall.roles.data.sources.patience import Patience


class Hub(msgspec.Struct, frozen=True):
    """A dataset by its name on the hub, a folder laid out like one, or a folder that `datasets` saved.

    What belongs to a configuration and a split is asked of `datasets`; the files are streamed, not downloaded first. A token
    is taken from the environment (HF_TOKEN). No code of a dataset is run.
    """

    name: str  # "openai/gsm8k", or a folder
    config: str = ""  # of a dataset that has several
    split: str = "train"
    revision: str = ""  # branch, tag or commit
    columns: dict[str, str] = {}  # our name of a column → the dataset's; others are recognised
    on_error: Literal["refuse", "skip"] = "refuse"  # as in Files
    longest: int = 1 << 24  # as in Files
    patience: Patience = Patience()

    def records(self, *, repeats: bool) -> Iterator[Found]:
        """All records of the split, in order.

        Raises:
            DataError: the dataset, configuration or split isn't there, or a file can't be read.
        """
        return self._files().records(repeats=repeats)

    def table(self, report: Report) -> Table:
        """Find the files of the split and look into their footers.

        Raises:
            DataError: the dataset, configuration or split isn't there, or its files are of no known format.
        """
        return self._files().table(report)

    def _files(self) -> Files:
        folder = Path(self.name).expanduser()
        found = _saved(folder, self.split) if folder.is_dir() else []
        urls = found or self._listed()
        form = "arrow" if found else ""
        return Files(urls, format=form, on_error=self.on_error, longest=self.longest, patience=self.patience)

    def _listed(self) -> list[str]:
        """The files that `datasets` finds."""

        def ask() -> Any:
            from datasets import load_dataset_builder

            return load_dataset_builder(self.name, self.config or None, revision=self.revision or None).config.data_files

        try:
            splits = self.patience.call(ask, f"the dataset {self.name}")
        except DataError as error:
            cause = error.__cause__
            if isinstance(cause, ValueError) and "config" in str(cause).lower():
                said = str(cause).splitlines()
                raise DataError(f"The dataset {self.name} has no configuration {self.config!r}.", have=" ".join(said)) from cause
            raise
        if not splits or self.split not in splits:
            have = ", ".join(map(str, splits or ())) or "no data files"
            raise DataError(f"The dataset {self.name} has no split {self.split!r}.", have=have, remedy="name one of these: Hub(…, split=…)")
        return [str(url) for url in splits[self.split]]


class _State(msgspec.Struct):
    """What `Dataset.save_to_disk` writes beside its files."""

    files: list[dict[str, str]] = msgspec.field(name="_data_files", default_factory=list)


def _saved(folder: Path, split: str) -> list[str]:
    """The files of a folder that `save_to_disk` wrote; none where it did not.

    Raises:
        DataError: it has no such split, or its description is damaged.
    """
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split / "state.json").is_file():
            have = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json")))
            raise DataError(f"The dataset {folder} has no split {split!r}.", have=have, remedy="name one of these: Hub(…, split=…)")
        folder = folder / split
    if not (folder / "state.json").is_file():
        return []
    try:
        state = msgspec.json.decode((folder / "state.json").read_bytes(), type=_State)
        return [str(folder / each["filename"]) for each in state.files]
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError) as error:
        raise DataError(f"{folder / 'state.json'} is damaged: {error}.", remedy="save the dataset again") from error

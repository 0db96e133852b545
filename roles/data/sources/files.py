"""Files as a source: JSON lines, CSV, parquet, arrow; local or by URL; compressed or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec
from rolecall.protocols.errors import DataError
from rolecall.roles.data.report import Report
from rolecall.roles.data.sources.base import Found, Table
from rolecall.roles.data.sources.cells import CellTable
from rolecall.roles.data.sources.columnar import Rules, columnar
from rolecall.roles.data.sources.lines import LineTable
from rolecall.roles.data.sources.opening import COMPRESSIONS, FORMATS, File, find
from rolecall.roles.data.sources.patience import Patience

_LISTED = 16384  # rows at once where all records are listed


class Files(msgspec.Struct, frozen=True):
    """Records in files: a path, glob, folder or URL (file, s3, gs, http, hf, … by fsspec), or several.

    Files are read from front to back, in parts; they may be larger than memory. They are told apart by their endings:
    .jsonl .ndjson .json (one object a line), .csv .tsv (with a head; all cells are texts), .parquet .pq, .arrow .feather .ipc;
    JSON lines and CSV also with .gz .zst .bz2 .xz after it.
    """

    files: str | list[str]
    format: str = ""  # "jsonl", "csv", "tsv", "parquet", "arrow"; "" tells it by the ending
    compression: str = ""  # "gzip", "zstd", "bz2", "xz", "none"; "" tells it by the ending
    columns: dict[str, str] = {}  # our name of a column → the files': {"prompt": "question"}; others are recognised
    on_error: Literal["refuse", "skip"] = "refuse"  # a line or row that is no record: an error, or skipped and counted
    encoding: str = "utf-8"  # of JSON lines and CSV
    longest: int = 1 << 24  # bytes of the longest record; a longer one is an error like any other
    expansion: float = 200.0  # bytes that a compressed byte may become
    options: dict[str, Any] = {}  # of the file system: {"endpoint_url": …}; secrets are better in its environment variables
    patience: Patience = Patience()  # with remote files

    def records(self, *, repeats: bool) -> Iterator[Found]:
        """All records, in the order of the files.

        Raises:
            DataError: a file can't be read, or a line is no record and not to be skipped; it names file and line.
        """
        table = self.table(Report())
        for piece in range(table.pieces):
            for rows in table.read(piece, _LISTED, 1 << 26, 0):
                yield from (found for row in range(len(rows)) if (found := rows.decode(row)) is not None)

    def table(self, report: Report) -> Table:
        """List the files and look into their footers.

        Raises:
            DataError: there are none, or they are of several or unknown formats.
        """
        self._check()
        urls = (self.files,) if isinstance(self.files, str) else tuple(self.files)
        return tabled(
            find(urls, form=self.format, compression=self.compression, options=self.options, patience=self.patience), self, report
        )

    def _check(self) -> None:
        for word, value, known in (
            ("format", self.format, {*FORMATS.values()}),
            ("compression", self.compression, {*COMPRESSIONS.values(), "none"}),
        ):
            if value and value not in known:
                raise DataError(
                    f"There is no {word} {value!r}.", have=", ".join(sorted(known)), remedy="leave it out to tell it by the ending"
                )
        if not self.files:
            raise DataError("No file is named.", remedy="give a path, glob, folder or URL")


def tabled(files: list[File], settings: Files, report: Report) -> Table:
    """A table of files that have been found.

    Raises:
        DataError: they are of several formats, or can't be read.
    """
    formats = sorted({file.format for file in files})
    if len(formats) > 1:
        raise DataError(
            "The files of one source are of one format.", have=", ".join(formats), remedy="name some of them, or make a Mix of sources"
        )
    if formats[0] in ("parquet", "arrow"):
        packed = next((file for file in files if file.compression), None)
        if packed is not None:
            raise DataError(f"{packed.url} is compressed as a whole.", remedy=f"{formats[0]} files compress their columns: unpack it first")
        return columnar(files, Rules(report, settings.on_error, settings.longest))
    kind = LineTable if formats[0] == "jsonl" else CellTable
    return kind(
        files, report, on_error=settings.on_error, longest=settings.longest, expansion=settings.expansion, encoding=settings.encoding
    )

"""From what a user gives to a source, and from a source to a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rolecall.protocols.errors import DataError
from rolecall.roles.data.report import Report
from rolecall.roles.data.sources.base import Found, Source, Streamed, Table
from rolecall.roles.data.sources.files import Files
from rolecall.roles.data.sources.listed import Memory, Records

_LISTED = 16384  # rows at once where all records are listed


def source_of(given: Any) -> Source:
    """A source from what the user gave: a source, a path, glob or URL of files, or a list of records.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(given, str | Path):
        return Files(str(given))
    if isinstance(given, list | tuple):
        return Records(list(given))
    if isinstance(given, Source):
        return given
    raise DataError(
        "Data can't be read from this.",
        ask=f"{type(given).__name__} {str(given)[:60]!r}",
        remedy="give Files(...), Hub(...), ReasoningGym(...), a path or URL, a list of dictionaries, or an object with a method `records`",
    )


def table_of(given: Any, report: Report) -> Table:
    """A table of what the user gave: streamed where the source can be, else listed into memory.

    Raises:
        DataError: it can't be read.
    """
    source = source_of(given)
    return source.table(report) if isinstance(source, Streamed) else Memory(source.records(repeats=False))


def listed(given: Any, report: Report, *, repeats: bool) -> Iterator[Found]:
    """All records of what the user gave, in order; `report` counts those that are skipped.

    Args:
        given: as for `source_of`.
        report: where they are counted.
        repeats: list a record as often as the source holds it.

    Raises:
        DataError: it can't be read.
    """
    source = source_of(given)
    if not isinstance(source, Streamed):
        yield from source.records(repeats=repeats)
        return
    table = source.table(report)
    for piece in range(table.pieces):
        for rows in table.read(piece, _LISTED, 1 << 26, 0):
            yield from (found for row in range(len(rows)) if (found := rows.decode(row)) is not None)
    table.close()


def mapping_of(given: Any) -> dict[str, str]:
    """Which columns a source says to be which: our name → the source's; {} leaves them to be recognised."""
    return dict(getattr(source_of(given), "columns", {}))

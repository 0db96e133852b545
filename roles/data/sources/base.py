"""What a source is: settings that a controller can hold, and a table of pieces that a data member reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from rolecall.roles.data.report import Report

Found = tuple[str, dict[str, Any]]  # where a record was read, for errors ("file.jsonl:3"), and its columns


@runtime_checkable
class Source(Protocol):
    """What `Data` and `Mix` read: anything that lists records. A source that also has `table` is streamed, not listed."""

    def records(self, *, repeats: bool) -> Iterable[Found]:
        """Where each record is from (for errors: "file.jsonl:3") and the record, a dictionary of plain data.

        The same source must list the same records in the same order each time.

        Args:
            repeats: list a record as often as the source holds it; else once is enough.

        Raises:
            DataError: the source can't be read, or holds less than was asked of it.
        """
        ...


class Rows(Protocol):
    """Some neighbouring rows, read but not decoded yet. A row that holds no record is a gap."""

    def __len__(self) -> int: ...

    def decode(self, row: int) -> Found | None:
        """The record of a row, or None where there is none (a blank line, or one that was skipped and counted).

        Raises:
            DataError: the row can't be decoded, and is not to be skipped.
        """
        ...


class Table(Protocol):
    """A source as a member reads it: pieces (a file, a range of lines, a row group) that are read from front to back."""

    pieces: int
    window: int  # rows to shuffle as one; 0: as many as the mix says

    def identity(self) -> str:
        """Changes whenever other records would be read: names and sizes, or a digest of what lies in memory."""
        ...

    def rows(self, piece: int) -> int | None:
        """Rows of a piece, where they are known without reading it."""
        ...

    def chunk(self, piece: int, rows: int, size: int) -> int:
        """Rows of each chunk of a piece (but the last) whose rows are known: `rows`, or fewer where they are large."""
        ...

    def read(self, piece: int, rows: int, size: int, skip: int) -> Iterator[Rows]:
        """The piece in chunks of at most `rows` rows and about `size` bytes, but for the first `skip` chunks.

        Raises:
            DataError: the piece can't be read; it names the file.
        """
        ...

    def close(self) -> None:
        """Give open files back."""
        ...


@runtime_checkable
class Streamed(Protocol):
    """A source that can be read in pieces, and so may be larger than memory."""

    def table(self, report: Report) -> Table:
        """Look at what there is (list the files, read their footers). What is skipped later is counted in `report`.

        Raises:
            DataError: nothing is there, or it is of no known format.
        """
        ...

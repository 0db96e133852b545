"""Records that are the rows of a CSV file: every cell is a text."""

from __future__ import annotations

import contextlib
import csv
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

from rolecall.protocols.errors import DataError
from rolecall.roles.data.sources.lines import LineTable, Long, NoRecordError, Piece
from rolecall.roles.data.sources.opening import File


class CellTable(LineTable):
    """CSV and TSV files with a head. A file is read from its beginning: a cell in quotes may hold the ends of lines.

    Where a row ends is asked of Python's reader and not counted by quotes: one within a cell (a 5" disk) opens nothing. A cell
    may hold what other readers take for the end of a line (U+2028, U+0085, a form feed); rows end at line feeds alone.
    """

    wanted = 'give each row as many cells as the head names; within a cell in quotes, write a quote as ""'

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._heads: dict[int, list[str]] = {}
        csv.field_size_limit(max(csv.field_size_limit(), 2 * self.longest))  # Python's own limit is 128 KiB for a cell

    def lines(self, piece: Piece) -> Iterator[bytes]:
        """The rows of a file, but for its head. A row of several lines is followed by blank ones: the numbers of lines stay right.

        Raises:
            DataError: the file can't be read, its head names no columns that can be told apart, or a quote is never closed.
        """
        file, given = self.files[piece.file], super().lines(piece)
        first, number = True, 1
        for line in given:
            held = self._row(line, given, file, number)
            number += len(held)
            long = sum(map(len, held)) > self.longest or any(isinstance(each, Long) for each in held)
            raw = Long(held[0]) if long else b"\n".join(held)
            if first:
                self._heads[piece.file] = self._head(raw, file)
            yield b"" if first else raw
            yield from (b"" for _ in held[1:])
            first = False

    def parse(self, piece: Piece, raw: bytes) -> dict[str, Any]:
        """The cells of a row by the names in the file's head.

        Raises:
            NoRecordError: there are more or fewer cells than names.
            UnicodeError: the row is of another encoding.
        """
        names, cells = self._heads[piece.file], _cells(raw.decode(self.encoding), self.files[piece.file])
        if len(cells) != len(names):
            raise NoRecordError(f"this row has {len(cells)} cells in a table of {len(names)} columns ({', '.join(names)})")
        return dict(zip(names, cells, strict=True))

    def _divided(self, number: int, file: File) -> list[Piece]:
        return [Piece(number)]

    def _row(self, first: bytes, more: Iterator[bytes], file: File, number: int) -> list[bytes]:
        """The lines of the row that begins with `first`: further ones are taken where a quote is open at its end.

        Raises:
            DataError: it is open at the end of the file. What follows would be lost as one bad row, so this is never skipped.
        """
        if isinstance(first, Long) or b'"' not in first:
            return [first]
        held: list[bytes] = []

        def feed() -> Iterator[str]:
            size = 0
            for line in chain([first], more):
                held.append(line)
                yield line.decode("latin-1") + "\n"  # quotes and commas are the same bytes in every encoding that has lines
                size += len(line)
                if size > self.longest:
                    return
            raise DataError(
                f'{file.url}:{number}: a quote (") is opened in this row and never closed.',
                have=f"{len(held)} lines from there to the end of the file",
                remedy='close it; within a cell in quotes, write a quote as ""',
            )

        with contextlib.suppress(csv.Error):  # told when the row is parsed
            next(csv.reader(feed(), delimiter=_between(file)), None)
        return held

    def _head(self, raw: bytes, file: File) -> list[str]:
        """The names of the columns.

        Raises:
            DataError: the first row is no CSV, or two columns have one name.
        """
        place = f"{file.url}:1"
        try:
            names = _cells(raw.decode(self.encoding), file)
        except (NoRecordError, UnicodeError) as error:
            remedy = "look at its first line: it must name the columns; lines end with a line feed"
            raise DataError(f"{place}: the head can't be read: {error}.", have=repr(raw[:60]), remedy=remedy) from error
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice:
            raise DataError(
                f"{place}: several columns are called {', '.join(map(repr, twice))}.",
                have=", ".join(names),
                remedy="give each column a name of its own",
            )
        return names


def _between(file: File) -> str:
    """What stands between two cells."""
    return "\t" if file.format == "tsv" else ","


def _cells(text: str, file: File) -> list[str]:
    """The cells of one row.

    Raises:
        NoRecordError: it is no CSV, or more or less than a row.
    """
    lines = [line + "\n" for line in text.split("\n")]
    try:
        rows = list(csv.reader(lines, delimiter=_between(file)))
    except csv.Error as error:
        raise NoRecordError(f"this is no CSV: {error}") from error
    if len(rows) != 1:
        raise NoRecordError(f"this is no row of CSV, but {len(rows)}")  # never one of several: the others would be lost
    return rows[0]

"""Records that are the rows of a CSV file: every cell is a text."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from rolecall.roles.data.sources.lines import LineTable, Long, NoRecordError, Piece
from rolecall.roles.data.sources.opening import File


class CellTable(LineTable):
    """CSV and TSV files with a head. A file is read from its beginning: a cell in quotes may hold the ends of lines."""

    def lines(self, piece: Piece) -> Iterator[bytes]:
        """The rows of a file, but for its head. A row of several lines is followed by blank ones: the numbers of lines stay right."""
        held: list[bytes] = []
        size, quotes, first = 0, 0, True
        for line in super().lines(piece):
            held.append(line)
            size += len(line)
            quotes += line.count(b'"')
            if quotes % 2 and size <= self.longest:
                continue
            yield b"" if first else self._row(held, size)
            yield from (b"" for _ in held[1:])
            held, size, quotes, first = [], 0, 0, False
        if held and not first:
            yield self._row(held, size)

    def parse(self, piece: Piece, raw: bytes) -> dict[str, Any]:
        """The cells of a row by the names in the file's head.

        Raises:
            NoRecordError: there are more or fewer cells than names.
            UnicodeError: the row is of another encoding.
        """
        file = self.files[piece.file]
        names, cells = self._head(piece), _cells(raw.decode(self.encoding), file)
        if len(cells) != len(names):
            raise NoRecordError(f"this row has {len(cells)} cells in a table of {len(names)} columns ({', '.join(names)})")
        return dict(zip(names, cells, strict=True))

    def _divided(self, number: int, file: File) -> list[Piece]:
        return [Piece(number)]

    def _head(self, piece: Piece) -> list[str]:
        heads: dict[int, list[str]] = self.__dict__.setdefault("_heads", {})
        if piece.file not in heads:
            first = next(super().lines(piece), b"")
            heads[piece.file] = _cells(first.decode(self.encoding), self.files[piece.file])
        return heads[piece.file]

    def _row(self, lines: list[bytes], size: int) -> bytes:
        long = size > self.longest or any(isinstance(line, Long) for line in lines)
        return Long(lines[0]) if long else b"\n".join(lines)


def _cells(text: str, file: File) -> list[str]:
    try:
        rows = list(csv.reader(text.splitlines(keepends=True), delimiter="\t" if file.format == "tsv" else ","))
    except csv.Error as error:
        raise NoRecordError(f"this is no CSV: {error}") from error
    return rows[0] if rows else []

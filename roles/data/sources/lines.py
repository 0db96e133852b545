"""Records that are lines: JSON lines, compressed or not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, NamedTuple

import msgspec
from rolecall.protocols.errors import DataError
from rolecall.roles.data.report import Report
from rolecall.roles.data.sources.base import Found
from rolecall.roles.data.sources.opening import File
from rolecall.roles.data.sources.unpacking import unpacked

_RANGE = (1 << 20, 1 << 26)  # bytes of a piece of an uncompressed file: a 16th of the file, within these
_COUNTABLE = 1 << 28  # local files up to this size have their lines counted, to say where a record stands
_STEP = 1 << 22  # bytes in which lines are counted
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ": "xz"}  # how compressed files begin
_SAMPLE = 60  # bytes of a bad line that are shown

Trouble = Literal["refuse", "skip"]


class Piece(NamedTuple):
    """The lines of a file that begin at byte `start` or later, and before `stop`."""

    file: int
    start: int = 0
    stop: int | None = None  # None: to the end of the file


class Long(bytes):
    """The beginning of a line that is longer than a record may be."""


class NoRecordError(ValueError):
    """A line is no record; says why."""


class LineTable:
    """Files of JSON lines.

    Args:
        files: all of them of one format.
        report: counts the lines that are skipped.
        on_error: "refuse" a line that is no record, or "skip" and count it.
        longest: bytes of the longest record.
        expansion: how many times its compressed size a file may have.
        encoding: of the text.
    """

    window = 0
    wanted = "write one object a line"  # of a record

    def __init__(self, files: list[File], report: Report, *, on_error: Trouble, longest: int, expansion: float, encoding: str) -> None:
        self.files, self.longest, self.expansion, self.encoding = files, longest, expansion, encoding
        self._report, self._on_error = report, on_error
        self._pieces = [piece for number, file in enumerate(files) for piece in self._divided(number, file)]
        self.pieces = len(self._pieces)
        self._newlines: dict[tuple[int, int], int] = {}  # (file, start of a piece) → ends of lines before the byte before it
        self._read = msgspec.json.Decoder().decode

    def identity(self) -> str:
        """Names and sizes of the files."""
        return repr([(file.url, file.size) for file in self.files])

    def rows(self, piece: int) -> None:
        """Not known without reading."""

    def chunk(self, piece: int, rows: int, size: int) -> int:
        """As many as asked for."""
        return rows

    def close(self) -> None:
        """Nothing is kept open."""

    def read(self, piece: int, rows: int, size: int, skip: int) -> Iterator[LineRows]:
        """A piece in chunks; every line is a row, blank ones too.

        Raises:
            DataError: the file can't be read.
        """
        here = self._pieces[piece]
        chunks = _chunks(self.lines(here), rows, size)
        yield from (LineRows(self, here, first, lines) for first, lines in islice(chunks, skip, None))

    def lines(self, piece: Piece) -> Iterator[bytes]:
        """The lines of a piece, without their ends.

        Raises:
            DataError: the file can't be read.
        """
        file = self.files[piece.file]
        blocks = unpacked(file, self.expansion) if file.compression else file.blocks(max(piece.start - 1, 0))
        return split_lines(blocks, self.longest, piece)

    def parse(self, piece: Piece, raw: bytes) -> Any:
        """What a line says.

        Raises:
            NoRecordError, msgspec.DecodeError, UnicodeError, RecursionError: nothing.
        """
        if self.encoding != "utf-8":
            raw = raw.decode(self.encoding).encode()
        columns = self._read(raw)
        if type(columns) is not dict:
            raise NoRecordError(f"a record must be an object with columns, not {type(columns).__name__}")
        return columns

    def decode(self, piece: Piece, begin: str, line: int, raw: bytes) -> Found | None:
        """A line as a record, with its place (`begin` and the line's number); None where there is none (and that was counted).

        Raises:
            DataError: it is none, and is not to be skipped.
        """
        if not raw or raw.isspace():
            return None
        try:
            if isinstance(raw, Long):
                raise NoRecordError(f"the record is longer than {self.longest} bytes")
            return f"{begin}{line}", self.parse(piece, raw)
        except (NoRecordError, msgspec.DecodeError, UnicodeError, RecursionError) as error:
            known = self.shown_before(piece) is not None
            place = f"{self.files[piece.file].url}:{line if known else self.before(piece) + line}"
            if self._on_error == "skip":
                self._report.add("read")
                self._report.add("dropped", "too long a record" if isinstance(raw, Long) else "malformed", place=place)
                return None
            raise self._refusal(place, raw, error) from error

    def shown_before(self, piece: Piece) -> int | None:
        """Lines of the file before a piece, if they can be counted quickly."""
        file = self.files[piece.file]
        quick = not piece.start or (file.system is None and (file.size or 0) <= _COUNTABLE)
        return self.before(piece) if quick else None

    def _divided(self, number: int, file: File) -> list[Piece]:
        """The pieces of a file. An uncompressed one has several, so that its lines are shuffled among each other."""
        if file.compression or not file.ranged or file.size is None:
            return [Piece(number)]
        size = min(max(file.size // 16, _RANGE[0]), _RANGE[1])
        return [Piece(number, start, min(start + size, file.size)) for start in range(0, file.size, size)]

    def before(self, piece: Piece) -> int:
        """Lines of the file that begin before a piece: the first, and one after each end of a line, the byte before it left out."""
        if not piece.start:
            return 0
        if (piece.file, piece.start) in self._newlines:
            return 1 + self._newlines[piece.file, piece.start]
        file, lines, at = self.files[piece.file], 0, 0
        for each in self._pieces:
            if each.file == piece.file and 0 < each.start <= piece.start:
                key = (each.file, each.start)
                if key not in self._newlines:
                    steps = range(at, each.start - 1, _STEP)
                    self._newlines[key] = lines + sum(file.read(step, min(step + _STEP, each.start - 1)).count(b"\n") for step in steps)
                lines, at = self._newlines[key], each.start - 1
        return 1 + lines

    def _refusal(self, place: str, raw: bytes, error: Exception) -> DataError:
        have = raw[:_SAMPLE].decode(errors="replace")
        packed = next((name for magic, name in _MAGIC.items() if raw.startswith(magic)), "")
        if packed:
            remedy = f'give it its ending, or say so: Files(…, compression="{packed}")'
            return DataError(f"{place}: this is no JSON but looks like {packed}.", remedy=remedy)
        if raw.lstrip().startswith(b"[") and not isinstance(error, NoRecordError):
            remedy = "write one object a line; one long array can't be streamed"
            return DataError(f"{place}: this is no JSON line: {error}.", have=have, remedy=remedy)
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in raw[:_SAMPLE]:
            return DataError(f"{place}: the file is not UTF-8 but looks like UTF-16.", remedy="convert it: iconv -f UTF-16 -t UTF-8")
        if isinstance(raw, Long):
            return DataError(f"{place}: {error}.", have=have, remedy='raise longest=… of Files, or skip it: Files(…, on_error="skip")')
        if isinstance(error, NoRecordError):
            return DataError(f"{place}: {error}.", have=have, remedy=f'{self.wanted}; or skip such: Files(…, on_error="skip")')
        if isinstance(error, UnicodeError) or "utf-8" in str(error).lower():
            remedy = 'name its encoding: Files(…, encoding="latin-1"), or skip such lines: on_error="skip"'
            return DataError(f"{place}: this is no JSON: it is not {self.encoding.upper()}: {error}.", have=have, remedy=remedy)
        remedy = 'write one JSON object a line, or skip such lines: Files(…, on_error="skip")'
        return DataError(f"{place}: this is no JSON: {error}.", have=have, remedy=remedy)


class LineRows:
    """Neighbouring lines of a piece."""

    def __init__(self, table: LineTable, piece: Piece, first: int, lines: list[bytes]) -> None:
        self._table, self._piece, self._lines = table, piece, lines
        before, url = table.shown_before(piece), table.files[piece.file].url
        self._first = first + (before or 0)
        self._begin = f"{url}: after byte {piece.start}, line " if before is None else f"{url}:"

    def __len__(self) -> int:
        return len(self._lines)

    def decode(self, row: int) -> Found | None:
        """The record of a line, or None where it is blank or was skipped."""
        return self._table.decode(self._piece, self._begin, self._first + row, self._lines[row])


def _chunks(lines: Iterator[bytes], rows: int, size: int) -> Iterator[tuple[int, list[bytes]]]:
    """Number of the first line, and lines, of each chunk."""
    first, pending, held = 1, [], 0
    for line in lines:
        pending.append(line)
        held += len(line)
        if len(pending) >= rows or held >= size:
            yield first, pending
            first, pending, held = first + len(pending), [], 0
    if pending:
        yield first, pending


def split_lines(blocks: Iterator[bytes], longest: int, piece: Piece) -> Iterator[bytes]:
    """The lines that begin in a piece, from blocks that begin a byte before it (or at the file's beginning).

    A line that is too long is not kept in memory: its beginning comes as `Long`.
    """
    at = max(piece.start - 1, 0)  # where the next line begins
    behind = piece.start > 0  # whether that line began before the piece
    rest: list[bytes] = []  # the beginning of a line whose end is still to come
    kept = lost = 0  # its bytes: in `rest`, and forgotten because it is too long
    for block in blocks:
        lines = block.split(b"\n")
        tail = lines.pop()
        if lines:
            lines[0] = b"".join((*rest, lines[0]))
            for line in lines:
                length = len(line) + lost
                if not behind:
                    yield _marked(line, length, longest, at)
                behind, lost, at = False, 0, at + length + 1
                if piece.stop is not None and at >= piece.stop:
                    return
            rest, kept = [], 0
        rest.append(tail)
        kept += len(tail)
        if kept > longest:
            begin = b"".join(rest)[:_SAMPLE]
            rest, kept, lost = [begin], len(begin), lost + kept - len(begin)
    if kept and not behind:
        yield _marked(b"".join(rest), kept + lost, longest, at)


def _marked(line: bytes, length: int, longest: int, at: int) -> bytes:
    """A line without the mark that some editors put before the first, or what is left of it if it is too long."""
    if at == 0 and line.startswith(b"\xef\xbb\xbf"):
        line = line[3:]
    return Long(line[:_SAMPLE]) if length > longest else line

"""Records that are the rows of parquet and arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import msgspec
from rolecall.protocols.errors import DataError
from rolecall.roles.data.report import Report
from rolecall.roles.data.sources.base import Found, Table
from rolecall.roles.data.sources.lines import Trouble
from rolecall.roles.data.sources.opening import File

_BUFFER = 1 << 20  # bytes of a column that are read at once
_SKIP = 'or skip such rows: Files(…, on_error="skip")'


class Rules(NamedTuple):
    """What to do with a row that is no record."""

    report: Report  # counts those that are skipped
    on_error: Trouble = "refuse"
    longest: int = 1 << 24  # bytes of the longest record


class ColumnRows:
    """Neighbouring rows of a table."""

    def __init__(self, file: File, first: int, batch: Any, rules: Rules) -> None:
        self._file, self._first, self._batch, self._rules = file, first, batch, rules
        self._columns = list(zip(batch.schema.names, batch.columns, strict=True))
        self._large = batch.nbytes > rules.longest  # only then can a row be so

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def decode(self, row: int) -> Found | None:
        """The record of a row, or None where it was skipped.

        Raises:
            DataError: a text in it is not UTF-8, or it is too large, and it is not to be skipped.
        """
        place, longest = f"{self._file.url}: row {self._first + row}", self._rules.longest
        try:
            record = {name: column[row].as_py() for name, column in self._columns}
        except UnicodeDecodeError as error:
            self._trouble(DataError(f"{place}: a text is not UTF-8: {error}.", remedy=f"write the file anew, {_SKIP}"), place)
            return None
        # A column may count all that its values are chosen from with each of them: then the record itself is measured.
        large = self._large and self._batch.slice(row, 1).nbytes > longest
        if large and len(msgspec.json.encode(record, enc_hook=repr)) > longest:
            remedy = f"raise longest=… of Files, {_SKIP}"
            self._trouble(DataError(f"{place}: the record is longer than {longest} bytes.", remedy=remedy), place, "too long a record")
            return None
        return place, record

    def _trouble(self, error: DataError, place: str, why: str = "malformed") -> None:
        """Refuse a row, or count it as skipped."""
        if self._rules.on_error == "refuse":
            raise error
        self._rules.report.add("read")
        self._rules.report.add("dropped", why, place=place)


class ParquetTable:
    """Parquet files; a piece is a row group. Their footers are read at once, the rows from front to back."""

    window = 0

    def __init__(self, files: list[File], rules: Rules) -> None:
        self.files, self._rules = files, rules
        self._footers: list[Any] = []
        self._groups: list[tuple[int, int, int, int, int]] = []  # file, row group, rows before it, rows, bytes
        for number, file in enumerate(files):
            before = 0
            footer = _guarded(file, lambda file=file: self._opened(file).metadata)
            self._footers.append(footer)
            for group in range(footer.num_row_groups):
                facts = footer.row_group(group)
                self._groups.append((number, group, before, facts.num_rows, facts.total_byte_size))
                before += facts.num_rows
        self.pieces = len(self._groups)

    def identity(self) -> str:
        """Names and sizes of the files."""
        return repr([(file.url, file.size) for file in self.files])

    def rows(self, piece: int) -> int:
        """Rows of a row group."""
        return self._groups[piece][3]

    def chunk(self, piece: int, rows: int, size: int) -> int:
        """Fewer than asked for where the rows are large, by the mean of the row group."""
        *_, count, total = self._groups[piece]
        return max(1, min(rows, size * count // max(total, 1)))

    def read(self, piece: int, rows: int, size: int, skip: int) -> Iterator[ColumnRows]:
        """A row group in chunks.

        Raises:
            DataError: it can't be read.
        """
        number, group, before, _, _ = self._groups[piece]
        file, rows = self.files[number], self.chunk(piece, rows, size)
        batches = _guarded(
            file, lambda: self._opened(file, self._footers[number]).iter_batches(batch_size=rows, row_groups=[group], use_threads=False)
        )
        for at, batch in islice(enumerate(_even(_guarded_all(file, batches), rows)), skip, None):
            yield ColumnRows(file, before + at * rows, batch, self._rules)

    def close(self) -> None:
        """Files are closed as their readers end."""

    def _opened(self, file: File, footer: Any = None) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        raw = pa.OSFile(file.path) if file.system is None else pa.PythonFile(file.random(), mode="r")
        return pq.ParquetFile(raw, metadata=footer, buffer_size=_BUFFER, pre_buffer=False)


class ArrowTable:
    """Arrow files (the IPC file and stream formats, as `datasets` and feather write them); a piece is a file."""

    window = 0

    def __init__(self, files: list[File], rules: Rules) -> None:
        self.files, self.pieces, self._rules = files, len(files), rules
        self._mapped = {number: _guarded(file, lambda file=file: _mapped(file)) for number, file in enumerate(files) if file.system is None}

    def identity(self) -> str:
        """Names and sizes of the files."""
        return repr([(file.url, file.size) for file in self.files])

    def rows(self, piece: int) -> int | None:
        """Rows of a local file, which is mapped into memory; others must be read."""
        table = self._mapped.get(piece)
        return None if table is None else int(table.num_rows)

    def chunk(self, piece: int, rows: int, size: int) -> int:
        """Fewer than asked for where the rows are large, by the mean of the file."""
        table = self._mapped[piece]
        return int(max(1, min(rows, size * table.num_rows // max(table.nbytes, 1))))

    def read(self, piece: int, rows: int, size: int, skip: int) -> Iterator[ColumnRows]:
        """A file in chunks.

        Raises:
            DataError: it can't be read.
        """
        file = self.files[piece]
        table = self._mapped.get(piece)
        if table is not None:
            rows = self.chunk(piece, rows, size)
            for start in range(skip * rows, table.num_rows, rows):
                yield ColumnRows(file, start, table.slice(start, rows).combine_chunks().to_batches()[0], self._rules)
            return
        first = 0
        for number, batch in enumerate(_small(_guarded_all(file, _guarded(file, lambda: _batches(file))), rows, size)):
            if number >= skip:
                yield ColumnRows(file, first, batch, self._rules)
            first += batch.num_rows

    def close(self) -> None:
        """Maps go with the table."""
        self._mapped = {}


def _mapped(file: File) -> Any:
    import pyarrow as pa

    source = pa.memory_map(file.path)
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()


def _batches(file: File) -> Iterator[Any]:
    import pyarrow as pa

    if file.read(0, 6) == b"ARROW1":
        reader = pa.ipc.open_file(pa.PythonFile(file.random(), mode="r"))
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(pa.ipc.open_stream(pa.PythonFile(file.random(), mode="r")))


def _even(batches: Iterator[Any], rows: int) -> Iterator[Any]:
    """Batches of exactly `rows` rows, but for the last."""
    import pyarrow as pa

    held: list[Any] = []
    count = 0
    for batch in batches:
        held, count = [*held, batch], count + batch.num_rows
        while count >= rows:
            whole = held[0] if len(held) == 1 else pa.Table.from_batches(held).combine_chunks().to_batches()[0]
            yield whole.slice(0, rows)
            count -= rows
            held = [whole.slice(rows)] if count else []
    if count:
        yield pa.Table.from_batches(held).combine_chunks().to_batches()[0]


def _small(batches: Iterator[Any], rows: int, size: int) -> Iterator[Any]:
    """The batches, cut where they are large."""
    for batch in batches:
        step = max(1, min(rows, size * batch.num_rows // max(batch.nbytes, 1)))
        yield from (batch.slice(start, step) for start in range(0, batch.num_rows, step))


def _guarded(file: File, action: Any) -> Any:
    """What `action` returns; arrow's errors become ours, with the file's name."""
    import pyarrow as pa

    try:
        return action()
    except (pa.ArrowException, OSError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{file.url} can't be read as {file.format}: {error}.", remedy="look whether the file is whole, or fetch it again"
        ) from error


def _guarded_all(file: File, batches: Iterator[Any]) -> Iterator[Any]:
    while (batch := _guarded(file, lambda: next(batches, None))) is not None:
        yield batch


def columnar(files: list[File], rules: Rules) -> Table:
    """A table of parquet or of arrow files."""
    return ParquetTable(files, rules) if files[0].format == "parquet" else ArrowTable(files, rules)

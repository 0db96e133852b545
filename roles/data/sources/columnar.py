"""Records that are the rows of parquet and arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from rolecall.protocols.errors import DataError
from rolecall.roles.data.sources.base import Found, Table
from rolecall.roles.data.sources.opening import File

_BUFFER = 1 << 20  # bytes of a column that are read at once


class ColumnRows:
    """Neighbouring rows of a table."""

    def __init__(self, file: File, first: int, batch: Any) -> None:
        self._file, self._first, self._rows = file, first, batch.num_rows
        self._columns = list(zip(batch.schema.names, batch.columns, strict=True))

    def __len__(self) -> int:
        return int(self._rows)

    def decode(self, row: int) -> Found:
        """The record of a row.

        Raises:
            DataError: a text in it is not UTF-8.
        """
        place = f"{self._file.url}: row {self._first + row}"
        try:
            return place, {name: column[row].as_py() for name, column in self._columns}
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: a text is not UTF-8: {error}.", remedy="write the file anew") from error


class ParquetTable:
    """Parquet files; a piece is a row group. Their footers are read at once, the rows from front to back."""

    window = 0

    def __init__(self, files: list[File]) -> None:
        self.files = files
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
            yield ColumnRows(file, before + at * rows, batch)

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

    def __init__(self, files: list[File]) -> None:
        self.files, self.pieces = files, len(files)
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
                yield ColumnRows(file, start, table.slice(start, rows).combine_chunks().to_batches()[0])
            return
        first = 0
        for number, batch in enumerate(_small(_guarded_all(file, _guarded(file, lambda: _batches(file))), rows, size)):
            if number >= skip:
                yield ColumnRows(file, first, batch)
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


def columnar(files: list[File]) -> Table:
    """A table of parquet or of arrow files."""
    return ParquetTable(files) if files[0].format == "parquet" else ArrowTable(files)

"""Records that lie in memory: a list of dictionaries, or what a simple source lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import xxhash
from rolecall.protocols.errors import DataError
from rolecall.roles.data.sources.base import Found


class Records(msgspec.Struct, frozen=True):
    """Records given as a list of dictionaries."""

    source: list[dict[str, Any]]
    columns: dict[str, str] = {}  # our name of a column → the records': {"prompt": "question"}; others are recognised

    def records(self, *, repeats: bool) -> Iterator[Found]:
        """All records, in order.

        Raises:
            DataError: one is no dictionary.
        """
        for number, record in enumerate(self.source):
            place = f"record {number}"
            if not isinstance(record, dict):
                raise DataError(f"{place}: a record must be an object with columns.", have=type(record).__name__)
            yield place, record


class Memory:
    """A table of records that lie in memory: one piece."""

    pieces = 1

    def __init__(self, found: Iterable[Found]) -> None:
        self._found = list(found)
        self.window = len(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def decode(self, row: int) -> Found:
        """The record of a row."""
        return self._found[row]

    def identity(self) -> str:
        """Digest of all records."""
        digest = xxhash.xxh3_64()
        for _, record in self._found:
            digest.update(msgspec.json.encode(record, enc_hook=repr, order="sorted"))
        return digest.hexdigest()

    def rows(self, piece: int) -> int:
        """How many there are."""
        return len(self._found)

    def chunk(self, piece: int, rows: int, size: int) -> int:
        """As many as asked for: they are in memory anyway."""
        return rows

    def read(self, piece: int, rows: int, size: int, skip: int) -> Iterator[Memory]:
        """The records in chunks."""
        for start in range(skip * rows, len(self._found), rows):
            yield self if rows >= len(self._found) else Memory(self._found[start : start + rows])

    def close(self) -> None:
        """Nothing is open."""

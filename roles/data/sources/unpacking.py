"""Compressed files as a flow of bytes, bounded in memory and in how far they may expand."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import Any

from rolecall.protocols.errors import DataError
from rolecall.roles.data.sources.opening import File

_BLOCK = 1 << 20  # bytes of text at once
_FREE = 1 << 26  # bytes that a file may expand to whatever its compressed size


def unpacked(file: File, expansion: float) -> Iterator[bytes]:
    """The bytes of a compressed file, in blocks.

    Args:
        file: its `compression` is "gzip", "zstd", "bz2" or "xz".
        expansion: bytes that a compressed byte may become; more is taken for an attack on disk or time.

    Raises:
        DataError: the file can't be read, is damaged or cut off, or expands beyond all measure.
    """
    raw = _Flow(file.blocks())
    given = 0
    try:
        with _opened(raw, file.compression) as flow:
            while block := flow.read(_BLOCK):
                given += len(block)
                if given > _FREE and given > expansion * raw.taken:
                    raise DataError(
                        f"{file.url} expands to more than {given >> 20} MiB from {raw.taken >> 10} KiB.",
                        ask=f"at most {expansion:g} times",
                        remedy="look what is in it; if it is meant so, raise expansion=… of Files",
                    )
                yield bytes(block)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{file.url} is damaged or no {file.compression} file: {error}.",
            have=f"{given} bytes up to there",
            remedy="fetch the file again",
        ) from error


def _opened(raw: _Flow, compression: str) -> Any:
    if compression == "zstd":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    kinds: dict[str, Any] = {"gzip": gzip.GzipFile, "bz2": bz2.BZ2File, "xz": lzma.LZMAFile}
    if compression not in kinds:
        raise DataError(f"There is no compression {compression!r}.", have="gzip, zstd, bz2, xz")
    return kinds[compression](raw) if compression != "gzip" else gzip.GzipFile(fileobj=io.BufferedReader(raw, _BLOCK))


class _Flow(io.RawIOBase):
    """Blocks as a file that is read from front to back; counts what was taken."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, memoryview(b"")
        self.taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if not self._rest:
            self._rest = memoryview(next(self._blocks, b""))
        count = min(len(view), len(self._rest))
        view[:count], self._rest = self._rest[:count], self._rest[count:]
        self.taken += count
        return count

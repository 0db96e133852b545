"""Files by path, glob, folder or URL (fsspec): which there are, and their bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rolecall.protocols.errors import DataError
from rolecall.roles.data.sources.patience import Patience, unreadable

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
_BLOCK = 1 << 22  # bytes read at once


@dataclass
class File:
    """One file: where, how large, of which format; reads ranges of bytes."""

    url: str  # as the user would write it
    format: str  # "jsonl", "csv", "tsv", "parquet", "arrow"
    compression: str = ""  # "gzip", "zstd", "bz2", "xz", or "" for none
    size: int | None = None  # bytes; None where a server doesn't say
    ranged: bool = True  # whether ranges can be read
    path: str = ""  # as the file system writes it
    system: Any = None  # of fsspec; None for a local file
    patience: Patience = field(default_factory=Patience)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`, or to the end.

        Raises:
            DataError: they can't be read, or the file is shorter than it was when it was listed.
        """
        stop = min(stop, self.size) if self.size is not None else stop
        want = stop - start if self.size is not None else None
        if want is not None and want <= 0:
            return b""

        def once() -> bytes:
            found: bytes = self._local(start, stop) if self.system is None else self.system.cat_file(self.path, start=start, end=stop)
            if want is not None and len(found) != want:
                raise OSError(f"{want} bytes from byte {start} on were asked for, {len(found)} came: the file has changed, or was cut off")
            return found

        return self._try(once)

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        """The bytes from `start` on, in blocks.

        Raises:
            DataError: they can't be read.
        """
        if self.ranged and self.size is not None:
            for at in range(start, self.size, _BLOCK):
                yield self.read(at, at + _BLOCK)
        else:
            yield from self._flow(start)

    def random(self) -> io.RawIOBase:
        """The file for a reader that seeks.

        Raises:
            DataError: the server gives only whole files.
        """
        if not self.ranged or self.size is None:
            raise DataError(f"{self.url} can't be read in parts: its server gives only whole files.", remedy="download the file first")
        return _Random(self)

    def _flow(self, start: int) -> Iterator[bytes]:
        """The bytes of a server that gives only whole files; a broken connection is opened again and read up to where it broke."""
        flow = _Whole(self.system, self.path, start)
        while block := self._try(flow.read):
            yield block
        if self.size is not None and flow.at < self.size:
            raise DataError(f"{self.url} ended after {flow.at} of {self.size} bytes.", remedy="look whether the file is whole")

    def _local(self, start: int, stop: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def _try(self, once: Callable[[], bytes]) -> bytes:
        if self.system is not None:
            return self.patience.call(once, self.url)
        try:
            return once()
        except OSError as error:
            raise unreadable(self.url, error) from error


class _Whole:
    """A remote file that can only be read from its beginning; opened anew after an error."""

    def __init__(self, system: Any, path: str, start: int) -> None:
        self.at = start
        self._system, self._path, self._opened = system, path, None

    def read(self) -> bytes:
        """The next block; empty at the end."""
        opened, self._opened = self._opened, None
        if opened is None:
            opened = self._system.open(self._path, "rb", block_size=0)
            behind = self.at
            while behind and (block := opened.read(min(behind, _BLOCK))):
                behind -= len(block)
        found: bytes = opened.read(_BLOCK)
        self._opened, self.at = opened, self.at + len(found)
        return found


class _Random(io.RawIOBase):
    """A file object over ranges."""

    def __init__(self, file: File) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size or 0}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        found = self._file.read(self._at, self._at + len(view))
        view[: len(found)] = found
        self._at += len(found)
        return len(found)


def find(urls: tuple[str, ...], *, form: str, compression: str, options: dict[str, Any], patience: Patience) -> list[File]:
    """All files of some paths, globs, folders and URLs, in the order given, each sorted by name.

    Raises:
        DataError: nothing is there, or a file is of no known format.
    """
    found = []
    for url in urls:
        named = _named(url, options, patience)
        if not named:
            raise DataError(f"{url} names no file of records.", have="nothing that matches", remedy=f"name files of {', '.join(FORMATS)}")
        for each in named:
            each.format, each.compression = kind_of(each.url, form, compression)
            each.patience = patience
        found += named
    return found


def kind_of(url: str, form: str = "", compression: str = "") -> tuple[str, str]:
    """Format and compression of a file, by its name where they are not given.

    Raises:
        DataError: its name tells no format.
    """
    name = url.split("?")[0].rsplit("/", 1)[-1].lower()
    ending = next((each for each in COMPRESSIONS if name.endswith(each)), "")
    name = name.removesuffix(ending)
    compression = {"none": "", "": COMPRESSIONS.get(ending, "")}.get(compression, compression)
    form = form or next((kind for each, kind in FORMATS.items() if name.endswith(each)), "")
    if not form:
        raise DataError(f"{url} has no ending that tells its format.", have=", ".join(FORMATS), remedy='say it: Files(…, format="jsonl")')
    return form, compression


def _find(url: str, options: dict[str, Any]) -> list[File]:
    """The files that one path or URL names, without their formats."""
    import fsspec

    system, path = fsspec.core.url_to_fs(url, **options)
    local = "file" in ((system.protocol,) if isinstance(system.protocol, str) else system.protocol)
    web = url.startswith(("http://", "https://"))
    if "*" in path or (local and any(sign in path for sign in "?[") and not Path(path).exists()):
        paths = [each for each in system.glob(path) if not system.isdir(each)]
    elif (not web or url.endswith("/")) and system.isdir(path):
        paths = [each for each in system.find(path) if _is_data(each.removeprefix(path))]
    else:
        paths = [path]
    files = []
    for each in sorted(paths):
        info = system.info(each)
        name = each if local or web else system.unstrip_protocol(each)
        ranged = not web or _gives_ranges(system, each)
        files.append(File(name, "", size=info.get("size"), ranged=ranged, path=each, system=None if local else system))
    return files


def _named(url: str, options: dict[str, Any], patience: Patience) -> list[File]:
    """`_find` with its errors in our words."""
    if "://" in url:
        return patience.call(lambda: _find(url, options), url)
    try:
        return _find(str(Path(url).expanduser()), options)
    except OSError as error:
        raise unreadable(url, error) from error


def _gives_ranges(system: Any, url: str) -> bool:
    """Whether a web server answers with the part that it is asked for. Its headers don't tell: it is asked for a byte."""
    from fsspec.asyn import sync

    async def ask() -> bool:
        session = await system.set_session()
        async with session.get(system.encode_url(url), headers={"Range": "bytes=0-0"}) as answer:
            return bool(answer.status == 206)

    return bool(sync(system.loop, ask))


def _is_data(path: str) -> bool:
    """Whether a file in a folder is one of records: of a known ending, and neither hidden nor the description of the others."""
    parts = path.strip("/").split("/")
    stem = parts[-1].lower()
    for ending in COMPRESSIONS:
        stem = stem.removesuffix(ending)
    described = stem in ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json")
    return not described and not any(part.startswith((".", "_")) for part in parts) and any(stem.endswith(each) for each in FORMATS)

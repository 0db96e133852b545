"""Where problems come from: a task generator of reasoning-gym, a file of JSON lines, or a list of records."""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec
from rolecall.protocols.errors import DataError

_PATIENCE = 10  # a generator has no more to give when so many times the problems found bring nothing new …
_LEAST = 1000  # … and at least so many draws


@runtime_checkable
class Source(Protocol):
    """What `Data` reads: anything that lists records."""

    def records(self, *, repeats: bool) -> Iterable[tuple[str, dict[str, Any]]]:
        """Where each record is from (for errors: "file.jsonl:3") and the record.

        A record has "prompt" (a text, or a list of {"role", "content"}) and any further fields, which become columns.
        The same source must list the same records in the same order each time.

        Args:
            repeats: list a problem as often as the source holds it; else once is enough.

        Raises:
            DataError: the source can't be read, or holds less than was asked of it.
        """
        ...


class ReasoningGym(msgspec.Struct, frozen=True):
    """Problems made by a task of the package reasoning-gym; columns `answer`, `metadata`, `data_source`."""

    task: str  # "chain_sum", "gcd", …
    config: dict[str, Any] = {}  # of the task: {"min_terms": 2, "max_terms": 2}
    size: int = 2000  # distinct problems to make (problems, where repeats are kept)
    seed: int = 0  # of the problems; not the run's, so that runs with other seeds have the same problems

    def records(self, *, repeats: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        """`size` problems.

        Raises:
            DataError: no such task or setting, or it has too few distinct problems.
        """
        seen: set[str] = set()
        given = idle = 0
        for draw, entry in enumerate(self._entries()):
            new = entry["question"] not in seen
            seen.add(entry["question"])
            idle = 0 if new else idle + 1
            if new or repeats:
                given += 1
                metadata = entry.get("metadata", {})
                columns = {"answer": entry["answer"], "metadata": metadata, "data_source": f"reasoning_gym/{self.task}"}
                yield f"{self.task} {draw}", {"prompt": entry["question"], **columns}
            if given == self.size:
                return
            if not repeats and idle >= max(_LEAST, _PATIENCE * len(seen)):
                raise DataError(
                    f"The task {self.task} with {self.config or 'its own settings'} has only {len(seen)} distinct problems.",
                    ask=f"{self.size} distinct problems",
                    have=f"{len(seen)}, and the last {idle} draws brought no new one",
                    remedy=f"set size={len(seen)} and hold fewer out, or give the task a wider range (more digits, more terms)",
                )

    def _entries(self) -> Iterator[dict[str, Any]]:
        """Draws without end: the generator's own sequence for `seed`, then further ones."""
        if self.size < 1:
            raise DataError("A task must make at least one problem.", ask=f"size={self.size}", remedy="give a positive size")
        block = 0
        while True:
            seed = self.seed if block == 0 else random.Random(f"{self.seed}/{block}").randrange(2**32)
            dataset = self._dataset(seed)
            for number in range(self.size):
                yield dataset[number]
            block += 1

    def _dataset(self, seed: int) -> Any:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise DataError("The package reasoning-gym is missing.", remedy="pip install reasoning-gym") from error
        if self.task not in DATASETS:
            raise DataError(f"reasoning-gym has no task {self.task!r}.", remedy=_nearest(self.task, DATASETS))
        known = [name for name in DATASETS[self.task][1].__dataclass_fields__ if name not in ("seed", "size")]
        for name in self.config:
            if name not in known:
                raise DataError(f"The task {self.task} has no setting {name!r}.", have=", ".join(known), remedy=_nearest(name, known))
        try:
            return reasoning_gym.create_dataset(self.task, **self.config, seed=seed, size=self.size)
        except (AssertionError, ValueError, TypeError) as error:
            raise DataError(f"The task {self.task} refuses its settings: {error}.", ask=str(self.config)) from error


class Records(msgspec.Struct, frozen=True):
    """Records from a file of JSON lines, or given as a list of dictionaries."""

    source: str | list[dict[str, Any]]
    prompt: str = "prompt"  # the field that holds the prompt

    def records(self, *, repeats: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        """All records, in order.

        Raises:
            DataError: the file is missing, or a record is no object with a prompt; it says which line.
        """
        for place, record in self._lines() if isinstance(self.source, str) else self._list():
            if not isinstance(record, dict):
                raise DataError(f"{place}: a record must be an object with a field {self.prompt!r}.", have=type(record).__name__)
            if self.prompt not in record:
                have = ", ".join(map(str, record)) or "no field at all"
                raise DataError(
                    f"{place}: the record has no field {self.prompt!r}.", have=have, remedy='name it: Records(…, prompt="question")'
                )
            yield place, {"prompt": record[self.prompt], **{name: value for name, value in record.items() if name != self.prompt}}

    def _list(self) -> Iterator[tuple[str, Any]]:
        for number, record in enumerate(self.source):
            yield f"record {number}", record

    def _lines(self) -> Iterator[tuple[str, Any]]:
        path = Path(str(self.source)).expanduser()
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise DataError(f"The data file {path} can't be read: {error.strerror}.", remedy="give a file of JSON lines") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                start = line[:60].decode(errors="replace")
                raise DataError(f"{path}:{number}: this is no JSON: {error}.", have=start, remedy="write one JSON object a line") from error


def source_of(given: Any) -> Source:
    """A source from what the user gave: a source, the path of a file of JSON lines, or a list of records.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(given, str | Path):
        return Records(str(given))
    if isinstance(given, list | tuple):
        return Records(list(given))
    if isinstance(given, Source):
        return given
    raise DataError(
        "Data can't be read from this.",
        ask=f"{type(given).__name__} {str(given)[:60]!r}",
        remedy="give ReasoningGym(...), the path of a file of JSON lines, a list of dictionaries, or an object with a method `records`",
    )


def _nearest(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"write {near[0]!r}" if near else f"choose one of {', '.join(sorted(words)[:8])}, …"

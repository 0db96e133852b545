"""Records of a mix at the positions of one endless line: what the packer and the prompts are made from.

    stream = Stream(Mix({"math": Files("math/*.parquet"), "chat": Files("s3://bucket/chat.jsonl.zst")}), seed=0)
    for raw in stream.at(position):            # rising positions; raw.position, raw.columns, raw.place, …
        ...
    state = stream.state(position)             # a few integers: where `position` is, for another process
    position = other.restore(state)            # the same stream goes on there

What stands at a position is a pure function of (mix, sources, seed). It depends neither on the number of data members nor
on where reading began. Positions without a record (a skipped line, a record held out) are left out: positions rise, but not always
by one. How members divide the positions is their choice: `at(position, step=world)`, or `at(start, stop)` in blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import xxhash
from rolecall.protocols.errors import DataError
from rolecall.roles.data.mixing import Mix
from rolecall.roles.data.order import Anchor, Walk
from rolecall.roles.data.report import Report
from rolecall.roles.data.sources import table_of

_BLOCK = 4096  # positions whose sources are computed at once


class Raw(msgspec.Struct, frozen=True):
    """A record as its source has it, and where it stands."""

    position: int  # in the stream: its key, the same in every run of that mix and seed
    source: str  # name within the mix
    epoch: int  # of that source
    place: str  # where it was read, for errors: "file.jsonl:3"
    columns: dict[str, Any]


class Stream:
    """Opens the sources of a mix and gives records by position.

    One iterator at a time: a new one may begin anywhere, forward (cheap) or back (read again from the nearest known place).

    Args:
        mix: the sources and their shares; a single source, path or list is a mix of its own.
        seed: of the order.
        report: counts what is read and skipped.
        held_out: one record in so many is kept out of the stream, by the digest of its columns; 0 keeps none out.

    Raises:
        DataError: a source can't be used.
    """

    def __init__(self, mix: Mix | Any, seed: int = 0, *, report: Report | None = None, held_out: int = 0) -> None:
        self.mix = mix if isinstance(mix, Mix) else Mix({"data": mix})
        self.mix.check()
        self.seed, self.report, self.aside = seed, report or Report(), held_out
        self.names = tuple(self.mix.sources)
        shape = {"window": self.mix.window, "size": self.mix.window_bytes, "together": self.mix.together}
        tables = [table_of(self.mix.sources[name], self.report) for name in self.names]
        self._walks = [Walk(table, seed, name, shuffle=self.mix.shuffle, **shape) for table, name in zip(tables, self.names, strict=True)]
        totals = [walk.total() for walk in self._walks] if self.mix.needs_totals() else []
        self._schedule = self.mix.schedule(totals, seed)
        self._identity = 0

    @property
    def length(self) -> int | None:
        """Positions of the stream, or None where it has no end."""
        return self._schedule.length

    def at(self, position: int = 0, stop: int | None = None, step: int = 1) -> Iterator[Raw]:
        """The records at `position`, `position + step`, … before `stop` (or the stream's end).

        Raises:
            DataError: a record can't be read or decoded and is not to be skipped; it names file and line.
        """
        if position < 0 or step < 1:
            raise DataError("A stream is read forward from a position of at least 0.", ask=f"position={position}, step={step}")
        while stop is None or position < stop:
            end = position + _BLOCK * step if stop is None else min(position + _BLOCK * step, stop)
            sources, numbers = self._schedule.chosen(position, end)
            places = zip(range(position, end, step), sources[::step].tolist(), numbers[::step].tolist(), strict=False)
            yield from self._records(places)
            if len(sources) < end - position:
                return
            position += -(-len(sources) // step) * step

    def _records(self, places: Iterable[tuple[int, int, int]]) -> Iterator[Raw]:
        """The records at (position, source, number) that there are."""
        counts = self.report.counts
        for position, source, number in places:
            epoch, found = self._walks[source].row(number)
            if found is None:
                continue
            counts["read", ""] += 1
            if self.aside and self._is_aside(found[1]):
                self.report.add("dropped", "held out")
                continue
            yield Raw(position, self.names[source], epoch, *found)

    def held_out(self, count: int) -> list[Raw]:
        """The first `count` records that are held out, in the order of the sources; their positions are -1, -2, …

        Raises:
            DataError: there are fewer, or none are held out.
        """
        found = list(itertools.islice(self.all_held_out(), count))
        if len(found) < count:
            raise too_few_held_out(count, len(found))
        return found

    def all_held_out(self) -> Iterator[Raw]:
        """All records that are held out, as `held_out`; they are read as they are asked for."""
        given = 0
        for name in self.names if self.aside else ():
            walk = Walk(table_of(self.mix.sources[name], Report()), 0, name, shuffle=False)
            for number in itertools.count():
                epoch, record = walk.row(number)
                if epoch:
                    break
                if record is not None and self._is_aside(record[1]):
                    given += 1
                    yield Raw(-given, name, 0, *record)

    def state(self, position: int) -> dict[str, int]:
        """Integers from which `restore` finds `position` again, at once and in any process.

        Besides the position itself they say what it depends on, and for each source where to begin to read.
        """
        state = {"position": position, **self.meaning()}
        for walk, number in zip(self._walks, self._schedule.before(position), strict=True):
            state |= {f"{walk.name}.{word}": value for word, value in walk.anchor(number)._asdict().items()}
        return state

    def restore(self, state: dict[str, int]) -> int:
        """Make ready to go on where `state` was taken, and give its position.

        Raises:
            DataError: it was taken from another mix, other data or another seed; nothing is changed.
        """
        now = self.meaning()
        other = [word for word, value in now.items() if state.get(word) != value]
        if other or state.get("position", -1) < 0:
            raise DataError(
                f"The data can't go on from this state: {', '.join(other) or 'position'} differs.",
                ask=", ".join(f"{word}={state.get(word)}" for word in other or ["position"]),
                have=", ".join(f"{word}={now[word]}" for word in other),
                remedy="resume with the same sources, mix and seed",
            )
        for walk in self._walks:
            walk.start(Anchor(*(int(state.get(f"{walk.name}.{word}", 0)) for word in Anchor._fields)))
        return state["position"]

    def close(self) -> None:
        """Give open files back."""
        for walk in self._walks:
            walk.table.close()

    def meaning(self) -> dict[str, int]:
        """What a position depends on."""
        if not self._identity:
            settings = {**msgspec.structs.asdict(self.mix), "sources": {walk.name: walk.table.identity() for walk in self._walks}}
            self._identity = xxhash.xxh3_64_intdigest(msgspec.json.encode(settings)) >> 16 | 1
        return {"seed": self.seed, "data": self._identity, "held_out": self.aside}

    def _is_aside(self, columns: dict[str, Any]) -> bool:
        digest = xxhash.xxh3_64_intdigest(msgspec.json.encode(columns, enc_hook=repr, order="sorted"))
        return digest % self.aside == 0


def too_few_held_out(asked: int, there: int) -> DataError:
    """The error of asking for more records than are held out."""
    return DataError("So many records are not held out.", ask=str(asked), have=str(there), remedy="ask for fewer, or hold more out")

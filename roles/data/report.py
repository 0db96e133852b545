"""What became of the records: how many were read, used, cut, split, dropped, and why."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from rolecall.protocols.errors import DataError

Outcome = Literal["read", "used", "cut", "split", "dropped", "noted"]


class Report:
    """Counts records by what became of them and why; of each reason the first place is remembered."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()  # (outcome, why) → records
        self.first: dict[tuple[str, str], str] = {}  # (outcome, why) → where it happened first

    def add(self, outcome: Outcome, why: str = "", *, place: str = "", number: int = 1) -> None:
        """Count `number` records; "noted" is for what is used as it is, but worth knowing."""
        self.counts[outcome, why] += number
        if place:
            self.first.setdefault((outcome, why), place)

    def merge(self, other: Report) -> None:
        """Add what another report counted."""
        self.counts.update(other.counts)
        self.first = {**other.first, **self.first}

    def total(self, outcome: Outcome) -> int:
        """Records of this outcome, whatever the reason."""
        return sum(number for (found, _), number in self.counts.items() if found == outcome)

    def summary(self) -> dict[str, int]:
        """Records by outcome: "read", "cut: too long", "dropped: malformed (first: file.jsonl:3)"."""
        found = {}
        for (outcome, why), number in sorted(self.counts.items()):
            first = self.first.get((outcome, why), "")
            found[f"{outcome}{': ' if why else ''}{why}{f' (first: {first})' if first and why else ''}"] = number
        return found


def reason(error: DataError, place: str = "") -> str:
    """Why a record was dropped, in a few words that are the same for all records it happens to: what a report counts by.

    Errors about single records carry it as `why`; of others it is the first sentence.
    """
    return str(getattr(error, "why", "") or error.message.removeprefix(place).lstrip(": ").partition(". ")[0])

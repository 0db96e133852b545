"""Problems: records with an identity, each distinct text once, divided into training and held out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from rolecall.protocols.errors import DataError
from rolecall.roles.data.records import Kind, Layout, Question, recognise
from rolecall.roles.data.report import Report, reason
from rolecall.roles.data.sources import Found
from rolecall.roles.plain import as_plain

_WANTED: tuple[Kind, ...] = ("question",)


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt and what the dataset says of it."""

    id: str  # hash of its words: 24 hexadecimal digits, the same in every run (.1, .2, … at repetitions)
    text: str  # what the user says
    question: Question  # as it is templated
    columns: dict[str, Any]
    place: str  # where it was read, for errors
    source: str = ""  # name of its source


@dataclass(frozen=True)
class Split:
    """All problems of a source, training and held out, no text in both."""

    training: list[Problem]
    held_out: list[Problem]
    columns: tuple[str, ...]  # names of all columns
    repeated: int  # records whose text had come before


def split(problems: Sequence[Problem], held_out: int, *, repeats: bool) -> Split:
    """Divide problems by text.

    Held out are the texts with the smallest hashes: whatever the seed, and mostly the same ones after records are added.

    Args:
        problems: of all sources.
        held_out: how many distinct problems to hold out.
        repeats: keep training problems as often as they are listed.

    Raises:
        DataError: there are no problems, or too few distinct ones.
    """
    if not problems:
        raise DataError("The dataset is empty.", have="no record", remedy="give a source with at least one prompt")
    distinct = {problem.id: problem for problem in reversed(problems)}  # the first of equal ones stays
    if len(distinct) <= held_out:
        raise DataError(
            f"The source has only {len(distinct)} distinct problems ({len(problems)} records).",
            ask=f"held_out={held_out} and some to train on",
            remedy="hold fewer out, or give the source more problems",
        )
    aside = sorted(distinct)[:held_out]
    hidden = set(aside)
    times: Counter[str] = Counter()
    training = []
    for problem in problems:
        if problem.id not in hidden and (repeats or problem.id not in times):
            again = times[problem.id]  # a prompt's samples are seeded by its id: repetitions must differ
            training.append(replace(problem, id=f"{problem.id}.{again}") if again else problem)
        times[problem.id] += 1
    names = sorted({name for problem in distinct.values() for name in problem.columns})
    return Split(training, [distinct[name] for name in aside], tuple(names), len(problems) - len(distinct))


def problems_of(
    records: Iterable[Found], source: str = "", mapping: Mapping[str, str] | None = None, dropped: Report | None = None
) -> list[Problem]:
    """The problems that records hold.

    Args:
        records: places and records, as a source lists them.
        source: its name.
        mapping: our name of a column → the source's; others are recognised.
        dropped: where records without a usable prompt are counted, which are left out. None raises at the first.

    Raises:
        DataError: the columns of the first record are not those of prompts; or a record holds no prompt; it says which.
    """
    layout: Layout | None = None
    problems = []
    for place, record in records:
        try:
            layout = layout or recognise(record, mapping, want=_WANTED)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        try:
            problems.append(_problem(place, record, layout, source))
        except DataError as error:
            if dropped is None:
                raise
            dropped.add("read")
            dropped.add("dropped", reason(error, place), place=place)
    return problems


def _problem(place: str, record: dict[str, Any], layout: Layout, source: str) -> Problem:
    question = layout.read(record, place)
    if not isinstance(question, Question):
        raise DataError(f"{place}: this is no prompt.", have=type(question).__name__)
    messages = ({"role": "user", "content": question.prompt},) if isinstance(question.prompt, str) else question.prompt
    if not any(str(each.get("content") or "").strip() for each in messages):
        raise DataError(f"{place}: the prompt is empty.", remedy="take the record out, or give it a prompt", why="an empty prompt")
    words = "\x00".join(f"{message['role']}\x01{' '.join(message['content'].split())}" for message in messages)
    if question.tools:
        words += "\x00tools\x01" + json.dumps(question.tools, sort_keys=True, default=str)
    try:
        columns = as_plain(question.columns)
    except TypeError as error:
        raise DataError(
            f"{place}: a column holds what is no plain data: {error}.",
            remedy="keep to numbers, texts, lists, objects",
            why="a column that is no plain data",
        ) from error
    text = "\n".join(message["content"] for message in messages if message["role"] == "user")
    identity = hashlib.sha256(words.encode(errors="surrogatepass")).hexdigest()[:24]
    return Problem(identity, text, msgspec.structs.replace(question, prompt=messages, columns={}), columns, place, source)

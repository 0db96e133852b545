"""`rolecall data show`: a few records as the model will see them, with the tokens that are trained in colour."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rolecall.protocols.errors import DataError
from rolecall.roles.data.encode import Encoded, Encoder, Pair
from rolecall.roles.data.mixing import Mix
from rolecall.roles.data.records import Layout, Question, Record, recognise
from rolecall.roles.data.report import Report, reason
from rolecall.roles.data.sources import ReasoningGym, mapping_of, source_of
from rolecall.roles.data.stream import Stream
from rolecall.roles.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text as Styled

TRAINED, GIVEN, HEAD = "bold green", "dim", "bold"  # styles
_OPEN, _CLOSE = "⟦", "⟧"  # around what is trained, where there are no colours
_GYM = "gym:"


def show(
    source: str,
    model: str,
    *,
    count: int = 3,
    scan: int = 256,
    columns: Mapping[str, str] | None = None,
    train: Literal["assistant", "last", "each", "all"] = "assistant",
    plain: bool = False,
    system: str | None = None,
    options: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> int:
    """Print records after templating.

    Args:
        source: path, glob or URL of files, or gym:TASK for a task of reasoning-gym.
        model: folder or hub name whose tokenizer and chat template are used.
        count: records to print.
        scan: records to encode for the counts at the end.
        columns: our name of a column → the source's.
        train: what is trained of a conversation (roles/data/encode.py).
        plain: take prompts and completions that are texts as they are.
        system: said before every conversation that brings no system message.
        options: further variables of the chat template.
        console: where to print; the terminal's by default.

    Returns:
        0, or 1 where no record could be used.

    Raises:
        DataError: the source can't be read, or its columns are of no layout.
        ModelError: there is no tokenizer, or it has no chat template where one is needed.
    """
    from rich.console import Console

    console = console or Console(markup=False, highlight=False)
    tokenizer = Tokenizer.load(model)
    encoder, report = Encoder(tokenizer, train=train, plain=plain, system=system, options=options), Report()
    given = ReasoningGym(source.removeprefix(_GYM)) if source.startswith(_GYM) else source_of(source)
    shown = 0
    lengths: list[tuple[int, int]] = []
    for record, encoded in _encoded(given, columns, encoder, report, max(count, scan)):
        if shown < count:
            shown += 1
            _print(console, tokenizer, record, encoded)
        lengths += [(len(side), int(side.trained.sum())) for side in _sides(encoded)]
    _print_counts(console, report, lengths)
    if lengths and tokenizer.hf.chat_template and not tokenizer.spans().ends:
        console.print("The chat template ends turns of the assistant with no special token: nothing teaches to stop.", style="yellow")
    return 0 if lengths else 1


def values_of(options: Mapping[str, str]) -> dict[str, Any]:
    """What a command line says about variables: numbers, true, false, null, lists and objects as JSON, all else as texts."""
    found: dict[str, Any] = {}
    for name, text in options.items():
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def _encoded(
    source: Any, columns: Mapping[str, str] | None, encoder: Encoder, report: Report, scan: int
) -> Iterator[tuple[Record, Encoded | Pair]]:
    skipped = Report()
    stream = Stream(Mix({"data": source}, shuffle=False), report=skipped)
    layouts: dict[tuple[str, ...], Layout] = {}
    for raw in itertools.takewhile(lambda raw: not raw.epoch, itertools.islice(stream.at(0), scan)):
        report.add("read")
        key = tuple(raw.columns)
        if key not in layouts:
            layouts[key] = recognise(key, {**mapping_of(source), **(columns or {})})
        try:
            record = layouts[key].read(raw.columns, raw.place)
        except DataError as error:
            report.add("dropped", reason(error, raw.place), place=raw.place)
            continue
        for encoded in encoder.encode_all([record], report):
            report.add("used")
            yield record, encoded
    del skipped.counts["read", ""]  # one may be of the next epoch
    report.merge(skipped)


def _sides(encoded: Encoded | Pair) -> tuple[Encoded, ...]:
    return (encoded.chosen, encoded.rejected) if isinstance(encoded, Pair) else (encoded,)


def _print(console: Console, tokenizer: Tokenizer, record: Record, encoded: Encoded | Pair) -> None:
    kind = type(record).__name__.lower()
    if isinstance(encoded, Encoded):
        trained = "a prompt, nothing is trained" if isinstance(record, Question) else f"{int(encoded.trained.sum())} trained"
        console.print(f"── {record.place} · {kind} · {len(encoded)} tokens, {trained}", style=HEAD)
        console.print(coloured(tokenizer, encoded.tokens, encoded.trained, colours=console.is_terminal), soft_wrap=True)
        return
    console.print(f"── {record.place} · {kind} · {encoded.shared} tokens shared", style=HEAD)
    shared = encoded.chosen.tokens[: encoded.shared]
    console.print(coloured(tokenizer, shared, np.zeros(len(shared), np.bool_), colours=console.is_terminal), soft_wrap=True)
    for name, side in (("chosen", encoded.chosen), ("rejected", encoded.rejected)):
        console.print(f"── {name} · {int(side.trained.sum())} trained", style=HEAD)
        rest = side.tokens[encoded.shared :], side.trained[encoded.shared :]
        console.print(coloured(tokenizer, *rest, colours=console.is_terminal), soft_wrap=True)


def coloured(tokenizer: Tokenizer, tokens: np.ndarray, trained: np.ndarray, *, colours: bool = True) -> Styled:
    """The text of tokens, the trained ones in another colour (or within ⟦⟧); control characters are made visible.

    Args:
        tokenizer: whose they are.
        tokens: [n] int32.
        trained: [n] bool.
        colours: whether the terminal has any.
    """
    from rich.text import Text

    text = Text()
    edges = np.flatnonzero(np.diff(trained.astype(np.int8))) + 1
    for part, mine in zip(np.split(tokens, edges), np.split(trained, edges), strict=True):
        if len(part):
            words = visible(tokenizer.decode(part.tolist()))
            text.append(words if colours or not mine[0] else f"{_OPEN}{words}{_CLOSE}", style=TRAINED if mine[0] else GIVEN)
    return text


def visible(text: str) -> str:
    """With pictures for control characters: a record must not be able to steer the terminal."""
    return "".join(
        letter if letter in "\n\t" or not _controls(letter) else chr(0x2400 + ord(letter)) if ord(letter) < 0x20 else "�" for letter in text
    )


def _controls(letter: str) -> bool:
    number = ord(letter)
    return number < 0x20 or 0x7F <= number < 0xA0 or 0x202A <= number <= 0x202E or 0x2066 <= number <= 0x2069


def _print_counts(console: Console, report: Report, lengths: list[tuple[int, int]]) -> None:
    console.print("── counts", style=HEAD)
    for words, number in report.summary().items():
        console.print(visible(f"{number:>8}  {words}"), soft_wrap=True)
    if lengths:
        tokens, trained = np.array(lengths).T
        share = trained.sum() / tokens.sum()
        console.print(f"tokens of a sequence: median {int(np.median(tokens))}, longest {int(tokens.max())}; {share:.0%} are trained")

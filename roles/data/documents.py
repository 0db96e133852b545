"""The data role for training on records: packed rows, a block of records at a time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash
from rolecall.protocols.errors import ConfigError, DataError
from rolecall.protocols.messages import PackedBatch, Prompts
from rolecall.roles.base import Member, Role
from rolecall.roles.data.encode import TRAIN, Encoded, Encoder, Pair, Train
from rolecall.roles.data.mixing import Mix
from rolecall.roles.data.packer import TOO_LONG, TooLong, attention_share, pack_block
from rolecall.roles.data.records import Completion, Conversation, Layout, Question, Record, recognise
from rolecall.roles.data.report import Report, reason
from rolecall.roles.data.sources import Source, mapping_of, source_of
from rolecall.roles.data.stream import Raw, Stream, too_few_held_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD = -1  # number of the block of held-out records


class Documents(Role):
    """Conversations, completions, texts or preferences as packed rows for the policy.

    The stream of records is cut into blocks of so many positions. Block b is packed by itself: its rows are a pure function of
    (sources, mix, seed, model's tokenizer, settings, b), so that any member can make any block, at any time and as often as is
    asked, and a place in the stream is a block and a row of it. `Run.batches` asks for blocks ahead of the training, from
    each member in turn, and divides their rows over the policy's members by cost.

    Args:
        source: a Mix, Files(...), the path or URL of files, a list of records, or any Source.
        model: folder or hub name whose tokenizer and chat template are used.
        columns: our name of a column → the source's, before what the source itself says: {"completion": "answer"}.
        row_tokens: capacity of a row.
        block: records that are packed together; more fill the rows better, fewer are there sooner.
        held_out: one record in so many is kept for `held_out` and `questions`; 0 keeps none.
        seed: of the order; None means the run's.
        too_long: what to do with a record that doesn't fit a row: "cut", "split", "drop" or "refuse" it (roles/data/packer.py).
        unusable: what to do with a record that has no trained token, or that the template does not take: "drop" it (it is
            counted, and `report` says why and where), or "refuse" the data.
        train: what is trained of a conversation: what the assistant says ("assistant"), only its last turn ("last"), each turn in
            a record of its own ("each"), or all.
        plain: take prompts and completions that are texts as they are, without the chat template.
        system: said before every conversation that brings no system message.
        suffix: appended to the prompts of `questions`.
        options: further variables of the chat template: {"enable_thinking": False}. Where a template writes the date, "today"
            (an ISO date) makes it the same on every day that the run goes on.
    """

    name = "data"

    def __init__(
        self,
        source: Mix | Source | str | Path | Sequence[dict[str, Any]],
        *,
        model: str,
        columns: Mapping[str, str] | None = None,
        row_tokens: int = 1024,
        block: int = 1024,
        held_out: int = 0,
        seed: int | None = None,
        too_long: TooLong = "cut",
        unusable: Literal["refuse", "drop"] = "drop",
        train: Train = "assistant",
        plain: bool = False,
        system: str | None = None,
        suffix: str = "",
        options: dict[str, Any] | None = None,
    ) -> None:
        self.source, self.model, self.row_tokens, self.block, self.held = source, model, row_tokens, block, held_out
        self.seed, self.too_long, self.unusable, self.train, self.plain = seed, too_long, unusable, train, plain
        self.system, self.suffix, self.options = system, suffix, dict(options or {})
        self.columns = dict(columns or {})
        self._stream: Stream | None = None

    def check(self) -> None:
        """Refuse settings that make no sense, before anything starts.

        Raises:
            DataError, ConfigError: it says which.
        """
        if isinstance(self.source, Mix):
            self.source.check()
        else:
            source_of(self.source)
        if self.row_tokens < 2 or self.block < 1 or self.held < 0 or self.held == 1:
            raise ConfigError(
                "A number of the data is too small.",
                ask=f"row_tokens={self.row_tokens}, block={self.block}, held_out={self.held}",
                remedy="give row_tokens >= 2, block >= 1, and held_out of 2 or more (one record in so many), or 0 for none",
            )
        for name, value, allowed in (
            ("too_long", self.too_long, TOO_LONG),
            ("unusable", self.unusable, ("refuse", "drop")),
            ("train", self.train, TRAIN),
        ):
            if value not in allowed:
                raise ConfigError(f"The data has no {name} {value!r}.", have=", ".join(allowed), remedy="choose one of these")

    def setup(self, member: Member) -> None:
        """Open the sources and load the tokenizer.

        Raises:
            DataError: a source can't be used; it says why.
            ModelError: there is no tokenizer.
        """
        super().setup(member)
        self.check()
        from rolecall.roles.memory import keep_freed_memory
        from rolecall.roles.tokens import identity, load_tokenizer

        keep_freed_memory()
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.model)
        self._encoder = Encoder(tokenizer, train=self.train, plain=self.plain, system=self.system, suffix=self.suffix, options=self.options)
        self._tokenizer, (self._context, self._square) = identity(tokenizer), _facts(self.model)
        self._report = Report()
        self._stream = Stream(self.source, member.seed if self.seed is None else self.seed, report=self._report, held_out=self.held)
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._tried: list[bool] = []  # of the held-out records so far: whether they can be used
        self._mute: set[int] = set()  # places of those that ask nothing

    def close(self) -> None:
        """Give open files back."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def batch(self, block: int) -> PackedBatch:
        """The rows of a block; none where the data has ended before it. A member is quickest with rising numbers.

        Raises:
            DataError: a record can't be read or used and is to be refused, or no record of the block can be used.
        """
        started = time.perf_counter()
        stream, before = self._ready(), dict(self._report.counts)
        start = block * self.block
        if start < 0:
            raise DataError("Blocks are numbered from 0.", ask=f"block {block}")
        made = self._packed(stream.at(start, start + self.block), block, self._report)
        if not len(made.keys) and (stream.length is None or start < stream.length):
            new = {key: count - before.get(key, 0) for key, count in self._report.counts.items() if count > before.get(key, 0)}
            why = ", ".join(f"{count} {outcome}{': ' if word else ''}{word}" for (outcome, word), count in new.items())
            raise DataError(
                f"None of the {self.block} records from position {start} on can be trained.",
                have=why or "no record there",
                remedy="look at a few of them: the first of each reason is in the report (data.report)",
            )
        self._measure(made, time.perf_counter() - started, before)
        return made

    def held_out(self, count: int) -> PackedBatch:
        """The first `count` held-out records that can be used, packed; always the same ones, whatever the seed.

        Raises:
            DataError: fewer are held out, or one can't be used and is to be refused.
        """
        raws = list(itertools.islice(self._usable(), count))
        if len(raws) < count:
            raise too_few_held_out(count, len(raws))
        return self._packed(iter(raws), HELD, Report())  # they are no part of the stream

    def questions(self, count: int) -> Prompts:
        """The prompts of the first `count` held-out records, for a rollout: what comes before the assistant's last turn.

        Their other columns are those that rewards read. The records are those of `held_out`, but for any that asks nothing.

        Raises:
            DataError: fewer are held out, or one has nothing to ask or can't be used, and is to be refused.
        """
        found: list[tuple[Raw, Question]] = []
        for raw in self._usable():
            if len(found) == count:
                break
            try:
                found.append((raw, _question(raw, self._read(raw))))
            except DataError as error:
                self._leave_out(raw, error)
        if len(found) < count:
            raise too_few_held_out(count, len(found))
        asked = [question for _, question in found]
        encoded = self._encoder.encode_all(asked)
        tokens = [each.tokens for each in encoded if isinstance(each, Encoded)]
        names = sorted({name for question in asked for name in question.columns})
        return Prompts(
            keys=np.array([raw.position for raw, _ in found], np.int64),
            ids=tuple(xxhash.xxh3_128_hexdigest(each.tobytes())[:24] for each in tokens),
            tokens=np.concatenate(tokens),
            cu_seqlens=np.concatenate([[0], np.cumsum([len(each) for each in tokens])]).astype(np.int64),
            texts=tuple(_words(question.prompt) for question in asked),
            columns={name: tuple(question.columns.get(name) for question in asked) for name in names},
            tokenizer=self._tokenizer,
        )

    def _usable(self) -> Iterator[Raw]:
        """The held-out records that can be trained on, so that a measurement is of as many as were asked for."""
        for number, raw in enumerate(self._ready().all_held_out()):
            if number == len(self._tried):
                report = Report()
                self._packed(iter([raw]), HELD, report)
                self._tried.append(report.total("used") > 0)
                for why in () if self._tried[-1] else (why for outcome, why in report.counts if outcome == "dropped"):
                    self._report.add("noted", f"held out and not used: {why}", place=raw.place)
            if self._tried[number]:
                yield raw

    def _leave_out(self, raw: Raw, error: DataError) -> None:
        """Note a held-out record that asks nothing, once; refuse it if that was asked for, or if none of its kind asks anything."""
        why = getattr(error, "why", "")
        if self.unusable == "refuse" or not why:
            raise error
        if raw.position not in self._mute:
            self._mute.add(raw.position)
            self._report.add("noted", f"held out and not asked: {why}", place=raw.place)

    def state(self, block: int = 0, row: int = 0) -> dict[str, int]:
        """A place in the stream as a few integers, for `restore`; where to read on from is among them."""
        return {**self._ready().state(block * self.block), **self._meaning(), "block": block, "row": row}

    def restore(self, state: dict[str, int]) -> None:
        """Make ready to go on where `state` was taken; the number of members doesn't matter.

        Raises:
            DataError: it was taken from other data, another tokenizer or other settings; nothing is changed.
        """
        now = self._meaning()
        other = [name for name, value in now.items() if state.get(name) != value]
        if other:
            raise DataError(
                f"The rows can't go on from this state: {', '.join(other)} differs.",
                ask=", ".join(f"{name}={state.get(name)}" for name in other),
                have=", ".join(f"{name}={now[name]}" for name in other),
                remedy="resume with the same model and the same settings of Documents",
            )
        self._ready().restore(state)

    def report(self) -> dict[str, int]:
        """What became of the records that this member read so far: "used", "cut: too long", "dropped: no trained token (file:3)"."""
        return self._report.summary()

    def _packed(self, raws: Iterator[Raw], block: int, report: Report) -> PackedBatch:
        return pack_block(
            self._encoded(raws, report),
            capacity=self.row_tokens,
            block=block,
            longest=self._context,
            too_long=self.too_long,
            square=self._square,
            report=report,
            tokenizer=self._tokenizer,
        )

    def _encoded(self, raws: Iterator[Raw], report: Report) -> list[Encoded | Pair]:
        records = []
        for raw in raws:
            try:
                records.append(self._read(raw))
            except DataError as error:
                if self.unusable == "refuse" or not self._layouts:  # no layout was ever found: the columns are not what was meant
                    raise
                report.add("dropped", reason(error, raw.place), place=raw.place)
        return self._encoder.encode_all(records, report if self.unusable == "drop" else None)

    def _read(self, raw: Raw) -> Record:
        key = (raw.source, *raw.columns)
        if key not in self._layouts:
            source = self.source.sources[raw.source] if isinstance(self.source, Mix) else self.source
            try:
                self._layouts[key] = recognise(
                    raw.columns, {**mapping_of(source), **self.columns}, ("preference", "conversation", "completion", "text")
                )
            except DataError as error:
                raise DataError(f"{raw.place}: {error}", why="columns of no layout") from error
        return self._layouts[key].read(raw.columns, raw.place)

    def _measure(self, made: PackedBatch, took: float, before: dict[tuple[str, str], int]) -> None:
        used = int((made.segments >= 0).sum())
        self.meter.add("tokens_per_s", used / took, took)
        if used:
            self.meter.add("fill", used / len(made.segments), len(made.segments))
        for outcome in ("read", "used", "cut", "split", "dropped"):
            was = sum(count for (word, _), count in before.items() if word == outcome)
            self.meter.add(outcome, float(self._report.total(outcome) - was))

    def _meaning(self) -> dict[str, int]:
        """What a block's rows depend on besides the stream."""
        options = sorted(self.options.items())
        words: tuple[object, ...] = (
            self.row_tokens,
            self.block,
            self.too_long,
            self.unusable,
            self.train,
            self.plain,
            self.system,
            options,
        )
        words += (sorted(self.columns.items()),) if self.columns else ()  # runs without them go on as they were
        return {"settings": xxhash.xxh3_64_intdigest(repr((*words, self._context, self._tokenizer)).encode()) >> 16}

    def _ready(self) -> Stream:
        if self._stream is None:
            raise DataError("The data role is not set up, or was closed.", remedy="call setup(Member()) first")
        return self._stream


def _question(raw: Raw, record: Record) -> Question:
    """What a record asks.

    Raises:
        DataError: nothing.
    """
    columns = {name: value for name, value in raw.columns.items() if name not in ("messages", "prompt", "completion", "chosen", "rejected")}
    if isinstance(record, Conversation):
        turns = [number for number, message in enumerate(record.messages) if message["role"] == "assistant"]
        if turns and turns[-1] > 0:
            before = record.messages[: turns[-1]]
            return Question(prompt=before, columns=columns, tools=record.tools, options=record.options, id=record.id, place=record.place)
    if isinstance(record, Completion):
        return Question(prompt=record.prompt, columns=columns, tools=record.tools, options=record.options, id=record.id, place=record.place)
    talk = isinstance(record, Conversation)
    raise DataError(
        f"{raw.place}: there is no question in a {type(record).__name__.lower()}.",
        remedy="begin it with a message of the user" if talk else "hold out conversations or completions",
        why="nothing before the assistant's turn" if talk else "",
    )


def _words(prompt: Any) -> str:
    """What the user says."""
    return prompt if isinstance(prompt, str) else "\n".join(str(each["content"]) for each in prompt if each["role"] == "user")


def _facts(model: str) -> tuple[int, float]:
    """Context and `attention_share` of a model from its configuration; 0 where that says too little."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError):
        return 0, 0.0  # a tokenizer alone
    context = getattr(config, "max_position_embeddings", None) or 0
    try:
        hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
        head = getattr(config, "head_dim", None) or hidden // heads
        own = 2 * hidden * head * (heads + (getattr(config, "num_key_value_heads", None) or heads)) + 3 * hidden * config.intermediate_size
        return context, attention_share(heads * head, layers, layers * own + hidden * config.vocab_size)
    except (AttributeError, TypeError):
        return context, 0.0  # another kind of model

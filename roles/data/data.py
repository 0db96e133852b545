"""The data role: a stream of prompts whose whole state is a few integers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from rolecall.protocols.errors import DataError
from rolecall.protocols.messages import Prompts
from rolecall.roles.base import Member, Role
from rolecall.roles.data.ahead import Ahead
from rolecall.roles.data.mixing import Mix
from rolecall.roles.data.problems import Problem, Split, problems_of, split
from rolecall.roles.data.report import Report, reason
from rolecall.roles.data.shares import Shares, earlier_of, together
from rolecall.roles.data.sources import Found, Source, listed, mapping_of, source_of
from rolecall.roles.data.stream import Stream


@dataclass(frozen=True, slots=True)
class _Made:
    """A problem and its tokens."""

    problem: Problem
    tokens: np.ndarray
    epoch: int = 0


class _Listed:
    """Problems as a source."""

    def __init__(self, problems: list[Problem]) -> None:
        self._problems = problems

    def records(self, *, repeats: bool) -> Iterator[Found]:
        return ((problem.place, {"problem": problem}) for problem in self._problems)


class Data(Role):
    """Prompts for the rollout: training ones without end, and held-out ones in a fixed order.

    The stream (`stream.py`) is the training problems, of several sources by their shares in a Mix, shuffled anew in each
    epoch; a prompt's key is its place in the stream. With several members, member r of w gives the places r, r + w, r + 2w, …,
    so none is given twice. Training and held-out problems never share a text, and no text comes twice in an epoch unless
    `repeats` is set. Prompts are templated and tokenised ahead of being asked for, in a thread.

    Args:
        source: ReasoningGym(...), Files(...), Hub(...), a path or URL, a list of records, any Source, or a Mix of these.
        model: folder or hub name whose tokenizer and chat template are used.
        held_out: distinct problems to hold out; the same ones whatever the seed.
        seed: of the order; None means the run's.
        ahead: batches (of the size last asked for) to have ready.
        suffix: appended to every prompt for the model, and not seen by rewards.
        system: said before every prompt that brings no system message.
        options: further variables of the chat template: {"enable_thinking": False}. Where a template writes the date, "today"
            (an ISO date) makes it the same on every day that the run goes on.
        shuffle: False gives the source's own order.
        repeats: keep training problems as often as the source gives them, which keeps the proportions of a task generator.
        max_prompt_tokens: longest prompt; 0 means any.
        too_long: what to do with longer ones: "refuse" all the data at the start, or "drop" them and count `data/dropped`.
        unusable: what to do with a record that holds no prompt, or that the chat template does not take: "refuse" the data, or
            "drop" it (it is counted, and `report` says why and where).
        deadline: seconds that one call may wait for prompts.
    """

    name = "data"

    def __init__(
        self,
        source: Mix | Source | str | Path | Sequence[dict[str, Any]],
        *,
        model: str,
        held_out: int = 256,
        seed: int | None = None,
        ahead: int = 2,
        suffix: str = "",
        system: str | None = None,
        options: dict[str, Any] | None = None,
        shuffle: bool = True,
        repeats: bool = False,
        max_prompt_tokens: int = 0,
        too_long: Literal["refuse", "drop"] = "refuse",
        unusable: Literal["refuse", "drop"] = "refuse",
        deadline: float = 120.0,
    ) -> None:
        self.source, self.model, self.held, self.seed = source, model, held_out, seed
        self.ahead, self.suffix, self.system, self.shuffle, self.repeats = ahead, suffix, system, shuffle, repeats
        self.max_prompt_tokens, self.too_long, self.deadline, self.options = max_prompt_tokens, too_long, deadline, dict(options or {})
        self.unusable = unusable
        self._queue: Ahead[_Made] | None = None

    def check(self) -> None:
        """Refuse settings that make no sense, before anything starts.

        Raises:
            DataError: it says which.
        """
        self._mix().check()
        for source in self._mix().sources.values():
            source_of(source)
        for setting, least in (("held", 0), ("ahead", 0), ("max_prompt_tokens", 0)):
            if getattr(self, setting) < least:
                word = "held_out" if setting == "held" else setting
                raise DataError(f"{word} can't be negative.", ask=f"{word}={getattr(self, setting)}")
        for what, choice in (("are too long", self.too_long), ("can't be used", self.unusable)):
            if choice not in ("refuse", "drop"):
                raise DataError(f"There are two ways to treat prompts that {what}.", ask=repr(choice), have="'refuse' and 'drop'")
        if not (math.isfinite(self.deadline) and self.deadline > 0):
            raise DataError("The deadline must be a positive number of seconds.", ask=f"deadline={self.deadline}")

    def setup(self, member: Member) -> None:
        """Read the source, load the tokenizer, hold problems out, and start preparing.

        Raises:
            DataError: the data can't be used; it says why.
            ModelError: there is no tokenizer, or it has no chat template.
        """
        super().setup(member)
        self.check()
        mix, lost, problems = self._mix(), Report(), []
        for name, source in mix.sources.items():
            given = listed(source, lost, repeats=self.repeats)
            problems += problems_of(given, name, mapping_of(source), lost if self.unusable == "drop" else None)
        self._split: Split = split(problems, self.held, repeats=self.repeats)
        parts = {name: _Listed([each for each in self._split.training if each.source == name]) for name in mix.sources}
        mix = msgspec.structs.replace(mix, sources=parts, shuffle=mix.shuffle and self.shuffle)
        self._stream = Stream(mix, member.seed if self.seed is None else self.seed)
        if not self.repeats and self._split.repeated:
            lost.add("noted", "left out: a text that came before", number=self._split.repeated)
        from rolecall.roles.data.encode import Encoder
        from rolecall.roles.tokens import identity, load_tokenizer, require_chat_template

        tokenizer = load_tokenizer(self.model)
        require_chat_template(tokenizer)
        self._encoder = Encoder(tokenizer, suffix=self.suffix, system=self.system, options=self.options)
        self._tokenizer = identity(tokenizer)
        if self.max_prompt_tokens and self.too_long == "refuse":
            self._refuse_long()
        aside = Report()
        held = [self._made(problem, aside) for problem in self._split.held_out]
        self._held = [made for made in held if made is not None]
        for (outcome, why), number in aside.counts.items():
            lost.add("noted", f"held out and not used: {why}", place=aside.first[outcome, why], number=number)
        if member.rank == 0:  # every member lists all records: they are told once
            self._stream.report.merge(lost)
        self._start(Shares(), member.rank)
        self._reported = len(self._held) - len(held)  # those left out above count at the next report

    def close(self) -> None:
        """End the thread."""
        if self._queue is not None:
            self._queue.close()
            self._queue = None

    def prompts(self, count: int) -> Prompts:
        """The next `count` training prompts of this member's share of the stream; fewer where a mix ends.

        Raises:
            DataError: a prompt can't be prepared, it took longer than the deadline, or the data has ended.
        """
        if count < 1:
            raise DataError("At least one prompt must be asked for.", ask=f"{count} prompts")
        if self._queue is None:
            raise DataError("The data role is not set up, or was closed.", remedy="call setup(Member()) first")
        taken = self._queue.take(count, keep=self.ahead * count, deadline=self.deadline)
        if not taken:
            raise DataError(
                "The data has ended.", have=f"{self._stream.length} positions", remedy='raise epochs, or set dry="repeat" in the Mix'
            )
        self._next = taken[-1][0] + self.member.world
        dropped = self._queue.dropped
        self.meter.add("dropped", float(dropped - self._reported))
        self._reported = dropped
        self.meter.add("ready", float(self._queue.ready))
        self.meter.add("epoch", float(max(made.epoch for _, made in taken)))
        return self._message([index for index, _ in taken], [made for _, made in taken])

    def held_out(self, count: int, start: int = 0) -> Prompts:
        """`count` held-out prompts from number `start` on, always in the same order; their keys are -1, -2, …

        Raises:
            DataError: fewer are held out.
        """
        if count < 1 or start < 0 or start + count > len(self._held):
            long = f" ({self.held - len(self._held)} more are too long)" if len(self._held) < self.held else ""
            raise DataError(
                "So many problems are not held out.",
                ask=f"{count} from number {start} on",
                have=f"{len(self._held)} held out{long}",
                remedy="ask for fewer, or raise held_out of Data",
            )
        return self._message([-1 - number for number in range(start, start + count)], self._held[start : start + count])

    def state(self) -> dict[str, int]:
        """Where this member's share of the stream is, as a few integers: `restore` goes on from there exactly."""
        return {**self._shares.state(self._next, self.member.rank, self.member.world), **self._stream.meaning()}

    def restore(self, state: dict[str, int] | list[dict[str, int]]) -> None:
        """Go on where `state` was taken; nothing is given twice or left out.

        Args:
            state: of this member; or a list of the states of all members of a run, whose number may have been another.

        Raises:
            DataError: it was taken from other data, another seed or other members; nothing is changed.
        """
        states = state if isinstance(state, list) else [state]
        now = self._stream.meaning()
        for each in states:
            other = [name for name, value in now.items() if each.get(name) != value]
            if other or each.get("next", -1) < 0:
                raise DataError(
                    f"The data can't go on from this state: {', '.join(other) or 'next'} differs.",
                    ask=", ".join(f"{name}={each.get(name)}" for name in other or ["next"]),
                    have=", ".join(f"{name}={now[name]}" for name in other),
                    remedy="resume with the same sources, mix and seed",
                )
        rank, world = self.member.rank, self.member.world
        own = next((each for each in states if (each.get("rank"), each.get("world")) == (rank, world)), None)
        if own is not None:
            self._start(earlier_of(own), own["next"])
        else:
            shares = together(states)
            self._start(shares, shares.first(rank, world))

    def report(self) -> dict[str, int]:
        """What became of the records that this member prepared so far: how many were read, used and dropped, and why."""
        return self._stream.report.summary()

    def _mix(self) -> Mix:
        return self.source if isinstance(self.source, Mix) else Mix({"data": self.source})

    def _start(self, shares: Shares, first: int) -> None:
        self.close()
        self._shares, self._next, self._reported = shares, first, 0
        self._queue = Ahead(self._items(first), patience=len(self._split.training))

    def _items(self, first: int) -> Iterator[tuple[int, _Made | None]]:
        """The prompts of this member's share, or None where one can't be used. Runs in the thread."""
        for raw in self._stream.at(first, step=self.member.world):
            if self._shares.given(raw.position):
                continue
            made = self._made(raw.columns["problem"], self._stream.report, raw.epoch)
            if made is not None:
                self._stream.report.add("used")
            yield raw.position, made

    def _made(self, problem: Problem, report: Report, epoch: int = 0, *, cut: bool = True) -> _Made | None:
        """A problem with its tokens; None where it is too long or the template refuses it, and is to be dropped: it is counted."""
        try:
            made, why = _Made(problem, self._tokens(problem), epoch), "too long"
        except DataError as error:
            if self.unusable == "refuse":
                raise
            made, why = None, reason(error, problem.place)
        if made is not None and not (cut and self._is_long(made)):
            return made
        report.add("dropped", why, place=problem.place)
        return None

    def _tokens(self, problem: Problem) -> np.ndarray:
        """The prompt's tokens, up to where the assistant begins: [n] int32."""
        encoded = self._encoder.encode(problem.question)
        tokens: np.ndarray = encoded.tokens  # type: ignore[union-attr]  # a question has one side
        return tokens

    def _is_long(self, made: _Made) -> bool:
        return bool(self.max_prompt_tokens) and len(made.tokens) > self.max_prompt_tokens

    def _refuse_long(self) -> None:
        problems = [*self._split.training, *self._split.held_out]
        lengths = [(len(made.tokens), problem.place) for problem in problems if (made := self._made(problem, Report(), cut=False))]
        long = [each for each in lengths if each[0] > self.max_prompt_tokens]
        if long:
            length, place = max(long)
            raise DataError(
                f"{len(long)} of {len(problems)} prompts are too long; the longest has {length} tokens ({place}).",
                ask=f"at most {self.max_prompt_tokens} tokens a prompt",
                remedy=f'raise max_prompt_tokens to {length} if the model has room for it, or set too_long="drop"',
            )

    def _message(self, keys: list[int], made: list[_Made]) -> Prompts:
        problems = [each.problem for each in made]
        return Prompts(
            keys=np.array(keys, dtype=np.int64),
            ids=tuple(problem.id for problem in problems),
            tokens=np.concatenate([each.tokens for each in made]),
            cu_seqlens=np.concatenate([[0], np.cumsum([len(each.tokens) for each in made])]).astype(np.int64),
            texts=tuple(problem.text for problem in problems),
            columns={name: tuple(problem.columns.get(name) for problem in problems) for name in self._split.columns},
            tokenizer=self._tokenizer,
        )

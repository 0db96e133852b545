"""The data role: a stream of prompts whose whole state is a few integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rolecall.protocols.errors import DataError
from rolecall.protocols.messages import Prompts
from rolecall.roles.base import Member, Role
from rolecall.roles.data.ahead import Ahead
from rolecall.roles.data.problems import Problem, Split, split
from rolecall.roles.data.sources import Source, mapping_of, source_of


@dataclass(frozen=True, slots=True)
class _Made:
    """A problem and its tokens."""

    problem: Problem
    tokens: np.ndarray


class Data(Role):
    """Prompts for the rollout: training ones without end, and held-out ones in a fixed order.

    The stream is the training problems, shuffled anew in each epoch by (seed, epoch); a prompt's key is its place in the
    stream. With several members, member r of w gives the places r, r + w, r + 2w, …, so none is given twice. Training and
    held-out problems never share a text, and no text comes twice in an epoch unless `repeats` is set. Prompts are templated
    and tokenised ahead of being asked for, in a thread.

    Args:
        source: ReasoningGym(...), the path of a file of JSON lines, a list of records, or any Source.
        model: folder or hub name whose tokenizer and chat template are used.
        held_out: distinct problems to hold out; the same ones whatever the seed.
        seed: of the order; None means the run's.
        ahead: batches (of the size last asked for) to have ready.
        suffix: appended to every prompt for the model, and not seen by rewards.
        system: said before every prompt that brings no system message.
        shuffle: False gives the source's own order.
        repeats: keep training problems as often as the source gives them, which keeps the proportions of a task generator.
        max_prompt_tokens: longest prompt; 0 means any.
        too_long: what to do with longer ones: "refuse" all the data at the start, or "drop" them and count `data/dropped`.
        deadline: seconds that one call may wait for prompts.
    """

    name = "data"

    def __init__(
        self,
        source: Source | str | Path | Sequence[dict[str, Any]],
        *,
        model: str,
        held_out: int = 256,
        seed: int | None = None,
        ahead: int = 2,
        suffix: str = "",
        system: str | None = None,
        shuffle: bool = True,
        repeats: bool = False,
        max_prompt_tokens: int = 0,
        too_long: Literal["refuse", "drop"] = "refuse",
        deadline: float = 120.0,
    ) -> None:
        self.source, self.model, self.held, self.seed = source, model, held_out, seed
        self.ahead, self.suffix, self.system, self.shuffle, self.repeats = ahead, suffix, system, shuffle, repeats
        self.max_prompt_tokens, self.too_long, self.deadline = max_prompt_tokens, too_long, deadline
        self._queue: Ahead[_Made] | None = None

    def check(self) -> None:
        """Refuse settings that make no sense, before anything starts.

        Raises:
            DataError: it says which.
        """
        source_of(self.source)
        for setting, least in (("held", 0), ("ahead", 0), ("max_prompt_tokens", 0)):
            if getattr(self, setting) < least:
                word = "held_out" if setting == "held" else setting
                raise DataError(f"{word} can't be negative.", ask=f"{word}={getattr(self, setting)}")
        if self.too_long not in ("refuse", "drop"):
            raise DataError("There are two ways to treat prompts that are too long.", ask=repr(self.too_long), have="'refuse' and 'drop'")
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
        self._split: Split = split(
            source_of(self.source).records(repeats=self.repeats), self.held, repeats=self.repeats, mapping=mapping_of(self.source)
        )
        from rolecall.roles.data.templating import Templater
        from rolecall.roles.tokens import identity, load_tokenizer, require_chat_template

        tokenizer = load_tokenizer(self.model)
        require_chat_template(tokenizer)
        self._templater, self._tokenizer = Templater(tokenizer, self.suffix, self.system), identity(tokenizer)
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        if self.max_prompt_tokens and self.too_long == "refuse":
            self._refuse_long()
        held = [_Made(problem, self._templater.tokens(problem)) for problem in self._split.held_out]
        self._held = [made for made in held if not self._is_long(made)]
        self._start(member.rank)
        self._reported = len(self._held) - len(held)  # those left out above count at the next report

    def close(self) -> None:
        """End the thread."""
        if self._queue is not None:
            self._queue.close()
            self._queue = None

    def prompts(self, count: int) -> Prompts:
        """The next `count` training prompts of this member's share of the stream.

        `epoch` of the message is that of its first prompt.

        Raises:
            DataError: a prompt can't be prepared, or it took longer than the deadline.
        """
        if count < 1:
            raise DataError("At least one prompt must be asked for.", ask=f"{count} prompts")
        if self._queue is None:
            raise DataError("The data role is not set up, or was closed.", remedy="call setup(Member()) first")
        taken = self._queue.take(count, keep=self.ahead * count, deadline=self.deadline)
        self._next = taken[-1][0] + self.member.world
        dropped = self._queue.dropped
        self.meter.add("dropped", float(dropped - self._reported))
        self._reported = dropped
        self.meter.add("ready", float(self._queue.ready))
        epoch = taken[0][0] // len(self._split.training)
        return self._message([index for index, _ in taken], [made for _, made in taken], epoch)

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
        return self._message([-1 - number for number in range(start, start + count)], self._held[start : start + count], 0)

    def state(self) -> dict[str, int]:
        """Where the stream is: `restore` goes on from there exactly."""
        return {"next": self._next, **self._meaning()}

    def restore(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken.

        Raises:
            DataError: it was taken from other data, another seed, or another member; nothing is changed.
        """
        now = self._meaning()
        other = [name for name, value in now.items() if state.get(name) != value]
        if other or state.get("next", -1) < 0:
            raise DataError(
                f"The data can't go on from this state: {', '.join(other) or 'next'} differs.",
                ask=", ".join(f"{name}={state.get(name)}" for name in other or ["next"]),
                have=", ".join(f"{name}={now[name]}" for name in other),
                remedy="resume with the same source, seed and number of data members",
            )
        self._start(state["next"])

    def _meaning(self) -> dict[str, int]:
        """What the number `next` depends on."""
        ids = sha256("".join(problem.id for problem in self._split.training).encode()).digest()
        facts = {"problems": int.from_bytes(ids[:6], "little"), "seed": self._seed, "shuffle": int(self.shuffle)}
        return {**facts, "rank": self.member.rank, "world": self.member.world}

    @property
    def _seed(self) -> int:
        return self.member.seed if self.seed is None else self.seed

    def _start(self, first: int) -> None:
        self.close()
        self._next, self._reported = first, 0
        self._queue = Ahead(self._make, first, self.member.world, patience=len(self._split.training))

    def _make(self, index: int) -> _Made | None:
        """The prompt at a place of the stream, or None where it is too long. Runs in the thread."""
        epoch, place = divmod(index, len(self._split.training))
        if self._order[0] != epoch:
            self._order = (epoch, self._shuffled(epoch))
        problem = self._split.training[int(self._order[1][place])]
        made = _Made(problem, self._templater.tokens(problem))
        return None if self._is_long(made) else made

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The order of an epoch. RandomState, because its stream is frozen: a run can be resumed with another numpy."""
        count = len(self._split.training)
        if not self.shuffle:
            return np.arange(count)
        words = [self._seed & 0xFFFFFFFF, (self._seed >> 32) & 0xFFFFFFFF, epoch]
        return np.random.RandomState(words).permutation(count)

    def _is_long(self, made: _Made) -> bool:
        return bool(self.max_prompt_tokens) and len(made.tokens) > self.max_prompt_tokens

    def _refuse_long(self) -> None:
        problems = [*self._split.training, *self._split.held_out]
        lengths = [(len(self._templater.tokens(problem)), problem.place) for problem in problems]
        long = [each for each in lengths if each[0] > self.max_prompt_tokens]
        if long:
            length, place = max(long)
            raise DataError(
                f"{len(long)} of {len(problems)} prompts are too long; the longest has {length} tokens ({place}).",
                ask=f"at most {self.max_prompt_tokens} tokens a prompt",
                remedy=f'raise max_prompt_tokens to {length} if the model has room for it, or set too_long="drop"',
            )

    def _message(self, keys: list[int], made: list[_Made], epoch: int) -> Prompts:
        problems = [each.problem for each in made]
        return Prompts(
            keys=np.array(keys, dtype=np.int64),
            ids=tuple(problem.id for problem in problems),
            tokens=np.concatenate([each.tokens for each in made]),
            cu_seqlens=np.concatenate([[0], np.cumsum([len(each.tokens) for each in made])]).astype(np.int64),
            texts=tuple(problem.text for problem in problems),
            columns={name: tuple(problem.columns.get(name) for problem in problems) for name in self._split.columns},
            epoch=epoch,
            tokenizer=self._tokenizer,
        )

"""Problems made by a task generator of reasoning-gym."""

from __future__ import annotations

import datetime
import difflib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from rolecall.protocols.errors import DataError

_PATIENCE = 10  # a generator has no more to give when so many times the problems found bring nothing new …
_LEAST = 1000  # … and at least so many draws


class ReasoningGym(msgspec.Struct, frozen=True):
    """Problems made by a task of the package reasoning-gym; columns `answer`, `metadata`, `data_source`."""

    task: str  # "chain_sum", "gcd", …
    config: dict[str, Any] = {}  # of the task: {"min_terms": 2, "max_terms": 2}
    size: int = 2000  # distinct problems to make (problems, where repeats are kept)
    seed: int = 0  # of the problems; not the run's, so that runs with other seeds have the same problems
    completion: str = ""  # for fine-tuning: the metadata that is the worked answer ("answer_cot"), or "answer" for the answer alone

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
                metadata = _plain(entry.get("metadata", {}))
                columns = {"answer": entry["answer"], "metadata": metadata, "data_source": f"reasoning_gym/{self.task}"}
                yield f"{self.task} {draw}", {"prompt": entry["question"], **self._worked(entry), **columns}
            if given == self.size:
                return
            if not repeats and idle >= max(_LEAST, _PATIENCE * len(seen)):
                raise DataError(
                    f"The task {self.task} with {self.config or 'its own settings'} has only {len(seen)} distinct problems.",
                    ask=f"{self.size} distinct problems",
                    have=f"{len(seen)}, and the last {idle} draws brought no new one",
                    remedy=f"set size={len(seen)} and hold fewer out, or give the task a wider range (more digits, more terms)",
                )

    def _worked(self, entry: dict[str, Any]) -> dict[str, str]:
        """The column `completion`, where one is asked for."""
        if not self.completion:
            return {}
        known = {"answer": entry["answer"], **entry.get("metadata", {})}
        if not isinstance(known.get(self.completion), str):
            texts = [name for name, value in known.items() if isinstance(value, str)]
            raise DataError(
                f"The task {self.task} has no text {self.completion!r} to train on.",
                have=", ".join(texts),
                remedy=f"set completion to one of these: {_nearest(self.completion, texts)}",
            )
        return {"completion": known[self.completion]}

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


def _plain(value: Any) -> Any:
    """The same of what can travel in a message; anything else (the fractions of gsm_symbolic, say) in words."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [_plain(item) for item in value]
    known = value is None or isinstance(value, str | int | float | bytes | datetime.date) or hasattr(value, "dtype")
    return value if known else str(value)


def _nearest(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"write {near[0]!r}" if near else f"choose one of {', '.join(sorted(words)[:8])}, …"

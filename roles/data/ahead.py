"""Prompts made ahead by a thread, in order, a bounded number of them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from rolecall.protocols.errors import DataError

T = TypeVar("T")
_STOP = 10.0  # seconds for the thread to end


class Ahead(Generic[T]):
    """Takes items from an iterator before they are asked for.

    Args:
        items: (index, item) in turn, or (index, None) for what is left out; it runs in the thread.
        patience: items left out in a row after which something must be wrong.
    """

    def __init__(self, items: Iterator[tuple[int, T | None]], patience: int) -> None:
        self.made = 0  # items made so far, handed out or not
        self.dropped = 0  # items left out so far
        self._items, self._patience = items, patience
        self._ready: deque[tuple[int, T]] = deque()
        self._target = 0  # how many to have ready
        self._error: BaseException | None = None
        self._closed = self._ended = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="rolecall-data", daemon=True)
        self._thread.start()

    def take(self, count: int, *, keep: int, deadline: float) -> list[tuple[int, T]]:
        """The next `count` items with their indices, fewer at the end; afterwards `keep` more are made in the background.

        Raises:
            DataError: making an item failed (its cause is attached), or took longer than `deadline` seconds.
        """
        until = time.monotonic() + deadline
        with self._change:
            self._target = count
            self._change.notify_all()
            while len(self._ready) < count and self._error is None and not self._ended:
                if not self._change.wait(max(0.0, until - time.monotonic())) and time.monotonic() >= until:
                    raise DataError(
                        f"Preparing {count} prompts took longer than {deadline:g} s.",
                        have=f"{len(self._ready)} of them",
                        remedy="ask for fewer at once, or raise the deadline of Data",
                    )
            if len(self._ready) < count and self._error is not None:
                if isinstance(self._error, DataError):
                    raise self._error
                raise DataError(f"Preparing prompts failed: {type(self._error).__name__}: {self._error}") from self._error
            self._target = keep
            taken = [self._ready.popleft() for _ in range(min(count, len(self._ready)))]
            self._change.notify_all()
            return taken

    def wait_idle(self, deadline: float) -> bool:
        """Wait until as many are ready as wanted (or the thread has ended); False if not within `deadline` seconds."""
        with self._change:
            return self._change.wait_for(lambda: len(self._ready) >= self._target or self._error is not None or self._ended, deadline)

    @property
    def ready(self) -> int:
        """How many items wait to be taken."""
        return len(self._ready)

    def close(self) -> None:
        """End the thread."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join(_STOP)

    def _run(self) -> None:
        row = 0  # left out in a row
        try:
            while True:
                with self._change:
                    self._change.wait_for(lambda: self._closed or len(self._ready) < self._target)
                    if self._closed:
                        return
                index, item = next(self._items, (-1, None))
                if index < 0:
                    break
                row = 0 if item is not None else row + 1
                if row > self._patience:
                    raise DataError(
                        f"The last {row} prompts were all too long, or refused by the chat template.",
                        remedy="raise max_prompt_tokens, or look at the prompts: rolecall data show",
                    )
                with self._change:
                    if item is None:
                        self.dropped += 1
                    else:
                        self.made += 1
                        self._ready.append((index, item))
                    self._change.notify_all()
            with self._change:
                self._ended = True
                self._change.notify_all()
        except BaseException as error:  # told by the next `take`: a thread has nobody to raise to
            with self._change:
                self._error = error
                self._change.notify_all()

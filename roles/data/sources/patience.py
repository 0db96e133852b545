"""Waiting for files that are elsewhere: each attempt has a deadline, failed ones are repeated, then the file is named."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from rolecall.protocols.errors import DataError

T = TypeVar("T")
_HOPELESS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError)


class Patience(msgspec.Struct, frozen=True):
    """How long to wait for a remote file."""

    deadline: float = 60.0  # seconds that one attempt may take
    attempts: int = 4
    pause: float = 0.5  # seconds before the second attempt; doubled before each further one

    def call(self, action: Callable[[], T], what: str) -> T:
        """What `action` returns; it runs in a thread, so that one that hangs is left behind.

        Raises:
            DataError: every attempt failed or took too long, or the file isn't there; it says which file, and why.
        """
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            done, value, error = self._once(action)
            if done:
                return value  # type: ignore[no-any-return]
            if isinstance(error, DataError):
                raise error
            if isinstance(error, _HOPELESS) or attempt + 1 == self.attempts:
                raise unreadable(what, error, attempt + 1) from error
        raise DataError("A file must be tried at least once.", ask=f"attempts={self.attempts}")

    def _once(self, action: Callable[[], Any]) -> tuple[bool, Any, Exception]:
        """Whether it went well, what it returned, and what went wrong otherwise."""
        late = TimeoutError(f"no answer within {self.deadline:g} s")
        found: list[tuple[bool, Any, Exception]] = []

        def run() -> None:
            try:
                found.append((True, action(), late))
            except Exception as error:
                found.append((False, None, error))

        thread = threading.Thread(target=run, name="rolecall-read", daemon=True)
        thread.start()
        thread.join(self.deadline)
        return found[0] if found else (False, None, late)


def unreadable(what: str, error: Exception, attempts: int = 1) -> DataError:
    """The error of a file that can't be read."""
    tried = f" (tried {attempts} times)" if attempts > 1 else ""
    reason = (
        "no such file" if isinstance(error, FileNotFoundError) else (getattr(error, "strerror", None) or str(error) or type(error).__name__)
    )
    remedy = "look whether it is still there, and can be read with the rights you have"
    if isinstance(error, ImportError):
        remedy = "install the package that reads this kind of URL: s3fs for s3, gcsfs for gs, adlfs for az"
    elif isinstance(error, TimeoutError):
        remedy = "look whether the server answers, or raise the deadline: Files(…, patience=Patience(deadline=…))"
    return DataError(f"{what} can't be read{tried}: {reason}.", remedy=remedy)

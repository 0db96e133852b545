"""`launch`: what stands under a controller's `if __name__ == "__main__"`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from rolecall.actors.config import parse
from rolecall.protocols import PlanError, RolecallError, UserError

A = TypeVar("A", bound=msgspec.Struct)

USER_MISTAKE, FAILED, INTERRUPTED = 2, 1, 130


def launch(main: Callable[[A], None], args: type[A], argv: Sequence[str] | None = None) -> None:
    """Read the configuration, run `main`, and end with an exit code that scripts can tell apart.

    A user's mistake (exit code 2) and a failed member (1) print their message without our own traceback; a member's
    remote traceback is printed, since that is where the fault is. Ctrl-C gives 130.
    """
    parsed = parse(args, argv)
    try:
        main(parsed)
    except PlanError as error:
        _show_reasons(error)
        sys.exit(USER_MISTAKE)
    except UserError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(USER_MISTAKE)
    except RolecallError as error:
        cause = getattr(error, "cause", None)
        remote = getattr(error, "remote", "")
        if remote and not isinstance(cause, UserError):
            print(f"\n{remote}", file=sys.stderr)
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(USER_MISTAKE if isinstance(cause, UserError) else FAILED)
    except KeyboardInterrupt:
        print("\ninterrupted: members and placement groups were ended; the run folder is kept.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _show_reasons(error: PlanError) -> None:
    from rich.console import Console
    from rolecall.placement.table import reasons_table

    console = Console(stderr=True, markup=False)  # names may hold brackets
    console.print(reasons_table(error))
    console.print(error.message.rpartition(error.reasons[-1])[2].strip() or "Nothing was started.", soft_wrap=True, highlight=False)

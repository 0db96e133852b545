"""A controller's configuration: the defaults of its frozen `Args` struct, then a TOML file, then `--key value`.

Strict: whatever is unknown or of the wrong type is refused, all of it at once, each with its place and the nearest right
one. Nothing heavy is imported here, so that a mistake is answered in well under two seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rolecall.actors.config.layers import Layers, pairs
from rolecall.actors.config.toml import written
from rolecall.protocols.errors import ConfigError

__all__ = ["dump", "given", "parse", "resolve"]

A = TypeVar("A", bound=msgspec.Struct)
USER_MISTAKE = 2  # exit code


def parse(kind: type[A], argv: Sequence[str] | None = None, *, name: str = "") -> A:
    """Read a controller's configuration from its command line, or end the process.

    Args:
        kind: frozen msgspec Struct with a default for every field that need not be given. Fields: int, float, str, bool,
            Literal, lists, tuples, dicts by text, other Structs, lists of Structs, and any of them `| None`.
        argv: the arguments; without it, those of the process.
        name: of the program, in messages; without it, that of the script.

    `--help` prints every field and exits with 0; mistakes are printed, without a traceback, and exit with 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    name = name or Path(sys.argv[0] or "rolecall").stem
    if "--help" in argv or "-h" in argv:
        from rolecall.actors.config.usage import help_text

        print(help_text(kind, name))
        sys.exit(0)
    try:
        return resolve(kind, argv)
    except ConfigError as error:
        print(f"{name}: {error}\n{name}: --help lists every key", file=sys.stderr)
        sys.exit(USER_MISTAKE)


def resolve(kind: type[A], argv: Sequence[str]) -> A:
    """`parse` as a function: `--config FILE` and `--key value` laid over the defaults.

    `--policy.learning-rate 1e-5` reaches into nested structs, `--pools.train.members 2` into the item of that name (or
    number) of a list of structs; `--key=value` works too; `--flag` and `--no-flag` set a bool; lists and tables are
    written as in TOML or JSON: `--stop '["a"]'`. "none" is None where None is allowed. Files are read before other
    arguments, in the order given.

    Raises:
        ConfigError: with every mistake, each with its place; `mistakes` holds them one by one.
    """
    result: A = _resolved(Layers(kind), argv)
    return result


def given(kind: type[msgspec.Struct], argv: Sequence[str]) -> dict[str, Any]:
    """As `resolve`, where what must be given may be missing: field → value of those that there are."""
    result: dict[str, Any] = _resolved(Layers(kind, whole=False), argv)
    return result


def _resolved(layers: Layers, argv: Sequence[str]) -> Any:
    found = pairs(argv, layers.check)
    for key, text in found:
        if key == "config":
            layers.file(text)
    for key, text in found:
        if key != "config":
            layers.override(key, text)
    made = layers.check.build(layers.kind, layers.tree)
    mistakes = layers.check.mistakes
    if mistakes:
        head = f"{len(mistakes)} mistakes in the configuration:" if len(mistakes) > 1 else "a mistake in the configuration:"
        raise ConfigError("\n  ".join([head, *mistakes]), mistakes=tuple(mistakes))
    return made


def dump(args: msgspec.Struct) -> str:
    """The configuration as TOML; `resolve` reads it back equal."""
    return written(args)

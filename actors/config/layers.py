"""Laying a TOML file and `--key value` arguments over the defaults of a configuration struct."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any, Literal, NamedTuple, get_args, get_origin

import msgspec
from rolecall.actors.config.check import Checker
from rolecall.actors.config.fields import (
    NONE,
    Path,
    defaults,
    field_map,
    is_list_of_structs,
    is_struct,
    item_type,
    leaves,
    nearest,
    unwrap,
    words,
)
from rolecall.actors.config.toml import key_lines


def pairs(argv: Sequence[str], check: Checker) -> list[tuple[str, str | None]]:
    """`--key value`, `--key=value` and `--key` as (key, text or None)."""
    found: list[tuple[str, str | None]] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            check.mistakes.append(f"unexpected argument {word!r}; keys are written --key value")
        elif equals:
            found.append((key, text))
        elif rest and not rest[0].startswith("--"):
            found.append((key, rest.pop(0)))
        else:
            found.append((key, None))
    return found


class Spot(NamedTuple):
    """Where a `--key` leads: the type there, the container it is in, its key in that, and the whole path."""

    hint: Any
    holder: Any
    key: Any
    path: Path


class Layers:
    """The tree of plain values that the defaults, files and arguments add up to.

    Attributes:
        tree: what was put together so far; checked by nobody yet.
        check: knows the place of every value that a user wrote, and the mistakes so far.
    """

    def __init__(self, kind: type[msgspec.Struct], *, whole: bool = True) -> None:
        self.kind = kind
        self.tree: dict[str, Any] = defaults(kind)
        self.check = Checker(kind, whole=whole)
        self._places: dict[Path, str] = {}  # of the file being laid over

    def file(self, name: str | None) -> None:
        """Lay the TOML file over the tree: structs key by key, everything else whole."""
        if not name:
            self.check.mistakes.append("--config: needs the name of a TOML file")
            return
        file = File(name)
        try:
            text = file.read_text(encoding="utf-8")
            patch = tomllib.loads(text)
        except OSError as error:
            near = nearest(file.name, (each.name for each in file.parent.glob("*.toml"))) if file.parent.is_dir() else ""
            self.check.mistakes.append(f"--config {name}: {error.strerror}" + (f"; did you mean {file.parent / near}?" if near else ""))
        except ValueError as error:  # not UTF-8, or not TOML: says line and column
            self.check.mistakes.append(f"{name}: not valid TOML: {error}")
        else:
            self._places = {path: f"{name}:{line}" for path, line in key_lines(text).items()}
            self._merge(self.kind, self.tree, patch, (), ())

    def _merge(self, kind: Any, tree: dict[str, Any], patch: dict[str, Any], path: Path, source: Path) -> None:
        """Put `patch`, which stands at `source` in the file, into `tree`, which stands at `path` and is of `kind`."""
        known = field_map(kind)
        for name, value in patch.items():
            here, there = (*path, name), (*source, name)
            hint = unwrap(known[name].type)[0] if name in known else None
            if isinstance(value, dict) and is_struct(hint) and isinstance(tree.get(name), dict):
                self.check.places[here] = self._places[there]
                self._merge(hint, tree[name], value, here, there)
            elif isinstance(value, dict) and is_list_of_structs(hint) and isinstance(tree.get(name), list | tuple):
                self._merge_items(unwrap(item_type(hint))[0], tree[name], value, here, there)
            else:
                tree[name] = value
                found = {here + each[len(there) :]: place for each, place in self._places.items() if each[: len(there)] == there}
                self.check.places.update(found)

    def _merge_items(self, kind: Any, items: Any, patch: dict[str, Any], path: Path, source: Path) -> None:
        """`[pools.train]`: change the item of that name in a list of structs."""
        for name, value in patch.items():
            there = (*source, name)
            number = _find(items, name)
            if number is None or not isinstance(value, dict):
                text = f"{_no_item(items, str(path[-1]), name)}; a new one is written [[{path[-1]}]]"
                self.check.mistakes.append(f"{self._places[there]}: {text}")
                continue
            self.check.places[(*path, number)] = self._places[there]
            self._merge(kind, items[number], value, (*path, number), there)

    def override(self, key: str, text: str | None) -> None:
        """Put one `--key text` into the tree; without text it switches a bool on, as `no-key` switches it off."""
        said = f"--{key}" if text is None else f"--{key} {text}"
        spot = self._walk(key)
        if isinstance(spot, str) and text is None and key.startswith("no-"):
            off = self._walk(key.removeprefix("no-"))
            if isinstance(off, Spot) and unwrap(off.hint)[0] is bool:
                spot, text = off, "false"
        if isinstance(spot, str):
            self.check.mistakes.append(f"{said}: {spot}")
        elif text is None and unwrap(spot.hint)[0] is not bool:
            self.check.mistakes.append(f"{said}: needs a value, {words(spot.hint)}")
        else:
            spot.holder[spot.key] = _plain(spot.hint, "true" if text is None else text)
            for each in [each for each in self.check.places if each[: len(spot.path)] == spot.path]:
                del self.check.places[each]
            self.check.places[spot.path] = said

    def _walk(self, key: str) -> Spot | str:
        """Follow the parts of `key` through types and tree; the text of the mistake where they lead nowhere."""
        spot = Spot(self.kind, {"": self.tree}, "", ())
        for part in key.split("."):
            hint, _ = unwrap(spot.hint)
            value = spot.holder.get(spot.key) if isinstance(spot.holder, dict) else spot.holder[spot.key]
            if value is None and (is_struct(hint) or get_origin(hint) is dict):
                value = spot.holder[spot.key] = {}
            if is_struct(hint) and isinstance(value, dict):
                name = part.replace("-", "_")
                if name not in field_map(hint):
                    near = self._option_like(key)
                    return "unknown key" + (f"; did you mean --{near}?" if near else "")
                spot = Spot(field_map(hint)[name].type, value, name, (*spot.path, name))
            elif is_list_of_structs(hint) and isinstance(value, list | tuple):
                number = _find(value, part)
                if number is None:
                    return _no_item(value, str(spot.key), part)
                spot = Spot(item_type(hint), value, number, (*spot.path, number))
            elif get_origin(hint) is dict and isinstance(value, dict):
                spot = Spot(get_args(hint)[1], value, part, (*spot.path, part))
            else:
                return f"{'.'.join(map(str, spot.path))} is {words(hint)} and has no {part!r}"
        return spot

    def _option_like(self, key: str) -> str:
        key = key.replace("_", "-")
        options = [option.replace("_", "-") for option, _, _ in leaves(self.kind)]
        near = nearest(key, options) or next((option for option in options if option.endswith(f".{key}")), "")
        parts = key.split(".")
        named = [parts[at] if part == "<name>" and at < len(parts) else part for at, part in enumerate(near.split("."))]
        return ".".join(named)


def _find(items: Any, name: str) -> int | None:
    """Number of the item with this name, or with this number."""
    for number, item in enumerate(items):
        if isinstance(item, dict) and item.get("name") == name:
            return number
    return int(name) if name.isdecimal() and int(name) < len(items) else None


def _no_item(items: Any, field: str, name: str) -> str:
    names = [str(item["name"]) for item in items if isinstance(item, dict) and "name" in item]
    near = nearest(name, names)
    return f"{field} has no {name!r}" + (f"; did you mean {near!r}?" if near else f"; it has: {', '.join(names) or 'none'}")


def _plain(hint: Any, text: str) -> Any:
    """The text of an argument as the value that a TOML file would have held; the text itself if it is none."""
    hint, optional = unwrap(hint)
    if optional and text == NONE:
        return None
    if hint is str or (get_origin(hint) is Literal and all(isinstance(each, str) for each in get_args(hint))):
        return text
    try:
        if hint in (int, float):
            return hint(text)
    except ValueError:
        return text
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return json.loads(text)
    except ValueError:
        return text

"""The check of plain values against a configuration struct: every mistake at once, each with its place."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from rolecall.actors.config.fields import (
    NONE,
    Path,
    dotted,
    field_map,
    is_list_of_structs,
    is_struct,
    item_type,
    leaves,
    nearest,
    unwrap,
    words,
)


class Checker:
    """Turns a tree of plain values into a struct, and gathers every mistake with its place on the way.

    Attributes:
        whole: whether a value that must be given has to be there.
        places: path of a value → where the user wrote it ("run.toml:7", "--steps x").
        mistakes: what is wrong, one line each.
    """

    def __init__(self, root: type[msgspec.Struct], *, whole: bool = True) -> None:
        self.root, self.whole = root, whole
        self.places: dict[Path, str] = {}
        self.mistakes: list[str] = []

    def place(self, path: Path) -> str:
        """Where the value, or the innermost written thing around it, stands; "" for defaults."""
        return next((self.places[path[:size]] for size in range(len(path), 0, -1) if path[:size] in self.places), "")

    def refuse(self, path: Path, text: str) -> None:
        """Note a mistake at `path`."""
        place = self.place(path)
        self.mistakes.append(f"{place}: {text}" if place else text)

    def build(self, hint: Any, value: Any, path: Path = ()) -> Any:
        """`value` as an instance of `hint`; after a mistake, whatever it is."""
        hint_with_limits = hint
        hint, optional = unwrap(hint)
        if optional and (value is None or value == NONE):
            return None
        if is_struct(hint):
            return self._struct(hint, value, path)
        item = item_type(hint)
        if item is not None and isinstance(value, list | tuple):
            before = len(self.mistakes)
            made = [self.build(item, each, (*path, number)) for number, each in enumerate(value)]
            if len(self.mistakes) > before:
                return value
            return (get_origin(hint) or hint)(made) if is_list_of_structs(hint) else self._leaf(hint_with_limits, made, path)
        if get_origin(hint) is dict and isinstance(value, dict):
            kind = get_args(hint)[1]
            return {name: self.build(kind, each, (*path, name)) for name, each in value.items()}
        return self._leaf(hint_with_limits, value, path)

    def _struct(self, kind: type[msgspec.Struct], value: Any, path: Path) -> Any:
        if not isinstance(value, dict):
            self.refuse(path, f"{dotted(path)} is a table of its own, not {value!r}")
            return value
        known, before = field_map(kind), len(self.mistakes)
        for name in [name for name in value if name not in known]:
            near = nearest(name, known) or self._elsewhere(name)
            where = f" in {dotted(path)}" if path else ""
            remedy = f"did you mean {near!r}?" if near else f"there are: {', '.join(known)}"
            self.refuse((*path, name), f"unknown key {name!r}{where}; {remedy}")
        missing = [name for name, field in known.items() if field.required and name not in value] if self.whole or path else []
        for name in missing:
            self.refuse(path, f"{dotted((*path, name))} is missing: {words(known[name].type)}")
        made = {name: self.build(field.type, value[name], (*path, name)) for name, field in known.items() if name in value}
        if len(self.mistakes) > before:
            return value
        if not self.whole and not path:
            return made
        try:
            return kind(**made)
        except (ValueError, TypeError) as error:  # the struct's own check of its fields
            self.refuse(path, str(error))
            return value

    def _elsewhere(self, name: str) -> str:
        """The key of this name that stands in another table."""
        return next((path for path, field, _ in leaves(self.root) if field.name == name), "")

    def _leaf(self, hint: Any, value: Any, path: Path) -> Any:
        try:
            return msgspec.convert(value, hint, strict=True)
        except msgspec.ValidationError as error:
            bare, _ = unwrap(hint)
            choices = [str(each) for each in get_args(bare)] if get_origin(bare) is Literal else []
            near = nearest(str(value), choices)
            reason = str(error).partition(" - at ")[0]
            bound = re.search(r"[<>]=? \S+$", reason)
            limit = f" {bound[0]}" if bound else f" ({reason})" if re.search(r"length|matching|multiple", reason) else ""
            extras = get_args(hint)[1:] if bound and get_origin(hint) is Annotated else ()
            meaning = next((f" ({each.description})" for each in extras if isinstance(each, msgspec.Meta) and each.description), "")
            remedy = f"; did you mean {near!r}?" if near else ""
            said = "" if self.place(path).startswith("--") else f"{dotted(path)} = {value!r}: "  # an argument shows its value
            self.refuse(path, f"{said}expected {words(hint)}{limit}{meaning}{remedy}")
            return value

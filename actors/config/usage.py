"""The text of `--help`."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import msgspec
from msgspec.structs import FieldInfo
from rolecall.actors.config.fields import NONE, default_of, defaults, described, field_map, is_list_of_structs, leaves, unwrap, words


def help_text(kind: type[msgspec.Struct], name: str) -> str:
    """Usage, and every field of `kind` with type, default and documentation."""
    lines = [f"usage: {name} [--config FILE.toml] [--key value ...]", ""]
    about = (kind.__doc__ or "").strip().split("\n\n")[0]
    if about and not about.startswith(f"{kind.__name__}("):  # what msgspec makes up where there is no docstring
        lines += [about, ""]
    given = defaults(kind)
    texts: dict[type[msgspec.Struct], dict[str, str]] = {}
    for option, field, holder in leaves(kind):
        if holder not in texts:
            texts[holder] = described(holder)
        lines.append(f"  --{option.replace('_', '-')}   {words(field.type)} ({_default(option, field, given)})")
        lines += textwrap.wrap(texts[holder].get(field.name, ""), 110, initial_indent="      ", subsequent_indent="      ")
    for field_name, field in field_map(kind).items():
        if is_list_of_structs(unwrap(field.type)[0]) and not field.required:
            names = [str(item.get("name", number)) for number, item in enumerate(given[field_name] or ())]
            lines += ["", f"  <name> of {field_name}: {', '.join(names) or 'none by default'}"]
    return "\n".join(lines)


def _default(option: str, field: FieldInfo, given: Any) -> str:
    """The default of the option: as the struct around it sets it, else as its own field does."""
    for part in option.split("."):
        given = given.get(part, field) if isinstance(given, dict) else field
    if given is field and field.required:
        return "required"
    value = default_of(field) if given is field else given
    return f"default {NONE}" if value is None else f"default {json.dumps(value, ensure_ascii=False)}"

"""Pages that are made from the code, so that they can't drift from it: `python docs/generate.py messages`.

`messages` writes docs/messages.md from the message classes: fields from their types and Specs, words from docstrings and the
comments beside the fields. A test holds the committed page to what this makes.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import msgspec
from rolecall.protocols import base, messages
from rolecall.protocols.base import Divisible, Message
from rolecall.protocols.schema import declared, fingerprint

DOCS = Path(__file__).resolve().parent
PARTS = (messages.Tensor, messages.Scored, messages.Failed, messages.Abstained)  # structs within messages
REPLIES = (messages.Receipt, base.Outline)  # what comes back to a controller beside a message
RULES = {"finite": "finite", "nats": "in nats: finite, above 0 only by rounding", "offsets": "begins at 0, never falls"}
HEAD = """# Messages

Made by `python docs/generate.py messages` from `protocols/messages.py` and `protocols/packed.py`; don't edit it by hand. How messages
travel, are checked and cut is in [protocol.md](protocol.md).

{letters}

A letter stands for one size within a message: two fields of size `T` have equally many entries, `N+1` is one more. V is the number of
spans of one weights version. *dict of tuples* are columns: name → one value a row. The fingerprint tells two versions of a message apart.
"""


def page() -> str:
    """The text of messages.md."""
    found = [kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, Message)]
    kinds = [kind for kind in found if kind.__module__ != base.__name__]  # in the order of the file, those of other files first
    letters = (inspect.getdoc(messages) or "").split("\n\n", 1)[1].replace("\n", " ")
    parts = [HEAD.format(letters=letters).strip()]
    parts += [section(kind) for kind in kinds]
    parts.append("## Parts of messages\n\nStructs within the messages above.")
    parts += [section(kind, "###") for kind in PARTS]
    parts.append("## Beside the messages\n\nWhat every call gives back to the controller: small, and never the bulk.")
    parts += [section(kind, "###") for kind in REPLIES]
    return "\n\n".join(parts) + "\n"


def section(kind: type[msgspec.Struct], mark: str = "##") -> str:
    """One struct: its docstring and a table of its fields."""
    about = (inspect.getdoc(kind) or "").strip()
    head = f"{mark} {kind.__name__}\n\n{about}"
    if issubclass(kind, Message):
        cut = "Divisible between units. " if issubclass(kind, Divisible) else ""
        head += f"\n\n{cut}Fingerprint `{fingerprint(kind):016x}`."
    specs = {field.name: field for field in declared(kind)}
    module = sys.modules[kind.__module__]
    words = comments(kind, module)
    lines = ["| field | what | size | says |", "|---|---|---|---|"]
    for field in msgspec.structs.fields(kind):
        spec = specs.get(field.name)
        form = {"array": spec.spec.dtype, "tuple": "tuple", "columns": "dict of tuples"}[spec.form] if spec else written(kind, field.name)
        form += " or nothing" if spec and spec.optional else ""
        size = f"[{spec.spec.shape}]" if spec else ""
        rule = RULES.get(spec.spec.rule, "") if spec else ""
        says = "; ".join(word for word in (words.get(field.name, ""), rule) if word).replace("|", "\\|")
        lines.append(f"| `{field.name}` | {form} | {size} | {says} |")
    if kind is messages.Abstained:
        return head
    return head + "\n\n" + "\n".join(lines)


def written(kind: type, name: str) -> str:
    """A field's type as the source says it."""
    text = ast.unparse(_field(kind, name).annotation)
    return f"`{text.replace('|', 'or')}`" if "[" in text else text.replace("|", "or")


def comments(kind: type, module: ModuleType) -> dict[str, str]:
    """Field → the comment on its line."""
    lines = inspect.getsource(module).splitlines()
    found = {}
    for field in msgspec.structs.fields(kind):
        line = lines[_field(kind, field.name).end_lineno - 1]  # type: ignore[operator]  # parsed from a file: it has a line
        match = re.search(r"  # (.*)$", line)
        if match:
            found[field.name] = match[1]
    return found


def _field(kind: type, name: str) -> ast.AnnAssign:
    """Where the source declares the field."""
    tree = ast.parse(inspect.getsource(sys.modules[kind.__module__]))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__).body
    return next(node for node in body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name)


PAGES = {"messages": page}

if __name__ == "__main__":
    for word in sys.argv[1:] or PAGES:
        if word not in PAGES:
            sys.exit(f"there is no page {word!r}; there is: {', '.join(PAGES)}")
        (DOCS / f"{word}.md").write_text(PAGES[word](), encoding="utf-8")
        print(DOCS / f"{word}.md")

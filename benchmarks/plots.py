"""What the generated pages share: plots as SVG that come out the same each time, and tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

INK, OURS, OTHERS = "#333333", "#1b6ca8", "#b0b7bf"
COLOURS = ("#1b6ca8", "#d1603d", "#4b9b6e", "#8e5ea2", "#c9a227", "#6b7a8f")


def axes(count: int = 1, *, height: float = 3.2) -> tuple[Any, list[Any]]:
    """A figure with `count` plots side by side."""
    import matplotlib

    matplotlib.use("svg")
    # text stays text: any reader has a font, and the file is small
    matplotlib.rcParams.update({"svg.hashsalt": "rolecall", "svg.fonttype": "none", "font.size": 10, "axes.edgecolor": INK})
    from matplotlib import pyplot

    figure, found = pyplot.subplots(1, count, figsize=(4.6 * count + 1.2, height), squeeze=False)
    for each in found[0]:
        each.spines[["top", "right"]].set_visible(False)
    return figure, list(found[0])


def save(figure: Any, path: Path) -> None:
    """Write the figure and forget it."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    # matplotlib leaves blanks at the ends of lines
    path.write_text(re.sub(r" +$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE), encoding="utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; columns after the first are numbers, to the right."""
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    lines += [f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def number(value: object) -> str:
    """A figure as people write it, to four digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value != value or value == 0 or 1e-3 <= abs(value) < 1e6:
        text = f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        return text.replace("nan", "–")
    return f"{value:.3g}"

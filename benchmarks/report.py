"""`docs/benchmarks.md` and its plots from the committed results: `python benchmarks/report.py`.

Every figure on that page stands in a file of benchmarks/results, which a benchmark wrote with `--out`.
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

from plots import INK, OTHERS, OURS, axes, number, save, table

COLUMNS = 2  # further figures of each contender that stand beside its time
ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Benchmarks

Made by `python benchmarks/report.py` from the files in `benchmarks/results`; don't edit it by hand.

A benchmark first checks that what it times gives the right answer. Then ours and each peer are timed in the same run, in turn, and
the table shows medians with the quickest and the slowest of all rounds. *× ours* is the peer's figure over ours. A target was set before
anything was measured and stands here whether it is met or not. A device is named by its usable cores (`cpu2`) or its GPU (`h100`, `h200`).
`make bench-NAME` runs one; `ARGS="--quick"` makes it small, `ARGS="--out FILE"` writes the result.
"""


def read(folder: Path) -> list[dict[str, Any]]:
    """All results, by benchmark and device.

    Raises:
        ValueError: a file is no result.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        lacking = [key for key in ("bench", "device", "workload", "ours", "unit", "peers") if key not in result]
        if lacking:
            raise ValueError(f"{path.name} is no result of a benchmark: it lacks {', '.join(lacking)}")
        found.append({**result, "file": path.name})
    return sorted(found, key=lambda result: (result["bench"], result["device"]))


def about(bench: str, scripts: Path) -> str:
    """What the benchmark's own script says it does."""
    script = scripts / f"{bench}.py"
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) if script.is_file() else None
    return (text or "").replace("\n\n", "\0").replace("\n", " ").replace("\0", "\n\n")


def section(result: dict[str, Any], docs: Path) -> str:
    """One result in Markdown, with its plot written beside it."""
    name, unit, spread = f"{result['bench']}-{result['device']}", result["unit"], result.get("spread", {})
    ratio = result.get("ratio", {})
    own = next((each for each in spread if each not in result["peers"]), "rolecall")
    details = result.get("details", {})
    each = {name: found for name, found in details.items() if isinstance(found, dict) and found.keys() <= {own, *result["peers"]}}
    figures = {name: found for name, found in each.items() if all(isinstance(value, int | float) for value in found.values())}
    columns = figures if len(figures) <= COLUMNS else {}
    rows = []
    for who, value, times in [(own, result["ours"], 1), *((peer, value, ratio.get(peer, "")) for peer, value in result["peers"].items())]:
        between = f"{number(spread[who][0])} – {number(spread[who][1])}" if who in spread else ""
        more = [number(found.get(who, "")) for found in columns.values()]
        rows.append((f"**{who}**" if who == own else who, number(value), between, number(times), *more))
    if result.get("limit") is not None:
        rows.append(("physical limit", number(result["limit"]), "", number(result["limit"] / result["ours"]), *("" for _ in columns)))
    texts = [f"- {who}: {text}" for name, found in each.items() if name not in figures for who, text in found.items()]
    made = " ".join(f"{package} {version}" for package, version in result.get("versions", {}).items() if version != "missing")
    which = result["bench"].partition("-")[2]
    parts = [
        f"### {which + ' on' if which else 'On'} {result['device']}{', ' + result['date'] if 'date' in result else ''}",
        f"{result['workload']}.",
        table(("", unit, "quickest – slowest", "× ours", *(name.replace("_", " ") for name in columns)), rows),
        "" if columns else _figures(figures, [own, *result["peers"]]),
        "\n".join(texts),
        f"![{name}](plots/{name}.svg)",
        _targets(result),
        *(f"`{peer}` did not run: {why}." for peer, why in result.get("missing", {}).items()),
        _details({name: found for name, found in details.items() if name not in each}),
        f"{result.get('rounds', '?')} rounds; {made + '; ' if made else ''}`benchmarks/results/{result['file']}`.",
    ]
    _plot(result, own, docs / "plots" / f"{name}.svg")
    return "\n\n".join(part for part in parts if part)


def _figures(figures: dict[str, Any], who: list[str]) -> str:
    """More than fit beside the times: a table of their own, one a row."""
    rows = [(name.replace("_", " "), *(number(found.get(each, "")) for each in who)) for name, found in figures.items()]
    return table(("", *who), rows) if rows else ""


def _targets(result: dict[str, Any]) -> str:
    if not result.get("targets"):
        met = result.get("met")
        return f"Target: {result['target']}: {'met' if met else 'not met'}." if "target" in result and met is not None else ""
    rows = [(asked, number(found["reached"]), "yes" if found["met"] else "**no**") for asked, found in result["targets"].items()]
    return table(("target", "reached", "met"), rows)


def _details(details: dict[str, Any]) -> str:
    rows = [(name, number(value)) for name, value in details.items() if isinstance(value, int | float | str)]
    for name, value in details.items():
        if isinstance(value, dict):
            rows += [(f"{name}: {key}", number(item)) for key, item in value.items() if isinstance(item, int | float | str)]
    return table(("more figures", ""), rows) if rows else ""


def _plot(result: dict[str, Any], own: str, path: Path) -> None:
    bars = {own: result["ours"], **result["peers"]}
    if result.get("limit") is not None:
        bars["physical limit"] = result["limit"]
    figure, (plot,) = axes(height=0.9 + 0.42 * len(bars))
    names = list(reversed(bars))
    plot.barh(names, [bars[name] for name in names], color=[OURS if name == own else OTHERS for name in names], height=0.62)
    for place, name in enumerate(names):
        plot.annotate(f" {number(bars[name])}", (bars[name], place), va="center", color=INK)
    if max(bars.values()) > 20 * min(value for value in bars.values() if value > 0):
        plot.set_xscale("log")
    if plot.get_xscale() == "log":
        plot.set_xlim(min(bars.values()) / 3, max(bars.values()) * 5)
    else:
        plot.set_xlim(right=max(bars.values()) * 1.15)
    plot.set_xlabel(result["unit"])
    plot.set_title(f"{result['bench']} on {result['device']}", loc="left", color=INK)
    save(figure, path)


def report(results: Path, docs: Path, scripts: Path) -> Path:
    """Write the page and the plots; returns the page."""
    parts = [HEAD.strip()]
    bench = ""
    for result in read(results):
        if result["bench"].partition("-")[0] != bench:
            bench = result["bench"].partition("-")[0]
            parts += [f"## {bench}", about(bench, scripts)]
        parts.append(section(result, docs))
    if not bench:
        parts.append("There are no results yet.")
    page = docs / "benchmarks.md"
    page.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    chosen = parser.parse_args()
    print(report(chosen.results, chosen.docs, ROOT / "benchmarks"))

"""What a run leaves for readers: the tables in the README of the benchmarks, and pictures beside the results."""

from __future__ import annotations

import json
import re
import statistics
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from ._peers import PEERS
from ._table import markdown

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["draw", "put_into"]

BEGIN, END = "<!-- comparison -->", "<!-- end of comparison -->"

BARS = {
    "drain": ("jobs_per_second", "drain by one process, jobs/s"),
    "drain2": ("jobs_per_second", "drain by two processes, jobs/s"),
    "pickup": ("p50_ms", "idle pickup p50, ms (less is better)"),
    "sustained": ("jobs_per_second", "sustained, jobs/s"),
}


def put_into(text: str, cells: list[dict[str, Any]], results: str, pictures: list[str]) -> str:
    """The text with the tables, and links to the file and the pictures, between its two marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise click.ClickException(f"the README needs one line {BEGIN} and one line {END}")
    tail = "".join(f"\n![{one}]({one})\n" for one in pictures)
    found = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    return found.sub(lambda _: f"{BEGIN}\n\n{_head(cells, results)}{markdown(cells)}{tail}\n{END}", text)


def _head(cells: list[dict[str, Any]], results: str) -> str:
    """Where the figures come from, when they were taken, of which notifyq; how often and with what each verb ran."""
    times = sorted(cell["at"].replace("T", " ")[:16] for cell in cells if "at" in cell)
    when = f", measured from {times[0]} to {times[-1]} (UTC)" if times else ""
    commits = list(dict.fromkeys(cell["commit"] for cell in cells if cell["peer"] == "notifyq" and "commit" in cell))
    what = f", notifyq of commit {', '.join(commits)}" if commits else ""
    runs = dict[str, list[str]]()
    for verb in dict.fromkeys(cell["verb"] for cell in cells):
        of_verb = [cell for cell in cells if cell["verb"] == verb]
        options = {json.dumps(cell["options"]): cell["options"] for cell in of_verb}
        told = " or ".join(", ".join(f"{name} {value:,}" for name, value in one.items()) for one in options.values())
        repeats = sorted({sum(_row(one) == row for one in of_verb) for row in map(_row, of_verb)})
        times_run = f"{' to '.join(str(one) for one in dict.fromkeys((repeats[0], repeats[-1])))}x, with {told}"
        runs.setdefault(times_run, []).append(verb)
    list_of_runs = "; ".join(f"{', '.join(verbs)} {times_run}" for times_run, verbs in runs.items())
    return f"From [`{results}`]({results}){when}{what}: medians, and lowest to highest.\nRun: {list_of_runs}.\n\n"


def _row(cell: dict[str, Any]) -> tuple[str, str]:
    return cell["peer"], cell["row"]


def draw(cells: list[dict[str, Any]], base: Path) -> list[Path]:
    """Bars of what was measured, and the curves of the steady states; returns the files, none without matplotlib."""
    if find_spec("matplotlib") is None:
        click.echo("compare: no pictures without matplotlib: pip install 'notifyq[bench]'", err=True)
        return []
    figured = [cell for cell in cells if "figures" in cell]
    bars = {verb: [cell for cell in figured if cell["verb"] == verb] for verb in BARS}
    curves = [cell for cell in figured if cell["verb"] == "pinned"]
    files = []
    if drawn := {verb: found for verb, found in bars.items() if found}:
        figure = import_module("matplotlib.figure").Figure(figsize=(10, 4 * len(drawn)), layout="constrained")
        for axes, (verb, found) in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn.items(), strict=True):
            _bars(axes, found, *BARS[verb])
        files.append(base.with_suffix(".svg"))
        _save(figure, files[-1])
    if curves:
        figure = import_module("matplotlib.figure").Figure(figsize=(10, 5), layout="constrained")
        _curves(figure.subplots(), curves)
        files.append(base.with_name(f"{base.stem}-pinned.svg"))
        _save(figure, files[-1])
    return files


def _save(figure: Any, file: Path) -> None:
    """Text stays text, and no date is in it: the same figures give the same file."""
    with import_module("matplotlib").rc_context({"svg.fonttype": "none", "svg.hashsalt": "comparison"}):
        figure.savefig(file, metadata={"Date": None})


def _bars(axes: Any, cells: list[dict[str, Any]], key: str, title: str) -> None:
    """A bar of each row: the median, and a line from the lowest to the highest."""
    names = [(peer.name, row) for peer in PEERS.values() for row in peer.rows]
    found = {name: [c["figures"][key] for c in cells if (c["peer"], c["row"]) == name] for name in names}
    found = {name: values for name, values in found.items() if values}
    middles = [statistics.median(values) for values in found.values()]
    spread = [
        [middle - min(values) for middle, values in zip(middles, found.values(), strict=True)],
        [max(values) - middle for middle, values in zip(middles, found.values(), strict=True)],
    ]
    axes.barh([", ".join(name) for name in found], middles, xerr=spread, color="C0", ecolor="C1")
    axes.invert_yaxis()
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    if max(middles) > 50 * max(min(middles), 1e-9):
        axes.set_xscale("log")


def _curves(axes: Any, cells: list[dict[str, Any]]) -> None:
    """Handlers begun a second under a snapshot, of the last repeat."""
    for cell in {(cell["peer"], cell["row"]): cell for cell in cells}.values():
        axes.plot(cell["figures"]["curve"], label=f"{cell['peer']}, {cell['row']}")
    axes.set_title("a snapshot is held open: jobs begun a second, by seconds")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))

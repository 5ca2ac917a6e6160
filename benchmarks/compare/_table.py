"""The results as tables: medians, and the spread of the repeats; what each peer keeps and runs beside its figures."""

from __future__ import annotations

import json
import statistics
from typing import Any

import attrs
from rich.console import Console
from rich.table import Table as RichTable

from ._peers import PEERS

__all__ = ["MARKS", "Table", "markdown", "notes", "show", "tables"]

MARKS = (
    "¹ some sends had not begun 10 s after the last: the true figures are higher.",
    "² stopped at the limit of time: the rate until then.",
)

FIGURES: dict[str, dict[str, str]] = {
    "pickup": {"p50_ms": "pickup p50, ms", "p99_ms": "p99, ms"},
    "sends": {"by_1_per_second": "sends/s of one task", "by_10_per_second": "of ten tasks"},
    "sends_heard": {"by_1_per_second": "while a worker runs them: one task", "by_10_per_second": "ten tasks"},
    "drain": {
        "jobs_per_second": "drain by one process, jobs/s",
        "wal_bytes_per_job": "WAL bytes a job",
        "commits_per_job": "commits a job",
    },
    "drain2": {"jobs_per_second": "by two processes, jobs/s"},
    "sustained": {
        "jobs_per_second": "sustained, jobs/s",
        "p50_ms": "pickup p50, ms",
        "wal_bytes_per_job": "WAL bytes a job",
        "commits_per_job": "commits a job",
    },
    "control": {"last_over_first": "last over first sixth"},
    "pinned": {"last_over_first": "the same, snapshot held open", "jobs_per_second": "jobs/s under it"},
    "idle": {"transactions_per_second": "idle: transactions/s", "connections": "connections"},
}
"""Columns by verb. The first of each has the spread beside the median."""

TABLES = {
    "Waking, sending": ("pickup", "sends", "sends_heard"),
    "Draining": ("drain", "drain2"),
    "A steady state": ("sustained", "control", "pinned"),
    "Ten queues, nothing to do": ("idle",),
}


@attrs.frozen
class Table:
    """A title, the heads of the columns, the rows."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def tables(cells: list[dict[str, Any]]) -> list[Table]:
    """Those tables of which there is a figure."""
    found = []
    for title, verbs in TABLES.items():
        measured = [verb for verb in verbs if any(cell["verb"] == verb for cell in cells)]
        if measured:
            heads = ["peer, settings", "keeps of a job", "jobs a call"]
            heads += [head for verb in measured for head in FIGURES[verb].values()]
            found.append(Table(title, heads, _rows(cells, measured)))
    return found


def _rows(cells: list[dict[str, Any]], verbs: list[str]) -> list[list[str]]:
    rows = []
    for peer in PEERS.values():
        for name, row in peer.rows.items():
            own = [cell for cell in cells if (cell["peer"], cell["row"]) == (peer.name, name) and cell["verb"] in verbs]
            if own:
                called = "1" if row.per_call == 1 else f"to {row.per_call:,}"
                rows.append([f"{peer.name}, {name}", row.keeps, called, *_texts(own, verbs)])
    return rows


def _texts(cells: list[dict[str, Any]], verbs: list[str]) -> list[str]:
    texts = []
    for verb in verbs:
        of_verb = [cell for cell in cells if cell["verb"] == verb]
        figures = [cell["figures"] for cell in of_verb if "figures" in cell]
        mark = " ¹" if any("not_begun" in one for one in figures) else ""
        mark = " ²" if any("left" in one for one in figures) else mark
        for number, key in enumerate(FIGURES[verb]):
            values = [one[key] for one in figures if one.get(key) is not None]
            nothing = "failed" if of_verb and not figures else "–"
            texts.append(_median(values, spread=not number) + mark if values else nothing)
    return texts


def _median(values: list[float], *, spread: bool) -> str:
    text = _number(statistics.median(values))
    return f"{text} ({_number(min(values))} to {_number(max(values))})" if spread and len(values) > 1 else text


def _number(value: float) -> str:
    """As short as it says something."""
    if float(value).is_integer() and abs(value) < 100:
        return str(int(value))
    places = next((places for least, places in ((100, 0), (10, 1), (1, 2)) if abs(value) >= least), 3)
    return f"{value:,.{places}f}"


def notes(cells: list[dict[str, Any]]) -> list[str]:
    """A line of each peer: versions, what it does less or differently, its documentation, its settings."""
    lines = []
    for name, peer in PEERS.items():
        own = [cell for cell in cells if cell["peer"] == name]
        if not own:
            continue
        versions = ", ".join(
            f"{package} {version}"
            for package, version in own[-1]["versions"].items()
            if package not in ("adapter", "source")
        )
        pages = ", ".join(f"[{title}]({address})" for title, address in peer.pages.items())
        settings = {cell["row"]: json.dumps(cell["settings"]) for cell in own}
        told = "; ".join(f"{row}: `{text}`" for row, text in settings.items() if text != "{}")
        lines.append(f"{name} ({versions}): {peer.notes}.{f' By {pages}.' if pages else ''} {told}".rstrip())
    return lines


def markdown(cells: list[dict[str, Any]]) -> str:
    """All of it, as it stands in the README."""
    parts = []
    for table in tables(cells):
        lines = [table.heads, ["---", "---", *["---:"] * (len(table.heads) - 2)], *table.rows]
        parts.append(f"**{table.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts.append("\n".join(MARKS))
    parts.append("\n".join(f"- {line}" for line in notes(cells)))
    return "\n\n".join(parts) + "\n"


def show(cells: list[dict[str, Any]]) -> None:
    """Print the tables, and below them what each peer does not do."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for table in tables(cells):
        shown = RichTable(title=table.title)
        for number, head in enumerate(table.heads):
            shown.add_column(head, justify="right" if number > 1 else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for line in (*MARKS, *notes(cells)):
        console.print(line, highlight=False, markup=False)

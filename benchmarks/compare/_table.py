"""The results as a table: medians of the repeats, and below it what each peer does not do."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from ._peers import PEERS

__all__ = ["show"]

HEADS = {
    "pickup": "pickup p50 / p99, ms",
    "drain": "drain, 1 process, jobs/s",
    "drain2": "drain, 2 processes, jobs/s",
    "sends": "sends/s by 1; by 10",
    "sustained": "sustained, jobs/s; p50 ms",
    "idle": "idle, 10 queues: transactions/s; connections",
}
COSTS = ("drain", "sustained")


def _number(value: float | None) -> str:
    """As short as it says something."""
    if value is None:
        return "–"
    places = next((places for least, places in ((100, 0), (10, 1), (1, 2)) if abs(value) >= least), 3)
    return f"{value:,.{places}f}"


def _text(verb: str, figures: list[dict[str, Any]]) -> str:
    def median(name: str) -> str:
        values = [one[name] for one in figures if one.get(name) is not None]
        return _number(statistics.median(values) if values else None)

    match verb:
        case "pickup":
            mark = " ¹" if any("not_begun" in one for one in figures) else ""
            return f"{median('p50_ms')} / {median('p99_ms')}{mark}"
        case "drain" | "drain2":
            return median("jobs_per_second") + (" ²" if any("left" in one for one in figures) else "")
        case "sends":
            return f"{median('by_1_per_second')}; {median('by_10_per_second')}"
        case "sustained":
            return f"{median('jobs_per_second')}; {median('p50_ms')}"
        case "costs":
            return f"{median('wal_bytes_per_job')}; {median('commits_per_job')}"
        case _:
            return f"{median('transactions_per_second')}; {median('connections')}"


def show(cells: list[dict[str, Any]], verbs: list[str], repeats: int) -> None:
    """Print the table of these cells."""
    table = Table(title="one repeat" if repeats == 1 else f"medians of {repeats} repeats")
    table.add_column("peer, settings")
    for verb in verbs:
        table.add_column(HEADS[verb], justify="right")
        if verb in COSTS:
            table.add_column(f"{verb}: WAL bytes; commits, a job", justify="right")
    rows = [(peer.name, row) for peer in PEERS.values() for row in peer.rows]
    for peer, row in rows:
        found = [cell for cell in cells if (cell["peer"], cell["row"]) == (peer, row)]
        if not found:
            continue
        texts = []
        for verb in verbs:
            of_verb = [cell for cell in found if cell["verb"] == verb]
            figures = [cell["figures"] for cell in of_verb if "figures" in cell]
            nothing = "failed" if of_verb else "–"
            texts.append(_text(verb, figures) if figures else nothing)
            if verb in COSTS:
                texts.append(_text("costs", figures) if figures else nothing)
        table.add_row(f"{peer}, {row}", *texts)
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    console.print(table)
    console.print("¹ some sends had not begun 10 s after the last: the true figures are higher.", highlight=False)
    console.print("² stopped at the limit of time: the rate until then.", highlight=False)
    for name in dict.fromkeys(cell["peer"] for cell in cells):
        console.print(f"{name}: {PEERS[name].notes}.", highlight=False, markup=False)

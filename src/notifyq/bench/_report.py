"""From runs to figures, and how they are shown and written."""

from __future__ import annotations

import json
import re
import statistics
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from pathlib import Path

    from ._parts import Found

__all__ = ["medians", "show", "write"]


def medians(runs: list[Found]) -> dict[str, Any]:
    """The figures of a workload and the runs they come from: medians, and what is the same in each run as it is."""
    figures = {
        key: _figure([run[key] for run in runs]) for key, value in runs[0].items() if not isinstance(value, list)
    }
    return {**figures, "runs": [{key: _rounded(value) for key, value in run.items()} for run in runs]}


def _figure(values: list[Any]) -> Any:
    if isinstance(values[0], bool | int | str):
        return values[0]
    return round(statistics.median(values), 4)


def _rounded(value: Any) -> Any:
    """Samples in a file need not be exact to more than what a clock of this kind tells."""
    return [round(one, 3) for one in value] if isinstance(value, list) else value


def show(report: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table(
        title=f"notifyq {report['notifyq']}, PostgreSQL {report['server_version']}, Python {report['python']}"
    )
    table.add_column("workload")
    table.add_column("figure")
    table.add_column("median", justify="right")
    table.add_column("lowest", justify="right")
    table.add_column("highest", justify="right")
    for name, figures in report["workloads"].items():
        for key, value in figures.items():
            if key == "runs":
                continue
            if isinstance(value, bool | int | str):
                table.add_row(name, key, str(value), "", "")
                continue
            values = [run[key] for run in figures["runs"]]
            table.add_row(name, key, *(_shown(one) for one in (value, min(values), max(values))))
    Console().print(table)


def _shown(value: float) -> str:
    """A number with as many digits as mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def write(report: dict[str, Any], file: Path) -> None:
    """Write the report as JSON, a list of samples on a line."""
    text = json.dumps(report, indent=2)
    text = re.sub(r"\[\s+([-+\d.eE,\s]+?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    file.write_text(text + "\n", encoding="utf-8")

"""What the commands print: a table that fits the terminal for people, JSON for programs."""

from __future__ import annotations

import json
import os
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import RenderableType

__all__ = ["show", "show_record"]

NARROWEST = 8
"""Characters: no column is cut shorter than that. If there is no room for so much, each row becomes a block of lines."""


def show(rows: Iterable[Mapping[str, Any]], as_json: bool, title: str, *, single: bool = False) -> None:
    """Print rows as JSON (an object if ``single``), or as a table with a title; a single row as its title alone.

    Columns of which no row says anything (None, 0, no) are left out. What is no terminal is as wide as it needs to be.
    """
    rows = list(rows)
    if as_json:
        print(json.dumps(rows[0] if single else rows, default=_plain))
    elif single:
        print(title)
    elif not rows:
        print(f"no {title}")
    else:
        console = _console()
        console.print(_table(rows, title, console.width))


def show_record(row: Mapping[str, Any], title: str) -> None:
    """Print one row for people, each of its fields that say anything in full."""
    _console().print(Text(title, style="italic"), _block(row))


def _console() -> Console:
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=100_000)


def _table(rows: Sequence[Mapping[str, Any]], title: str, width: int) -> RenderableType:
    first, *others = rows[0]
    columns = [first, *(name for name in others if any(row[name] for row in rows))]
    cells = {name: [_cell(row[name], brief=True) for row in rows] for name in columns}
    natural = [max(map(cell_len, (name, *texts))) for name, texts in cells.items()]
    room = width - 2 * (len(columns) - 1)
    cut = max(natural)
    while cut > NARROWEST and sum(min(length, cut) for length in natural) > room:
        cut -= 1
    if sum(min(length, cut) for length in natural) > room:
        blocks = Table.grid()
        for row in rows:
            blocks.add_row(_block(row))
            blocks.add_row()
        return blocks
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        is_count = all(isinstance(row[name], int) for row in rows)
        table.add_column(name, no_wrap=True, max_width=cut, justify="right" if is_count else "left")
    for texts in zip(*cells.values(), strict=True):
        table.add_row(*map(Text, texts))
    return table


def _block(row: Mapping[str, Any]) -> Table:
    block = Table.grid(padding=(0, 2, 0, 0))
    block.add_column(style="bold", no_wrap=True)
    block.add_column(overflow="fold")
    for name, value in row.items():
        if text := _cell(value):
            block.add_row(Text(name), Text(text))
    return block


def _plain(value: Any) -> Any:
    """What JSON has no type for: durations in seconds, moments in ISO 8601, the rest as text."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _cell(value: Any, *, brief: bool = False) -> str:
    """``brief``: of a moment of today only the time."""
    match value:
        case None | False:
            return ""
        case True:
            return "yes"
        case list() if all(isinstance(item, str) for item in value):
            return ", ".join(value)
        case dict() | list():
            return json.dumps(value, default=str, ensure_ascii=False)
        case datetime():
            is_today = value.date() == datetime.now(value.tzinfo).date()
            return f"{value:%H:%M:%S}" if brief and is_today else f"{value:%Y-%m-%d %H:%M:%S}"
        case timedelta() if value < timedelta(minutes=1):
            return f"{value.total_seconds():.3g} s"
        case timedelta():
            return str(timedelta(seconds=round(value.total_seconds())))
    return str(value)

"""The file of results: written after every cell, so that a run that was stopped goes on where it stopped."""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Results", "newest", "unfinished_or_new"]

IDENTITY = ("peer", "row", "verb", "repeat", "versions", "settings", "options", "server_version")
"""What makes a cell the same as another: with all of them alike there is nothing to measure again."""


def _identity(cell: dict[str, Any], without: str = "") -> dict[str, Any]:
    return {key: cell.get(key) for key in IDENTITY if key != without}


def newest(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each peer, row and verb the repeats that are like the last one: older versions or options don't mix with it."""
    last = {(cell["peer"], cell["row"], cell["verb"]): _identity(cell, "repeat") for cell in cells}
    return [
        cell for cell in cells if last[cell["peer"], cell["row"], cell["verb"]] == _identity(cell, without="repeat")
    ]


def unfinished_or_new(folder: Path, planned: list[dict[str, Any]]) -> Results:
    """The newest results, if they have some of these cells and not all, whatever day they were begun; or today's."""
    files = sorted(folder.glob("*-compare.json"))
    if files:
        last = Results(files[-1])
        if 0 < len(last.missing(planned)) < len(planned):
            return last
    return Results(folder / f"{datetime.date.today():%Y-%m-%d}-compare.json")


class Results:
    """Cells that have been measured."""

    def __init__(self, path: Path) -> None:
        """Read the file, if it is there."""
        self.path, self.cells = path, list[dict[str, Any]]()
        self.about: dict[str, Any] = {"schema": 1}
        if not path.exists():
            return
        try:
            self.about = json.loads(path.read_text(encoding="utf-8"))
            self.cells = self.about.pop("cells")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise click.UsageError(f"{path} does not hold results of a comparison: name another with --json") from None

    def missing(self, planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of the planned cells that have no figures yet, with these versions, settings and options."""
        done = [_identity(cell) for cell in self.cells if "figures" in cell]
        return [cell for cell in planned if _identity(cell) not in done]

    def add(self, cell: dict[str, Any]) -> None:
        """Keep a cell, in place of an earlier failure, and write the file as a whole, a cell on a line."""
        self.cells = [old for old in self.cells if _identity(old) != _identity(cell)]
        self.cells.append(cell)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        about = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in self.about.items())
        cells = ",\n".join(f"  {json.dumps(one)}" for one in self.cells)
        written = self.path.with_suffix(".part")
        written.write_text(f'{{\n{about} "cells": [\n{cells}\n ]\n}}\n', encoding="utf-8")
        written.replace(self.path)

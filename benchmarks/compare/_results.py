"""The file of results: written after every cell, so that a run that was stopped goes on where it stopped."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Results"]

IDENTITY = ("peer", "row", "verb", "repeat", "versions", "settings", "options", "server_version")


def _identity(cell: dict[str, Any]) -> dict[str, Any]:
    return {key: cell.get(key) for key in IDENTITY}


class Results:
    """Cells that have been measured."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        """Read the file, if it is there."""
        self.path, self.about = path, about
        self.cells: list[dict[str, Any]] = []
        if not path.exists():
            return
        try:
            self.cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        except (ValueError, KeyError, TypeError):
            raise click.UsageError(f"{path} does not hold results of a comparison: name another with --json") from None

    def missing(self, planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of the planned cells that have no figures yet, with these versions, settings and options."""
        done = [_identity(cell) for cell in self.cells if "figures" in cell]
        return [cell for cell in planned if _identity(cell) not in done]

    def of(self, planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The planned cells, as they were measured."""
        return [cell for cell in self.cells if any(_identity(cell) == _identity(one) for one in planned)]

    def add(self, cell: dict[str, Any]) -> None:
        """Keep a cell, in place of an earlier failure, and write the file as a whole."""
        self.cells = [old for old in self.cells if _identity(old) != _identity(cell)]
        self.cells.append(cell)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".part")
        written.write_text(
            json.dumps({"schema": 1, **self.about, "cells": self.cells}, indent=1) + "\n", encoding="utf-8"
        )
        written.replace(self.path)

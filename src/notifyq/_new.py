"""Writes the example project."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import TYPE_CHECKING

from ._errors import InvalidOption

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_project"]


def write_project(folder: Path) -> list[Path]:
    """Copy the example project into a folder and return the files written.

    Raises ``InvalidOption`` if it is not empty, or cannot be written to.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidOption(f"{folder} exists and is not an empty folder: name a new one")
    try:
        return _copy(folder)
    except OSError as error:
        raise InvalidOption(f"{folder} cannot be written to: {error.strerror}") from error


def _copy(folder: Path) -> list[Path]:
    written = []
    with as_file(files("notifyq") / "_template") as template:
        for source in sorted(template.rglob("*")):
            if source.is_file() and source.suffix in (".py", ".md", ".sql"):
                target = folder / source.relative_to(template)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
                written.append(target)
    return written

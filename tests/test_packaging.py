"""What is shipped, and what is public."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import notifyq

ROOT = Path(__file__).parent.parent


def test_wheel_and_sdist_hold_every_sql_file(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--quiet", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    expected = {str(path.relative_to(ROOT / "sql")) for path in (ROOT / "sql").rglob("*.sql")}
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        name.removeprefix("notifyq/sql/") for name in names if name.startswith("notifyq/sql/") and name.endswith(".sql")
    } == expected
    assert len(names) == len(set(names))
    assert "notifyq/py.typed" in names
    assert "notifyq/_template/orders.sql" in names
    [sdist] = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        shipped = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"sql/{name}" for name in expected} <= shipped


def test_public_names_are_the_stated_ones():
    public = {name for name in vars(notifyq) if not name.startswith("_")} - {"bench", "testing"}
    modules = {name for name in public if type(getattr(notifyq, name)).__name__ == "module"}
    assert public - modules == set(notifyq.__all__) - {"__version__", "events"}


def test_the_version_is_in_the_changelog():
    assert f"## {notifyq.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

"""What the documentation points at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *sorted((ROOT / "docs").glob("*.md"))]


def names_of_tests() -> set[str]:
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    return {name for text in texts for name in re.findall(r"def (test_\w+)", text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_is_named_exists(page):
    named = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")))
    assert named - names_of_tests() == set()
    if page.name == "guarantees.md":
        assert len(named) > 30


def points(page: str) -> list[str]:
    """What a page says: its paragraphs, and the points of its lists; a table with the brackets that follow it."""
    found: list[str] = []
    for block in re.split(r"\n(?=- |\d+\. )|\n\n", page):
        if block.startswith("[") and found[-1].startswith("|"):
            found[-1] += "\n" + block
        elif block.strip() and not block.startswith("#"):
            found.append(block.strip())
    return found


def test_whatever_is_guaranteed_names_what_holds_it():
    page = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    guaranteed = page[page.index("## The promise") : page.index("## What was broken")]
    said = points(guaranteed)
    assert len(said) > 30
    holder = r"(?:`test_\w+`|chaos `[\w-]+`|`make chaos`)"
    assert [point for point in said if not re.search(rf"\[{holder}(?:,\s+{holder})*\]$", point)] == []
    faults = re.findall(r"^- `([\w-]+)`: ", (ROOT / "docs" / "faults.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"chaos `([\w-]+)`", page)) <= set(faults)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []

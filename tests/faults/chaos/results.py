"""What a run leaves: a JSON file, and the table in docs/guarantees.md."""

from __future__ import annotations

import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cell import Outcome
    from .faults import Fault

__all__ = ["about", "as_entry", "descriptions", "markdown", "put_into", "replaced", "section", "write"]

BEGIN, END = "<!-- faults -->", "<!-- end of faults -->"


def about(seed: int, minutes: float, command: str, server: str) -> dict[str, Any]:
    """What the figures were taken with."""
    return {
        "schema": 1,
        "command": command,
        "seed": seed,
        "minutes": minutes,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "postgresql": server,
            "python": platform.python_version(),
            **{name: version(name) for name in ("notifyq", "psycopg", "trio")},
        },
    }


def as_entry(fault: Fault, outcome: Outcome) -> dict[str, Any]:
    """One fault's figures."""
    verdict = outcome.verdict
    return {
        "fault": fault.name,
        "times": outcome.incidents.total(),
        "times_by_kind": dict(outcome.incidents),
        "jobs": verdict.sent,
        "runs_of_handlers": verdict.ran,
        "lost": len(verdict.lost),
        "stuck": len(verdict.stuck),
        "duplicated_explained": sum(verdict.explained.values()),
        "explained_by": dict(verdict.explained),
        "duplicated_unexplained": len(verdict.unexplained),
        "recoveries": len(outcome.waits),
        "longest_recovery_seconds": round(max(outcome.waits), 3) if outcome.waits else None,
        "median_recovery_seconds": round(sorted(outcome.waits)[len(outcome.waits) // 2], 3) if outcome.waits else None,
        "goal_seconds": fault.goal,
        "jobs_of_sends_without_answer": outcome.unknown,
        "failed_sends": outcome.refused,
        "events": outcome.events,
        "restarts_of_workers_that_could_not_start": outcome.restarts,
        "seconds": round(outcome.seconds, 1),
        "complaints": verdict.complaints,
        "good": verdict.good,
    }


def write(path: Path, head: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Write the file as a whole, a fault on a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in head.items())
    faults = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    part = path.with_suffix(".part")
    part.write_text(f'{{\n{lines} "faults": [\n{faults}\n ]\n}}\n', encoding="utf-8")
    part.replace(path)


def replaced(entries: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries with this one in the place of the same fault's, or at the end."""
    if entry["fault"] not in [one["fault"] for one in entries]:
        return [*entries, entry]
    return [entry if one["fault"] == entry["fault"] else one for one in entries]


def markdown(entries: list[dict[str, Any]]) -> str:
    """The table: fault, how often, jobs, lost, run twice, longest recovery."""
    rows = [
        "| fault | times | jobs | lost | run twice, explained | run twice, unexplained | longest recovery, s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    tried = [entry for entry in entries if "jobs" in entry]
    for entry in tried:
        longest = entry["longest_recovery_seconds"]
        rows.append(
            f"| {entry['fault']} | {entry['times']} | {entry['jobs']:,} | {entry['lost'] + entry['stuck']}"
            f" | {entry['duplicated_explained']:,} | {entry['duplicated_unexplained']}"
            f" | {'' if longest is None else f'{longest:.2f}'} |"
        )
    total = {key: sum(entry[key] for entry in tried) for key in ("times", "jobs", "lost", "stuck")}
    twice = [sum(entry[f"duplicated_{key}"] for entry in tried) for key in ("explained", "unexplained")]
    rows.append(
        f"| all | {total['times']} | {total['jobs']:,} | {total['lost'] + total['stuck']} | {twice[0]:,} | {twice[1]} | |"
    )
    rows += [f"\nNot tried: {entry['fault']}, {entry['not_tried']}." for entry in entries if "not_tried" in entry]
    rows += [f"\nBroke off: {entry['fault']}, {entry['broke_off']}." for entry in entries if "broke_off" in entry]
    rows += [
        f"\nNot good: {entry['fault']}: {'; '.join(entry['complaints'])}." for entry in tried if entry.get("complaints")
    ]
    return "\n".join(rows) + "\n"


def section(found: dict[str, Any], results: str) -> str:
    """The table, and what it was taken with."""
    versions = found["versions"]
    taken = ", ".join(f"{name} {versions[name]}" for name in ("postgresql", "python", "psycopg", "trio"))
    head = f"From [`{Path(results).name}`]({results}): seed {found['seed']}, {found['machine']}, {taken}."
    later = [
        f"`{one['fault']}` with seed {one['seed']}"
        for one in found["faults"]
        if one.get("seed", found["seed"]) != found["seed"]
    ]
    if later:
        head += f"\nRun again later, on what was mended since: {', '.join(later)}."
    return f"{head}\n\n{markdown(found['faults'])}"


def descriptions(faults: list[Fault]) -> str:
    """What each fault does, as a list."""
    return "".join(f"- `{fault.name}`: {' '.join((type(fault).__doc__ or '').split())}\n" for fault in faults)


def put_into(text: str, part: str) -> str:
    """The text with this part between its two marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the page needs one line {BEGIN} and one line {END}")
    marks = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    return marks.sub(lambda _: f"{BEGIN}\n\n{part}\n{END}", text)

"""The command: ``python -m tests.faults.chaos``."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import trio

from . import results
from .catalogue import FAULTS
from .cell import Outcome, run_cell
from .servers import Server, make_template

if TYPE_CHECKING:
    from .faults import Fault

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
LOG_SHOWN = 4000
"""Characters of the workers' log that are shown of a run that was not good."""


@click.command()
@click.argument("names", nargs=-1, metavar="[FAULT]...")
@click.option("--minutes", default=10.0, show_default=True, type=click.FloatRange(0.05), help="Of load, in all.")
@click.option("--seed", type=int, help="Of an earlier run: the same blows in the same order.")
@click.option("--rate", default=5000.0, show_default=True, help="Most bulk jobs sent in a second.")
@click.option(
    "--json",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write; what it has of faults that are not named stays.",
)
@click.option(
    "--write-docs",
    is_flag=True,
    help="Write the table of that file into docs/guarantees.md, and run nothing if it is there.",
)
@click.option("--keep", is_flag=True, help="Keep the folder with the ledgers and logs.")
def main(
    names: tuple[str, ...],
    minutes: float,
    seed: int | None,
    rate: float,
    path: Path | None,
    write_docs: bool,
    keep: bool,
) -> None:
    """Break what is named, or everything, while three workers work; account for every job. Ends with 1 if one is missing."""
    if write_docs and path is None:
        raise click.UsageError("--write-docs needs the file: --json FILE")
    if write_docs and path is not None and path.exists():
        write_pages(path)
        return
    # as Ctrl-C: servers, workers and mounts end with it
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)  # it tells of every connection that was lost
    if seed is None:
        seed = random.randrange(10**6)
    faults = chosen(names)
    click.echo(f"seed {seed}, {len(faults)} faults, {minutes:g} minutes of load", err=True)
    folder = Path(tempfile.mkdtemp(prefix="notifyq-chaos-"))
    folder.chmod(0o711)
    bad = False
    try:
        template = make_template(folder)
        command = " ".join(["python -m tests.faults.chaos", *names, f"--minutes {minutes:g} --seed {seed}"])
        head = results.about(seed, minutes, command, trio.run(server_version, template, folder))
        entries: list[dict[str, Any]] = []
        if names and path is not None and path.exists():  # what is not run now stays
            head = json.loads(path.read_text(encoding="utf-8"))
            entries = head.pop("faults")
        for fault, seconds in zip(faults, lengths(faults, minutes * 60), strict=True):
            entry = tried(fault, seconds, seed, folder, template, rate)
            if not keep:
                shutil.rmtree(folder / fault.name, ignore_errors=True)
            entries = results.replaced(entries, {**entry, "seed": seed})
            bad |= not entry.get("good", "not_tried" in entry)
            if path is not None:
                results.write(path, head, entries)
        if path is None:
            click.echo(results.markdown(entries))
        elif write_docs:
            write_pages(path)
    finally:
        if keep:
            click.echo(f"ledgers and logs are in {folder}", err=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if bad else 0)


def chosen(names: tuple[str, ...]) -> list[Fault]:
    """The faults of these names."""
    known = {fault.name: fault for fault in FAULTS}
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"there is no fault {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names] or FAULTS


def lengths(faults: list[Fault], seconds: float) -> list[float]:
    """Seconds of load for each, of so many in all: alike, but for those that need more, if these take no more than half."""
    needy = [fault for fault in faults if fault.least > seconds / len(faults)]
    if sum(fault.least for fault in needy) > seconds / 2:
        needy = []
    alike = (seconds - sum(fault.least for fault in needy)) / (len(faults) - len(needy))
    return [fault.least if fault in needy else alike for fault in faults]


async def server_version(template: Path, folder: Path) -> str:
    server = Server.copied(template, folder / "version")
    try:
        await server.start()
        return str(server.query("show server_version")[0][0])
    finally:
        server.kill()


def tried(fault: Fault, seconds: float, seed: int, folder: Path, template: Path, rate: float) -> dict[str, Any]:
    """Run a fault, if it can be; gives its figures, or why there are none."""
    if reason := fault.missing():
        click.echo(f"{fault.name:24} not tried: {reason}", err=True)
        return {"fault": fault.name, "not_tried": reason}
    try:
        return results.as_entry(fault, run_one(fault, seconds, seed, folder, template, rate))
    except Exception as error:  # the others are tried all the same
        traceback.print_exc()
        return {"fault": fault.name, "broke_off": repr(error)}


def run_one(fault: Fault, seconds: float, seed: int, folder: Path, template: Path, rate: float) -> Outcome:
    """Run a fault and say how it went."""

    async def run() -> Outcome:
        return await run_cell(
            fault, seconds=seconds, seed=seed, folder=folder / fault.name, template=template, rate=rate
        )

    outcome = trio.run(run)
    verdict = outcome.verdict
    waits = f"{max(outcome.waits):.2f} s" if outcome.waits else "-"
    click.echo(
        f"{fault.name:24} {outcome.incidents.total():4} times, {verdict.sent:8,} jobs, {len(verdict.lost)} lost,"
        f" {len(verdict.stuck)} stuck, twice {sum(verdict.explained.values())} explained"
        f" and {len(verdict.unexplained)} not, recovery {waits}, {outcome.restarts} restarts, {outcome.seconds:.0f} s",
        err=True,
    )
    if not verdict.good:
        for complaint in verdict.complaints:
            click.echo(f"    {complaint}", err=True)
        for what in ("lost", "stuck", "unexplained"):
            if jobs := getattr(verdict, what):
                click.echo(f"    {what}: {jobs[:10]}", err=True)
        click.echo(outcome.log[-LOG_SHOWN:], err=True)
    return outcome


def pages(path: Path) -> dict[Path, str]:
    """The pages with the table of a file, and with what each fault does."""
    found = json.loads(path.read_text(encoding="utf-8"))
    parts = {
        DOCS / "guarantees.md": results.section(found, os.path.relpath(path.resolve(), DOCS)),
        DOCS / "faults.md": results.descriptions(FAULTS),
    }
    return {page: results.put_into(page.read_text(encoding="utf-8"), part) for page, part in parts.items()}


def write_pages(path: Path) -> None:
    """Put the table of a file into the pages."""
    for page, text in pages(path).items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

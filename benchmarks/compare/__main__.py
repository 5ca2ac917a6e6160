"""The command."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import psycopg

from notifyq import testing
from notifyq.bench._one_line import run

from . import _install, _server
from ._cell import Cell, Options
from ._peers import PEERS, Peer
from ._process import CellFailed
from ._readme import draw, put_into
from ._results import Results, newest, unfinished_or_new
from ._table import show
from ._verbs import VERBS, measure

if TYPE_CHECKING:
    from collections.abc import Iterator

README = Path(__file__).parents[1] / "README.md"
RESULTS = README.parent / "results"
PUBLISHED = 5
"""Fewest repeats for the README's tables: the median of fewer is not worth publishing on a machine that others use."""


@click.command()
@click.argument("names", nargs=-1, metavar="[PEER|VERB]...")
@click.option("--settings", default="", metavar="WORD", help="Of peers only rows whose name begins so: default, tuned.")
@click.option("--repeats", default=PUBLISHED, show_default=True, type=click.IntRange(1), help="Runs of every cell.")
@click.option("--jobs", default=50_000, show_default=True, type=click.IntRange(100), help="Jobs of a drain.")
@click.option("--seconds", default=30, show_default=True, type=click.IntRange(6), help="Of sustained; pinned has two.")
@click.option("--limit", default=60, show_default=True, type=click.IntRange(15), help="Most seconds of a drain.")
@click.option(
    "--json",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write, or to go on with.  [default: that of the run that was stopped last, or a new one of today]",
)
@click.option(
    "--readme", is_flag=True, help="Then write tables and pictures of the whole file into benchmarks/README.md."
)
@click.option("--install-only", is_flag=True, help="Install the peers, and stop.")
def main(
    names: tuple[str, ...],
    settings: str,
    repeats: int,
    jobs: int,
    seconds: int,
    limit: int,
    path: Path | None,
    readme: bool,
    install_only: bool,
) -> None:
    """Measure notifyq beside its peers, each at its defaults and tuned: those that are named, by those verbs, or all.

    Every cell (peer, settings, verb, repeat) runs in a database of its own and is written down when it is done; the
    same command again does only what is missing.
    """
    wanted, verbs = chosen(names)
    check(wanted, settings, repeats, readme=readme)
    results = Results(path) if path else None
    peers = available(wanted)
    if install_only:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # processes and server end with it
    options = Options(jobs=jobs, seconds=seconds, limit=limit)
    versions = {name: _install.versions(PEERS[name]) for name in peers}
    with alone(), testing.embedded_server() as server:
        told = _server.settings(server)
        planned = plan(versions, verbs, repeats, options, told["server_version"], settings)
        if not planned:
            raise click.UsageError(f"nothing to measure of {', '.join(versions)} by {', '.join(verbs)}")
        results = results or unfinished_or_new(RESULTS, planned)
        results.about |= {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"}
        results.about |= {"server_settings": told}
        say_settings(planned)
        measure_all(server, results, results.missing(planned), options)
    cells = newest(results.cells)
    show(cells)
    if readme:
        base = README.parent
        pictures = [str(one.relative_to(base)) for one in draw(cells, results.path.resolve())]
        text = put_into(README.read_text(encoding="utf-8"), cells, os.path.relpath(results.path, base), pictures)
        README.write_text(text, encoding="utf-8")
    if failures := sum("error" in cell for cell in cells):
        raise click.ClickException(f"{failures} cells failed: the same command tries them again")
    if missing := [name for name in wanted if name not in peers]:
        raise click.ClickException(f"left out: {', '.join(missing)}")


@contextlib.contextmanager
def alone(folder: Path = Path(__file__).parent) -> Iterator[None]:
    """Refuse to run beside another comparison: they would share a machine, and perhaps a file."""
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise click.ClickException("another comparison is running here") from None
        yield
    finally:
        os.close(held)


def chosen(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The peers and the verbs that are named, or all of a kind of which none is, in their own order.

    Raises:
        UsageError: a name is neither; says which there are.
    """
    for name in names:
        if name not in PEERS and name not in VERBS:
            raise click.UsageError(f"no peer or verb {name!r}: there are {', '.join([*PEERS, *VERBS])}")
    peers, verbs = ([one for one in all_ if one in names] or list(all_) for all_ in (PEERS, VERBS))
    return peers, verbs


def check(wanted: list[str], settings: str, repeats: int, *, readme: bool) -> None:
    """Refuse what would measure nothing, or publish too little.

    Raises:
        UsageError: no row of these peers has such a name; too few repeats for the README.
    """
    rows = {row for name in wanted if PEERS[name].kind not in ("own", "bare") for row in PEERS[name].rows}
    if settings and not any(row.startswith(settings) for row in rows):
        told = f"there are {', '.join(sorted(rows))}" if rows else "none of them has rows to choose from"
        raise click.UsageError(f"--settings {settings}: no row of {', '.join(wanted)} begins so: {told}")
    if readme and repeats < PUBLISHED:
        raise click.UsageError(f"--readme with --repeats {repeats}: too few for a table, it takes {PUBLISHED} or more")


def available(wanted: list[str]) -> list[str]:
    """Those of the peers that are installed now; a line about each other one."""
    found = []
    for name in wanted:
        try:
            _install.install(PEERS[name])
        except _install.NotInstalled as error:
            click.echo(f"compare: left out: {error}", err=True)
        else:
            found.append(name)
    return found


def plan(
    versions: dict[str, dict[str, str]],
    verbs: list[str],
    repeats: int,
    options: Options,
    server: str,
    settings: str = "",
) -> list[dict[str, Any]]:
    """The cells, in their order: one of each peer in turn, then the next verb, then the next repeat."""
    return [
        {
            "peer": name,
            "row": row,
            "verb": verb,
            "repeat": repeat,
            "versions": found,
            "settings": PEERS[name].rows[row].settings,
            "options": options.of(verb),
            "server_version": server,
        }
        for repeat in range(1, repeats + 1)
        for verb in verbs
        for name, found in versions.items()
        for row in PEERS[name].rows
        if _is_planned(PEERS[name], row, verb, settings)
    ]


def _is_planned(peer: Peer, row: str, verb: str, settings: str) -> bool:
    if peer.kind == "bare":
        return verb == "pickup"
    return peer.kind == "own" or row.startswith(settings)


def say_settings(planned: list[dict[str, Any]]) -> None:
    """Print what is about to be compared."""
    rows = {(cell["peer"], cell["row"]): cell for cell in planned}
    for (peer, row), cell in rows.items():
        click.echo(f"{peer}, {row}: {json.dumps(cell['settings'])} {json.dumps(cell['versions'])}", err=True)


def measure_all(server: str, results: Results, missing: list[dict[str, Any]], options: Options) -> None:
    """Measure these cells, and write each down."""
    commit = _install.commit()
    for number, planned in enumerate(missing, 1):
        title = "{verb}: {peer}, {row}, repeat {repeat}".format(**planned)
        began = time.monotonic()
        try:
            outcome: dict[str, Any] = {"figures": measure_one(server, planned, options)}
        except (CellFailed, psycopg.Error) as error:
            outcome = {"error": str(error).partition("\n")[0]}
        seconds = time.monotonic() - began
        told = outcome.get("error") or {key: one for key, one in outcome["figures"].items() if key != "curve"}
        click.echo(f"[{number}/{len(missing)}] {title}: {told} in {seconds:.0f} s", err=True)
        if commit:
            outcome["commit"] = commit
        results.add({**planned, "at": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}", **outcome})


def measure_one(server: str, planned: dict[str, Any], options: Options) -> dict[str, Any]:
    """Measure a cell, in a database of its own."""
    peer = PEERS[planned["peer"]]
    command, variables = _install.command(peer)
    with _server.fresh_database(server) as database:
        return measure(planned["verb"], Cell(peer, planned["settings"], database, command, variables, options))


if __name__ == "__main__":
    run(main, "benchmarks.compare")

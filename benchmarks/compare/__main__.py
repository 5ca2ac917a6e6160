"""The command."""

from __future__ import annotations

import datetime
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from notifyq import testing

from . import _install, _server
from ._peers import PEERS
from ._process import CellFailed
from ._results import Results
from ._table import show
from ._verbs import VERBS, Cell, Options, measure

if TYPE_CHECKING:
    from collections.abc import Iterable


class Names(click.ParamType[list[str]]):
    """Names with commas between them, kept in the order of the choices."""

    name = "names"

    def __init__(self, what: str, choices: Iterable[str]) -> None:
        self.what, self.choices = what, list(choices)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        """All of them, or a refusal that says which there are."""
        if isinstance(value, list):
            return value
        names = [name.strip() for name in value.split(",")]
        for name in names:
            if name not in self.choices:
                self.fail(f"no {self.what} {name!r}: there are {', '.join(self.choices)}", param, ctx)
        return [name for name in self.choices if name in names]


@click.command()
@click.option("--peers", type=Names("peer", PEERS), default=list(PEERS), help="Only these, a,b,c.  [default: all]")
@click.option("--verbs", type=Names("verb", VERBS), default=list(VERBS), help="Only these, a,b,c.  [default: all]")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1), help="Runs of every cell.")
@click.option("--jobs", default=50_000, show_default=True, type=click.IntRange(100), help="Jobs of a drain.")
@click.option("--limit", default=60, show_default=True, type=click.IntRange(15), help="Most seconds of a drain.")
@click.option(
    "--json",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write, or to go on with.  [default: benchmarks/results/<date>-compare.json]",
)
@click.option("--install-only", is_flag=True, help="Install the peers, and stop.")
def main(
    peers: list[str], verbs: list[str], repeats: int, jobs: int, limit: int, path: Path | None, install_only: bool
) -> None:
    """Measure notifyq beside its peers, each at its defaults and tuned.

    Every cell (peer, settings, verb, repeat) runs in a database of its own and is written down when it is done; the
    same command again does only what is missing.
    """
    path = path or Path(__file__).parents[1] / "results" / f"{datetime.date.today():%Y-%m-%d}-compare.json"
    results = Results(path, {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"})
    for name in peers:
        _install.check(PEERS[name])
    for name in peers:
        _install.install(PEERS[name])
    if install_only:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # processes and server end with it
    options = Options(
        jobs=jobs, pickups=300, sends_seconds=5, sustained_seconds=15, in_flight=5000, idle_seconds=20, limit=limit
    )
    with testing.embedded_server() as server:
        settings = _server.settings(server)
        results.about["server_settings"] = settings
        planned = plan(peers, verbs, repeats, options, settings["server_version"])
        measure_all(server, results, results.missing(planned), options)
    cells = results.of(planned)
    show(cells, verbs, repeats)
    if failures := sum("error" in cell for cell in cells):
        raise click.ClickException(f"{failures} cells failed: the same command tries them again")


def plan(peers: list[str], verbs: list[str], repeats: int, options: Options, server: str) -> list[dict[str, Any]]:
    """The cells, in their order: one of each peer in turn, then the next verb, then the next repeat."""
    versions = {name: _install.versions(PEERS[name]) for name in peers}
    for name in peers:
        told = ", ".join(f"{package} {version}" for package, version in versions[name].items())
        click.echo(f"{name} ({told})", err=True)
        for row, settings in PEERS[name].rows.items():
            click.echo(f"  {row}: {json.dumps(settings)}", err=True)
    return [
        {
            "peer": name,
            "row": row,
            "verb": verb,
            "repeat": repeat,
            "versions": versions[name],
            "settings": settings,
            "options": attrs.asdict(options),
            "server_version": server,
        }
        for repeat in range(1, repeats + 1)
        for verb in verbs
        for name in peers
        for row, settings in PEERS[name].rows.items()
        if PEERS[name].kind != "bare" or verb == "pickup"
    ]


def measure_all(server: str, results: Results, missing: list[dict[str, Any]], options: Options) -> None:
    """Measure these cells, and write each down."""
    for number, planned in enumerate(missing, 1):
        title = "{verb}: {peer}, {row}, repeat {repeat}".format(**planned)
        began = time.monotonic()
        try:
            outcome: dict[str, Any] = {"figures": measure_one(server, planned, options)}
        except CellFailed as error:
            outcome = {"error": str(error)}
        seconds = time.monotonic() - began
        click.echo(f"[{number}/{len(missing)}] {title}: {next(iter(outcome.values()))} in {seconds:.0f} s", err=True)
        results.add({**planned, "at": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}", **outcome})


def measure_one(server: str, planned: dict[str, Any], options: Options) -> dict[str, Any]:
    """Measure a cell, in a database of its own."""
    peer = PEERS[planned["peer"]]
    command, variables = _install.command(peer)
    with _server.fresh_database(server) as database:
        return measure(planned["verb"], Cell(peer, planned["settings"], database, command, variables, options))


if __name__ == "__main__":
    try:
        main(prog_name="python -m benchmarks.compare", standalone_mode=False)
    except click.ClickException as error:  # one line: without click's usage above it
        click.echo(f"compare: {error.format_message()}", err=True)
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)

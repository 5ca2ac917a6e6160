"""The command: see ``python -m notifyq.bench --help``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import psycopg
from click.core import ParameterSource

from notifyq import NotifyqError
from notifyq._ctrl_c import every_end_is_ctrl_c

from ._measure import measure
from ._one_line import run
from ._options import ALL, MAIN, check, doubts
from ._parts import CannotMeasure
from ._plots import draw, is_installed
from ._report import show, write

__all__ = ["main", "measure", "show"]

MAIN_WORDS = f"{', '.join(MAIN[:-1])} and {MAIN[-1]}"
OTHER_WORDS = ", ".join(name for name in ALL if name not in MAIN)
SECONDS = f"[default: {', '.join(f'{name} {kind.seconds:.0f}' for name, kind in ALL.items() if kind.seconds)}]"
QUEUES = f"[default: {', '.join(f'{name} {kind.queues}' for name, kind in ALL.items() if kind.queues)}]"
FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    help=f"Measure WORKLOADS: {MAIN_WORDS} (the default), {OTHER_WORDS}, or all.\n\n"
    "In databases of its own, which it drops afterwards, on a server that it starts, or on the one given. "
    "It touches no database that it has not made, and needs a role that may create databases.",
)
@click.argument("workloads", nargs=-1, type=click.Choice([*ALL, "all"]), metavar="[WORKLOADS]...")
@click.option(
    "--dsn", envvar="DATABASE_URL", help="Server to measure, in a database of its own [default: an embedded one]."
)
@click.option("--jobs", default=50_000, show_default=True, type=click.IntRange(100), help="Jobs of a run.")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1), help="Senders, or workers.")
@click.option("--concurrency", default=10, show_default=True, type=click.IntRange(1), help="At once in a process.")
@click.option("--batch", default=1000, show_default=True, type=click.IntRange(1), help="Jobs in one send_many.")
@click.option("--kept/--not-kept", default=True, help="Whether finished jobs and outputs are kept.  [default: kept]")
@click.option("--senders", default=32, show_default=True, type=click.IntRange(1), help="Connections that send at once.")
@click.option("--seconds", type=click.FloatRange(1), help=f"How long those measure that last.  {SECONDS}")
@click.option("--queues", type=click.IntRange(1), help=f"Queues.  {QUEUES}")
@click.option(
    "--backlog", default=1_000_000, show_default=True, type=click.IntRange(20_000), help="Jobs that wait, or are kept."
)
@click.option(
    "--repeat", type=click.IntRange(1), help="Runs; the median counts.  [default: 3, or 1 of those that last]"
)
@click.option("--warm-up", type=click.IntRange(0), help="Runs before, which don't count.  [default: 1, or 0]")
@click.option("--json", "json_file", type=FILE, help="Write the figures here.")
@click.option("--plot", type=FOLDER, help="Draw latency, sustained and pinned into this folder.")
@click.pass_context
def main(
    context: click.Context,
    /,
    workloads: tuple[str, ...],
    dsn: str | None,
    json_file: Path | None,
    plot: Path | None,
    **options: Any,
) -> None:
    names = list(ALL) if "all" in workloads else list(dict.fromkeys(workloads or MAIN))
    given = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if (wrong := check(names, given)) is not None:
        raise click.UsageError(wrong)
    if plot is not None and not is_installed():
        raise click.UsageError("--plot needs matplotlib: pip install 'notifyq[bench]'")
    try:
        with every_end_is_ctrl_c():
            report = measure(names, dsn, doubts=doubts(names, given), **options)
    except (NotifyqError, CannotMeasure) as error:
        raise click.ClickException(str(error)) from None
    except psycopg.Error as error:
        raise click.ClickException(f"the server said: {' '.join(str(error).split())}") from None
    show(report)
    if json_file is not None:
        write(report, json_file)
    if plot is not None:
        for file in draw(report, plot):
            click.echo(f"drawn: {file}")


if __name__ == "__main__":
    run(main, "notifyq.bench")

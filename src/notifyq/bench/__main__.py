"""The command: see ``python -m notifyq.bench --help``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from notifyq import NotifyqError

from ._measure import measure
from ._options import ALL, MAIN, check
from ._report import show, write

__all__ = ["main", "measure", "show"]

MAIN_WORDS = f"{', '.join(MAIN[:-1])} and {MAIN[-1]}"
OTHER_WORDS = ", ".join(name for name in ALL if name not in MAIN)


@click.command(
    help=f"Measure WORKLOADS: {MAIN_WORDS} (the default), {OTHER_WORDS}, or all.\n\n"
    "In a database of its own, which it drops afterwards, on a server that it starts; or on the one given."
)
@click.argument("workloads", nargs=-1, type=click.Choice([*ALL, "all"]))
@click.option(
    "--dsn", envvar="DATABASE_URL", help="Server to measure, in a database of its own [default: an embedded one]."
)
@click.option("--jobs", default=50_000, show_default=True, type=click.IntRange(100), help="Jobs of a run.")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1), help="Senders, or workers.")
@click.option("--concurrency", default=10, show_default=True, type=click.IntRange(1), help="At once in a process.")
@click.option("--batch", default=1000, show_default=True, type=click.IntRange(1), help="Jobs in one send_many.")
@click.option("--kept/--not-kept", default=True, help="Whether finished jobs and outputs are kept.  [default: kept]")
@click.option("--senders", default=32, show_default=True, type=click.IntRange(1), help="Connections that send at once.")
@click.option("--seconds", type=click.FloatRange(1), help="How long a workload that lasts is measured.")
@click.option("--queues", type=click.IntRange(1), help="Queues of idle [default: 10], and of queues [default: 1000].")
@click.option(
    "--backlog", default=1_000_000, show_default=True, type=click.IntRange(20_000), help="Jobs that wait, or are kept."
)
@click.option(
    "--repeat", type=click.IntRange(1), help="Runs; the median counts.  [default: 3, or 1 of those that last]"
)
@click.option("--warm-up", type=click.IntRange(0), help="Runs before, which don't count.  [default: 1, or 0]")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
@click.pass_context
def main(
    context: click.Context,
    /,
    workloads: tuple[str, ...],
    dsn: str | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    names = list(ALL) if "all" in workloads else list(dict.fromkeys(workloads or MAIN))
    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if (wrong := check(names, given)) is not None:
        raise click.UsageError(wrong)
    if json_file is not None and not json_file.parent.is_dir():
        raise click.UsageError(f"--json: there is no folder {json_file.parent}")
    try:
        report = measure(names, dsn, **options)
    except NotifyqError as error:
        raise click.ClickException(str(error)) from None
    show(report)
    if json_file is not None:
        write(report, json_file)


if __name__ == "__main__":
    main()

"""The command: see ``python -m notifyq.bench --help``."""

from __future__ import annotations

import json
import platform
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import psycopg
import trio
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from notifyq import Queue, __version__, connect, testing
from notifyq._connect import resolve_dsn

from ._parts import Settings
from ._rules import RULES
from ._sql import SETTINGS
from ._workloads import MAIN, WORKLOADS, set_up


@click.command()
@click.argument("workloads", nargs=-1, type=click.Choice([*WORKLOADS, "all"]))
@click.option(
    "--dsn", envvar="DATABASE_URL", help="Server to measure, in a database of its own [default: an embedded one]."
)
@click.option("--jobs", default=50_000, show_default=True, type=click.IntRange(100), help="Jobs of a run.")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1), help="Senders, or workers.")
@click.option("--concurrency", default=10, show_default=True, type=click.IntRange(1), help="At once in a process.")
@click.option("--batch", default=1000, show_default=True, type=click.IntRange(1), help="Jobs in one send_many.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1), help="Runs; the median counts.")
@click.option("--kept/--not-kept", default=True, help="Whether finished jobs and outputs are kept.  [default: kept]")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
def main(
    workloads: tuple[str, ...],
    dsn: str | None,
    jobs: int,
    processes: int,
    concurrency: int,
    batch: int,
    repeat: int,
    kept: bool,
    json_file: Path | None,
) -> None:
    """Measure WORKLOADS: enqueue, drain and latency (the default), keys, flows, or all."""
    names = list(WORKLOADS) if "all" in workloads else list(dict.fromkeys(workloads or MAIN))
    report = measure(
        names, dsn, repeat, jobs=jobs, processes=processes, concurrency=concurrency, batch=batch, kept=kept
    )
    show(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(names: list[str], dsn: str | None, repeat: int, **options: Any) -> dict[str, Any]:
    """Run workloads in a fresh database, interleaved, and report medians with the runs they come from."""
    with ExitStack() as stack:
        server = resolve_dsn(dsn) if dsn else stack.enter_context(testing.embedded_server())
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}

        async def all_runs() -> dict[str, str]:
            async with testing.fresh_database(server) as own:
                return await trio.to_thread.run_sync(runs_in, own)

        def runs_in(own: str) -> dict[str, str]:
            trio.run(_make_queues, own, options["kept"])
            set_up(own)
            settings = Settings(own, **options)
            columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                tasks = {name: progress.add_task(name, total=repeat) for name in names}
                for _ in range(repeat):
                    for name in names:
                        runs[name].append(WORKLOADS[name](settings, lambda task=tasks[name]: progress.advance(task)))  # type: ignore[misc]
            with psycopg.connect(own) as connection:
                return dict(connection.execute(SETTINGS).fetchall())

        server_settings = trio.run(all_runs)
    return {
        "schema": 1,
        "notifyq": __version__,
        "python": platform.python_version(),
        "psycopg": f"{psycopg.__version__} {psycopg.pq.__impl__}",
        "machine": f"{platform.system()} {platform.machine()}",
        "server_version": server_settings.pop("server_version"),
        "server_settings": server_settings,
        "settings": {**options, "repeat": repeat},
        "workloads": {name: _medians(found) for name, found in runs.items()},
    }


async def _make_queues(dsn: str, kept: bool) -> None:
    async with connect(dsn) as nq:
        await nq.create_queue(Queue("bench.drain", retention=86_400 if kept else 0))
        await nq.create_queue(Queue("bench.latency", retention=86_400))
        await nq.create_queue(Queue("bench.chain", policy="singleton", retention=86_400))
        for queue in RULES.values():
            await nq.create_queue(queue)


def _medians(runs: list[dict[str, float]]) -> dict[str, Any]:
    figures: dict[str, Any] = {key: _figure([run[key] for run in runs]) for key in runs[0]}
    return {**figures, "runs": runs}


def _figure(values: list[float]) -> float | bool | int:
    if isinstance(values[0], bool | int):
        return values[0]
    return round(statistics.median(values), 3)


def show(report: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table(
        title=f"notifyq {report['notifyq']}, PostgreSQL {report['server_version']}, Python {report['python']}"
    )
    table.add_column("workload")
    table.add_column("figure")
    table.add_column("median", justify="right")
    table.add_column("lowest", justify="right")
    table.add_column("highest", justify="right")
    for name, figures in report["workloads"].items():
        for key, value in figures.items():
            if key == "runs":
                continue
            values = [run[key] for run in figures["runs"]]
            row = [f"{v:,.0f}" if v >= 100 else f"{v:,.2f}" for v in (value, min(values), max(values))]
            table.add_row(name, key, *(row if not isinstance(value, bool | int) else [str(value), "", ""]))
    Console().print(table)


if __name__ == "__main__":
    main()

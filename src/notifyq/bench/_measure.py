"""Runs workloads in a database of their own, in turn, and reports what they found."""

from __future__ import annotations

import platform
from contextlib import ExitStack
from typing import Any

import psycopg
import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from notifyq import Queue, __version__, connect, testing
from notifyq._connect import resolve_dsn

from ._options import ALL
from ._parts import Found, Settings
from ._report import medians
from ._rules import RULES
from ._sql import SETTINGS
from ._steady import STEADY
from ._workloads import set_up

__all__ = ["measure"]

KEPT = 86_400
"""Seconds of retention of the queues whose outputs are read afterwards."""


def measure(
    names: list[str],
    dsn: str | None,
    repeat: int | None = None,
    *,
    warm_up: int | None = 0,
    seconds: float | None = None,
    queues: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run workloads in a fresh database, interleaved, and report medians with the runs they come from.

    ``None``: as each workload has it. It touches no database that it has not created, and drops those.
    """
    found: dict[str, list[Found]] = {name: [] for name in names}
    each = {
        name: {
            "repeat": ALL[name].repeat if repeat is None else repeat,
            "warm_up": ALL[name].warm_up if warm_up is None else warm_up,
            "seconds": ALL[name].seconds if seconds is None else seconds,
            "queues": ALL[name].queues if queues is None else queues,
        }
        for name in names
    }
    server_settings: dict[str, str] = {}

    def runs_in(own: str) -> None:
        trio.run(_make_queues, own, options["kept"])
        set_up(own)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[run]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            totals = {name: int(each[name]["warm_up"] + each[name]["repeat"]) for name in names}
            tasks = {name: progress.add_task(name, total=totals[name], run="") for name in names}
            for number in range(max(totals.values())):
                for name in names:
                    if number >= totals[name]:
                        continue
                    task, is_warm_up = tasks[name], number < each[name]["warm_up"]
                    progress.update(
                        task, run="warm-up" if is_warm_up else f"run {number + 1 - each[name]['warm_up']:.0f}"
                    )

                    def tell(part: float, task: Any = task, number: int = number) -> None:
                        progress.update(task, completed=number + part)

                    settings = Settings(
                        own,
                        seconds=each[name]["seconds"],
                        queues=int(each[name]["queues"]),
                        own_server=dsn is None,
                        **options,
                    )
                    run = ALL[name].run(settings, tell)
                    tell(1.0)
                    if not is_warm_up:
                        found[name].append(run)
        with psycopg.connect(own) as connection:
            server_settings.update(connection.execute(SETTINGS).fetchall())

    async def all_runs(server: str) -> None:
        async with testing.fresh_database(server) as own:
            await trio.to_thread.run_sync(runs_in, own)

    with ExitStack() as stack:
        server = resolve_dsn(dsn) if dsn else stack.enter_context(testing.embedded_server())
        trio.run(all_runs, server)
    return {
        "schema": 1,
        "notifyq": __version__,
        "python": platform.python_version(),
        "psycopg": f"{psycopg.__version__} {psycopg.pq.__impl__}",
        "machine": f"{platform.system()} {platform.machine()}",
        "server_version": server_settings.pop("server_version"),
        "server_settings": server_settings,
        "settings": {**options, "repeat": max(int(one["repeat"]) for one in each.values()), "each": each},
        "workloads": {name: medians(runs) for name, runs in found.items()},
    }


async def _make_queues(dsn: str, kept: bool) -> None:
    async with connect(dsn) as nq:
        await nq.create_queue(Queue("bench.drain", retention=KEPT if kept else 0))
        await nq.create_queue(Queue("bench.latency", retention=KEPT))
        await nq.create_queue(Queue("bench.chain", policy="singleton", retention=KEPT))
        await nq.create_queue(Queue("bench.send_default", retention=KEPT))
        await nq.create_queue(Queue("bench.send_no_notify", retention=KEPT, bell="never"))
        for queue in (*RULES.values(), *STEADY):
            await nq.create_queue(queue)

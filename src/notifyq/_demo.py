"""``notifyq demo``: the example project on a real server, and what happens to its jobs, live."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import trio
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from . import testing
from ._connect import connect, resolve_dsn
from ._ctrl_c import every_end_is_ctrl_c
from ._demo_sql import INSERT_ORDER
from ._new import write_project
from ._queue import Queue
from .bench.__main__ import measure, show

if TYPE_CHECKING:
    from ._client import Client

__all__ = ["main"]

REMINDERS: Queue[Any, Any] = Queue("reminders")
LOGGED: Queue[Any, Any] = Queue("reminders/logged")
SENT = 14
"""Jobs the demo sends; one reminder fails three times and leaves a dead letter beside them."""


def main() -> None:
    """Run the demo. It leaves nothing running, and nothing in the database of ``DATABASE_URL`` but its own copy's end."""
    console = Console()
    with ExitStack() as stack:
        stack.enter_context(every_end_is_ctrl_c())
        given = os.environ.get("DATABASE_URL")
        if given:
            server = resolve_dsn(given)
        else:
            console.print("Starting an embedded PostgreSQL server …")
            server = stack.enter_context(testing.embedded_server())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="notifyq-demo-")))
        write_project(folder / "project")
        trio.run(_demo, server, folder / "project", console)
        console.print("\nA short benchmark of this machine:")
        show(measure(["enqueue", "drain", "latency"], server, 1, **_SHORT))


_SHORT: dict[str, Any] = {"jobs": 10_000, "processes": 1, "concurrency": 10, "batch": 1000, "kept": True}


async def _demo(server: str, project: Path, console: Console) -> None:
    async with testing.fresh_database(server) as dsn, connect(dsn) as nq:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute((project / "orders.sql").read_bytes())
        worker = subprocess.Popen(  # noqa: ASYNC220 - our own interpreter; starting it takes a millisecond
            [sys.executable, "-m", "notifyq", "run", "reminders.wiring:runtime"],
            cwd=project,
            env={**os.environ, "DATABASE_URL": dsn},
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            await _show_jobs(nq, dsn, worker, console)
        finally:
            worker.send_signal(signal.SIGTERM)
            with trio.CancelScope(shield=True):
                log = await trio.to_thread.run_sync(worker.communicate)
            if worker.returncode != 0:
                console.print(log[1].decode(), style="red")
        console.print(f"\nThe worker process got SIGTERM and ended with exit code {worker.returncode}. It had logged:")
        console.print("\n".join(log[1].decode().strip().splitlines()[-8:]), style="dim", markup=False, highlight=False)


async def _show_jobs(nq: Client, dsn: str, worker: subprocess.Popen[bytes], console: Console) -> None:
    while not await nq.runtimes():
        if worker.poll() is not None:
            return
        await trio.sleep(0.05)
    progress = Progress(TextColumn("finished"), BarColumn(), MofNCompleteColumn(), console=console)
    task = progress.add_task("", total=SENT)
    with Live(console=console, refresh_per_second=10) as live:
        for number in range(6):
            await nq.send(REMINDERS, {"message": f"tea {number + 1}"})
        await nq.send(REMINDERS, {"message": "nobody home", "fail": True})
        await nq.send(REMINDERS, {"message": "in 3 s"}, delay=3)
        for number in range(3):
            await nq.send(LOGGED, {"message": f"logged {number + 1}"})
        with psycopg.connect(dsn, autocommit=True) as connection:
            for item in ("teapot", "kettle", "biscuits"):
                connection.execute(INSERT_ORDER, (item,))
        while True:
            records = sorted(await nq.jobs(limit=100), key=lambda record: record.id)
            finished = sum(record.finished_at is not None for record in records)
            progress.update(task, completed=finished)
            live.update(Group(_table(records), progress))
            if finished >= SENT or worker.poll() is not None:
                return
            await trio.sleep(0.1)


def _table(records: list[Any]) -> Table:
    """Fits 80 columns; only the last one wraps much."""
    table = Table(title="notifyq.jobs", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("id", no_wrap=True, justify="right")
    for column in ("queue", "data"):
        table.add_column(column, no_wrap=True)
    table.add_column("state", max_width=9)
    table.add_column("attempt", no_wrap=True, justify="right")
    table.add_column("pickup", no_wrap=True, justify="right")
    table.add_column("output or error")
    styles = {"completed": "green", "failed": "red", "active": "yellow"}
    for record in records:
        # Of a job that is tried again it would be the time until its last attempt.
        waited = record.claimed_at - record.sent_at if record.claimed_at and record.attempt == 1 else None
        state = record.state + (" (dead letter)" if record.provenance else " (retry)" if record.retrying else "")
        end = (record.error or {}).get("message", "") if record.output is None else record.output
        if isinstance(end, dict):
            end = end["result"]
        table.add_row(
            str(record.id),
            record.queue,
            str(record.data.get("message", record.data.get("item", ""))),
            f"[{styles.get(record.state, 'default')}]{state}",
            str(record.attempt),
            "" if waited is None else f"{waited.total_seconds() * 1000:,.1f}\N{NO-BREAK SPACE}ms",
            str(end),
        )
    return table

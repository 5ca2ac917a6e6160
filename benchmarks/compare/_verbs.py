"""What is measured. Each verb takes a cell, in a database of its own, and gives its figures.

A job counts once its handler ran and the peer has settled it: its own table shows it as waiting or running no longer.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import psycopg

from notifyq.bench._parts import Role as BenchRole
from notifyq.bench._sql import BARE_SETUP

from ._cell import Cell, await_runs
from ._process import CellFailed
from ._steady import steady

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._process import Role

__all__ = ["VERBS", "measure"]

GAP = 0.02
"""Seconds between the sends of pickup, with jitter of half of it: both sides have gone to sleep by then."""
WARM_UP = 40
FILL = 1000
QUEUES = 10


def pickup(cell: Cell) -> dict[str, Any]:
    """Sends one by one on an idle system: from the call of send to the first line of the handler, in another process."""
    sends, limit = cell.options.pickups, cell.options.limit
    cell.install()
    with cell.role() as worker, cell.role() as producer:
        worker.ask("start")
        producer.ask("open")
        producer.ask("paced", limit, jobs=WARM_UP, gap=GAP)
        await_runs(worker, WARM_UP, 10)
        worker.ask("forget")
        cell.database.settle()
        producer.ask("paced", limit, jobs=sends, gap=GAP)
        await_runs(worker, sends, 10)
        report = worker.ask("pickups")
    if report["ran"] < 2:
        raise CellFailed("no job began within 10 s of the last send")
    figures = {"p50_ms": report["p50_ms"], "p99_ms": report["p99_ms"]}
    # those that did not begin would be the slowest: these percentiles are too good
    return figures | ({"not_begun": sends - report["ran"]} if report["ran"] < sends else {})


def bare_pickup(cell: Cell) -> dict[str, Any]:
    """The limit, as notifyq's own benchmark has it: insert, NOTIFY by a trigger, LISTEN, delete, in plain psycopg."""
    with psycopg.connect(cell.database.uri, autocommit=True) as connection:
        connection.execute(BARE_SETUP)
    with ExitStack() as stack:
        consumer = stack.enter_context(BenchRole("bare-consume", cell.database.uri, WARM_UP))
        stack.callback(consumer.kill)
        producer = stack.enter_context(BenchRole("bare-produce", cell.database.uri, WARM_UP, GAP))
        found: list[float] = []
        for turn in range(1 + -(-cell.options.pickups // WARM_UP)):  # the first is the warm-up
            producer.go()
            producer.hear()
            pickups = consumer.hear()["pickups"]
            found += [pickup / 1e6 for pickup in pickups] if turn else []
    percentiles = statistics.quantiles(found, n=100, method="inclusive")
    return {"p50_ms": percentiles[49], "p99_ms": percentiles[98]}


def drain(processes: int) -> Callable[[Cell], dict[str, Any]]:
    """Jobs/s of so many processes, started when all jobs are there: from the first handler to the last one settled."""

    def measured(cell: Cell) -> dict[str, Any]:
        options, database = cell.options, cell.database
        cell.install()
        with cell.role() as producer:
            producer.ask("open")
            producer.ask("fill", 600, jobs=options.jobs, chunk=FILL)
        database.settle()
        commits, wal = database.commits(), database.wal()
        with ExitStack() as stack:
            workers = [stack.enter_context(cell.role()) for _ in range(processes)]
            for worker in workers:
                worker.ask("ready")
            for worker in workers:
                worker.tell("start")
            for worker in workers:
                worker.hear()
            _until_settled(cell, workers)
            ended, wal, left = time.monotonic(), database.wal() - wal, cell.outstanding()
            told = [worker.ask("ran") for worker in workers]
        begins = [one["first"] / 1e6 for one in told if one["first"] is not None]
        done = options.jobs - left
        if not begins or done < 1:
            raise CellFailed(f"no job was settled within {options.limit:.0f} s")
        return {
            "jobs_per_second": done / (ended - min(begins)),
            "wal_bytes_per_job": wal / done,
            "commits_per_job": (database.commits() - commits) / done,
            **({"left": left} if left else {}),
        }

    return measured


def _until_settled(cell: Cell, workers: list[Role]) -> None:
    """Wait until nothing is left, or for the limit. Looks rarely while there is much to do, so as not to take part in it."""
    began, jobs = time.monotonic(), cell.options.jobs
    while (seconds := time.monotonic() - began) < cell.options.limit:
        ran = sum(worker.ask("ran")["ran"] for worker in workers)
        if ran < jobs:
            time.sleep(min(max((jobs - ran) * seconds / max(ran, 1) / 2, 0.005), 0.25))
        elif cell.outstanding():
            time.sleep(0.005)
        else:
            return


def sends(*, heard: bool = False) -> Callable[[Cell], dict[str, Any]]:
    """Jobs/s of sends one by one, by one and by ten tasks of a process: alone, or while another one runs them."""

    def measured(cell: Cell) -> dict[str, Any]:
        cell.install()
        figures = {}
        with ExitStack() as stack:
            if heard:
                stack.enter_context(cell.role()).ask("start")
            producer = stack.enter_context(cell.role())
            producer.ask("open")
            for tasks in (1, 10):
                producer.ask("singly", seconds=0.5, tasks=tasks)
                cell.database.settle()
                told = producer.ask("singly", seconds=cell.options.sends_seconds, tasks=tasks)
                figures[f"by_{tasks}_per_second"] = told["sent"] / told["seconds"]
        return figures

    return measured


def idle(cell: Cell) -> dict[str, Any]:
    """A worker that serves ten empty queues: transactions a second, of which one has one statement or more; connections."""
    cell.install(queues=QUEUES)
    with cell.database.without_autovacuum(), cell.role(queues=QUEUES) as worker:
        worker.ask("start")
        time.sleep(cell.options.seconds)  # what it does at the start is told by then
        before, began = cell.database.transactions(), time.monotonic()
        time.sleep(2 * cell.options.seconds)
        after, seconds = cell.database.transactions(), time.monotonic() - began
        return {"transactions_per_second": (after - before) / seconds, "connections": cell.database.connections()}


VERBS: dict[str, Callable[[Cell], dict[str, Any]]] = {
    "pickup": pickup,
    "sends": sends(),
    "sends_heard": sends(heard=True),
    "drain": drain(1),
    "drain2": drain(2),
    "sustained": steady(),
    "control": steady(times=2),
    "pinned": steady(times=2, pinned=True),
    "idle": idle,
}


def measure(verb: str, cell: Cell) -> dict[str, Any]:
    """One cell's figures, rounded."""
    figures = bare_pickup(cell) if cell.peer.kind == "bare" else VERBS[verb](cell)
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in figures.items()}

"""The verbs of a steady state: chunks are sent as fast as a worker process follows, for as long as it lasts."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import psycopg

from ._cell import CHUNK, Cell, await_runs
from ._process import CellFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._process import Role

__all__ = ["steady"]

WARM_UP = 5.0
"""Seconds, or a tenth of what is measured, before anything counts."""

SIXTHS = (1 / 6, 5 / 6, 1)
"""When settled jobs are counted: a count reads the peer's table, so there are few of them."""

SLICE = 1.0
"""Seconds of a point of the curve."""


class Stream:
    """Sends chunks so that at most so many jobs are sent and not begun; pickup contains the wait behind them."""

    def __init__(self, cell: Cell, worker: Role, producer: Role) -> None:
        self.cell, self.worker, self.producer = cell, worker, producer
        self.sent = self.forgotten = 0

    def send(self, jobs: int) -> None:
        """Send so many in chunks."""
        self.producer.ask("fill", jobs=jobs, chunk=CHUNK)
        self.sent += jobs

    def begun(self) -> int:
        """How many handlers have begun."""
        ran: int = self.worker.ask("ran")["ran"]
        return self.forgotten + ran

    def settled(self) -> int:
        """How many jobs have an end that is committed."""
        return self.sent - self.cell.outstanding()

    def forget(self) -> None:
        """Pickups count from now on."""
        self.forgotten += self.worker.ask("forget")["ran"]

    def keep_up(self, until: float) -> list[float]:
        """Send until that moment; handlers begun a second, by slices of time."""
        most, curve = self.cell.options.in_flight, []
        begun, at = self.begun(), time.monotonic()
        while (now := time.monotonic()) < until:
            more = self.begun()
            if now - at >= SLICE:
                curve.append(round((more - begun) / (now - at), 1))
                begun, at = more, now
            # at most a quarter of what may be in flight, to look again before the worker runs dry
            jobs = min(most + more - self.sent, most // 4) // CHUNK * CHUNK
            if jobs > 0:
                self.send(jobs)
            else:
                time.sleep(0.005)
        return curve


def steady(*, times: float = 1, pinned: bool = False) -> Callable[[Cell], dict[str, Any]]:
    """Jobs/s settled while it lasts, and what they cost; ``pinned`` holds a snapshot open, so that nothing is vacuumed."""

    def measured(cell: Cell) -> dict[str, Any]:
        seconds, database = cell.options.seconds * times, cell.database
        cell.install()
        commits = database.commits()
        with ExitStack() as stack:
            stream = Stream(cell, stack.enter_context(cell.role()), stack.enter_context(cell.role()))
            stream.worker.ask("start")
            stream.producer.ask("open")
            stream.send(CHUNK)
            await_runs(stream.worker, CHUNK, 10)
            stream.keep_up(time.monotonic() + min(WARM_UP, seconds / 10))
            if pinned:
                _hold_a_snapshot(stack, database.uri)
            stream.forget()
            wal, looks, curve = database.wal(), [(time.monotonic(), stream.settled())], []
            for part in SIXTHS:
                curve += stream.keep_up(looks[0][0] + part * seconds)
                looks.append((time.monotonic(), stream.settled()))
            wal = database.wal() - wal
            report = stream.worker.ask("pickups")
        done = looks[-1][1] - looks[0][1]
        if done < 1:
            raise CellFailed("no job was settled")
        first, last = _rate(looks[0], looks[1]), _rate(looks[2], looks[3])
        return {
            "jobs_per_second": _rate(looks[0], looks[-1]),
            "last_over_first": last / first if first else None,  # a slow peer may settle none in it
            "p50_ms": report.get("p50_ms"),
            "p99_ms": report.get("p99_ms"),
            "wal_bytes_per_job": wal / done,
            # the whole life of the processes, for they tell of their commits late
            "commits_per_job": (database.commits() - commits) / looks[-1][1],
            "curve": curve,
        }

    return measured


def _rate(first: tuple[float, int], last: tuple[float, int]) -> float:
    return (last[1] - first[1]) / (last[0] - first[0])


def _hold_a_snapshot(stack: ExitStack, uri: str) -> None:
    holder = stack.enter_context(psycopg.connect(uri))
    holder.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    holder.execute("select count(*) from pg_class")  # takes it

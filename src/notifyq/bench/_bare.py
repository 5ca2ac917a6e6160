"""The limit, as processes: the same work by hand, in plain psycopg on a bare table. Started by ``_roles``."""

from __future__ import annotations

import json
import random
import sys
import threading
import time

import psycopg

from ._computing import compute
from ._say import say
from ._sql import BARE_CLAIM, BARE_FILL, BARE_LISTEN, BARE_SEND, BARE_TAKE

__all__ = ["compute_for", "consume", "enqueue", "produce", "take"]


def enqueue(dsn: str, jobs: int, batch: int, concurrency: int) -> None:
    """Insert so many rows in statements of ``batch``, over ``concurrency`` connections at once."""
    left = iter([min(batch, jobs - start) for start in range(0, jobs, batch)])
    connections = [psycopg.connect(dsn, autocommit=True) for _ in range(concurrency)]

    def sender(connection: psycopg.Connection) -> None:
        while (rows := next(left, None)) is not None:
            connection.execute(BARE_FILL, (json.dumps([{"data": number} for number in range(rows)]),))

    threads = [threading.Thread(target=sender, args=(connection,)) for connection in connections]
    say(ready=True)
    sys.stdin.readline()
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say(seconds=time.perf_counter() - started)
    for connection in connections:
        connection.close()


def take(dsn: str, kept: bool, rows: int) -> None:
    """At go, delete rows, so many at a time, until there are none; kept: each lands in another table, with its output."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        say(ready=True)
        sys.stdin.readline()
        started = time.perf_counter()
        taken = 0
        while (found := len(connection.execute(BARE_TAKE, {"rows": rows, "kept": kept}).fetchall())) > 0:
            taken += found
        say(seconds=time.perf_counter() - started, taken=taken)


def compute_for(jobs: int) -> None:
    """At go, compute as much as so many jobs of the scaling workload, without a queue."""
    say(ready=True)
    sys.stdin.readline()
    for _ in range(jobs):
        compute()
    say(done=True)


def consume(dsn: str, jobs: int) -> None:
    """LISTEN, and claim one row by hand for each notification. Tells of every ``jobs`` jobs."""
    pickups: list[int] = []
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(BARE_LISTEN)
        connection.execute(BARE_CLAIM)
        say(ready=True)
        while True:
            # until the parent kills it: notifies() can't also wait for stdin
            list(connection.notifies(stop_after=1))
            while (row := connection.execute(BARE_CLAIM).fetchone()) is not None:
                pickups.append(time.monotonic_ns() - row[0])
            if len(pickups) >= jobs:
                say(pickups=pickups)
                pickups = []


def produce(dsn: str, jobs: int, gap: float) -> None:
    """The other side: at each go, so many rows one by one, each with its NOTIFY."""
    spread = random.Random()
    with psycopg.connect(dsn, autocommit=True) as connection:
        say(ready=True)
        while sys.stdin.readline():
            for _ in range(jobs):
                time.sleep(spread.uniform(0.5, 1.5) * gap)
                connection.execute(BARE_SEND, (time.monotonic_ns(),))
            say(done=True)

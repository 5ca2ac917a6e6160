"""The workloads: start processes, say go, time them."""

from __future__ import annotations

import json
import statistics
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psycopg

from ._parts import GAP, TURN, Role, Settings, clear
from ._rules import flows, keys
from ._sql import BARE_SETUP, PICKUPS, SEND_ALL, UNFINISHED

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MAIN", "WORKLOADS", "set_up"]


def enqueue(settings: Settings, step: Callable[[], None]) -> dict[str, float]:
    """Bulk sends: jobs/s from the first send to the last commit."""
    each = settings.jobs // settings.processes
    with ExitStack() as stack:
        senders = [
            stack.enter_context(Role("enqueue", settings.dsn, each, settings.batch, settings.concurrency))
            for _ in range(settings.processes)
        ]
        started = time.perf_counter()
        for sender in senders:
            sender.go()
        for sender in senders:
            sender.hear()
        seconds = time.perf_counter() - started
    clear(settings.dsn)
    step()
    return {"jobs_per_second": each * settings.processes / seconds}


def drain(settings: Settings, step: Callable[[], None]) -> dict[str, float]:
    """Jobs/s from the commit that makes them ready until the last completion is committed."""
    with ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(settings.dsn, autocommit=True))
        for _ in range(settings.processes):
            stack.enter_context(Role("work", settings.dsn, settings.concurrency))
        data = json.dumps([{"data": number} for number in range(settings.jobs)])
        connection.execute(SEND_ALL, (data,))
        started = time.perf_counter()
        while connection.execute(UNFINISHED).fetchone() == (True,):
            time.sleep(0.01)
        seconds = time.perf_counter() - started
    clear(settings.dsn)
    step()
    return {"jobs_per_second": settings.jobs / seconds, "processes": settings.processes, "kept": settings.kept}


def latency(settings: Settings, step: Callable[[], None]) -> dict[str, float]:
    """Send to start of the worker on an idle system, and the same by hand in plain psycopg, a few sends of each in turn.

    In turn, because the speed of a shared machine changes from second to second. The first turn of each is a warm-up.
    """
    turns = max(2, min(500, settings.jobs // 100) // TURN)
    limit: list[float] = []
    with ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(settings.dsn, autocommit=True))
        stack.enter_context(Role("work", settings.dsn, 10))
        producer = stack.enter_context(Role("produce", settings.dsn, TURN, GAP))
        bare_consumer = stack.enter_context(Role("bare-consume", settings.dsn, TURN))
        stack.callback(bare_consumer.kill)
        bare_producer = stack.enter_context(Role("bare-produce", settings.dsn, TURN, GAP))
        for turn in range(turns + 1):
            producer.go()
            producer.hear()
            while connection.execute(UNFINISHED).fetchone() == (True,):
                time.sleep(0.01)
            bare_producer.go()
            bare_producer.hear()
            pickups = bare_consumer.hear()["pickups"]
            limit += [pickup / 1e6 for pickup in pickups] if turn else []
        found = [row[0] / 1e6 for row in connection.execute(PICKUPS, ("bench.latency",)).fetchall()][TURN:]
    clear(settings.dsn)
    step()
    percentiles = statistics.quantiles(found, n=100)
    p50, limit_p50 = percentiles[49], statistics.median(limit)
    return {
        "p50_ms": p50,
        "p95_ms": percentiles[94],
        "p99_ms": percentiles[98],
        "max_ms": max(found),
        "limit_p50_ms": limit_p50,
        "p50_over_limit": p50 / limit_p50,
    }


WORKLOADS: dict[str, Callable[[Settings, Callable[[], None]], dict[str, float]]] = {
    "enqueue": enqueue,
    "drain": drain,
    "latency": latency,
    "keys": keys,
    "flows": flows,
}

MAIN = ("enqueue", "drain", "latency")
"""What is measured if nothing is named."""


def set_up(dsn: str) -> None:
    """What the bare limit needs."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(BARE_SETUP)

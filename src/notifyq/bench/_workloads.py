"""The workloads that take seconds: start processes, say go, time them."""

from __future__ import annotations

import json
import statistics
import time
from contextlib import ExitStack

import psycopg

from ._parts import GAP, TURN, Found, Role, Settings, Tell, clear, wait_finished
from ._sql import BARE_FILL, PICKUPS, SEND_ALL, UNFINISHED

__all__ = ["BARE_BATCH", "bare_drain", "drain", "enqueue", "latency"]

BARE_BATCH = 100
"""Rows that a bare worker takes at a time: as many as ours claims at least when jobs are quick."""


def enqueue(settings: Settings, tell: Tell) -> Found:
    """Bulk sends: jobs/s from the first send to the last commit. The limit: bare inserts from JSON, as many at once."""
    each = settings.jobs // settings.processes
    rates: list[float] = []
    for role in ("enqueue", "bare-enqueue"):
        with ExitStack() as stack:
            senders = [
                stack.enter_context(Role(role, settings.dsn, each, settings.batch, settings.concurrency))
                for _ in range(settings.processes)
            ]
            started = time.perf_counter()
            for sender in senders:
                sender.go()
            for sender in senders:
                sender.hear()
            rates.append(each * settings.processes / (time.perf_counter() - started))
        clear(settings.dsn)
        tell(0.5)
    return {"jobs_per_second": rates[0], "limit_jobs_per_second": rates[1], "fraction_of_limit": rates[0] / rates[1]}


def drain(settings: Settings, tell: Tell) -> Found:
    """Jobs/s from the commit that makes them ready until the last completion is committed.

    The limit: each process deletes rows of a bare table, 100 at a time, and inserts them into another one if they are kept.
    """
    data = json.dumps([{"data": number} for number in range(settings.jobs)])
    with ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(settings.dsn, autocommit=True))
        for _ in range(settings.processes):
            stack.enter_context(Role("work", settings.dsn, settings.concurrency))
        connection.execute(SEND_ALL, (data,))
        started = time.perf_counter()
        wait_finished(connection, UNFINISHED)
        rate = settings.jobs / (time.perf_counter() - started)
    clear(settings.dsn)
    tell(0.5)
    limit = bare_drain(settings, data)
    return {
        "jobs_per_second": rate,
        "processes": settings.processes,
        "kept": settings.kept,
        "limit_jobs_per_second": limit,
        "fraction_of_limit": rate / limit,
    }


def bare_drain(settings: Settings, data: str, rows: int = BARE_BATCH, *, processes: int = 0) -> float:
    """Jobs/s of so many processes (0: as many as workers) that delete rows of a bare table, so many at a time."""
    with ExitStack() as stack:
        with psycopg.connect(settings.dsn, autocommit=True) as connection:
            connection.execute(BARE_FILL, (data,))
        workers = [
            stack.enter_context(Role("bare-take", settings.dsn, settings.kept, rows))
            for _ in range(processes or settings.processes)
        ]
        started = time.perf_counter()
        for worker in workers:
            worker.go()
        taken = sum(worker.hear()["taken"] for worker in workers)
        rate: float = taken / (time.perf_counter() - started)
    clear(settings.dsn)
    return rate


def latency(settings: Settings, tell: Tell) -> Found:
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
            wait_finished(connection, UNFINISHED)
            bare_producer.go()
            bare_producer.hear()
            pickups = bare_consumer.hear()["pickups"]
            limit += [pickup / 1e6 for pickup in pickups] if turn else []
            tell((turn + 1) / (turns + 1))
        found = [row[0] / 1e6 for row in connection.execute(PICKUPS, ("bench.latency",)).fetchall()][TURN:]
    clear(settings.dsn)
    percentiles = statistics.quantiles(found, n=100, method="inclusive")
    p50, limit_p50 = percentiles[49], statistics.median(limit)
    return {
        "p50_ms": p50,
        "p95_ms": percentiles[94],
        "p99_ms": percentiles[98],
        "max_ms": max(found),
        "limit_p50_ms": limit_p50,
        "p50_over_limit": p50 / limit_p50,
        "samples_ms": found,
        "limit_samples_ms": limit,
    }

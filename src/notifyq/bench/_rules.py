"""The workloads of keys and flows: what the rules cost, and how soon what they free starts."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from contextlib import ExitStack
from typing import Any

import psycopg
import trio

from notifyq import Flow, NewJob, Queue, connect

from ._parts import GAP, TURN, Found, Role, Settings, Tell, clear, wait_finished
from ._sql import BARE_FILL, CLAIM_HELD, PICKUPS, SEND_TO, UNFINISHED_BUT_HELD
from ._workloads import BARE_BATCH, bare_drain

__all__ = ["RULES", "flows", "keys"]

RULES: dict[str, Queue[Any, Any]] = {
    "singleton": Queue("bench.singleton", int, int, policy="singleton"),
    "key_limit_5": Queue("bench.key_limit", int, int, key_limit=5),
}
KEYS = (1, 100, 10_000)
HELD_KEYS = 100
BLOCKED = 100_000
WIDE = 10_000
FREED = 100


def keys(settings: Settings, tell: Tell) -> Found:
    """Jobs/s by rule and number of keys while other keys hold back 100,000 jobs; freed key to next start; plain pickup.

    The limit: bare deletes of as many rows at a time as there are keys, 100 at most, by one process.
    """
    figures: Found = {}
    with ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(settings.dsn, autocommit=True))
        for queue in RULES.values():
            _hold_back(connection, queue.name, min(BLOCKED, 20 * settings.jobs))
        for _ in range(settings.processes):
            stack.enter_context(Role("work", settings.dsn, settings.concurrency))
        for rule, queue in RULES.items():
            for number in KEYS:
                jobs = _jobs_of(number, settings)
                data = [{"data": job, "key": f"k{job % number}"} for job in range(jobs)]
                started = time.perf_counter()
                connection.execute(SEND_TO, (queue.name, json.dumps(data)))
                wait_finished(connection, UNFINISHED_BUT_HELD)
                figures[f"{rule}_{number}_jobs_per_second"] = jobs / (time.perf_counter() - started)
                tell(len(figures) / (len(RULES) * len(KEYS) + 1))
        producer = stack.enter_context(Role("produce", settings.dsn, TURN, GAP))
        for _ in range(FREED // TURN + 1):
            producer.go()
            producer.hear()
        _send_chain(settings.dsn)
        wait_finished(connection, UNFINISHED_BUT_HELD)
        plain = [row[0] / 1e6 for row in connection.execute(PICKUPS, ("bench.latency",)).fetchall()][TURN:]
        chain = [row[0] for row in connection.execute(PICKUPS, ("bench.chain",)).fetchall()]
    freed = [(then["started"] - before["ended"]) / 1e6 for before, then in itertools.pairwise(chain)][TURN:]
    figures["freed_p50_ms"] = statistics.median(freed)
    figures["plain_p50_ms"] = statistics.median(plain)
    figures["freed_over_plain"] = figures["freed_p50_ms"] / figures["plain_p50_ms"]
    clear(settings.dsn)
    for number in KEYS:
        data = [{"data": job} for job in range(_jobs_of(number, settings))]
        limit = bare_drain(settings, json.dumps(data), min(number, BARE_BATCH), processes=1)
        figures[f"limit_{number}_jobs_per_second"] = limit
    return figures


def _jobs_of(keys: int, settings: Settings) -> int:
    return min(settings.jobs, 2_000 if keys == 1 else 20_000)


def _hold_back(connection: psycopg.Connection[Any], queue: str, blocked: int) -> None:
    """Leave so many jobs blocked behind a few keys, whose active jobs are claimed by hand."""
    data = [{"data": job, "key": f"held{job % HELD_KEYS}"} for job in range(blocked + 5 * HELD_KEYS)]
    connection.execute(SEND_TO, (queue, json.dumps(data)))
    while connection.execute(CLAIM_HELD, (queue,)).fetchall():
        pass
    connection.execute("analyze")


def _send_chain(dsn: str) -> None:
    async def send() -> None:
        chain = Queue("bench.chain", int)
        async with connect(dsn, migrate=False) as nq:
            await nq.send_many(chain, [NewJob(number, {"key": "one"}) for number in range(FREED + TURN)])

    trio.run(send)


def flows(settings: Settings, tell: Tell) -> Found:
    """A job, 10,000 that wait for it, and one that waits for them: sent, and run.

    The limit: as many rows of a bare table that know nothing of each other, sent by one statement and drained.
    """
    part: Queue[int, int] = Queue("bench.drain", int, int)
    with ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(settings.dsn, autocommit=True))
        for _ in range(settings.processes):
            stack.enter_context(Role("work", settings.dsn, settings.concurrency))
        flow = Flow()
        first = flow.add(part, 0, delay=0)
        parts = [flow.add(part, number, after=[first]) for number in range(WIDE)]
        flow.add(part, 1, after=parts)

        async def send() -> float:
            async with connect(settings.dsn, migrate=False) as nq:
                await nq.queue_stats()
                started = time.perf_counter()
                await nq.send_flow(flow)
                return time.perf_counter() - started

        send_seconds = trio.run(send)
        tell(0.5)
        started = time.perf_counter()
        wait_finished(connection, UNFINISHED_BUT_HELD)
        seconds = time.perf_counter() - started
    clear(settings.dsn)
    data = json.dumps([{"data": number} for number in range(WIDE)])
    with psycopg.connect(settings.dsn, autocommit=True) as connection:
        started = time.perf_counter()
        connection.execute(BARE_FILL, (data,))
        bare_send_seconds = time.perf_counter() - started
    clear(settings.dsn)
    return {
        "sent_jobs_per_second": WIDE / send_seconds,
        "run_jobs_per_second": WIDE / seconds,
        "limit_sent_jobs_per_second": WIDE / bare_send_seconds,
        "limit_run_jobs_per_second": bare_drain(settings, data),
    }

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
from ._sql import CLAIM_HELD, PICKUPS, SEND_TO, UNFINISHED_BUT_HELD

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
    """Jobs/s by rule and number of keys while other keys hold back 100,000 jobs; freed key to next start; plain pickup."""
    figures: Found = {}
    with ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(settings.dsn, autocommit=True))
        for queue in RULES.values():
            _hold_back(connection, queue.name, min(BLOCKED, 20 * settings.jobs))
        for _ in range(settings.processes):
            stack.enter_context(Role("work", settings.dsn, settings.concurrency))
        for rule, queue in RULES.items():
            for number in KEYS:
                jobs = min(settings.jobs, 2_000 if number == 1 else 20_000)
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
    return figures


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
    """A job, 10,000 that wait for it, and one that waits for them: sent, and run."""
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
    return {"sent_jobs_per_second": WIDE / send_seconds, "run_jobs_per_second": WIDE / seconds}

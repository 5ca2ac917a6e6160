"""The processes of a benchmark: each does one thing, told by its arguments, and talks in lines of JSON on stdout."""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import psycopg
import trio

from notifyq import Job, Queue, Runtime, connect

from ._parts import GAP
from ._rules import RULES
from ._sql import BARE_CLAIM, BARE_LISTEN, BARE_SEND

DRAIN: Queue[int, int] = Queue("bench.drain", int, int)
LATENCY: Queue[int, int] = Queue("bench.latency", int, int)


def say(**line: Any) -> None:
    """Tell the parent something."""
    print(json.dumps(line), flush=True)


async def wait_for_go() -> bool:
    """Wait until the parent writes a line; False when it has closed stdin."""
    return bool(await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True))


async def enqueue(dsn: str, jobs: int, batch: int, concurrency: int) -> None:
    """Send so many jobs in calls of ``batch``, ``concurrency`` calls at once."""
    async with connect(dsn, pool_size=concurrency) as nq:
        await nq.queue_stats()
        say(ready=True)
        await wait_for_go()
        left = iter(range(0, jobs, batch))

        async def sender() -> None:
            for start in left:
                await nq.send_many(DRAIN, range(start, min(start + batch, jobs)))

        started = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(concurrency):
                nursery.start_soon(sender)
        say(seconds=time.perf_counter() - started)


async def work(dsn: str, concurrency: int) -> None:
    """Run jobs until the parent closes stdin. The output of a latency job is its pickup time in nanoseconds."""

    @DRAIN.worker(concurrency=concurrency)
    async def same(job: Job[int]) -> int:
        return job.data

    @LATENCY.worker
    async def pickup(job: Job[int]) -> int:
        return time.monotonic_ns() - job.data

    async def span(job: Job[int]) -> dict[str, int]:
        started = time.monotonic_ns()
        await trio.sleep(GAP)
        return {"started": started, "ended": time.monotonic_ns()}

    chain: Queue[int, dict[str, int]] = Queue("bench.chain", int)
    chain.worker(span)
    rules = [Queue(queue.name, int, int) for queue in RULES.values()]
    for queue in rules:
        queue.worker(concurrency=concurrency)(same)
    runtime = Runtime([DRAIN, LATENCY, chain, *rules], dsn=dsn, migrate=False)
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        say(ready=True)
        await wait_for_go()
        runtime.stop()


async def produce(dsn: str, jobs: int, gap: float) -> None:
    """At each go, send so many jobs one by one, ``gap`` seconds apart on average, each with the moment it was sent."""
    spread = random.Random()
    async with connect(dsn, migrate=False) as nq:
        await nq.queue_stats()
        say(ready=True)
        while await wait_for_go():
            for _ in range(jobs):
                await trio.sleep(spread.uniform(0.5, 1.5) * gap)
                await nq.send(LATENCY, time.monotonic_ns())
            say(done=True)


def bare_consume(dsn: str, jobs: int) -> None:
    """The limit: LISTEN, and claim one row by hand for each notification, in plain psycopg. Tells of every ``jobs`` jobs."""
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


def bare_produce(dsn: str, jobs: int, gap: float) -> None:
    """The limit's other side: one row and one NOTIFY, by hand."""
    spread = random.Random()
    with psycopg.connect(dsn, autocommit=True) as connection:
        say(ready=True)
        while sys.stdin.readline():
            for _ in range(jobs):
                time.sleep(spread.uniform(0.5, 1.5) * gap)
                connection.execute(BARE_SEND, (time.monotonic_ns(),))
            say(done=True)


def main(role: str, dsn: str, *numbers: str) -> None:
    """Run one role."""
    match role:
        case "enqueue":
            trio.run(enqueue, dsn, int(numbers[0]), int(numbers[1]), int(numbers[2]))
        case "work":
            trio.run(work, dsn, int(numbers[0]))
        case "produce":
            trio.run(produce, dsn, int(numbers[0]), float(numbers[1]))
        case "bare-consume":
            bare_consume(dsn, int(numbers[0]))
        case "bare-produce":
            bare_produce(dsn, int(numbers[0]), float(numbers[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])

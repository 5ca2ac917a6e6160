"""The processes of a steady state: chunks are sent as fast as they are completed. Started by ``_roles``.

Each line on a producer's stdin is leave to send one chunk; a worker says so when another chunk's worth is durably completed.
Who started them hands one on to the other, so that as many jobs wait as leaves were given at first, however fast either is.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from contextlib import ExitStack
from typing import LiteralString

import psycopg

from notifyq import Job, Queue, Runtime, events

from ._say import say, serve
from ._sql import BARE_FILL_RING, BARE_LISTEN, BARE_TAKE, SEND_TO

__all__ = ["CHUNK", "STEADY", "bare_work", "produce", "work"]

CHUNK = 100
"""Jobs in one send."""

SENDERS = 2
"""Sends at once: while one waits for its flush the other is prepared."""

KEYS = 50

STEADY: tuple[Queue[int, int], Queue[int, int]] = (
    Queue("bench.steady", int, int, retention=86_400, retry_delay=1, retry_backoff=False),
    Queue("bench.steady_keyed", int, int, retention=86_400, key_limit=5),
)
"""The queues of steady states: one with nothing special, one with a rule about keys."""


async def work(dsn: str, concurrency: int) -> None:
    """Serve both until the parent closes stdin. The output is the pickup time in nanoseconds; below zero fails once."""
    logging.disable(logging.WARNING)  # of failures that are meant
    completed = 0

    async def pickup(job: Job[int]) -> int:
        if job.data < 0 and job.attempt == 1:
            raise RuntimeError("the first attempt fails")
        return time.monotonic_ns() - abs(job.data)

    def count(_: events.Event) -> None:
        nonlocal completed
        completed += 1
        if completed % CHUNK == 0:
            say(completed=CHUNK)

    for queue in STEADY:
        queue.worker(concurrency=concurrency)(pickup)
    runtime = Runtime(STEADY, dsn=dsn, migrate=False, grace=1)
    runtime.subscribe(count, events.JobCompleted)
    await serve(runtime)


def produce(dsn: str, kind: str) -> None:
    """Send a chunk for each line on stdin until it is closed, in plain psycopg, which leaves the processor to the worker."""
    turn = threading.Lock()

    def sender(connection: psycopg.Connection) -> None:
        while True:
            with turn:
                if not sys.stdin.readline():
                    return
            for statement, values in _chunk(kind, time.monotonic_ns()):
                connection.execute(statement, values)

    with ExitStack() as stack:
        connections = [stack.enter_context(psycopg.connect(dsn, autocommit=True)) for _ in range(SENDERS)]
        threads = [threading.Thread(target=sender, args=(connection,)) for connection in connections]
        for thread in threads:
            thread.start()
        say(ready=True)
        for thread in threads:
            thread.join()


def _chunk(kind: str, now: int) -> list[tuple[LiteralString, tuple[str, ...]]]:
    """The statements that send a chunk: plain jobs, bare rows, or mixed jobs: 10 fail once, 10 are delayed, 10 have keys."""
    job = {"data": now}
    if kind == "bare":
        return [(BARE_FILL_RING, (json.dumps([job] * CHUNK),))]
    plain, keyed = (queue.name for queue in STEADY)
    if kind == "plain":
        return [(SEND_TO, (plain, json.dumps([job] * CHUNK)))]
    jobs = [job] * 70 + [{"data": -now}] * 10 + [{"data": now, "delay": 1}] * 10
    with_keys = [{"data": now, "key": f"k{(now + number) % KEYS}"} for number in range(10)]
    return [(SEND_TO, (plain, json.dumps(jobs))), (SEND_TO, (keyed, json.dumps(with_keys)))]


def bare_work(dsn: str) -> None:
    """The limit: take rows a chunk at a time, into another table, and listen when there are none. Until it is killed."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(BARE_LISTEN)
        say(ready=True)
        taken = 0
        while True:
            rows = len(connection.execute(BARE_TAKE, {"rows": CHUNK, "kept": True}).fetchall())
            taken += rows
            if taken >= CHUNK:
                taken -= CHUNK
                say(completed=CHUNK)
            if not rows:
                list(connection.notifies(stop_after=1))

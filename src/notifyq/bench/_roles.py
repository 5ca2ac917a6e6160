"""The processes of a benchmark: each does one thing, told by its arguments, and talks in lines of JSON on stdout."""

from __future__ import annotations

import random
import signal
import sys
import time

import trio

from notifyq import Job, Queue, Runtime, connect
from notifyq._connect import resolve_dsn

from . import _bare, _steady, _waiting
from ._parts import GAP
from ._rules import RULES
from ._say import say, serve, wait_for_go
from ._sending import send_singles

DRAIN: Queue[int, int] = Queue("bench.drain", int, int)
LATENCY: Queue[int, int] = Queue("bench.latency", int, int)


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
    await serve(Runtime([DRAIN, LATENCY, chain, *rules], dsn=dsn, migrate=False))


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


async def slow(dsn: str, concurrency: int) -> None:
    """Serve the queues of the senders workload with jobs that take ``GAP`` seconds, until the parent closes stdin."""

    async def sleep(_: Job[int]) -> None:
        await trio.sleep(GAP)

    queues: list[Queue[int, None]] = [Queue(f"bench.send_{kind}", int) for kind in ("default", "no_notify", "always")]
    for queue in queues:
        queue.worker(concurrency=concurrency)(sleep)
    await serve(Runtime(queues, dsn=dsn, migrate=False))


def main(role: str, *numbers: str) -> None:
    """Run one role. Ctrl-C is for the parent: it then closes stdin."""
    dsn = resolve_dsn(None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    match role:
        case "enqueue":
            trio.run(enqueue, dsn, int(numbers[0]), int(numbers[1]), int(numbers[2]))
        case "work":
            trio.run(work, dsn, int(numbers[0]))
        case "produce":
            trio.run(produce, dsn, int(numbers[0]), float(numbers[1]))
        case "slow":
            trio.run(slow, dsn, int(numbers[0]))
        case "send-singles":
            send_singles(dsn, int(numbers[0]))
        case "bare-enqueue":
            _bare.enqueue(dsn, int(numbers[0]), int(numbers[1]), int(numbers[2]))
        case "bare-take":
            _bare.take(dsn, numbers[0] == "True", int(numbers[1]))
        case "compute":
            _bare.compute_for(int(numbers[0]))
        case "bare-consume":
            _bare.consume(dsn, int(numbers[0]))
        case "bare-produce":
            _bare.produce(dsn, int(numbers[0]), float(numbers[1]))
        case "steady-work":
            trio.run(_steady.work, dsn, int(numbers[0]))
        case "steady-produce":
            _steady.produce(dsn, numbers[0])
        case "bare-steady-work":
            _steady.bare_work(dsn)
        case "idle":
            trio.run(_waiting.idle, dsn, int(numbers[0]))
        case "full":
            trio.run(_waiting.full, dsn)
        case "pattern":
            trio.run(_waiting.pattern, dsn)
        case _:
            raise ValueError(role)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Runtimes that wait, as processes: for jobs that do not come, behind full slots, or for any of many queues."""

from __future__ import annotations

import logging
import resource
import sys
import time

import trio

from notifyq import Job, Queue, Runtime

from ._say import say, serve, wait_for_go

__all__ = ["full", "idle", "pattern"]


async def idle(dsn: str, queues: int) -> None:
    """Serve so many queues that stay empty, and at each go tell of the processor time so far."""

    async def nothing(_: Job[int]) -> None:
        pass

    declared: list[Queue[int, None]] = [Queue(f"bench.idle{number}", int) for number in range(queues)]
    for queue in declared:
        queue.worker(nothing)
    runtime = Runtime(declared, dsn=dsn)
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        say(ready=True)
        while await wait_for_go():
            say(cpu=time.process_time())
        runtime.stop()


async def full(dsn: str) -> None:
    """Take as many jobs as there are slots, for ever; at each go tell of the most MiB so far that it took."""
    logging.disable(logging.WARNING)  # of jobs that are handed back at the end

    async def forever(_: Job[int]) -> None:
        await trio.sleep_forever()

    queue: Queue[int, None] = Queue("bench.q1", int)
    queue.worker(forever)
    runtime = Runtime([queue], dsn=dsn, migrate=False, grace=0)
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        say(ready=True)
        while await wait_for_go():
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            say(mib=most / (2**20 if sys.platform == "darwin" else 2**10))
        runtime.stop()


async def pattern(dsn: str) -> None:
    """Serve all queues of many, by a pattern. The output of a job is its pickup time in nanoseconds."""
    queues: Queue[int, int] = Queue("bench.q*", int, int)

    @queues.worker
    async def pickup(job: Job[int]) -> int:
        return time.monotonic_ns() - job.data

    await serve(Runtime([queues], dsn=dsn, migrate=False))

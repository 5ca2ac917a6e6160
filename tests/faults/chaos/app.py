"""The worker processes' program: ``notifyq run tests.faults.chaos.app:runtime``. Each run of a handler is in its ledger."""

from __future__ import annotations

import os
import random
import time

import trio

import notifyq
from notifyq import Job, events

from .ledger import Pen
from .queues import ALL, ALONE, BULK, LUCK, STEP

pen = Pen(os.environ["CHAOS_LEDGER"])


@BULK.worker(concurrency=20)
async def take_some_time(job: Job[int]) -> int:
    with pen.run(job.id, job.attempt):
        if job.data < 0 and job.attempt == 1:  # some of them after each other would block the loop for a lease
            time.sleep(-job.data / 1000)  # noqa: ASYNC251 - as a handler that should not
        elif job.data:
            await trio.sleep(abs(job.data) / 1000)
    return job.data


@LUCK.worker(concurrency=5)
async def fail_often(job: Job[int]) -> int:
    with pen.run(job.id, job.attempt):
        dice = random.random()
        if dice < 0.25:
            raise ValueError("bad luck")
        if dice < 0.3:
            raise notifyq.Snooze(0.05)
    return job.data


@ALONE.worker(concurrency=4, transaction=True)
async def write_span(job: Job[int], connection: notifyq.Connection) -> None:
    with pen.run(job.id, job.attempt):
        await connection.execute("insert into span values (%s, %s, clock_timestamp())", [job.id, job.key])
        await trio.sleep(random.expovariate(200))
        if random.random() < 0.1:
            raise ValueError("bad luck")
        await connection.execute("update span set ended_at = clock_timestamp() where job = %s", [job.id])


@STEP.worker(concurrency=4)
async def step(job: Job[int]) -> int:
    with pen.run(job.id, job.attempt):
        await trio.sleep(random.expovariate(200))
    return job.data


runtime = notifyq.Runtime(
    ALL,
    lease=float(os.environ["CHAOS_LEASE"]),
    grace=1,
    pool_size=int(os.environ["CHAOS_POOL"]),
    migrate=False,
)
runtime.subscribe(
    pen.tell, events.LeaseLost, events.LeaseGivenUp, events.ListenerDown, events.ListenerUp, events.JobsRescued
)

"""Starting, stopping, pausing and closing, from many sides at once: each works or says why not, and nothing hangs."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import trio
import trio.testing

import notifyq
from notifyq import Job, Queue, Runtime
from notifyq._results import POLL
from tests.faults.test_cancelled import OTHERS, UNFINISHED, wait_none

SIDES = 10
TURNS = 12


def served() -> Queue[int, int]:
    queue = Queue("q", int, int, retry_delay=0, retry_limit=1000)

    @queue.worker(concurrency=2)
    async def work(job: Job[int]) -> int:
        await trio.lowlevel.checkpoint()
        return job.data

    return queue


async def test_a_runtime_that_runs_refuses_to_run_again_and_goes_on(start, nq):
    queue = served()
    seen = await start(queue)
    with trio.fail_after(5), pytest.raises(RuntimeError, match="runs already"):
        await seen.runtime.run()
    with trio.fail_after(5):
        assert await nq.result(await nq.send(queue, 1)) == 1
    seen.runtime.stop()


async def test_a_runtime_that_does_not_run_cannot_be_stopped_and_then_runs(dsn, nq):
    queue = served()
    runtime = Runtime([queue], dsn=dsn)
    runtime.stop()
    assert not runtime.stopping
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(runtime.run)
            assert await nq.result(await nq.send(queue, 1)) == 1
            runtime.stop()


async def test_a_client_that_is_closed_while_calls_wait_says_so_to_each(dsn, nq):
    queue = served()
    await nq.create_queue(queue)
    told: list[str] = []

    async def told_that_it_is_closed(call: Any) -> None:
        with pytest.raises(notifyq.ClientClosed):
            await call()
        told.append("closed")

    async def hold(client: notifyq.Client, held: trio.Event, release: trio.Event) -> None:
        async with client.connection():
            held.set()
            await release.wait()

    with trio.fail_after(POLL - 1):
        async with trio.open_nursery() as nursery:
            held, release = trio.Event(), trio.Event()
            async with notifyq.connect(dsn, pool_size=1) as client:
                sent = await client.send(queue, 1)
                nursery.start_soon(told_that_it_is_closed, lambda: client.result(sent))
                while not client._results._listener.up:
                    await trio.sleep(0.005)
                await trio.testing.wait_all_tasks_blocked(0.1)  # it waits for the announcement
                nursery.start_soon(hold, client, held, release)
                await held.wait()
                nursery.start_soon(told_that_it_is_closed, lambda: client.send(queue, 2))
                nursery.start_soon(told_that_it_is_closed, lambda: client.get(sent))
                while client._pool.statistics().waiting < 2:
                    await trio.sleep(0.005)
            release.set()
    assert told == ["closed"] * 3


class Side:
    """Does one thing after the other to a runtime that others do things to, too."""

    def __init__(self, runtimes: list[Runtime], dsn: str, seed: str) -> None:
        self._runtimes = runtimes
        self._dsn = dsn
        self._random = random.Random(seed)

    async def run(self) -> None:
        for _ in range(TURNS):
            runtime = self._random.choice(self._runtimes)
            await self._random.choice([self._run, self._cancel, self._stop, self._stop_from_a_thread, self._use])(
                runtime
            )

    async def _run(self, runtime: Runtime) -> None:
        """Until somebody stops it, or for a moment."""
        async with trio.open_nursery() as nursery:

            async def stop_soon() -> None:
                await trio.sleep(self._random.uniform(0, 0.3))
                runtime.stop()

            nursery.start_soon(stop_soon)
            try:
                await runtime.run()
            except RuntimeError as error:
                assert "runs already" in str(error)  # noqa: PT017 - or it runs

    async def _cancel(self, runtime: Runtime) -> None:
        with trio.move_on_after(self._random.uniform(0, 0.2)):
            await self._run(runtime)

    async def _stop(self, runtime: Runtime) -> None:
        runtime.stop()
        await trio.sleep(self._random.uniform(0, 0.02))

    async def _stop_from_a_thread(self, runtime: Runtime) -> None:
        await trio.to_thread.run_sync(lambda: trio.from_thread.run_sync(runtime.stop))

    async def _use(self, runtime: Runtime) -> None:
        """A client of its own, which may be closed in the middle of a call."""
        queue = runtime.queues[0]
        with trio.move_on_after(self._random.uniform(0, 0.3)):
            async with notifyq.connect(self._dsn, pool_size=1) as client:
                await client.send_many(queue, [1, 2, 3])
                await client.pause(queue)
                await client.resume_queue(queue)
                await client.result(await client.send(queue, 4))


async def test_whatever_is_started_and_stopped_from_ten_sides_ends_and_loses_no_job(dsn, connection):
    seed = os.environ.get("NOTIFYQ_SEED") or str(random.randrange(2**32))
    print(f"NOTIFYQ_SEED={seed}")
    queue = served()
    runtimes = [Runtime([queue], dsn=dsn, grace=1.0) for _ in range(3)]
    async with notifyq.connect(dsn) as client:
        await client.create_queue(queue)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(SIDES):
                nursery.start_soon(Side(runtimes, dsn, f"{seed}{number}").run)
        assert not any(runtime.running for runtime in runtimes)
        await wait_none(connection, OTHERS)
        await wait_none(connection, "select count(*) from notifyq.runtime")
        await wait_none(connection, "select count(*) from notifyq.active")
        async with notifyq.connect(dsn) as client, trio.open_nursery() as nursery:
            await client.resume_queue(queue)
            await nursery.start(runtimes[0].run)
            await wait_none(connection, UNFINISHED)
            runtimes[0].stop()
        await wait_none(connection, OTHERS)

"""Misbehaviour in every kind of worker, and around one: what it costs its attempt, and that it costs no more."""

from __future__ import annotations

import threading
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

import notifyq
from notifyq import Job, Queue, events
from tests.faults.test_cancelled import value

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from notifyq._connection import TrioConnection

KINDS = ["async", "sync", "batch", "transaction", "middleware", "context"]


def worked(
    kind: str,
    misbehave: Callable[[Job[Any]], Awaitable[Any]],
    in_thread: Callable[[Job[Any]], Any],
    *,
    concurrency: int = 1,
    **options: Any,
) -> Queue[Any, Any]:
    """A queue whose worker, or what is around it, does this; a worker in a transaction writes before."""
    queue: Queue[Any, Any] = Queue("q", Any, Any, retry_delay=0, **options)

    async def write_and_misbehave(job: Job[Any], connection: TrioConnection) -> Any:
        await connection.execute("insert into written values (%s)", (job.attempt,))
        return await misbehave(job)

    async def misbehave_together(jobs: list[Job[Any]]) -> list[Any]:
        [job] = jobs
        return [await misbehave(job)]

    async def around(job: Job[Any], call_next: Any) -> Any:
        await call_next(job)
        return await misbehave(job)

    @asynccontextmanager
    async def context(job: Job[Any]) -> AsyncIterator[None]:
        yield
        await misbehave(job)

    async def work(job: Job[Any]) -> Any:
        return job.attempt

    match kind:
        case "sync":
            queue.worker(concurrency=concurrency)(in_thread)
        case "batch":
            queue.batch_worker(batch_size=1, concurrency=concurrency)(misbehave_together)
        case "transaction":
            queue.worker(concurrency=concurrency, transaction=True)(write_and_misbehave)
        case "middleware" | "context":
            layer = around if kind == "middleware" else context
            queue.worker(concurrency=concurrency, middleware=[layer])(work)
        case _:
            queue.worker(concurrency=concurrency)(misbehave)
    return queue


@pytest.fixture
async def written(connection: TrioConnection) -> Callable[[], Awaitable[list[int]]]:
    """Which attempts have written."""
    await connection.execute("create table written (attempt int not null)")
    return lambda: value(connection, "select coalesce(array_agg(attempt order by attempt), '{}') from written")


async def a_cancelled() -> trio.Cancelled:
    """One that trio has raised, and that has had its effect."""
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            kept = cancelled
            raise
    return kept


def nested() -> Exception:
    return ExceptionGroup("mixed", [ValueError("a"), ExceptionGroup("inner", [KeyError("b")])])


FAILS = {
    "a group": "ExceptionGroup",
    "a stale Cancelled": "RuntimeError",
    "a stale Cancelled in a group": "RuntimeError",
    "StopIteration": "RuntimeError",
    "swallows its timeout": "timeout",
}


@pytest.mark.parametrize("kind", KINDS)
async def test_what_fails_an_attempt_fails_it_alone_in_every_kind_of_worker(start, nq, written, kind):
    stale = await a_cancelled()

    def error(data: str) -> BaseException:
        return {
            "a group": nested(),
            "a stale Cancelled": stale,
            "a stale Cancelled in a group": BaseExceptionGroup("mixed", [ValueError("x"), stale]),
            "StopIteration": StopIteration(1),
        }[data]

    async def misbehave(job: Job[str]) -> int:
        if job.data == "nothing":
            return 1
        if job.data == "swallows its timeout":
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                return 1
        raise error(job.data)

    def in_thread(job: Job[str]) -> int:
        if job.data == "nothing":
            return 1
        if job.data == "swallows its timeout":
            time.sleep(0.4)
            return 1
        raise error(job.data)

    queue = worked(kind, misbehave, in_thread, retry_limit=0)
    seen = await start(queue)
    with trio.fail_after(20):
        for data, type_ in FAILS.items():
            sent = await nq.send(queue, data, timeout=0.2 if "timeout" in data else 60)
            with pytest.raises(notifyq.JobFailed) as caught:
                await nq.result(sent)
            assert (data, caught.value.type) == (data, type_)
        await nq.result(await nq.send(queue, "nothing"))
    assert seen.runtime.running
    assert await written() == ([1] if kind == "transaction" else [])


@pytest.mark.parametrize("kind", KINDS)
async def test_what_comes_after_the_attempt_was_lost_is_refused_in_every_kind_of_worker(
    start, nq, connection, written, kind
):
    started, lost, lost_in_thread = trio.Event(), trio.Event(), threading.Event()

    async def hold_out(job: Job[int]) -> int:
        if job.attempt == 1:
            started.set()
            with trio.CancelScope(shield=True):
                await lost.wait()
        return job.attempt

    def hold_out_in_thread(job: Job[int]) -> int:
        if job.attempt == 1:
            trio.from_thread.run_sync(started.set)
            lost_in_thread.wait(20)
        return job.attempt

    queue = worked(kind, hold_out, hold_out_in_thread, concurrency=2, retry_limit=1)
    seen = await start(queue)
    with trio.fail_after(20):
        sent = await nq.send(queue, 1)
        await started.wait()
        await connection.execute("update notifyq.active set deadline = now() - interval '1 second'")
        await connection.execute("select notifyq.rescue()")
        assert await nq.result(sent) == 2
        lost.set()
        lost_in_thread.set()
        [refused] = await seen.wait(events.LeaseLost)
    assert (refused.job_id, refused.attempt) == (sent.id, 1)
    assert [job.attempt for job in seen.of(events.JobCompleted)] == [2]
    assert await written() == ([2] if kind == "transaction" else [])


@pytest.mark.parametrize("kind", KINDS)
async def test_blocking_for_longer_than_the_lease_ends_no_kind_of_worker(start, nq, connection, written, kind):
    started, enough = trio.Event(), threading.Event()

    async def block(job: Job[int]) -> int:
        started.set()
        if job.attempt == 1:
            time.sleep(1.5)  # noqa: ASYNC251 - longer than the lease
        return job.attempt

    def block_in_thread(job: Job[int]) -> int:
        trio.from_thread.run_sync(started.set)
        enough.wait(20)
        return job.attempt

    queue = worked(kind, block, block_in_thread, retry_limit=5)
    await start(queue, lease=1.0)
    with trio.fail_after(20):
        sent = await nq.send(queue, 1)
        await started.wait()
        begun = await value(connection, "select clock_timestamp()")
        # A thread leaves the event loop free to renew the lease.
        beaten = "select coalesce(max(beat_at) > %s + interval '1.2 seconds', false) from notifyq.runtime"
        while kind == "sync" and not await value(connection, beaten, begun):
            await trio.sleep(0.01)
        enough.set()
        attempt = await nq.result(sent)
    assert await written() == ([attempt] if kind == "transaction" else [])

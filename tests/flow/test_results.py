"""Waiting for results: every waiter hears the announcement, whoever else waits, gives up, or loses the listener."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import trio
import trio.testing

import notifyq
from notifyq import Job, Queue
from notifyq._store import Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from notifyq._connection import TrioConnection

Q = Queue("q", int, int)

LISTENERS = (
    "select array_agg(pid) from pg_stat_activity"
    " where application_name = 'notifyq listener' and datname = current_database()"
)
INTERESTS = (
    "select count(*) from pg_locks l join pg_database d on d.oid = l.database"
    " where l.locktype = 'advisory' and d.datname = current_database() and l.mode = 'ShareLock' and l.granted"
)


@pytest.fixture(autouse=True)
def no_polling(monkeypatch):
    monkeypatch.setattr("notifyq._results.POLL", 3600.0)


async def value(connection: TrioConnection, statement: str) -> Any:
    row = await (await connection.execute(statement.encode())).fetchone()
    assert row is not None
    return row[0]


async def until(holds: Callable[[], Awaitable[Any]], seconds: float = 10) -> Any:
    """Look until something is so, and return what was found."""
    with trio.fail_after(seconds):
        while not (found := await holds()):
            await trio.sleep(0.005)
    return found


async def complete_all(nq: notifyq.Client) -> None:
    """Complete every job with ten times its data, by hand."""
    for job in await nq.fetch(Q, 100):
        assert await nq.complete(job, job.data * 10)


async def test_eight_first_waiters_at_the_same_moment_share_one_listener(nq, connection, monkeypatch):
    await nq.create_queue(Q)
    sent = await nq.send_many(Q, range(8))
    results: dict[int, int] = {}
    channel = Store.channel

    async def slowly(self: Store, on: TrioConnection, number: int) -> str:
        await trio.sleep(0.3)  # so that all eight come before the first one has begun to hear
        return await channel(self, on, number)

    monkeypatch.setattr(Store, "channel", slowly)

    async def wait(number: int) -> None:
        results[number] = await nq.result(sent[number])

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(wait, number)
            await until(lambda: value(connection, INTERESTS))
            await trio.testing.wait_all_tasks_blocked(0.2)
            assert len(await value(connection, LISTENERS)) == 1
            await complete_all(nq)
    assert results == {number: number * 10 for number in range(8)}
    assert len(await value(connection, LISTENERS)) == 1
    assert await value(connection, INTERESTS) == 0


async def test_two_waiters_of_one_job_both_get_its_result(nq):
    await nq.create_queue(Q)
    sent = await nq.send(Q, 1)
    results: list[int] = []

    async def wait() -> None:
        results.append(await nq.result(sent))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked(0.2)
            await complete_all(nq)
    assert results == [10, 10]


async def test_a_waiter_that_gives_up_takes_nothing_from_another_of_the_same_job(nq):
    await nq.create_queue(Q)
    sent = await nq.send(Q, 1)
    results: list[int] = []

    async def wait(scope: trio.CancelScope) -> None:
        with scope:
            results.append(await nq.result(sent))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            leaver = trio.CancelScope()
            nursery.start_soon(wait, leaver)
            nursery.start_soon(wait, trio.CancelScope())
            await trio.testing.wait_all_tasks_blocked(0.2)
            leaver.cancel()
            await trio.testing.wait_all_tasks_blocked(0.1)
            await complete_all(nq)
    assert results == [10]


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope at the n-th step of a task."""

    def __init__(self, scope: trio.CancelScope, step: int) -> None:
        self.task: trio.lowlevel.Task | None = None
        self._scope = scope
        self._left = step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self._left -= 1
            if self._left == 0:
                self._scope.cancel()


def resting(nq: notifyq.Client) -> int:
    """How many of its waiters wait for nothing but the announcement."""
    return sum(one.statistics().tasks_waiting for waiters in nq._results._waiters.values() for one in waiters)


async def cancelled_at(step: int, nq: notifyq.Client, wanted: notifyq.Sent[int], *beside: notifyq.Sent[int]) -> bool:
    """Wait for a result, and be cancelled at the n-th step; False if it was not reached before all had come to rest.

    ``beside`` is what others wait for at the same time.
    """
    scope = trio.CancelScope()
    instrument = CancelAtStep(scope, step)
    trio.lowlevel.add_instrument(instrument)

    async def cancelled() -> None:
        instrument.task = trio.lowlevel.current_task()
        with scope:
            await nq.result(wanted)

    try:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancelled)
                for other in beside:
                    nursery.start_soon(nq.result, other)
                while resting(nq) < len(nursery.child_tasks):
                    await trio.sleep(0.001)
                reached = scope.cancel_called
                nursery.cancel_scope.cancel()
    finally:
        trio.lowlevel.remove_instrument(instrument)
    return reached


async def test_a_first_waiter_cancelled_at_any_point_leaves_the_client_able_to_wait(dsn, nq, connection):
    await nq.create_queue(Q)
    step = 0
    reached = True
    while reached:
        step += 1
        async with notifyq.connect(dsn) as fresh:
            first, second = await fresh.send_many(Q, [1, 2])
            reached = await cancelled_at(step, fresh, first)
            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:

                    async def wait() -> None:
                        assert await fresh.result(second) == 20  # noqa: B023

                    nursery.start_soon(wait)
                    await until(lambda: value(connection, INTERESTS))
                    await trio.testing.wait_all_tasks_blocked(0.05)
                    await complete_all(fresh)
            assert len(await value(connection, LISTENERS)) == 1
            assert await value(connection, INTERESTS) == 0
        await until(lambda: gone(connection))
    assert step > 5


async def gone(connection: TrioConnection) -> bool:
    return await value(connection, LISTENERS) is None


async def test_a_waiter_cancelled_at_any_point_beside_another_leaves_no_interest_behind(nq, connection):
    await nq.create_queue(Q)
    first, second = await nq.send_many(Q, [1, 2])
    with trio.move_on_after(0.2):  # the listener runs from now on
        await nq.result(first)
    step = 0
    reached = True
    while reached:
        step += 1
        reached = await cancelled_at(step, nq, first, second)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert await value(connection, INTERESTS) == 0, step
    assert step > 5


async def test_interest_that_two_were_about_to_hold_is_let_go_of_when_one_gives_up_meanwhile(nq, connection):
    await nq.create_queue(Q)
    first, second = await nq.send_many(Q, [1, 2])
    with trio.move_on_after(0.2):  # the listener runs from now on
        await nq.result(first)
    number = await value(connection, "select number from notifyq.queue where name = 'q'")
    lock = f"(notifyq.lock_class('interest'), {number % 64})"
    taking = nq._results._listener._taking_interest
    leaver = trio.CancelScope()
    left = trio.Event()
    results: list[int] = []

    async def leave() -> None:
        with leaver:
            await nq.result(first)
        left.set()

    async def wait() -> None:
        results.append(await nq.result(second))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            # As a settle that looks whether anybody is interested: nobody can say so for a moment.
            await connection.execute(f"select pg_advisory_lock{lock}".encode())
            nursery.start_soon(leave)
            while not taking.locked():
                await trio.sleep(0.001)
            nursery.start_soon(wait)
            while not taking.statistics().tasks_waiting:
                await trio.sleep(0.001)
            leaver.cancel()
            await left.wait()
            await connection.execute(f"select pg_advisory_unlock{lock}".encode())
            await until(lambda: value(connection, INTERESTS))
            await trio.testing.wait_all_tasks_blocked(0.1)
            await complete_all(nq)
    assert results == [20]
    assert await value(connection, INTERESTS) == 0


@pytest.mark.parametrize("when", ["before", "while"])
async def test_the_result_of_a_job_that_did_not_complete_is_its_error(nq, when):
    await nq.create_queue(Q)
    sent = await nq.send_many(Q, [1, 2])
    caught: dict[str, notifyq.JobFailed] = {}

    async def wait(job: notifyq.Sent[int]) -> None:
        with pytest.raises(notifyq.JobFailed) as raised:
            await nq.result(job)
        caught[raised.value.state] = raised.value

    async def end() -> None:
        [job] = await nq.fetch(Q)
        await nq.fail(job, ValueError("broken"), final=True)
        await nq.cancel(sent[1])

    with trio.fail_after(10):
        if when == "before":
            await end()
        async with trio.open_nursery() as nursery:
            for job in sent:
                nursery.start_soon(wait, job)
            if when == "while":
                await trio.testing.wait_all_tasks_blocked(0.2)
                await end()
    failed, cancelled = caught["failed"], caught["cancelled"]
    assert (failed.job_id, failed.type, failed.message) == (sent[0].id, "ValueError", "broken")
    assert (cancelled.job_id, cancelled.type) == (sent[1].id, None)
    assert str(failed) == f"job {sent[0].id} failed: ValueError: broken"
    assert str(notifyq.JobFailed(7, "failed", "Retry", "")) == "job 7 failed: Retry"


async def test_a_result_still_comes_after_the_listeners_backend_was_killed(nq, connection):
    await nq.create_queue(Q)
    sent = await nq.send_many(Q, [1, 2])
    results: list[int] = []

    async def wait(job: notifyq.Sent[int]) -> None:
        results.append(await nq.result(job))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for job in sent:
                nursery.start_soon(wait, job)
            for _ in range(2):
                await until(lambda: value(connection, INTERESTS))
                await trio.testing.wait_all_tasks_blocked(0.2)
                [pid] = await value(connection, LISTENERS)
                await connection.execute("select pg_terminate_backend(%s)", (pid,))
                await until(lambda: replaced(connection, pid))  # noqa: B023
                await until(lambda: value(connection, INTERESTS))
            await trio.testing.wait_all_tasks_blocked(1.2)  # the looks of the time without a listener are over
            [job] = await nq.fetch(Q)
            with trio.fail_after(0.5):
                await nq.complete(job, 10)
                while not results:
                    await trio.sleep(0.005)
            await complete_all(nq)
    assert sorted(results) == [10, 20]


async def replaced(connection: TrioConnection, pid: int) -> bool:
    return pid not in (await value(connection, LISTENERS) or [pid])


async def test_a_result_that_came_while_the_listener_was_down_is_found(nq, connection, dsn):
    await nq.create_queue(Q)
    sent = await nq.send(Q, 1)
    results: list[int] = []

    async def wait() -> None:
        results.append(await nq.result(sent))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await until(lambda: value(connection, INTERESTS))
            await trio.testing.wait_all_tasks_blocked(0.2)
            [pid] = await value(connection, LISTENERS)
            with psycopg.connect(dsn, autocommit=True) as blocking:  # at once: nothing else here gets a turn
                blocking.execute("select pg_terminate_backend(%s)", (pid,))
                while blocking.execute("select 1 from pg_stat_activity where pid = %s", (pid,)).fetchone():
                    pass
                [job, *_] = blocking.execute("select id from notifyq.claim('q')").fetchone()
                blocking.execute("select notifyq.complete(%s::bigint, '10')", (job,))
    assert results == [10]


async def test_a_handler_hears_of_the_result_of_a_job_it_sent(start, nq):
    outer = Queue("outer", int, int)
    inner = Queue("inner", int, int)
    gate = trio.Event()

    @outer.worker(poll_interval=3600)
    async def ask(job: Job[int]) -> int:
        return await job.client.result(await job.client.send(inner, job.data))

    @inner.worker(poll_interval=3600)
    async def answer(job: Job[int]) -> int:
        await gate.wait()
        return job.data * 10

    await start(outer, inner)
    with trio.fail_after(10):
        sent = await nq.send_many(outer, range(8))
        while (await nq.queue_stats())[0]["active"] < 8:  # the inner ones
            await trio.sleep(0.005)
        await trio.testing.wait_all_tasks_blocked(0.2)
        gate.set()
        assert [await nq.result(job) for job in sent] == [number * 10 for number in range(8)]

"""A runtime or a client that is cancelled at any step of its work: it ends, leaves nothing behind, and no job is lost.

A step is one run of one of its tasks, from one checkpoint to the next. A few are tried, from a random one on: the seed is
printed, and ``NOTIFYQ_SEED`` repeats it. ``NOTIFYQ_ALL_STEPS=1`` tries them all, which takes minutes.
"""

from __future__ import annotations

import gc
import logging
import os
import random
from typing import TYPE_CHECKING, Any

import trio

import notifyq
from notifyq import Job, Queue, Runtime

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from notifyq._connection import TrioConnection

OTHERS = """
select count(*)
from pg_stat_activity
where datname = current_database()
and backend_type = 'client backend'
and pid <> pg_backend_pid()
"""
LEFT = """
select jsonb_build_object(
    'active', (select jsonb_agg(to_jsonb(a)) from notifyq.active a),
    'runtimes', (select jsonb_agg(to_jsonb(r)) from notifyq.runtime r),
    'locks', (
        select jsonb_agg(to_jsonb(l))
        from pg_locks l
        where locktype = 'advisory' and database = (select oid from pg_database where datname = current_database())
    )
)
"""
NOTHING = {"active": None, "runtimes": None, "locks": None}
UNFINISHED = "select count(*) from notifyq.jobs where state <> 'completed'"
TWICE = "select count(*) from (select n from written group by n having count(*) > 1) w"


class CancelAtStep(trio.abc.Instrument):
    """Counts the steps of all tasks but the tester's own, and cancels a scope at one of them (None: at none)."""

    def __init__(self, scope: trio.CancelScope, step: int | None) -> None:
        self.steps = 0
        self._scope = scope
        self._step = step
        self._tester: set[trio.lowlevel.Task] = set()

    def spare(self) -> None:
        """This task is not part of what is cancelled."""
        self._tester.add(trio.lowlevel.current_task())

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task not in self._tester:
            self.steps += 1
            if self.steps == self._step:
                self._scope.cancel()


def steps_to_try(how_many: int, last: int) -> Iterator[int]:
    """So many of the steps up to the last, evenly spread from a random one on; or all."""
    seed = int(os.environ.get("NOTIFYQ_SEED") or random.randrange(2**32))
    print(f"{last} steps, NOTIFYQ_SEED={seed}")
    stride = 1 if os.environ.get("NOTIFYQ_ALL_STEPS") else max(1, last // how_many)
    yield from range(1 + random.Random(seed).randrange(stride), last + 1, stride)


async def value(connection: TrioConnection, statement: str, *arguments: Any) -> Any:
    row = await (await connection.execute(statement.encode(), arguments or None)).fetchone()
    assert row is not None
    return row[0]


async def wait_none(connection: TrioConnection, statement: str) -> None:
    """Wait until a statement counts nothing."""
    while await value(connection, statement):
        await trio.sleep(0.002)


class Work:
    """Queues with workers of every kind. The first attempt of every other job fails."""

    def __init__(self) -> None:
        options: dict[str, Any] = {"retry_delay": 0, "retry_limit": 5}
        plain = Queue("plain", int, int, **options)
        threaded = Queue("threaded", int, int, **options)
        together = Queue("together", int, int, **options)
        written = Queue("written", int, int, **options)
        self.queues: list[Queue[int, Any]] = [plain, threaded, together, written]
        self.ran: set[int] = set()

        @plain.worker(concurrency=2)
        async def wait(job: Job[int]) -> int:
            await job.progress(0.5)
            await trio.sleep(0.001)
            return self._run(job)

        threaded.worker(concurrency=2)(self._run)

        @together.batch_worker(batch_size=2, concurrency=1)
        async def run_both(jobs: list[Job[int]]) -> list[int | Exception]:
            await trio.lowlevel.checkpoint()
            return [self._judge(job) for job in jobs]

        @written.worker(concurrency=2, transaction=True)
        async def write(job: Job[int], connection: TrioConnection) -> int:
            await connection.execute("insert into written values (%s)", (job.id,))
            return self._run(job)

    def _judge(self, job: Job[int]) -> int | Exception:
        if job.data % 2 and job.attempt == 1:
            return ValueError("not at the first attempt")
        self.ran.add(job.id)
        return job.data

    def _run(self, job: Job[int]) -> int:
        result = self._judge(job)
        if isinstance(result, Exception):
            raise result
        return result

    async def send(self, connection: TrioConnection) -> None:
        """Two jobs to each queue. It is not cancelled half-way."""
        with trio.CancelScope(shield=True):
            for queue in self.queues:
                await connection.execute(
                    "select notifyq.send(%s, '0'), notifyq.send(%s, '1')",
                    (queue.name, queue.name),
                )


async def work_until_cancelled(work: Work, dsn: str, connection: TrioConnection, step: int | None) -> int:
    """Run a runtime that finds jobs, gets more while it is idle, and stops. Returns the steps that it took."""
    runtime = Runtime(work.queues, dsn=dsn, pool_size=3)
    scope = trio.CancelScope()
    instrument = CancelAtStep(scope, step)

    async def drive() -> None:
        instrument.spare()
        await wait_none(connection, UNFINISHED)
        await work.send(connection)
        await wait_none(connection, UNFINISHED)
        runtime.stop()

    await work.send(connection)
    trio.lowlevel.add_instrument(instrument)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drive)
            with scope:
                await runtime.run()
            assert scope.cancel_called or step is None or step > instrument.steps
            nursery.cancel_scope.cancel()
    finally:
        trio.lowlevel.remove_instrument(instrument)
    assert not runtime.running
    return instrument.steps


async def test_a_runtime_cancelled_at_any_step_ends_leaves_nothing_and_loses_no_job(dsn, connection, caplog):
    caplog.set_level(logging.ERROR)
    await connection.execute("create table written (n bigint not null)")
    async with notifyq.connect(dsn) as client:
        for queue in Work().queues:
            await client.create_queue(queue)
    with trio.fail_after(20):
        await wait_none(connection, OTHERS)
        last = await work_until_cancelled(Work(), dsn, connection, None)
    for step in steps_to_try(15, last):
        work = Work()
        with trio.fail_after(20):
            await work_until_cancelled(work, dsn, connection, step)
            await wait_none(connection, OTHERS)
            assert await value(connection, LEFT) == NOTHING, step
            runtime = Runtime(work.queues, dsn=dsn)
            async with trio.open_nursery() as nursery:
                await nursery.start(runtime.run)
                await wait_none(connection, UNFINISHED)
                runtime.stop()
            await wait_none(connection, OTHERS)
            assert await value(connection, LEFT) == NOTHING, step
        assert await value(connection, TWICE) == 0, step
        gc.collect()  # what was left to the garbage collector complains now, as an error
        assert not caplog.records, step


HANDS = Queue("hands", int, int, retry_delay=0, retry_limit=1)
PAIRS = Queue("pairs", int)
OPEN_TRANSACTIONS = OTHERS + "and state like 'idle in transaction%'"
HALF_SENT = """
select count(*) from (select data from notifyq.jobs where queue = 'pairs' group by data having count(*) % 2 = 1) j
"""


async def use(client: notifyq.Client) -> None:
    """Each kind of call, alone and in a transaction. What sends two jobs sends both or none of them."""
    one = await client.send(HANDS, 1)
    await client.send_many(PAIRS, [2, 2])
    async with client.transaction() as connection:
        await client.send(PAIRS, 3, connection=connection)
        await client.send(PAIRS, 3, connection=connection)
    flow = notifyq.Flow()
    flow.add(HANDS, 4, after=[flow.add(HANDS, 5)])
    await client.send_flow(flow)
    await client.upsert(HANDS, 6, key="k")
    await client.get(one)
    for job in await client.fetch(HANDS, 3):
        await client.touch(job, 60)
        await client.complete(job, job.data)
    for job in await client.fetch(HANDS, 1):
        await client.fail(job, "no", final=True)
    with trio.move_on_after(5):
        assert await client.result(one) == 1
    await client.pause(HANDS)
    await client.resume_queue(HANDS)
    await client.update_queue(HANDS)
    await client.jobs(queue=HANDS)
    await client.queue_stats()
    await client.cancel(one)
    await client.redrive(HANDS)
    await client.delete_all(HANDS, "waiting")


async def connect_and_use(dsn: str) -> None:
    async with notifyq.connect(dsn, pool_size=1) as client:
        await use(client)


async def cancelled_at(step: int | None, call: Callable[..., Awaitable[None]], argument: Any) -> int:
    with trio.CancelScope() as scope:
        instrument = CancelAtStep(scope, step)
        trio.lowlevel.add_instrument(instrument)
        try:
            await call(argument)
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return instrument.steps


async def test_a_client_cancelled_at_any_step_of_its_life_leaves_nothing_and_sends_all_or_nothing(
    dsn, connection, caplog
):
    caplog.set_level(logging.ERROR)
    async with notifyq.connect(dsn) as client:
        await client.declare([HANDS, PAIRS])
    with trio.fail_after(20):
        await wait_none(connection, OTHERS)
        last = await cancelled_at(None, connect_and_use, dsn)
    for step in steps_to_try(12, last):
        with trio.fail_after(20):
            await cancelled_at(step, connect_and_use, dsn)
            await wait_none(connection, OTHERS)
            assert (await value(connection, LEFT))["locks"] is None, step
            assert await value(connection, HALF_SENT) == 0, step
            await connection.execute("select notifyq.delete_all('hands')")
        gc.collect()
        assert not caplog.records, step


async def test_a_client_whose_call_is_cancelled_at_any_step_is_as_good_as_before(dsn, connection):
    async with notifyq.connect(dsn, pool_size=1) as client:
        await client.declare([HANDS, PAIRS])
        last = await cancelled_at(None, use, client)
        for step in steps_to_try(60, last):
            with trio.fail_after(20):
                await cancelled_at(step, use, client)
                assert client._pool.statistics().on_loan == 0, step
                assert await value(connection, OPEN_TRANSACTIONS) == 0, step
                assert await value(connection, HALF_SENT) == 0, step
                await client.delete_all(HANDS)
                await client.resume_queue(HANDS)
                sent = await client.send(HANDS, 7)
                [job] = [job for job in await client.fetch(HANDS, 10) if job.id == sent.id]
                await client.complete(job, 7)
                assert await client.result(sent) == 7
    await wait_none(connection, OTHERS)

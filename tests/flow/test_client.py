"""The client, the installation, and what an idle runtime costs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from datetime import timedelta

import attrs
import psycopg
import pytest
import trio
import trio.testing

import notifyq
from notifyq import Job, NewJob, Queue, _schema, events, testing
from notifyq._opening import open_connection

Q = Queue("q", int, int, retry_delay=0)


async def test_send_joins_the_callers_transaction(nq):
    await nq.create_queue(Q)
    with contextlib.suppress(ZeroDivisionError):
        async with nq.transaction() as connection:
            await nq.send(Q, 1, connection=connection)
            raise ZeroDivisionError
    async with nq.transaction() as connection:
        await nq.send(Q, 2, connection=connection)
        assert await nq.jobs(queue=Q) == []
    assert await testing.sent(nq, Q) == [2]


@pytest.mark.parametrize("how", ["commit", "rollback"])
async def test_settling_and_operating_join_the_callers_transaction(nq, how):
    await nq.create_queue(Q)
    await nq.send_many(Q, range(5))
    done, broken = await nq.fetch(Q, 2)
    waiting, dropped, resumed = [record.id for record in reversed(await nq.jobs(state="ready"))]
    await nq.cancel(resumed)
    before = [record.state for record in await nq.jobs()]
    with contextlib.suppress(ZeroDivisionError):
        async with nq.transaction() as connection:
            assert await nq.complete(done, 1, connection=connection)
            assert await nq.fail(broken, "x", final=True, connection=connection)
            assert await nq.retry(broken.id, connection=connection) == [broken.id]
            assert await nq.cancel(waiting, connection=connection) == [waiting]
            assert await nq.resume(resumed, connection=connection) == [resumed]
            assert await nq.delete(dropped, connection=connection) == [dropped]
            assert [record.state for record in await nq.jobs()] == before
            if how == "rollback":
                raise ZeroDivisionError
    states = {record.id: record.state for record in await nq.jobs()}
    after = {done.id: "completed", broken.id: "ready", waiting: "cancelled", resumed: "ready"}
    assert (states == after) == (how == "commit")
    assert (list(states.values()) == before) == (how == "rollback")


async def test_a_statement_sends_on_a_plain_psycopg_connection(nq, dsn):
    await nq.create_queue(Q)
    with psycopg.connect(dsn) as connection:
        row = connection.execute(*Q.statement(3, priority=2)).fetchone()
    assert row is not None
    record = await nq.get(row[0])
    assert (record.data, record.priority) == (3, 2)


async def test_fetch_complete_and_fail_by_hand(nq):
    await nq.create_queue(Q)
    sent = await nq.send_many(Q, [1, NewJob(2, {"priority": 5})])
    second, first = await nq.fetch(Q, 5)
    assert (first.data, second.data, first.attempt) == (1, 2, 1)
    assert await nq.complete(first, 10)
    assert not await nq.complete(first, 11)
    assert await nq.fail(second, ValueError("no"), final=True)
    assert not await nq.fail(second, "again")
    assert await nq.result(sent[0]) == 10
    with pytest.raises(notifyq.LeaseLost):
        await nq.touch(second, 5)


async def test_a_waiter_is_woken_by_the_announcement_not_by_polling(nq, monkeypatch):
    monkeypatch.setattr("notifyq._results.POLL", 3600.0)
    await nq.create_queue(Q)
    sent = await nq.send_many(Q, range(3))
    results = []

    async def wait(job: notifyq.Sent[int]) -> None:
        results.append(await nq.result(job))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for job in sent:
                nursery.start_soon(wait, job)
            await trio.testing.wait_all_tasks_blocked(0.2)
            for job in await nq.fetch(Q, 3):
                await nq.complete(job, job.data * 2)
    assert sorted(results) == [0, 2, 4]


async def test_a_result_of_a_queue_that_keeps_nothing_is_an_error_at_once(nq):
    queue = Queue("none", int, retention=0)
    await nq.create_queue(queue)
    sent = await nq.send(queue, 1)
    with trio.fail_after(5), pytest.raises(notifyq.JobNotFound, match="keeps no finished jobs"):
        await nq.result(sent)


async def test_create_queue_says_what_differs_and_update_changes_it(nq):
    assert await nq.create_queue(Q) == "created"
    assert await nq.create_queue(Q) == "exists"
    other = Queue("q", retry_limit=9)
    assert await nq.create_queue(other) == "differs: retry_limit is 2, not 9"
    await nq.update_queue(other)
    assert await nq.create_queue(other) == "exists"
    await nq.send(Q, 1)
    assert await nq.delete_queue(Q) == 1
    with pytest.raises(notifyq.UnknownQueue, match="no queue named 'q'"):
        await nq.send(Q, 1)


@pytest.mark.parametrize(
    ("dsn_", "kind", "message"),
    [
        ("host=/nowhere", notifyq.ConnectionLost, "cannot reach the server within 0.5 s"),
        ("postgresql://user:secret@[bad", notifyq.InvalidOption, "the DSN is not one"),
        (None, notifyq.InvalidOption, "DATABASE_URL"),
    ],
)
async def test_a_bad_dsn_is_named_but_never_its_password(dsn_, kind, message, monkeypatch):
    monkeypatch.delenv("DATABASE_URL", raising=False)
    with trio.fail_after(10), pytest.raises(kind) as caught:
        async with notifyq.connect(dsn_, connect_timeout=0.5):
            pass
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_a_closed_client_says_so(dsn):
    async with notifyq.connect(dsn) as nq:
        pass
    with pytest.raises(notifyq.ClientClosed):
        await nq.get(1)


async def test_a_schema_that_is_missing_older_newer_or_forbidden_is_an_error_in_words(empty_dsn):
    with pytest.raises(notifyq.SchemaMismatch, match="not installed"):
        async with notifyq.connect(empty_dsn, migrate=False):
            pass
    connection = await open_connection(empty_dsn)
    role = f"nobody_{connection.info.dbname[-12:]}"
    await connection.execute(f"create role {role} login".encode())
    with pytest.raises(notifyq.MissingPrivilege, match="permission denied"):
        async with notifyq.connect(psycopg.conninfo.make_conninfo(empty_dsn, user=role)):
            pass
    await connection.execute(f"drop role {role}".encode())
    await _schema.apply(connection, "notifyq")
    await connection.execute("update notifyq.installed set hash = 'x' where file = 'functions/58_edit.sql'")
    with pytest.raises(notifyq.SchemaMismatch, match=r"older than notifyq \S+ \(functions/58_edit\.sql"):
        async with notifyq.connect(empty_dsn, migrate=False):
            pass
    await connection.execute("insert into notifyq.installed values ('migrations/9999_future.sql', 'x', '99.0')")
    await connection.close()
    with pytest.raises(notifyq.SchemaMismatch, match="newer than notifyq"):
        async with notifyq.connect(empty_dsn):
            pass


async def test_ten_processes_starting_at_once_install_once(empty_dsn):
    environment = {**os.environ, "DATABASE_URL": empty_dsn}
    code = "import trio, notifyq\nasync def main():\n    async with notifyq.connect() as nq: pass\ntrio.run(main)"
    processes = [await trio.lowlevel.open_process([sys.executable, "-c", code], env=environment) for _ in range(10)]
    assert [await process.wait() for process in processes] == [0] * 10
    connection = await open_connection(empty_dsn)
    cursor = await connection.execute("select count(distinct installed_at), count(*) from notifyq.installed")
    assert await cursor.fetchone() == (1, len(_schema.load("notifyq")))
    await connection.close()


async def test_two_installations_in_one_database_do_not_meet(dsn):
    async with notifyq.connect(dsn) as one, notifyq.connect(dsn, schema="second") as two:
        await one.create_queue(Q)
        await two.create_queue(Q)
        await one.send(Q, 1)
        await two.send(Q, 2)
        assert await testing.sent(one, Q) == [1]
        assert await testing.sent(two, Q) == [2]
        queue = Queue("q", int, int)

        @queue.worker
        async def work(job: Job[int]) -> int:
            return job.data

        assert await testing.run_waiting([queue], dsn=dsn, schema="second") == {"completed": 1}
        assert await testing.sent(one, Q) == [1]


async def test_a_job_that_was_sent_to_another_schema_is_refused_though_its_id_is_a_jobs_here(dsn):
    async with notifyq.connect(dsn) as nq, notifyq.connect(dsn, schema="second") as two:
        await nq.create_queue(Q)
        await two.create_queue(Q)
        ours = await nq.send(Q, 1)
        theirs = attrs.evolve(await two.send(Q, 2), id=ours.id)  # each schema counts its own
        flow = _after(theirs)
        for call, message in (
            (
                lambda: nq.send_flow(flow),
                "job 'child' of the flow: it comes after one that is not here: job .* 'second'",
            ),
            (lambda: nq.cancel(ours, theirs), "sent to schema 'second', and this is schema 'notifyq'"),
            (lambda: nq.retry(theirs), "use a client of its own"),
            (lambda: nq.resume(theirs), "schema 'second'"),
            (lambda: nq.delete(theirs), "schema 'second'"),
            (lambda: nq.update_job(theirs, priority=1), "schema 'second'"),
            (lambda: nq.get(theirs), "schema 'second'"),
            (lambda: nq.result(theirs), "schema 'second'"),
            (lambda: nq.parents(theirs), "schema 'second'"),
            (lambda: nq.flow(theirs), "schema 'second'"),
        ):
            with pytest.raises(notifyq.InvalidOption, match=message):
                await call()
        assert {(job.state, job.priority) for job in await nq.jobs()} == {("ready", 0)}
        before = await two.send(Q, 1)
        sent = await two.send_flow(_after(before))
        assert (await two.get(sent.jobs["child"])).state == "blocked"
        assert await two.cancel(sent.jobs["child"], before) == [before.id, sent.jobs["child"].id]


def _after(job: notifyq.Sent[int]) -> notifyq.Flow:
    flow = notifyq.Flow()
    flow.add(Q, 1, name="child", after=[job])
    return flow


async def test_aged_jobs_become_due(nq, dsn):
    queue = Queue("q", int, int)

    @queue.worker
    async def work(job: Job[int]) -> int:
        return job.data

    await nq.create_queue(queue)
    await nq.send(queue, 1, delay=3600)
    assert await testing.run_waiting([queue], dsn=dsn) == {}
    await testing.age_jobs(nq, timedelta(hours=2))
    assert await testing.run_waiting([queue], dsn=dsn) == {"completed": 1}


async def test_what_was_started_and_throttled_long_ago_counts_no_more(nq, dsn):
    queue = Queue("q", int, int, rate_limit=1, rate_period=3600)

    @queue.worker
    async def work(job: Job[int]) -> int:
        return job.data

    await nq.create_queue(queue)
    sent = [(await nq.send(queue, n, key="k", throttle=3600)).created for n in range(2)]
    assert sent == [True, False]
    assert await testing.run_waiting([queue], dsn=dsn) == {"completed": 1}
    await testing.age_jobs(nq, timedelta(hours=1, minutes=2))
    assert (await nq.send(queue, 3, key="k", throttle=3600)).created
    assert await testing.run_waiting([queue], dsn=dsn) == {"completed": 1}


async def test_an_idle_runtime_of_ten_queues_holds_at_most_three_connections(start, connection, other):
    queues = []
    for number in range(10):
        queue = Queue(f"q{number}", int, int)
        queue.worker(lambda job: job.data)
        queues.append(queue)
    await start(*queues)
    await trio.testing.wait_all_tasks_blocked(0.5)
    cursor = await connection.execute(
        "select count(*) from pg_stat_activity where datname = current_database() and pid <> all (%s)",
        ([connection.info.backend_pid, other.info.backend_pid],),
    )
    [(connections,)] = await cursor.fetchall()
    assert connections <= 3


async def test_a_runtime_starts_stops_and_starts_again(start, nq):
    queue = Queue("q", int, int)

    @queue.worker
    async def work(job: Job[int]) -> int:
        return job.data

    seen = await start(queue)
    seen.runtime.stop()
    await seen.wait(events.RuntimeStopped)
    assert await nq.runtimes() == []
    await start(queue)
    with trio.fail_after(5):
        assert await nq.result(await nq.send(queue, 1)) == 1


async def test_a_client_is_opened_once_at_a_time_and_can_be_opened_again(dsn, monkeypatch):
    monkeypatch.delenv("DATABASE_URL", raising=False)
    opening = notifyq.connect(migrate=False)
    with pytest.raises(notifyq.InvalidOption, match="no database"):
        await opening.__aenter__()
    monkeypatch.setenv("DATABASE_URL", dsn)
    async with opening as first:
        with pytest.raises(RuntimeError, match=r"open already: use it, or call connect\(\) again"):
            await opening.__aenter__()
        assert await first.runtimes() == []
    async with opening as second:
        assert await second.runtimes() == []
    with pytest.raises(notifyq.ClientClosed):
        await first.runtimes()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
async def test_what_ends_the_block_comes_out_as_it_is(dsn, kind):
    async def block() -> None:
        async with notifyq.connect(dsn) as nq:
            await nq.runtimes()
            raise kind("why")

    with pytest.raises(kind, match="why"):  # and not in a group
        await block()


def test_a_client_in_asyncio_says_what_to_do_instead():
    async def send() -> None:
        async with notifyq.connect("host=/nowhere"):
            pass

    with pytest.raises(RuntimeError, match=r"runs under trio: from asyncio, send with queue.statement\(\)"):
        asyncio.run(send())

"""Workers, servers and connections that die; real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.lowlevel

import notifyq
from notifyq import Job, Queue, events, testing
from notifyq._store import Store
from tests.faults.chaos.servers import binaries
from tests.faults.test_cancelled import OTHERS, value, wait_none

if TYPE_CHECKING:
    from pathlib import Path

    from notifyq._connection import TrioConnection

APP = """
import notifyq, trio

slow = notifyq.Queue("slow", int, int, retry_limit=3)

@slow.worker(concurrency=2)
async def work(job):
    print("started", job.data, job.attempt, flush=True)
    await trio.sleep({seconds})
    return job.attempt

runtime = notifyq.Runtime([slow], lease={lease}, grace={grace})
"""

DEADLY = """
import os, signal
import notifyq

slow = notifyq.Queue("slow", int, int, retry_limit=1, retry_delay=0)

@slow.worker
async def work(job):
    if job.data:
        print("started", job.data, job.attempt, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return job.attempt

runtime = notifyq.Runtime([slow], lease={lease}, grace={grace})
"""


class Process:
    """``notifyq run`` of a module written for the test."""

    def __init__(
        self,
        folder: Path,
        dsn: str,
        *,
        seconds: float,
        grace: float,
        lease: float = 2,
        arguments: tuple[str, ...] = (),
        app: str = APP,
    ) -> None:
        (folder / "app.py").write_text(app.format(seconds=seconds, grace=grace, lease=lease), encoding="utf-8")
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "notifyq", "run", "app:runtime", *arguments],
            cwd=folder,
            env={**os.environ, "DATABASE_URL": dsn},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.send_signal = self._popen.send_signal

    async def line(self) -> str:
        assert self._popen.stdout is not None
        with trio.fail_after(20):
            return (await trio.to_thread.run_sync(self._popen.stdout.readline, abandon_on_cancel=True)).strip()

    async def end(self) -> tuple[int, str]:
        with trio.fail_after(20):
            _, log = await trio.to_thread.run_sync(self._popen.communicate, abandon_on_cancel=True)
        return self._popen.returncode, log


SLOW = Queue("slow", int, int, retry_limit=3)
HOUR = 3600.0


async def test_the_jobs_of_a_killed_runtime_run_elsewhere(dsn, nq, tmp_path, start):
    process = Process(tmp_path, dsn, seconds=3600, grace=0)
    await nq.create_queue(SLOW)
    sent = await nq.send_many(SLOW, [1, 2])
    assert {await process.line(), await process.line()} == {"started 1 1", "started 2 1"}
    process.send_signal(signal.SIGKILL)
    assert (await process.end())[0] == -signal.SIGKILL
    queue = Queue("slow", int, int, retry_limit=3)

    @queue.worker
    async def work(job: Job[int]) -> int:
        return job.attempt

    await start(queue, lease=2.0)
    with trio.fail_after(5):
        assert [await nq.result(job) for job in sent] == [2, 2]
    record = await nq.get(sent[0])
    assert record.error is not None
    assert record.error["type"] == "lost"


async def test_jobs_of_the_killed_run_elsewhere_when_its_lease_ends_and_not_before(
    dsn, nq, connection, tmp_path, start
):
    process = Process(tmp_path, dsn, seconds=3600, grace=0, lease=1.5)
    await nq.create_queue(SLOW)
    sent = await nq.send_many(SLOW, [1, 2])
    await process.line()
    await process.line()
    queue = Queue("slow", int, int, retry_limit=3)
    queue.worker(lambda job: job.attempt)
    seen = await start(queue, lease=HOUR)  # its next beat is half an hour away
    with trio.fail_after(20):
        # The worst moment: it has just renewed its lease.
        leases = "select max(lease_until) from notifyq.runtime where pid <> %s"
        before = await value(connection, leases, os.getpid())
        while (lease_until := await value(connection, leases, os.getpid())) == before:
            await trio.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        await seen.wait(events.JobCompleted, 2)
    await process.end()
    claimed = [(await nq.get(job)).claimed_at for job in sent]
    assert lease_until < min(claimed)
    assert max(claimed) < lease_until + timedelta(seconds=1)


async def dead(connection: TrioConnection, lease: float, holding: int) -> None:
    """A runtime that beats no more, with so many jobs of queue q."""
    identity = await value(connection, "select gen_random_uuid()")
    await connection.execute("select notifyq.register(%s, '{q}', %s)", (identity, timedelta(seconds=lease)))
    if holding:
        await connection.execute("select notifyq.claim('q', %s, %s)", (holding, identity))


async def test_each_of_several_dead_is_rescued_when_its_own_lease_lapses(start, nq, connection, monkeypatch):
    monkeypatch.setattr("notifyq._maintenance.FIRST", (60.0, 60.0))
    queue = Queue("q", int, int, retry_limit=1)

    @queue.worker
    async def work(job: Job[int]) -> int:
        return job.attempt

    await nq.create_queue(queue)
    jobs = await nq.send_many(queue, [1, 2])
    for lease, holding in ((1.0, 1), (1.2, 0), (1.4, 1)):
        await dead(connection, lease, holding)
    seen = await start(queue, lease=HOUR)  # its next beat is half an hour away
    with trio.fail_after(20):
        assert [await nq.result(job) for job in jobs] == [2, 2]
    assert len(seen.of(events.JobsRescued)) == 2
    assert len(await nq.runtimes()) == 1


async def test_what_is_behind_a_gate_in_use_is_rescued_soon_after_and_all_else_at_once(
    start, nq, connection, monkeypatch
):
    monkeypatch.setattr("notifyq._maintenance.FIRST", (60.0, 60.0))
    plain, keyed = Queue("q", int, int, retry_limit=1), Queue("keyed", int, int, retry_limit=1, key_limit=1)
    plain.worker(lambda job: job.attempt)
    running, most = 0, 0

    @keyed.worker(concurrency=5)
    async def work(job: Job[int]) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(0.02)
        running -= 1
        return job.attempt

    await nq.create_queue(plain)
    await nq.create_queue(keyed)
    first = await nq.send(plain, 1)
    behind = [await nq.send(keyed, number, key="k") for number in range(4)]
    await dead(connection, 0.5, 1)
    await connection.execute("select notifyq.claim('keyed', 1, id) from notifyq.runtime")
    rescues = 0
    rescue = Store.rescue

    async def counted(*arguments: Any) -> list[int]:
        nonlocal rescues
        rescues += 1
        return await rescue(*arguments)

    monkeypatch.setattr(Store, "rescue", counted)
    with trio.fail_after(20):
        async with connection.transaction():
            await connection.execute("select notifyq.lock_gate(number) from notifyq.queue where name = 'keyed'")
            seen = await start(plain, keyed, lease=HOUR)  # its next beat is half an hour away
            assert await nq.result(first) == 2
            assert seen.of(events.JobsRescued)[0].job_ids == (first.id,)
            rescues = 0
            await trio.sleep(2)
            assert 1 <= rescues <= 4
            assert len(seen.of(events.JobsRescued)) == 1
        with trio.fail_after(3):
            await seen.wait(events.JobsRescued, 2)
        assert seen.of(events.JobsRescued)[1].job_ids == (behind[0].id,)
        assert [await nq.result(job) for job in behind] == [2, 1, 1, 1]
    assert most == 1
    await wait_none(connection, "select count(*) from notifyq.key where held <> 0")
    assert len(await nq.runtimes()) == 1
    rescues = 0
    await trio.sleep(1.5)
    assert rescues == 0


async def test_a_round_of_maintenance_that_takes_long_holds_up_no_rescue(start, nq, connection, monkeypatch):
    monkeypatch.setattr("notifyq._maintenance.FIRST", (0.0, 0.0))
    queue = Queue("q", int, int, retry_limit=1)
    queue.worker(lambda job: job.attempt)
    await nq.create_queue(queue)
    sent = await nq.send(queue, 1)
    await dead(connection, 1.0, 1)
    with trio.fail_after(20):
        async with connection.transaction():
            await connection.execute("lock table notifyq.archive in exclusive mode")
            seen = await start(queue)
            while not await value(connection, "select count(*) from pg_locks where not granted"):
                await trio.sleep(0.005)
            await seen.wait(events.JobsRescued, seconds=8)
        assert await nq.result(sent) == 2


async def test_sigterm_lets_running_jobs_finish_and_hands_back_the_rest(dsn, nq, tmp_path):
    process = Process(tmp_path, dsn, seconds=1, grace=30)
    await nq.create_queue(SLOW)
    sent = await nq.send_many(SLOW, range(10))
    await process.line()
    await process.line()
    process.send_signal(signal.SIGTERM)
    code, log = await process.end()
    assert code == 0, log
    records = [await nq.get(job) for job in sent]
    assert [(record.state, record.attempt) for record in records] == [("completed", 1)] * 2 + [("ready", 0)] * 8
    assert await nq.runtimes() == []


async def test_after_the_grace_running_jobs_are_cancelled_and_tried_again(dsn, nq, tmp_path):
    process = Process(tmp_path, dsn, seconds=3600, grace=0.2)
    await nq.create_queue(SLOW)
    sent = await nq.send(SLOW, 1)
    await process.line()
    process.send_signal(signal.SIGTERM)
    code, log = await process.end()
    assert code == 0, log
    record = await nq.get(sent)
    assert (record.state, record.error and record.error["type"]) == ("ready", "shutdown")


async def test_a_second_signal_is_immediate(dsn, nq, tmp_path):
    process = Process(tmp_path, dsn, seconds=3600, grace=3600)
    await nq.create_queue(SLOW)
    sent = await nq.send(SLOW, 1)
    await process.line()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    code, log = await process.end()
    assert code == 0, log
    assert (await nq.get(sent)).state == "ready"


async def test_the_supervisor_replaces_a_crashed_process_and_drains_all(dsn, nq, tmp_path):
    process = Process(tmp_path, dsn, seconds=0.1, grace=5, arguments=("--processes", "2"))
    await nq.create_queue(SLOW)
    with trio.fail_after(20):
        while len(runtimes := await nq.runtimes()) < 2:
            await trio.lowlevel.checkpoint()
    first = {row["pid"] for row in runtimes}
    os.kill(min(first), signal.SIGKILL)
    with trio.fail_after(20):
        while len({row["pid"] for row in await nq.runtimes()} - first) < 1:
            await trio.lowlevel.checkpoint()
    await nq.send(SLOW, 1)
    assert await process.line() == "started 1 1"
    process.send_signal(signal.SIGTERM)
    code, log = await process.end()
    assert code == 0, log


async def test_a_job_that_kills_its_process_has_failed_as_lost_when_its_attempts_are_used_up(dsn, nq, tmp_path):
    process = Process(tmp_path, dsn, seconds=0, grace=5, lease=1, arguments=("--processes", "2"), app=DEADLY)
    queue = Queue("slow", int, int, retry_limit=1, retry_delay=0)
    await nq.create_queue(queue)
    deadly = await nq.send(queue, 1)
    assert [await process.line(), await process.line()] == ["started 1 1", "started 1 2"]
    with trio.fail_after(20):
        with pytest.raises(notifyq.JobFailed, match="lost"):
            await nq.result(deadly)
        assert await nq.result(await nq.send(queue, 0)) == 1
    record = await nq.get(deadly)
    assert (record.state, record.attempt) == ("failed", 2)
    process.send_signal(signal.SIGTERM)
    code, log = await process.end()
    assert code == 0, log


NOTING = """
create table noted (what text, queue int, setting text);
create function note() returns trigger language plpgsql as $$ begin
    insert into public.noted values (tg_argv[0], new.queue, current_setting('synchronous_commit'));
    return null;
end $$;
create constraint trigger note after insert on notifyq.active
deferrable initially deferred for each row execute function note('claim');
create constraint trigger note after insert on notifyq.archive
deferrable initially deferred for each row execute function note('end');
"""
"""Writes down, as a transaction commits that claims or ends a job, whether the commit waits until it is on the disk."""


async def test_a_runtime_waits_for_what_it_writes_but_for_claims_of_what_may_run_again(start, nq, connection):
    once, again = Queue("once", int, int, retry_limit=0), Queue("again", int, int, retry_limit=1)

    async def work(job: Job[int]) -> int:
        return job.data

    for queue in (once, again):
        queue.worker(concurrency=2)(work)
    await nq.declare([once, again])
    await connection.execute(NOTING.encode())
    await start(once, again)
    with trio.fail_after(20):
        for sent in [*await nq.send_many(once, range(20)), *await nq.send_many(again, range(20))]:
            await nq.result(sent)
    noted = await connection.execute(
        "select distinct what, name, setting from noted join notifyq.queue on number = queue order by what, name"
    )
    assert await noted.fetchall() == [
        ("claim", "again", "off"),
        ("claim", "once", "on"),
        ("end", "again", "on"),
        ("end", "once", "on"),
    ]


async def test_a_restored_dump_has_every_job_and_what_was_active_runs_when_its_lease_has_passed(
    server, dsn, nq, connection, tmp_path
):
    queue = Queue("q", int, int, retry_limit=1)

    @queue.worker
    async def work(job: Job[int]) -> int:
        return job.attempt

    await nq.create_queue(queue)
    done, active = await nq.send(queue, 1), await nq.send(queue, 2)
    [job] = await nq.fetch(queue)
    await nq.complete(job, 7)
    await dead(connection, 2.0, 1)
    ready, delayed = await nq.send(queue, 3), await nq.send(queue, 4, delay=HOUR)
    file = str(tmp_path / "dump")
    await trio.run_process([binaries() / "pg_dump", "-Fc", "-f", file, "-d", dsn])
    async with testing.fresh_database(server) as own:
        await trio.run_process([binaries() / "pg_restore", "-d", own, file])
        runtime = notifyq.Runtime([queue], dsn=own)
        async with notifyq.connect(own) as restored, trio.open_nursery() as nursery:
            records = [await restored.get(each.id) for each in (done, active, ready, delayed)]
            assert [record.state for record in records] == ["completed", "active", "ready", "scheduled"]
            lease_until = await value(connection, "select lease_until from notifyq.runtime")
            with trio.fail_after(20):
                await nursery.start(runtime.run)
                assert [await restored.result(each) for each in (done, ready, active)] == [7, 1, 2]
            assert (await restored.get(active.id)).claimed_at > lease_until
            assert (await restored.send(queue, 5)).id > delayed.id
            runtime.stop()


async def set_read_only(connection: TrioConnection, setting: str) -> None:
    """What standbys are. It holds for connections that are made from now on; all others are ended."""
    name = connection.info.dbname
    await connection.execute(f"alter database {name} set default_transaction_read_only = {setting}".encode())
    await connection.execute(OTHERS.replace("count(*)", "count(pg_terminate_backend(pid))").encode())


async def test_a_runtime_does_not_start_where_nothing_can_be_written_and_says_why(dsn, connection):
    queue = Queue("q", int, int)
    queue.worker(lambda job: job.data)
    await set_read_only(connection, "on")
    with trio.fail_after(20), pytest.raises(notifyq.ConnectionLost, match="read-only transaction"):
        await notifyq.Runtime([queue], dsn=dsn).run()


async def test_a_runtime_whose_server_turns_read_only_says_so_and_goes_on_when_it_may_write(start, connection):
    queue = Queue("q", int, int)

    @queue.worker
    async def work(job: Job[int]) -> int:
        return job.data

    def told() -> list[str]:
        return [trouble.part for trouble in seen.of(events.ServerTrouble) if "read-only" in trouble.reason]

    seen = await start(queue, lease=2.0)
    await set_read_only(connection, "on")
    await seen.wait(events.LeaseGivenUp, seconds=20)
    idle = told()
    assert idle.count("beat") == 1  # though it tried again and again
    await connection.execute("select notifyq.send('q', '1')")
    with trio.fail_after(20):
        while "claim" not in told():
            await trio.sleep(0.01)
    await trio.sleep(1)  # it tries again and again; looks, which write nothing, do not succeed in between now
    assert told()[len(idle) :].count("claim") <= 1
    assert told().count("beat") == 1
    await set_read_only(connection, "off")
    await seen.wait(events.JobCompleted, seconds=20)


async def test_killed_backends_cost_no_job(start, nq, connection):
    queue = Queue("q", int, int)

    @queue.worker(poll_interval=3600)
    async def work(job: Job[int]) -> int:
        return job.data

    seen = await start(queue)
    ups = len(seen.of(events.ListenerUp))
    sent = [await nq.send(queue, 0)]
    for number in range(1, 4):
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where pid <> pg_backend_pid() and datname = current_database()"
        )
        await seen.wait(events.ListenerUp, ups + number)
        with trio.fail_after(10):
            while len(sent) <= number:
                try:
                    sent.append(await nq.send(queue, number))
                except notifyq.ConnectionLost:
                    continue
    with trio.fail_after(20):
        assert [await nq.result(job) for job in sent] == [0, 1, 2, 3]


async def test_an_outcome_of_a_lost_attempt_is_refused(start, nq, connection):
    queue = Queue("q", int, int)
    gate = trio.Event()

    @queue.worker
    async def work(job: Job[int]) -> int:
        await gate.wait()
        return job.attempt

    seen = await start(queue)
    sent = await nq.send(queue, 1)
    await seen.wait(events.JobClaimed)
    # what a rescue does, without waiting for a lease to lapse
    await connection.execute("update notifyq.active set deadline = now() - interval '1 second'")
    await connection.execute("select notifyq.rescue()")
    gate.set()
    await seen.wait(events.LeaseLost)
    with trio.fail_after(5):
        assert await nq.result(sent) == 2


async def test_a_snooze_whose_answer_was_lost_does_not_snooze_the_next_run(start, nq, monkeypatch):
    queue = Queue("q", int, str, retry_limit=0)
    runs = 0
    runs_again, repeated = trio.Event(), trio.Event()
    snooze = Store.snooze

    @queue.worker
    async def work(job: Job[int]) -> str:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise notifyq.Snooze(0)
        runs_again.set()
        await repeated.wait()
        return f"attempt {job.attempt}, run {runs}"

    async def loses_its_answer(*arguments: Any) -> list[int]:
        answer = await snooze(*arguments)
        if answer:
            await runs_again.wait()
            raise notifyq.ConnectionLost("its answer was lost")
        repeated.set()
        return answer

    monkeypatch.setattr(Store, "snooze", loses_its_answer)
    await start(queue)
    with trio.fail_after(10):
        assert await nq.result(await nq.send(queue, 1)) == "attempt 1, run 2"


async def test_a_runtime_that_lost_its_lease_cancels_its_handlers_and_registers_anew(start, nq, connection):
    queue = Queue("q", int, int)
    cancelled = trio.Event()

    @queue.worker
    async def work(job: Job[int]) -> int:
        if job.attempt == 1:
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()
        return job.attempt

    seen = await start(queue, lease=1.0)
    sent = await nq.send(queue, 1)
    await seen.wait(events.JobClaimed)
    await connection.execute("select notifyq.deregister(id) from notifyq.runtime")
    with trio.fail_after(10):
        await cancelled.wait()
        assert await nq.result(sent) == 2

"""A process that stands still, or a transaction that stays open, holds up nobody that has nothing to do with it."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from notifyq import Job, Queue
from notifyq._worker import QueueWorker
from notifyq.events import JobCompleted
from tests.faults.test_cancelled import value
from tests.faults.test_dying import Process

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from notifyq import Client, Connection
    from tests.conftest import Start

APP = """
import notifyq, trio

keyed = notifyq.Queue("keyed", int, policy="singleton")

@keyed.worker(transaction=True)
async def write(job, connection):
    await connection.execute("insert into written values (%s)", [job.data])
    print("started", flush=True)
    await connection.execute("select pg_advisory_xact_lock(4711)")
    return {returned}

runtime = notifyq.Runtime([keyed], lease={{lease}}, grace={{grace}})
"""

AT_THE_GATE = (
    "select count(*) from pg_stat_activity"
    " where datname = current_database() and query like %s and wait_event_type = 'Lock'"
)


async def until_at_the_gate(connection: Connection, function: str) -> None:
    """Wait until a call of this function waits for a lock."""
    with trio.fail_after(10):
        while not await value(connection, AT_THE_GATE, f"%.{function}%"):
            await trio.sleep(0.005)


@pytest.mark.parametrize("returned", ["None", "'x' * 300_000"])
async def test_a_process_that_is_stopped_with_its_completion_on_the_way_holds_nobody_up(
    dsn: str, nq: Client, connection: Connection, other: Connection, tmp_path: Path, returned: str
) -> None:
    """It is stopped while the server waits to complete its job: it can send no COMMIT any longer."""
    await connection.execute("create table written (n int)")
    queue = Queue("keyed", int, policy="singleton")
    await nq.create_queue(queue)
    sent = await nq.send(queue, 1, key="k")
    await connection.execute("select pg_advisory_lock(4711)")
    process = Process(tmp_path, dsn, seconds=0, grace=0, app=APP.format(returned=returned))
    assert await process.line() == "started"
    async with other.transaction():
        await other.execute("select from notifyq.gate for update")
        await connection.execute("select pg_advisory_unlock(4711)")
        await until_at_the_gate(connection, "complete_or_raise")
        process.send_signal(signal.SIGSTOP)
    try:
        with trio.fail_after(5):
            while (await nq.get(sent)).state != "completed":
                await trio.sleep(0.005)
            await other.execute("select from notifyq.gate for update")
        assert await value(connection, "select count(*) from written") == 1
        assert (await nq.get(sent)).attempt == 1
    finally:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
    code, log = await process.end()
    assert code == 0, log
    assert "no longer" not in log


@pytest.mark.parametrize("at_first", [True, False], ids=["rules from the start", "rules given later"])
async def test_a_transaction_that_holds_the_gate_of_a_queue_holds_up_no_queue_without_rules(
    start: Start,
    nq: Client,
    connection: Connection,
    other: Connection,
    monkeypatch: pytest.MonkeyPatch,
    at_first: bool,
) -> None:
    """One process serves both, and has jobs of the first to claim and to complete meanwhile."""
    ruled = Queue("ruled", int, key_limit=1)
    told, is_gated = trio.Event(), QueueWorker.is_gated

    def tell(worker: QueueWorker, gated: bool) -> None:
        is_gated(worker, gated)
        if gated:
            told.set()

    monkeypatch.setattr(QueueWorker, "is_gated", tell)
    plain = Queue("plain", int, int)
    running, go_on = trio.Event(), trio.Event()

    @ruled.worker
    async def wait(job: Job[int]) -> None:
        running.set()
        await go_on.wait()

    @plain.worker
    async def work(job: Job[int]) -> int:
        return job.data

    await nq.create_queue(Queue("ruled", int, key_limit=1 if at_first else None))
    seen = await start(ruled, plain)
    await nq.update_queue(ruled)
    with trio.fail_after(5):
        await told.wait()
    await nq.send(ruled, 1, key="a")
    later = await nq.send(ruled, 2, key="b", delay=3600)
    with trio.fail_after(5):
        await running.wait()
    async with other.transaction():
        await other.execute("select notifyq.cancel(%s::bigint)", [later.id])
        await nq.send(ruled, 3, key="c")
        await until_at_the_gate(connection, "claim(")
        go_on.set()
        await until_at_the_gate(connection, "complete(")
        with trio.fail_after(5):
            for data in range(10):
                assert await nq.result(await nq.send(plain, data)) == data
        assert [event.queue for event in await seen.wait(JobCompleted, 10)] == ["plain"] * 10
    await seen.wait(JobCompleted, 12)


async def test_once_the_queues_without_rules_have_gone_those_with_rules_claim_at_once_again(
    start: Start, nq: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruled, plain = Queue("ruled", int, int, key_limit=1), Queue("plain.*", int, int)
    at_once: list[bool] = []
    forgot, claim, forget = trio.Event(), QueueWorker._claim_at_once, QueueWorker.forget

    def noted(worker: QueueWorker, how_many: int, answered: Any) -> bool:
        at_once.append(claim(worker, how_many, answered))
        return at_once[-1]

    def told(worker: QueueWorker) -> None:
        forget(worker)
        forgot.set()

    monkeypatch.setattr(QueueWorker, "_claim_at_once", noted)
    monkeypatch.setattr(QueueWorker, "forget", told)

    @ruled.worker
    @plain.worker
    async def work(job: Job[int]) -> int:
        return job.data

    await nq.create_queue(Queue("plain.one", int, int))
    seen = await start(ruled, plain)

    async def send_until(enough: Callable[[], bool]) -> None:
        with trio.fail_after(20):
            while not enough():
                sent = len(seen.of(JobCompleted))
                await nq.send(ruled, 1, key="k")
                await seen.wait(JobCompleted, sent + 1)
                await trio.testing.wait_all_tasks_blocked(0.01)

    await send_until(lambda: len(at_once) >= 5)
    assert not any(at_once)
    await nq.delete_queue("plain.one")
    with trio.fail_after(5):
        await forgot.wait()
    await send_until(lambda: any(at_once))  # not each time: the connection that heard of the job may be in use

"""A process that stands still, or a transaction that stays open, holds up nobody that has nothing to do with it."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
import trio

from notifyq import Queue
from tests.faults.test_cancelled import value
from tests.faults.test_dying import Process

if TYPE_CHECKING:
    from pathlib import Path

    from notifyq import Client, Connection

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
    " where datname = current_database() and query like '%%.complete%%' and wait_event_type = 'Lock'"
)


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
        with trio.fail_after(10):
            while not await value(connection, AT_THE_GATE):
                await trio.sleep(0.005)
        process.send_signal(signal.SIGSTOP)
    try:
        await other.execute("set lock_timeout = '3 s'")
        assert await value(other, "select count(*) from (select from notifyq.gate for update) g") == 1
        assert await value(connection, "select count(*) from written") == 1
        record = await nq.get(sent)
        assert (record.state, record.attempt) == ("completed", 1)
    finally:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
    code, log = await process.end()
    assert code == 0, log
    assert "no longer" not in log

"""One job and fifty idle processes: a notification must not have all of them claim."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import pytest
import trio

import notifyq
from notifyq import Queue, _schema
from notifyq._opening import open_connection
from tests.faults.chaos.servers import Server, make_template

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

PROCESSES = 50
JOBS = 5
MOST_CLAIMS = 5
"""Of a job."""

APP = """
import trio
from notifyq import Job, Queue, Runtime

queue: Queue[int, int] = Queue("q", int, int)

@queue.worker(poll_interval=3600)
async def work(job: Job[int]) -> int:
    return job.data

trio.run(Runtime([queue], lease=3, migrate=False).run)
"""

RESTED = """
select count(*) = %s and min(beat_at) > max(started_at) from notifyq.runtime
"""
"""Each has had a beat since the last of them came: it knows how many there are."""


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A server for two connections of each process, which writes down its statements."""
    folder = Path(mkdtemp(prefix="notifyq-crowd-"))
    folder.chmod(0o711)  # the server has a user of its own
    server = Server(make_template(folder), {"max_connections": "200", "fsync": "off", "log_statement": "all"})
    try:
        await server.start()
        yield server
        await server.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def crowd(server: Server, tmp_path: Path) -> Iterator[Callable[[], None]]:
    processes: list[subprocess.Popen[bytes]] = []
    app = tmp_path / "app.py"
    app.write_text(APP)

    def crowd() -> None:
        for _ in range(PROCESSES):
            variables = {**os.environ, "DATABASE_URL": server.dsn}
            processes.append(subprocess.Popen([sys.executable, str(app)], env=variables))

    yield crowd
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


async def test_a_job_costs_fifty_idle_processes_few_claims(server: Server, crowd: Callable[[], None]):
    connection = await open_connection(server.dsn)
    await _schema.apply(connection, "notifyq")
    await connection.close()
    queue = Queue("q", int, int)
    log = server.data.with_name(server.data.name + ".log")

    def claims() -> int:
        return len(re.findall(r'"notifyq"\.claim\(', log.read_text()))

    async with notifyq.connect(server.dsn) as nq:
        await nq.create_queue(queue)
        crowd()
        with trio.fail_after(120):
            while server.query(RESTED, PROCESSES) != [(True,)]:
                await trio.sleep(0.1)
            before = claims()
            for number in range(JOBS):
                assert await nq.result(await nq.send(queue, number)) == number
                # Whoever was woken by it, or put it off, has claimed by the time that all have had their next beat.
                asked = server.query("select clock_timestamp()")[0][0]
                while server.query("select min(beat_at) > %s from notifyq.runtime", asked) != [(True,)]:
                    await trio.sleep(0.1)
    assert JOBS <= claims() - before <= JOBS * MOST_CLAIMS

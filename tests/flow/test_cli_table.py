"""How the commands print for people: in a terminal of 80 columns, in a narrower one, and into a pipe."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import trio

from notifyq import Job, Queue
from notifyq.testing import run_waiting

if TYPE_CHECKING:
    from collections.abc import Mapping

REGISTER = (
    "select notifyq.register(gen_random_uuid(), array['reminders', 'emails/outgoing'], interval '1 hour', 1234567,"
    " 'a-host-with-a-long-name.example.org', '0.1.0')"
)


@pytest.fixture
def notifyq(dsn):
    """Run a command with so many columns; returns its lines."""

    async def run(*arguments: str, columns: int | None = 80) -> list[str]:
        environment: Mapping[str, str] = {**os.environ, "DATABASE_URL": dsn}
        environment = {name: value for name, value in environment.items() if name != "COLUMNS"}
        if columns is not None:
            environment["COLUMNS"] = str(columns)
        done = await trio.to_thread.run_sync(
            lambda: subprocess.run(
                [sys.executable, "-m", "notifyq", *arguments],
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            )
        )
        return [line.rstrip() for line in done.stdout.splitlines()]

    return run


@pytest.fixture
async def jobs(nq, connection):
    """One that is ready, with long data, and one that is scheduled; and a runtime that serves their queues."""
    reminders, emails = Queue("reminders"), Queue("emails/outgoing")
    for queue in (reminders, emails):
        await nq.create_queue(queue)
    await nq.send(reminders, {"message": "x" * 300})
    await nq.send(emails, {"to": "someone@example.org"}, delay=86_400)
    await connection.execute(REGISTER)


async def test_tables_fit_80_columns_and_say_nothing_that_no_row_has(notifyq, jobs):
    queues = await notifyq("queues")
    assert queues[1].split() == ["queue", "ready", "scheduled", "head_age", "next_due"]
    listed = await notifyq("jobs")
    assert listed[1].split() == ["id", "queue", "state", "data", "sent_at", "due_at"]
    [reminder] = [line for line in listed if "reminders" in line]
    assert '{"message": "xxx' in reminder
    assert "x…" in reminder
    runtimes = await notifyq("runtimes")
    assert runtimes[1].split() == ["id", "hostname", "pid", "version", "queues", "beat_at", "state"]
    assert "1234567" in runtimes[3]
    assert max(map(len, queues + listed + runtimes)) <= 80


async def test_where_no_table_fits_each_row_is_a_block(notifyq, jobs):
    lines = await notifyq("jobs", columns=40)
    assert [line for line in lines if line.startswith("queue ")] == ["queue     emails/outgoing", "queue     reminders"]
    assert "".join(lines).count("x") >= 300
    assert max(map(len, lines)) <= 40


async def test_into_a_pipe_nothing_is_cut(notifyq, jobs):
    assert sum("x" * 300 in line for line in await notifyq("jobs", columns=None)) == 1


async def test_a_failed_job_is_shown_with_its_traceback(notifyq, nq, dsn):
    queue = Queue("q", int, retry_limit=0)

    @queue.worker
    async def work(_: Job[int]) -> None:
        raise ValueError("no such thing")

    await nq.create_queue(queue)
    sent = await nq.send(queue, 1)
    await run_waiting([queue], dsn=dsn)
    lines = await notifyq("show", str(sent.id))
    assert "error        ValueError: no such thing" in lines
    assert any(line.endswith('raise ValueError("no such thing")') for line in lines)

"""The commands about queues, as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import trio

from notifyq import Queue


@pytest.fixture
def command(dsn):
    """Run ``notifyq queues …``; returns its exit code, its output and its errors."""

    async def run(*arguments: str) -> tuple[int, str, str]:
        done = await trio.to_thread.run_sync(
            lambda: subprocess.run(
                [sys.executable, "-m", "notifyq", "queues", *arguments],
                env={**os.environ, "DATABASE_URL": dsn, "COLUMNS": "200"},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        )
        return done.returncode, done.stdout.strip(), done.stderr.strip()

    return run


async def test_a_queue_is_paused_resumed_and_changed(command, nq):
    await nq.create_queue(Queue("q", dead_letter=Queue("dead")))
    assert await command("pause", "q") == (0, "q is paused", "")
    assert await command("pause", "q") == (0, "q was paused already", "")
    code, out, _ = await command("--json")
    assert (code, {row["queue"]: row["paused"] for row in json.loads(out)}) == (0, {"q": True, "dead": False})
    assert "paused" in (await command())[1]
    code, out, _ = await command("resume", "q", "--json")
    assert (code, json.loads(out)) == (0, {"queue": "q", "paused": False, "changed": True})
    assert await command("resume", "q") == (0, "q was not paused", "")

    code, out, _ = await command("set", "q", "retry_limit=9", "timeout=60.5", "dead_letter=null", "bell=never")
    assert (code, out) == (0, "q: retry_limit=9, timeout=60.5, dead_letter=null, bell=never")
    async with nq.connection() as connection:
        cursor = await connection.execute(
            "select retry_limit, extract(epoch from timeout)::float8, dead_letter, bell, retry_delay = '1 second'"
            " from notifyq.queue where name = 'q'"
        )
        assert await cursor.fetchall() == [(9, 60.5, None, "never", True)]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("pause", "nowhere"), 1, "there is no queue named 'nowhere'"),
        (("resume", "nowhere"), 1, "there is no queue named 'nowhere'"),
        (("pause", "tenant.*"), 1, "there is no queue named 'tenant.*'"),
        (("set", "nowhere", "retry_limit=1"), 1, "there is no queue named 'nowhere'"),
        (("set", "q", "retry_limit"), 2, "'retry_limit' is not OPTION=VALUE"),
        (("set", "q", "retry_limit=many"), 1, "retry_limit must be an int from 0 to 1000, not 'many'"),
        (("set", "q", "retries=1"), 1, "queue 'q' has no option 'retries'"),
        (("set", "tenant.*", "retry_limit=1"), 1, "is a pattern"),
        (("set", "q"), 2, "Missing argument"),
        (("pause",), 2, "Missing argument"),
        (("--json", "pause", "q"), 2, "give --json after pause"),
        (("set", "q", "schedules=[]"), 2, "use notifyq schedules add"),
    ],
)
async def test_what_cannot_be_done_is_said_in_a_line(command, arguments, code, message):
    found, out, errors = await command(*arguments)
    assert (found, out) == (code, "")
    assert message in errors
    assert "Traceback" not in errors

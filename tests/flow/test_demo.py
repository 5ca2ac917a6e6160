"""``notifyq demo``, as a newcomer starts it: on a server, in a terminal of 80 columns."""

from __future__ import annotations

import os
import subprocess
import sys

import trio

DATABASES = (
    b"select datname from pg_database where datname like 'notifyq%' and datname <> current_database() order by 1"
)


async def databases(connection):
    return await (await connection.execute(DATABASES)).fetchall()


async def test_the_demo_shows_what_becomes_of_jobs_and_leaves_nothing(server, connection):
    before = await databases(connection)
    done = await trio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-m", "notifyq", "demo"],
            env={**os.environ, "DATABASE_URL": server, "COLUMNS": "80"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
    shown = done.stdout.split("A short benchmark")[0]
    lines = [line.rstrip() for line in shown.splitlines()]
    assert max(map(len, lines)) <= 80
    assert sum(" completed " in line for line in lines) == 13
    assert [line.split()[-2:] for line in lines if " tea 1 " in line] == [["tea", "1"]]  # its output is not cut up
    assert "dead" in shown
    assert "letter" in shown
    assert "14/14" in shown
    assert "ended with exit code 0" in shown
    assert "p50_over_limit" in done.stdout
    assert await databases(connection) == before

"""python -m pytest, with DATABASE_URL set to a server on which databases may be created, or notifyq[embedded] installed."""

import os
from collections.abc import Iterator

import pytest
import trio
from reminders.functions import Echo, Reminder
from reminders.wiring import missed, reminders

import notifyq
from notifyq import testing


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    if url := os.environ.get("DATABASE_URL"):
        yield url
    else:
        with testing.embedded_server("fsync=off") as dsn:
            yield dsn


def test_a_reminder_is_echoed_and_a_failing_one_becomes_a_dead_letter(server: str) -> None:
    async def main() -> None:
        async with testing.fresh_database(server) as dsn, notifyq.connect(dsn) as nq:
            await nq.create_queue(reminders)
            good = await nq.send(reminders, Reminder("tea"))
            await nq.send(reminders, Reminder("nobody home", fail=True), retry_limit=0)

            ended = await testing.run_waiting([reminders], dsn=dsn)

            assert ended == {"completed": 1, "failed": 1}
            assert await nq.result(good) == Echo("echo: tea")
            assert await testing.sent(nq, missed) == [Reminder("nobody home", fail=True)]

    trio.run(main)

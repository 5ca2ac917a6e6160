"""One server for the session, one database with the schema as template, one copy of it for each test."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio

import notifyq
from notifyq import _schema, testing
from notifyq._connection import TrioConnection, open_connection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The DSN of a server: ``NOTIFYQ_TEST_DSN``, or an embedded one."""
    given = os.environ.get("NOTIFYQ_TEST_DSN")
    if given:
        yield given
    else:
        with testing.embedded_server("fsync=off") as dsn:
            yield dsn


@pytest.fixture(scope="session")
def template(server: str) -> Iterator[str]:
    """The name of a database in which the schema is installed."""
    release = trio.Event()

    async def main(names: list[str]) -> None:
        async with testing.fresh_database(server) as dsn:
            connection = await open_connection(dsn)
            await _schema.apply(connection, "notifyq")
            names.append(connection.info.dbname)
            await connection.close()
            portal.append(trio.lowlevel.current_trio_token())
            made.release()
            await release.wait()

    import threading

    names: list[str] = []
    portal: list[trio.lowlevel.TrioToken] = []
    made = threading.Semaphore(0)
    thread = threading.Thread(target=trio.run, args=(main, names))
    thread.start()
    assert made.acquire(timeout=30)
    yield names[0]
    trio.from_thread.run_sync(release.set, trio_token=portal[0])
    thread.join()


@pytest.fixture
async def dsn(server: str, template: str) -> AsyncIterator[str]:
    """A database of this test's own, the schema installed."""
    async with testing.fresh_database(server, template=template) as own:
        yield own


@pytest.fixture
async def empty_dsn(server: str) -> AsyncIterator[str]:
    """A database of this test's own, with nothing in it."""
    async with testing.fresh_database(server) as own:
        yield own


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[TrioConnection]:
    """A connection to this test's database."""
    connection = await open_connection(dsn)
    yield connection
    await connection.close()


@pytest.fixture
async def nq(dsn: str) -> AsyncIterator[notifyq.Client]:
    """A client of this test's database."""
    async with notifyq.connect(dsn) as client:
        yield client

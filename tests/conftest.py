"""One server for the session, one database with the schema as template, one copy of it for each test."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
import pytest
import trio

import notifyq
from notifyq import _schema, events, testing
from notifyq._opening import open_connection
from notifyq._store import Store

if TYPE_CHECKING:
    from notifyq._connection import TrioConnection

E = TypeVar("E", bound=events.Event)


class Seen:
    """Records a runtime's events and waits for them."""

    def __init__(self, runtime: notifyq.Runtime) -> None:
        self.events: list[events.Event] = []
        self._lot = trio.lowlevel.ParkingLot()
        self.runtime = runtime
        runtime.subscribe(self._add)

    def _add(self, event: events.Event) -> None:
        self.events.append(event)
        self._lot.unpark_all()

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    async def wait(self, kind: type[E], count: int = 1, seconds: float = 10) -> list[E]:
        """Wait until so many events of a kind were seen."""
        with trio.fail_after(seconds):
            while len(self.of(kind)) < count:
                await self._lot.park()
        return self.of(kind)


@pytest.fixture
def claim_ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have runtimes claim so many jobs more than they have slots for, as when their slots are known to be free soon."""

    def claim_ahead(more: int) -> None:
        monkeypatch.setattr(
            "notifyq._hands.demand", lambda slots, taken, shelved, _: max(0, slots + more - taken - shelved)
        )

    return claim_ahead


Start = Callable[..., Awaitable[Seen]]


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
    name = f"notifyq_template_{os.getpid()}"

    async def install() -> None:
        connection = await open_connection(testing.with_database(server, name))
        await _schema.apply(connection, "notifyq")
        await connection.close()

    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"create database {name}".encode())
        trio.run(install)
        yield name
        connection.execute(f"drop database {name}".encode())


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
async def other(dsn: str) -> AsyncIterator[TrioConnection]:
    """A second connection to this test's database."""
    connection = await open_connection(dsn)
    yield connection
    await connection.close()


@pytest.fixture
def ask(connection: TrioConnection) -> Callable[..., Awaitable[list[Any]]]:
    """Run statements on this test's connection, and get the rows of the last one."""

    async def ask(statement: str, *parameters: object) -> list[Any]:
        cursor = await connection.execute(statement.encode(), parameters or None)
        while cursor.nextset():
            pass
        return await cursor.fetchall() if cursor.description else []

    return ask


@pytest.fixture
def store() -> Store:
    return Store("notifyq")


@pytest.fixture
async def nq(dsn: str) -> AsyncIterator[notifyq.Client]:
    """A client of this test's database."""
    async with notifyq.connect(dsn) as client:
        yield client


@pytest.fixture
async def start(dsn: str) -> AsyncIterator[Start]:
    """Start a runtime of some queues; what it does is recorded. It is stopped without grace when the test ends."""
    async with trio.open_nursery() as nursery:

        async def start(*queues: notifyq.Queue[Any, Any], **options: Any) -> Seen:
            runtime = notifyq.Runtime(queues, dsn=dsn, **options)
            seen = Seen(runtime)
            await nursery.start(runtime.run)
            return seen

        yield start
        nursery.cancel_scope.cancel()

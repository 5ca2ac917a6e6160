"""The workload of nothing to do: what a runtime costs that waits."""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from ._databases import own_database
from ._parts import Found, Role, Settings, Tell, part_of, telling_sleep
from ._sql import AUTOVACUUM_BACK, AUTOVACUUM_OFF, CONNECTIONS, EXTENSION, RELOAD, STATEMENTS, TRANSACTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import LiteralString

__all__ = ["idle"]

SETTLE = 30.0
"""Seconds, or half of what is measured: the first round of maintenance is over, and counted, which takes up to 10 s."""


def idle(settings: Settings, tell: Tell) -> Found:
    """Statements a second, connections and processor time of a runtime whose queues stay empty.

    Statements are counted by ``pg_stat_statements`` if the server has loaded it, otherwise as transactions of the runtime's
    database, since a runtime has no others. Those of autovacuum count, too: on a server of our own it is off meanwhile.
    The limit: a session in plain psycopg, in a database of its own at the same time, that listens.
    """
    settle = min(SETTLE, settings.seconds / 2)
    share = settle / (settle + settings.seconds)
    with ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(settings.dsn, autocommit=True))
        dsn = stack.enter_context(own_database(settings.dsn))
        bare_dsn = stack.enter_context(own_database(settings.dsn))
        database, bare_database = (conninfo_to_dict(one)["dbname"] for one in (dsn, bare_dsn))
        if settings.own_server:
            stack.enter_context(_without_autovacuum(connection))
        runtime = stack.enter_context(Role("idle", dsn, settings.queues))
        bare = stack.enter_context(Role("bare-consume", bare_dsn, 1))
        stack.callback(bare.kill)
        counter = STATEMENTS if _has_statements(connection, database) else TRANSACTIONS
        telling_sleep(settle, part_of(tell, 0, share))
        runtime.go()
        cpu, started = runtime.hear()["cpu"], time.perf_counter()
        before, bare_before = (_count(connection, counter, one) for one in (database, bare_database))
        telling_sleep(settings.seconds, part_of(tell, share, 1))
        seconds = time.perf_counter() - started
        statements = _count(connection, counter, database) - before
        bare_statements = _count(connection, counter, bare_database) - bare_before
        connections, bare_connections = (_count(connection, CONNECTIONS, one) for one in (database, bare_database))
        runtime.go()
        cpu = runtime.hear()["cpu"] - cpu
    return {
        "statements_per_second": statements / seconds,
        "connections": connections,
        "cpu_fraction": cpu / seconds,
        "limit_statements_per_second": bare_statements / seconds,
        "limit_connections": bare_connections,
        "queues": settings.queues,
        "counted": "statements" if counter == STATEMENTS else "transactions",
    }


def _count(connection: psycopg.Connection[Any], query: LiteralString, database: Any) -> int:
    row = connection.execute(query, (database,)).fetchone()
    assert row is not None
    return int(row[0])


def _has_statements(connection: psycopg.Connection[Any], database: Any) -> bool:
    try:
        connection.execute(EXTENSION)
        _count(connection, STATEMENTS, database)
    except psycopg.Error:
        return False
    return True


@contextmanager
def _without_autovacuum(connection: psycopg.Connection[Any]) -> Iterator[None]:
    connection.execute(AUTOVACUUM_OFF)
    connection.execute(RELOAD)
    try:
        yield
    finally:
        connection.execute(AUTOVACUUM_BACK)
        connection.execute(RELOAD)

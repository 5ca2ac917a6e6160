"""The senders, as a process: one loop over many connections, each a statement at a time. Started by ``_roles``."""

from __future__ import annotations

import select
import sys
import time
from typing import TYPE_CHECKING

import psycopg
from psycopg.pq import ExecStatus

from ._say import say
from ._sql import BARE_SEND_ONE, SEND_ONE

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

__all__ = ["STATEMENTS", "send_singles"]

STATEMENTS = {"default": SEND_ONE, "no_notify": SEND_ONE, "always": SEND_ONE, "limit": BARE_SEND_ONE}
"""By kind of turn: what is sent. The queue is ``bench.send_<kind>``; the limit's table has none."""


def send_singles(dsn: str, senders: int) -> None:
    """At each go of ``<kind> <seconds>``, send one row a transaction over each of so many connections at once.

    It drives libpq by hand: a connection that has its answer gets its next statement, prepared, at once. That costs this
    process some ten microseconds a send, a fifth of what a cursor does, so that it leaves the processor to the server.
    """
    connections = [psycopg.connect(dsn, autocommit=True) for _ in range(senders)]
    by_fileno = {connection.fileno(): connection.pgconn for connection in connections}
    poll = select.poll()
    for fileno, pgconn in by_fileno.items():
        for kind, statement in STATEMENTS.items():
            _check(pgconn.prepare(kind.encode(), statement.replace("queue", f"bench.send_{kind}").encode()))
        poll.register(fileno, select.POLLIN)
    say(ready=True)
    for line in sys.stdin:
        kind, seconds = line.split()
        name = kind.encode()
        cpu, started = time.process_time(), time.perf_counter()
        until = started + float(seconds)
        for pgconn in by_fileno.values():
            pgconn.send_query_prepared(name, None)
        sent, waiting = 0, senders
        while waiting:
            for fileno, _ in poll.poll():
                pgconn = by_fileno[fileno]
                pgconn.consume_input()
                if pgconn.is_busy():
                    continue
                while (result := pgconn.get_result()) is not None:
                    _check(result)
                sent += 1
                if time.perf_counter() < until:
                    pgconn.send_query_prepared(name, None)
                else:
                    waiting -= 1
        say(sent=sent, seconds=time.perf_counter() - started, cpu=time.process_time() - cpu)
    for connection in connections:
        connection.close()


def _check(result: PGresult) -> None:
    if result.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
        raise psycopg.OperationalError(result.error_message.decode())

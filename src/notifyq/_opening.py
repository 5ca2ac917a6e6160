"""Opens connections: psycopg's blocking code does it in a thread, which knows about hosts, failover and encryption."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, LiteralString, TypeVar

import psycopg
import trio

from ._connection import TrioConnection

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

__all__ = ["SESSION", "open_connection", "parameters", "run_abandonable"]

DEFAULTS = {
    "connect_timeout": 10,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
"""libpq parameters (seconds; the last milliseconds) that a DSN may set otherwise: a silent peer is noticed in about 11 s."""


SESSION: LiteralString = (
    "set default_transaction_isolation = 'read committed';"
    " set tcp_keepalives_idle = 5; set tcp_keepalives_interval = 3; set tcp_keepalives_count = 3;"
    " set tcp_user_timeout = 10000"
)
"""claim() is exact in READ COMMITTED only, and a role or database may default to another level. The server notices within
about 15 s that this side is gone: a ghost would keep its locks, and its transaction. Keepalives tell of a session that
waits; none is sent where an answer, or a notification, was never acknowledged, and that took a quarter of an hour."""


def parameters(dsn: str, **given: Any) -> dict[str, Any]:
    """How every connection is opened. ``fetch()`` writes its parameters in UTF-8, whatever the database's encoding is."""
    chosen = psycopg.conninfo.conninfo_to_dict(dsn)
    defaults = {name: value for name, value in DEFAULTS.items() if name not in chosen}
    return {"autocommit": True, "client_encoding": "utf8", **defaults, **given}


async def run_abandonable(function: Callable[[], T], undo: Callable[[T], object]) -> T:
    """Run a blocking function in a thread. Cancelled: leave at once; what it returns later goes to ``undo``."""
    guard = threading.Lock()
    results: list[T] = []
    abandoned = False

    def run() -> None:
        result = function()
        with guard:
            if not abandoned:
                results.append(result)
                return
        undo(result)

    try:
        await trio.to_thread.run_sync(run, abandon_on_cancel=True)
    except trio.Cancelled:
        with guard:
            abandoned = True
        if results:
            undo(results.pop())
        raise
    return results[0]


async def open_connection(dsn: str, **given: Any) -> TrioConnection:
    """Open a connection in autocommit. Raises ``psycopg.OperationalError``; cancelled, it closes what it opened."""

    def connect() -> psycopg.Connection[Any]:
        opened = psycopg.connect(dsn, **parameters(dsn, **given))
        try:
            opened.execute(SESSION)
        except BaseException:
            opened.close()
            raise
        return opened

    return TrioConnection(await run_abandonable(connect, lambda opened: opened.close()))

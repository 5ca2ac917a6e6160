"""Connections on loan: psycopg's pool opens, checks and replaces them, in its own threads.

Fetching one from another thread costs as much as a query, so connections given back wait here, on the trio
side, for the next borrower, and go back to psycopg's pool only when unused for ``IDLE_RETURN`` seconds.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import attrs
import psycopg_pool
import trio

from ._connection import PARAMETERS, TrioConnection, run_abandonable
from ._errors import ClientClosed, ConnectionLost
from ._lock import QuickLock

if TYPE_CHECKING:
    import psycopg

__all__ = ["Pool", "PoolStatistics"]

IDLE_RETURN = 30.0
"""Seconds unused after which psycopg's pool gets a connection back, to check it, shrink or replace it."""


@attrs.frozen
class PoolStatistics:
    """What a pool does right now."""

    size: int
    """Most connections open at once."""
    on_loan: int
    """Connections in use."""
    waiting: int
    """Tasks that wait for one."""


PREPARE_AFTER = 2
"""Executions of a statement after which it is prepared: its calls then skip parsing and planning."""


def _prepare(connection: psycopg.Connection[Any]) -> None:
    # claim() is exact in READ COMMITTED only; a role or database may default to another level.
    connection.execute("set default_transaction_isolation = 'read committed'")
    # A pooler in between gives its own process number, and may give each transaction to another server process,
    # which knows nothing of what was prepared.
    answer = connection.execute("select pg_backend_pid()").fetchone()
    connection.prepare_threshold = PREPARE_AFTER if answer == (connection.info.backend_pid,) else None


class Pool:
    """Up to ``size`` connections, opened when first needed, each for one borrower at a time."""

    def __init__(
        self, dsn: str, *, size: int, connect_timeout: float, parameters: dict[str, Any] | None = None
    ) -> None:
        """Prepare a pool; nothing is opened yet. ``connect_timeout``: seconds a borrower waits for a connection."""
        self._opener = psycopg_pool.ConnectionPool(
            dsn,
            kwargs={**PARAMETERS, "prepare_threshold": None, **(parameters or {})},
            min_size=0,
            max_size=size,
            max_idle=IDLE_RETURN,
            timeout=connect_timeout,
            configure=_prepare,
            open=False,
            name="notifyq",
        )
        self._size = size
        self._permits = QuickLock(size)
        self._resting: list[tuple[float, psycopg.Connection[Any]]] = []
        self._views: WeakKeyDictionary[psycopg.Connection[Any], TrioConnection] = WeakKeyDictionary()
        self._closed = True

    async def __aenter__(self) -> Pool:
        self._opener.open()
        self._closed = False
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        for _since, connection in self._resting:
            self._opener.putconn(connection)
        self._resting.clear()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._opener.close)

    def connection(self) -> AbstractAsyncContextManager[TrioConnection]:
        """Lend a connection for an ``async with`` block, in autocommit and READ COMMITTED.

        What the borrower leaves open is rolled back; a connection that broke, or whose query could not be ended, is
        closed and replaced. Entering raises ``ConnectionLost`` when none can be had in time, and ``ClientClosed``.
        """
        return _Loan(self)

    async def _lend(self) -> tuple[psycopg.Connection[Any], TrioConnection]:
        opened = await self._borrow()
        view = self._views.get(opened)
        if view is None:
            view = self._views[opened] = TrioConnection(opened)
        return opened, view

    async def _take_back(self, opened: psycopg.Connection[Any], view: TrioConnection) -> None:
        if await view.settle() and not self._closed:
            self._resting.append((trio.current_time(), opened))
        else:
            self._opener.putconn(opened)
        self._return_unused()

    async def _borrow(self) -> psycopg.Connection[Any]:
        while self._resting:
            _since, opened = self._resting.pop()
            if not opened.closed:
                return opened
            self._opener.putconn(opened)
        try:
            return await run_abandonable(self._opener.getconn, self._opener.putconn)
        except psycopg_pool.PoolTimeout as error:
            raise ConnectionLost(f"no connection to the server in {self._opener.timeout:g} s") from error

    def _return_unused(self) -> None:
        while self._resting and self._resting[0][0] < trio.current_time() - IDLE_RETURN:
            self._opener.putconn(self._resting.pop(0)[1])

    def statistics(self) -> PoolStatistics:
        """Say how many connections are in use."""
        return PoolStatistics(
            size=self._size,
            on_loan=self._permits.held,
            waiting=self._permits.waiting,
        )


class _Loan(AbstractAsyncContextManager[TrioConnection]):
    """A class, not a generator: it is entered twice for every job of an idle runtime."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def __aenter__(self) -> TrioConnection:
        if self._pool._closed:
            raise ClientClosed("this client is closed")
        await self._pool._permits.__aenter__()
        try:
            self._opened, self._view = await self._pool._lend()
        except BaseException:
            await self._pool._permits.__aexit__()
            raise
        return self._view

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._pool._take_back(self._opened, self._view)
        finally:
            await self._pool._permits.__aexit__()

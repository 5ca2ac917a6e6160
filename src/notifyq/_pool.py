"""Connections on loan: psycopg's pool opens, checks and replaces them, in its own threads.

Fetching one from another thread costs as much as a query, so connections given back wait here, on the trio
side, for the next borrower, and go back to psycopg's pool only when unused for ``IDLE_RETURN`` seconds.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

import attrs
import psycopg
import psycopg_pool
import trio

from ._connection import TrioConnection
from ._errors import ClientClosed, ConnectionLost
from ._lock import QuickLock
from ._opening import SESSION, parameters, run_abandonable

__all__ = ["Pool", "PoolStatistics"]

IDLE_RETURN = 30.0
"""Seconds unused after which psycopg's pool gets a connection back, to check it, shrink or replace it."""


RECONNECT_TIMEOUT = 5.0
"""Seconds psycopg's pool tries to reach the server for one borrower, its pauses doubling: after that it begins anew."""


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
    connection.execute(SESSION)
    # A pooler in between gives its own process number, and may give each transaction to another server process,
    # which knows nothing of what was prepared.
    answer = connection.execute("select pg_backend_pid()").fetchone()
    connection.prepare_threshold = PREPARE_AFTER if answer == (connection.info.backend_pid,) else None


class Pool:
    """Up to ``size`` connections, opened when first needed, each for one borrower at a time."""

    def __init__(self, dsn: str, *, size: int, connect_timeout: float) -> None:
        """Prepare a pool; nothing is opened yet. ``connect_timeout``: seconds a borrower waits for a connection."""
        self._opener: psycopg_pool.ConnectionPool[psycopg.Connection[Any]] = psycopg_pool.ConnectionPool(
            dsn,
            kwargs=parameters(dsn, prepare_threshold=None),
            connection_class=_Opened,
            min_size=0,
            max_size=size,
            max_idle=IDLE_RETURN,
            timeout=connect_timeout,
            reconnect_timeout=RECONNECT_TIMEOUT,
            configure=_prepare,
            open=False,
            name="notifyq",
        )
        self._size = size
        self._permits = QuickLock(size)
        self._connect_timeout = connect_timeout
        self._resting: list[tuple[float, TrioConnection]] = []
        self._closed = True

    async def __aenter__(self) -> Pool:
        self._opener.open()
        self._closed = False
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        for _since, connection in self._resting:
            self._opener.putconn(connection.opened)
        self._resting.clear()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._opener.close)

    def connection(self) -> AbstractAsyncContextManager[TrioConnection]:
        """Lend a connection for an ``async with`` block, in autocommit and READ COMMITTED.

        What the borrower leaves open is rolled back; a connection that broke, or whose query could not be ended, is
        closed and replaced. Entering raises ``ConnectionLost`` when none can be had in time, and ``ClientClosed``.
        """
        return _Loan(self)

    async def _lend(self) -> TrioConnection:
        """Raises ``ConnectionLost`` and ``ClientClosed``; what it returns must come back by ``_take_back``."""
        if self._closed:
            raise ClientClosed("this client is closed")
        if not self._permits.acquire_nowait():
            with trio.move_on_after(self._connect_timeout) as patience:
                await self._permits.__aenter__()
            if patience.cancelled_caught:
                raise ConnectionLost(f"all {self._size} connections were in use for {self._connect_timeout:g} s")
        try:
            return self._wake() or await self._open()
        except BaseException:
            self._permits.release()
            raise

    async def _take_back(self, connection: TrioConnection) -> None:
        try:
            fit = connection.clean or await connection.settle()
            if fit and not self._closed:
                self._resting.append((trio.current_time(), connection))
            else:
                self._opener.putconn(connection.opened)
            if not fit:
                self.distrust()
            self._return_unused()
        finally:
            self._permits.release()

    def distrust(self) -> None:
        """Close what is at rest: a connection broke, or is silent, and these are of the same time."""
        while self._resting:
            _since, connection = self._resting.pop()
            connection.opened.close()
            self._opener.putconn(connection.opened)

    def _wake(self) -> TrioConnection | None:
        """One that is at rest; those that broke meanwhile go."""
        while self._resting:
            _since, connection = self._resting.pop()
            if not connection.closed:
                return connection
            self._opener.putconn(connection.opened)
        return None

    async def _open(self) -> TrioConnection:
        try:
            opened = await run_abandonable(self._opener.getconn, self._opener.putconn)
        except psycopg_pool.PoolClosed as error:  # while this waited for its turn
            raise ClientClosed("this client is closed") from error
        except psycopg_pool.PoolTimeout as error:
            raise ConnectionLost(f"no connection to the server in {self._opener.timeout:g} s") from error
        assert isinstance(opened, _Opened)
        if opened.view is None:
            opened.view = TrioConnection(opened)
        return opened.view

    def _return_unused(self) -> None:
        while self._resting and self._resting[0][0] < trio.current_time() - IDLE_RETURN:
            self._opener.putconn(self._resting.pop(0)[1].opened)

    def statistics(self) -> PoolStatistics:
        """Say how many connections are in use."""
        return PoolStatistics(
            size=self._size,
            on_loan=self._permits.held,
            waiting=self._permits.waiting,
        )


class _Opened(psycopg.Connection[Any]):
    """A connection of psycopg's pool, with the view of it that trio drives."""

    view: TrioConnection | None = None


class _Loan(AbstractAsyncContextManager[TrioConnection]):
    """A class, not a generator: it is entered twice for every job of an idle runtime."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def __aenter__(self) -> TrioConnection:
        self._connection = await self._pool._lend()
        return self._connection

    async def __aexit__(self, *_: object) -> None:
        await self._pool._take_back(self._connection)

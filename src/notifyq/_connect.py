"""From a DSN to an open client: checks it, reaches the server, brings the schema up to date."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, Any

import psycopg
import trio

from . import _schema
from ._client import Client
from ._errors import ConnectionLost, InvalidOption
from ._listener import Listener
from ._opening import open_connection
from ._pool import Pool
from ._sql import check_schema_name, flag, seconds, translated, whole
from ._store import Store
from .events import Events

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from datetime import timedelta

__all__ = ["connect", "prepare", "resolve_dsn", "resolve_listen_dsn"]

PATIENCE_PAUSE = 0.5
"""Seconds between tries to reach a server that is starting."""


def resolve_dsn(dsn: str | None) -> str:
    """The DSN given, or ``DATABASE_URL``. Raises ``InvalidOption``, which never quotes it, if there is none or it is bad."""
    found = dsn if dsn is not None else os.environ.get("DATABASE_URL")
    if found is not None and not isinstance(found, str):
        raise InvalidOption(f"dsn must be text, not a {type(found).__name__}")
    if not found:
        raise InvalidOption("no database: give dsn=..., or set DATABASE_URL=postgresql://user@host:5432/database")
    try:
        fits = _is_whole(found, psycopg.conninfo.conninfo_to_dict(found))
    except (psycopg.ProgrammingError, UnicodeEncodeError):
        fits = False  # libpq's own words quote parts of it, passwords too
    if not fits:
        raise InvalidOption(
            "the DSN is not one: use postgresql://user:password@host:5432/database (with %40 for an @ in a password,"
            " and %2F for a /), or key=value pairs"
        )
    return found


def resolve_listen_dsn(listen_dsn: str | None, dsn: str) -> str:
    """The DSN for the listening connection: the one given, or ``dsn``. Raises ``InvalidOption`` if it is bad."""
    if listen_dsn is None:
        return dsn
    try:
        return resolve_dsn(listen_dsn)
    except InvalidOption as error:
        raise InvalidOption(f"listen_dsn: {error}") from None


def _is_whole(dsn: str, parts: Mapping[str, Any]) -> bool:
    """Whether a password ends where it should. An @ or a / in it that is not escaped puts the rest of it, or its
    beginning, into what errors quote: the host, the port, the database.
    """
    ports = str(parts.get("port", "")).split(",")
    path = re.sub(r"^postgres(ql)?://[^/?]*|\?.*", "", dsn) if "://" in dsn else ""
    return "@" not in f"{parts.get('host', '')}{path}" and all(not port or port.isdecimal() for port in ports)


async def prepare(dsn: str, schema: str, *, migrate: bool, patience: float) -> None:
    """Reach the server within ``patience`` seconds and bring the schema up to date, or check that it is.

    Raises ``ConnectionLost``, ``SchemaMismatch`` and ``MissingPrivilege``.
    """
    deadline = trio.current_time() + patience
    while True:
        try:
            with translated():
                connection = await open_connection(dsn, connect_timeout=max(2, int(patience)))
            break
        except ConnectionLost as error:
            if _is_final(error):
                raise ConnectionLost(f"the server refused the connection: {error.__cause__}") from None
            if trio.current_time() + PATIENCE_PAUSE > deadline:
                raise ConnectionLost(f"cannot reach the server within {patience:g} s: {error.__cause__}") from None
            await trio.sleep(PATIENCE_PAUSE)
    try:
        if migrate:
            await _schema.apply(connection, schema)
        else:
            await _schema.check(connection, schema)
    finally:
        await connection.close()


def _is_final(error: ConnectionLost) -> bool:
    """Whether the server answered with a refusal that waiting does not change: a bad password, no such database.

    libpq gives no SQLSTATE for these. Unknown words count as passing.
    """
    text = str(error.__cause__)
    return any(words in text for words in ("authentication failed", "does not exist", "no pg_hba.conf entry"))


def connect(
    dsn: str | None = None,
    *,
    listen_dsn: str | None = None,
    schema: str = "notifyq",
    migrate: bool = True,
    pool_size: int = 10,
    connect_timeout: float | timedelta = 10.0,
) -> contextlib.AbstractAsyncContextManager[Client]:
    """Open a client for the block: ``async with connect() as client``.

    Args:
        dsn: a PostgreSQL URI or key=value string (default: the environment's ``DATABASE_URL``).
        listen_dsn: the same database without a pooler in between, to wait for results (default: ``dsn``).
        schema: the schema that holds this installation.
        migrate: install or upgrade it if need be; False for a role that may not, which is told if it does not fit.
        pool_size: most connections at once, opened when needed.
        connect_timeout: seconds to reach the server at first, and later to wait for a free connection.

    Raises:
        InvalidOption: no DSN, or a bad one; a bad schema name; a number out of range.
        ConnectionLost: the server could not be reached in time, or refused the connection.
        SchemaMismatch: the schema is newer, or ``migrate=False`` and it is missing or older.
        MissingPrivilege: the role may not install it.
        RuntimeError: it is open already, or this is not trio. Once closed it can be opened again, with a client of its own.
    """
    return _Opening(lambda: _opened(dsn, listen_dsn, schema, migrate, pool_size, connect_timeout))


class _Opening(contextlib.AbstractAsyncContextManager["Client"]):
    """Opens a client each time that it is entered, one at a time."""

    def __init__(self, opened: Callable[[], contextlib.AbstractAsyncContextManager[Client]]) -> None:
        self._opened = opened
        self._entered: contextlib.AbstractAsyncContextManager[Client] | None = None

    async def __aenter__(self) -> Client:
        if self._entered is not None:
            raise RuntimeError("this client is open already: use it, or call connect() again for another one")
        try:
            trio.lowlevel.current_task()
        except RuntimeError:
            raise RuntimeError(
                "notifyq's client runs under trio: from asyncio, send with queue.statement() on a connection of your own"
            ) from None
        self._entered = self._opened()
        try:
            return await self._entered.__aenter__()
        except BaseException:
            self._entered = None
            raise

    async def __aexit__(self, *raised: Any) -> bool | None:
        assert self._entered is not None
        try:
            return await self._entered.__aexit__(*raised)
        finally:
            self._entered = None


@contextlib.asynccontextmanager
async def _opened(
    dsn: str | None,
    listen_dsn: str | None,
    schema: str,
    migrate: bool,
    pool_size: int,
    connect_timeout: float | timedelta,
) -> AsyncIterator[Client]:
    dsn = resolve_dsn(dsn)
    listen_dsn = resolve_listen_dsn(listen_dsn, dsn)
    check_schema_name(schema)
    flag(migrate, "migrate")
    whole(pool_size, "pool_size", 1, 1000)
    patience = seconds(connect_timeout, "connect_timeout")
    if not 0 < patience <= 86_400:
        raise InvalidOption(f"connect_timeout must be above zero and at most 86400 seconds, not {connect_timeout!r}")
    await prepare(dsn, schema, migrate=migrate, patience=patience)
    store = Store(schema)
    raised: BaseException | None = None
    async with (
        Pool(dsn, size=pool_size, connect_timeout=patience) as pool,
        trio.open_nursery() as nursery,
    ):
        listener = Listener(listen_dsn, store, Events())
        client = Client(pool, store, listener, lambda: nursery.start_soon(listener.run))
        try:
            yield client
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            raised = error  # and not the nursery's group of one
        finally:
            client.close()
            nursery.cancel_scope.cancel()
    if raised is not None:
        raise raised

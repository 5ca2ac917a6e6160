"""The server: an embedded one, with a fresh database for every cell."""

from __future__ import annotations

import contextlib
import secrets
import time
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

import psycopg
from psycopg import sql

from ._process import CellFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Database", "fresh_database", "settings"]

SETTINGS = (
    "select name, setting from pg_settings where name in ('server_version', 'fsync', 'synchronous_commit',"
    " 'shared_buffers', 'max_wal_size', 'max_connections', 'wal_compression')"
)
PATIENCE = 60_000
"""Milliseconds that a look may take."""

WAL = "select (pg_current_wal_lsn() - '0/0'::pg_lsn)::bigint"
TRANSACTIONS = "select xact_commit + xact_rollback from pg_stat_database where datname = current_database()"
COMMITS = "select xact_commit from pg_stat_database where datname = current_database()"
OTHERS = (
    "select count(*) from pg_stat_activity"
    " where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()"
)


def settings(dsn: str) -> dict[str, str]:
    """Version and settings that matter to the figures."""
    with psycopg.connect(dsn) as connection:
        return dict(connection.execute(SETTINGS).fetchall())


def uri(dsn: str, database: str) -> str:
    """A URI that every driver here understands: host and user as parameters, so that the host may be a folder."""
    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    names = ("host", "port", "user", "password")
    return f"postgresql:///{quote(database)}?{urlencode({key: str(parts[key]) for key in names if parts.get(key)})}"


class Database:
    """A cell's own database."""

    def __init__(self, dsn: str, name: str) -> None:
        self.uri = uri(dsn, name)
        self._connection = psycopg.connect(self.uri, autocommit=True, options=f"-c statement_timeout={PATIENCE}")
        self._looks = 0

    def close(self) -> None:
        """Leave it."""
        self._connection.close()

    def value(self, query: str) -> int:
        """The single number of a query."""
        self._looks += 1
        try:
            row = self._connection.execute(query.encode()).fetchone()
        except psycopg.Error as error:
            raise CellFailed(f"no answer of the server: {error}") from None
        assert row is not None
        return int(row[0])

    def settle(self) -> None:
        """Write down what the preparation left, so that no cell pays for another."""
        for command in (b"vacuum analyze", b"checkpoint"):
            self._connection.execute(command)
            self._looks += 1

    def wal(self) -> int:
        """Bytes of WAL that the server has written so far."""
        return self.value(WAL)

    def connections(self) -> int:
        """How many are open, without this one."""
        return self.value(OTHERS)

    def transactions(self) -> int:
        """All of this database so far, without the looks at it. Sessions tell of theirs up to 10 s late."""
        return self._exact(TRANSACTIONS)

    def commits(self) -> int:
        """Commits of this database so far, without the looks at it, once everybody else has left: then all is told."""
        until = time.monotonic() + 10
        while self.connections() and time.monotonic() < until:
            time.sleep(0.05)
        return self._exact(COMMITS)

    @contextlib.contextmanager
    def without_autovacuum(self) -> Iterator[None]:
        """Its transactions would count as the peer's. It runs as ever in every other cell."""
        self._alter(b"alter system set autovacuum = off")
        try:
            yield
        finally:
            self._alter(b"alter system reset autovacuum")

    def _alter(self, command: bytes) -> None:
        for one in (command, b"select pg_reload_conf()"):
            self._connection.execute(one)
            self._looks += 1

    def _exact(self, query: str) -> int:
        # in one transaction: what this session did before it is told at its end, and read by the next
        self._connection.execute("select pg_stat_force_next_flush()")
        self._looks += 1
        return self.value(query) - self._looks + 1


@contextlib.contextmanager
def fresh_database(dsn: str) -> Iterator[Database]:
    """A new database for the block, dropped after it, whoever is connected."""
    name = f"compare_{secrets.token_hex(6)}"
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        try:
            database = Database(dsn, name)
            try:
                yield database
            finally:
                database.close()
        finally:
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))

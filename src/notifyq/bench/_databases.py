"""Databases of the benchmark's own: made for a block, dropped after it. Nothing is done in any other."""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg
import trio
from psycopg import sql

from notifyq import connect, testing

from ._sql import BARE_SETUP, CREATE_DATABASE, DROP_DATABASE

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["own_database"]


@contextmanager
def own_database(server: str) -> Iterator[str]:
    """Create a database with the schema and the bare tables in it, give its DSN, and drop it after the block.

    Not asynchronous, as ``testing.fresh_database`` is, so that Ctrl-C ends a workload wherever it is.
    """
    name = f"notifyq_bench_{secrets.token_hex(6)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL(CREATE_DATABASE).format(sql.Identifier(name)))
        try:
            dsn = testing.with_database(server, name)
            trio.run(_install, dsn)
            with psycopg.connect(dsn, autocommit=True) as own:
                own.execute(BARE_SETUP)
            yield dsn
        finally:
            connection.execute(sql.SQL(DROP_DATABASE).format(sql.Identifier(name)))


async def _install(dsn: str) -> None:
    async with connect(dsn):
        pass

"""Installs and upgrades the schema from the files in ``sql/``, and checks that it is this version's.

Migrations are numbered, run once, and are never edited after a release. Functions and views are re-applied as a
whole whenever one of them changed. All of it happens in one transaction under an advisory lock.
"""

from __future__ import annotations

import hashlib
import random
import re
from importlib.metadata import version
from importlib.resources import files
from typing import TYPE_CHECKING

import attrs
import psycopg
import trio
from psycopg import sql

from ._errors import InvalidOption, MissingPrivilege, SchemaMismatch
from ._sql import translated

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from importlib.resources.abc import Traversable

    from ._connection import TrioConnection

__all__ = ["KINDS", "SqlFile", "apply", "check", "grant_roles", "load", "plan", "printed_plan", "renamed", "uninstall"]

VERSION = version("notifyq")

KINDS = ("producer", "worker", "operator")
"""Of roles: see ``sql/functions/99_rights.sql``."""

LOCK_SECONDS = 0.2
"""How long to wait for a table that somebody works with, and to keep others from what was taken before it: less than the
server waits before it looks for a deadlock (a second, unless that is set)."""


@attrs.frozen
class SqlFile:
    """One file of ``sql/``, its schema's name already in place."""

    name: str
    text: str = attrs.field(repr=False)
    hash: str

    @property
    def is_migration(self) -> bool:
        """Numbered structure: run once. Otherwise behaviour: re-applied."""
        return self.name.startswith("migrations/")


@attrs.frozen
class Installed:
    """What the database says it has."""

    hashes: Mapping[str, str]
    version: tuple[int, ...]


def load(schema: str) -> list[SqlFile]:
    """Read the SQL files, in the order in which they apply, for a schema of this name."""
    root = files("notifyq") / "sql"
    found = []
    for folder in ("migrations", "functions", "views"):
        entries: list[Traversable] = sorted((root / folder).iterdir(), key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.endswith(".sql"):
                text = entry.read_text(encoding="utf-8")
                found.append(
                    SqlFile(
                        f"{folder}/{entry.name}",
                        renamed(text, schema),
                        hashlib.sha256(text.encode()).hexdigest(),
                    )
                )
    return found


def renamed(text: str, schema: str) -> str:
    """The text of an SQL file for a schema of another name than the one it is written with."""
    return re.sub(r"\bnotifyq\b", schema, text)


def plan(installed: Installed | None, available: Sequence[SqlFile]) -> list[SqlFile]:
    """Say which files to run. Pure.

    Raises ``SchemaMismatch`` if the database is newer than these files, has a migration whose text differs, or says of none.
    """
    if installed is None:
        return list(available)
    if not installed.hashes:
        raise SchemaMismatch(
            "the schema was made by hand from the files, and does not say from which version's: drop it, and run what"
            " `notifyq migrate --plan` prints instead"
        )
    migrations = {file.name: file for file in available if file.is_migration}
    for name, hash_ in installed.hashes.items():
        if name.startswith("migrations/"):
            if name not in migrations:
                raise SchemaMismatch(f"the schema is newer than notifyq {VERSION}: it has {name}; upgrade notifyq")
            if migrations[name].hash != hash_:
                raise SchemaMismatch(f"the schema was installed from another {name} than notifyq {VERSION} has")
    pending = [file for file in available if file.is_migration and file.name not in installed.hashes]
    behaviour = [file for file in available if not file.is_migration]
    changed = any(installed.hashes.get(file.name) != file.hash for file in behaviour)
    # Functions of a newer release over the same structure serve this one too: leave them.
    if pending or (changed and installed.version <= _parsed(VERSION)):
        return pending + behaviour
    return []


async def apply(connection: TrioConnection, schema: str) -> list[str]:
    """Install or upgrade, and return the names of the files that ran. Safe to call from many processes at once.

    All of it belongs to the schema's owner, if this role is a member of that. Where the structure changes it waits until no
    transaction is in the midst of something with the tables, for as long as that takes. Raises ``SchemaMismatch`` (newer
    schema) and ``MissingPrivilege``. All or nothing; cancelled: nothing.
    """
    available = load(schema)
    with translated():
        if not plan(await _installed(connection, schema), available):
            return []
        try:
            async with connection.transaction():
                pending = await _apply(connection, schema, available)
        except psycopg.errors.InsufficientPrivilege as error:
            raise MissingPrivilege(
                f"schema {schema!r} is to be installed or upgraded, and this role may not: {error.diag.message_primary}."
                " Run `notifyq migrate` as a role that may create a schema here, or that owns this one"
            ) from error
    return [file.name for file in pending]


async def _apply(connection: TrioConnection, schema: str, available: Sequence[SqlFile]) -> list[SqlFile]:
    await connection.execute("set local lock_timeout = 0")
    await connection.execute("select pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"notifyq {schema}",))
    installed = await _installed(connection, schema)
    pending = plan(installed, available)
    if pending:
        if (owner := await _other_owner(connection, schema)) is not None:
            await connection.execute(sql.SQL("set local role {}").format(sql.Identifier(owner)))
        if not await _schema_exists(connection, schema):
            await connection.execute(sql.SQL("create schema {}").format(sql.Identifier(schema)))
        if _changes_structure(installed, pending):
            await _take_tables(connection, schema)
        for file in pending:
            await connection.execute(file.text.encode())
        for file in pending:
            await connection.execute(_record(schema), (file.name, file.hash, VERSION))
    return pending


def _changes_structure(installed: Installed | None, pending: Sequence[SqlFile]) -> bool:
    return installed is not None and any(file.is_migration for file in pending)


async def _take_tables(connection: TrioConnection, schema: str) -> None:
    """Lock all tables before their structure changes, as soon as nobody is in the midst of something with them.

    A migration would lock one after the other, and who sends or claims locks them in other orders: a deadlock, of which
    either can be the victim. Taken together and given up in time, they make others wait for a moment, and fail nobody.
    """
    statement = await _lock_tables(connection, schema)
    while True:
        try:
            async with connection.transaction():
                await connection.execute(statement)
            return
        except psycopg.errors.LockNotAvailable:
            await trio.sleep(random.uniform(1, 2) * LOCK_SECONDS)


async def _lock_tables(connection: TrioConnection, schema: str) -> sql.Composed:
    """What almost everybody begins with comes first: who comes later then waits there, and holds nothing."""
    cursor = await connection.execute(
        "select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where n.nspname = %s and c.relkind in ('r', 'p') and not c.relispartition"
        " order by c.relname <> 'queue', c.relname",
        (schema,),
    )
    tables = [sql.Identifier(schema, name) for (name,) in await cursor.fetchall()]
    return sql.SQL(
        "set local lock_timeout = {}; lock table {} in access exclusive mode; set local lock_timeout = 0"
    ).format(sql.Literal(f"{LOCK_SECONDS} s"), sql.SQL(", ").join(tables))


async def grant_roles(connection: TrioConnection, schema: str, roles: Mapping[str, str]) -> None:
    """Make roles, given by kind, what their kind is, from now on; one that does not exist is created. All or none.

    Raises ``MissingPrivilege``, whose message says what somebody else has to do first, and ``InvalidOption``.
    """
    if not roles:
        return
    with translated():
        async with connection.transaction():
            if (owner := await _other_owner(connection, schema)) is not None:
                await _create_missing(connection, roles.values())
                await connection.execute(sql.SQL("set local role {}").format(sql.Identifier(owner)))
            for kind, role in roles.items():
                await connection.execute(_grant(schema), (kind, role))


async def _create_missing(connection: TrioConnection, roles: Iterable[str]) -> None:
    """As who is connected, if he may; otherwise the owner will try."""
    cursor = await connection.execute("select rolsuper or rolcreaterole from pg_roles where rolname = current_user")
    if await cursor.fetchone() != (True,):
        return
    for role in roles:
        cursor = await connection.execute("select 1 from pg_roles where rolname = %s", (role,))
        if await cursor.fetchone() is None:
            await connection.execute(sql.SQL("create role {} nologin").format(sql.Identifier(role)))


async def check(connection: TrioConnection, schema: str) -> None:
    """Raise ``SchemaMismatch`` unless the installed schema is one that this version can use."""
    with translated():
        installed = await _installed(connection, schema)
    if installed is None:
        raise SchemaMismatch(f"schema {schema!r} is not installed: run `notifyq migrate`")
    if pending := plan(installed, load(schema)):
        differs = next(file.name for file in pending if installed.hashes.get(file.name) != file.hash)
        raise SchemaMismatch(
            f"schema {schema!r} is older than notifyq {VERSION} ({differs} is missing or old): run `notifyq migrate`"
        )


async def printed_plan(connection: TrioConnection, schema: str, roles: Mapping[str, str]) -> str:
    """The SQL that ``apply`` and ``grant_roles`` would run, for a DBA to read and run; empty if there is nothing to do."""
    installed = await _installed(connection, schema)
    pending = plan(installed, load(schema))
    if not pending and not roles:
        return ""
    parts = ["begin;"]
    if (owner := await _other_owner(connection, schema)) is not None:
        parts.append(sql.SQL("set local role {};").format(sql.Identifier(owner)).as_string(None))
    if installed is None and not await _schema_exists(connection, schema):
        parts.append(sql.SQL("create schema {};").format(sql.Identifier(schema)).as_string(None))
    if _changes_structure(installed, pending):
        lock = (await _lock_tables(connection, schema)).as_string(None)
        parts.append(f"-- if this fails, somebody works with them just now: run it again\n{lock};")
    parts.extend(f"-- {file.name}\n{file.text}" for file in pending)
    cursor = psycopg.ClientCursor(connection.opened)
    parts.extend(f"{cursor.mogrify(_record(schema), (file.name, file.hash, VERSION))};" for file in pending)
    parts.extend(f"{cursor.mogrify(_grant(schema), granted)};" for granted in roles.items())
    parts.append("commit;")
    return "\n\n".join(parts)


async def uninstall(connection: TrioConnection, schema: str) -> None:
    """Drop the schema with every queue and job in it. Raises ``InvalidOption`` if it is not one of ours."""
    if await _installed(connection, schema) is None:
        raise InvalidOption(f"schema {schema!r} was not installed by notifyq: nothing was dropped")
    with translated():
        await connection.execute(sql.SQL("drop schema {} cascade").format(sql.Identifier(schema)))


async def _schema_exists(connection: TrioConnection, schema: str) -> bool:
    cursor = await connection.execute("select 1 from pg_namespace where nspname = %s", (schema,))
    return await cursor.fetchone() is not None


async def _other_owner(connection: TrioConnection, schema: str) -> str | None:
    """Who owns the installation, or the schema made for it, if that is another role that this one may act as.

    What a superuser added to it as himself would run with a superuser's rights, and what one member of a group made, the
    others could not upgrade.
    """
    cursor = await connection.execute(
        "select pg_get_userbyid(o.owner) from pg_namespace n"
        " left join pg_class c on c.relnamespace = n.oid and c.relname = 'installed'"
        " cross join lateral (select coalesce(c.relowner, n.nspowner) as owner) o"
        " where n.nspname = %s and pg_has_role(o.owner, 'member')"
        " and pg_get_userbyid(o.owner) not in (current_user, 'pg_database_owner')",
        (schema,),
    )
    row = await cursor.fetchone()
    return None if row is None else str(row[0])


async def _installed(connection: TrioConnection, schema: str) -> Installed | None:
    # Asked of the catalogue's tables: to_regclass() answers from a cache, which may be older than the lock we waited for.
    cursor = await connection.execute(
        "select 1 from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where n.nspname = %s and c.relname = 'installed'",
        (schema,),
    )
    if await cursor.fetchone() is None:
        return None
    cursor = await connection.execute(
        sql.SQL("select file, hash, version from {}").format(sql.Identifier(schema, "installed"))
    )
    rows = await cursor.fetchall()
    return Installed({file: hash_ for file, hash_, _ in rows}, max((_parsed(text) for *_, text in rows), default=()))


def _record(schema: str) -> sql.Composed:
    return sql.SQL(
        "insert into {} (file, hash, version) values (%s, %s, %s)"
        " on conflict (file) do update set (hash, version, installed_at) = (excluded.hash, excluded.version, now())"
    ).format(sql.Identifier(schema, "installed"))


def _grant(schema: str) -> sql.Composed:
    return sql.SQL("select {}(%s, %s)").format(sql.Identifier(schema, "grant_role"))


def _parsed(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])

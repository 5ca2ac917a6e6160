"""How a SQL function is called: its schema's name put in, its arguments as PostgreSQL's text, its errors as ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString

import attrs
import psycopg
from psycopg import sql

from ._errors import InvalidData
from ._sql import raise_as_ours

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from ._connection import TrioConnection

__all__ = ["Bound", "Calls", "intervals", "literal"]


class Calls:
    """Calls in one schema. A call is one statement and so one transaction, unless the connection is in one."""

    def __init__(self, schema: str) -> None:
        self.schema = schema
        self._composed: dict[str, str] = {}

    async def rows(self, connection: TrioConnection, text: LiteralString, *arguments: Any) -> list[Any]:
        """Run a statement: ``{s}`` in it is the schema, ``$1`` the first argument. Raises our errors and psycopg's."""
        try:
            return await connection.fetch(self._statement(text), [literal(argument) for argument in arguments])
        except psycopg.Error as error:
            raise_as_ours(error)
        except RecursionError:  # JSON that SQL can hold
            raise InvalidData("data is nested too deeply for Python to read") from None
        except ValueError as error:  # a number of too many digits
            raise InvalidData(f"data cannot be read: {error}") from None

    async def run(self, connection: TrioConnection, call: Bound) -> list[Any]:
        """Make a call that was bound. Raises as ``rows``."""
        try:
            return await connection.fetch(call.statement, call.arguments)
        except psycopg.Error as error:
            raise_as_ours(error)

    def bind(self, text: LiteralString, *arguments: Any) -> Bound:
        """A call to be sent later, or many times."""
        return Bound(self._statement(text), [literal(argument) for argument in arguments])

    def text(self, text: LiteralString, **arguments: float | str | UUID | None) -> bytes:
        """A statement with its arguments in it: ``{name}`` is the argument of that name."""
        literals = {name: sql.Literal(argument) for name, argument in arguments.items()}
        return sql.SQL(text).format(s=sql.Identifier(self.schema), **literals).as_bytes(None)

    def _statement(self, text: LiteralString) -> str:
        statement = self._composed.get(text)
        if statement is None:
            statement = sql.SQL(text).format(s=sql.Identifier(self.schema)).as_string(None)
            self._composed[text] = statement
        return statement

    async def row(self, connection: TrioConnection, text: LiteralString, *arguments: Any) -> Any:
        """The first row, or None."""
        rows = await self.rows(connection, text, *arguments)
        return rows[0] if rows else None

    async def value(self, connection: TrioConnection, text: LiteralString, *arguments: Any) -> Any:
        """The first value of the first row."""
        return (await self.rows(connection, text, *arguments))[0][0]


@attrs.frozen
class Bound:
    """A statement with its arguments."""

    statement: str
    arguments: list[bytes | None]


def literal(value: Any) -> bytes | None:
    """An argument as PostgreSQL's text: a number, text, boolean, uuid, or a sequence of them as an array."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        write = str if _NUMBERS.issuperset(map(type, value)) else _element
        return f"{{{','.join(map(write, value))}}}".encode()
    return str(value).encode()


_NUMBERS = {int, float}


def _element(value: Any) -> str:
    if value is None:
        return "null"
    if type(value) is str:
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value)


def intervals(seconds: Sequence[float | None]) -> list[str | None]:
    """Durations as an array of intervals."""
    return [None if value is None else f"{value} s" for value in seconds]

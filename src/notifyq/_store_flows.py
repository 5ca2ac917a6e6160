"""The calls for flows and for edits of jobs that wait: see ``sql/functions/52_flow.sql`` and ``58_edit.sql``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString

from ._models import FlowJob, Parent

if TYPE_CHECKING:
    from ._calls import Calls
    from ._connection import TrioConnection

__all__ = ["Flows"]

_EDITED: LiteralString = "$5::jsonb, $6, make_interval(secs => $7), $8::timestamptz"


class Flows:
    """Part of ``Store``."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def send_flow(self, connection: TrioConnection, jobs: str) -> dict[str, int]:
        """Returns the ids by name. ``jobs``: a JSON array."""
        return dict(await self._calls.rows(connection, "select name, id from {s}.send_flow($1::jsonb)", jobs))

    async def parents(self, connection: TrioConnection, job: int) -> list[Parent]:
        statement: LiteralString = "select id, name, queue, state, output from {s}.parents($1)"
        return [Parent(*row) for row in await self._calls.rows(connection, statement, job)]

    async def flow(self, connection: TrioConnection, job: int) -> list[FlowJob]:
        statement: LiteralString = "select id, name, queue, state, after from {s}.flow($1)"
        return [FlowJob(*row) for row in await self._calls.rows(connection, statement, job)]

    async def update_job(
        self,
        connection: TrioConnection,
        job: int | None,
        queue: str | None,
        key: str | None,
        id_key: str | None,
        data: str | None,
        priority: int | None,
        delay: float | None,
        due_at: str | None,
    ) -> int | None:
        statement: LiteralString = "select {s}.update_job($1, $2, $3, $4, " + _EDITED + ")"
        edited: int | None = await self._calls.value(
            connection, statement, job, queue, key, id_key, data, priority, delay, due_at
        )
        return edited

    async def upsert(
        self,
        connection: TrioConnection,
        queue: str,
        data: str | None,
        key: str,
        priority: int | None,
        delay: float | None,
        due_at: str | None,
    ) -> tuple[int, bool]:
        statement: LiteralString = (
            "select id, created from {s}.upsert($1, $2::jsonb, $3, $4, make_interval(secs => $5), $6::timestamptz)"
        )
        row: Any = await self._calls.row(connection, statement, queue, data, key, priority, delay, due_at)
        return row[0], row[1]

"""The calls: one small coroutine for each SQL function. The only module beside ``_schema`` with SQL text.

Errors come as ours where we have one, see ``_sql.as_ours``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, LiteralString

import attrs
from psycopg import sql

from ._answers import QueueInfo
from ._calls import Calls
from ._models import JobRecord
from ._sql import many_entry, send_call, send_parameters, translated
from ._store_claims import Claims
from ._store_flows import Flows
from ._store_schedules import Schedules
from ._store_serving import Serving
from ._store_settles import Settles

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from uuid import UUID

    from ._connection import TrioConnection

__all__ = ["Store"]


_SEND: LiteralString = send_call("{s}.try_send", "${}")
_SEND_PLAIN: LiteralString = "select * from {s}.try_send($1::text, $2::jsonb)"
Operation = Literal["cancel", "retry", "resume", "delete"]
_OPERATIONS: dict[Operation, LiteralString] = {
    "cancel": "select {s}.cancel($1::bigint[])",
    "retry": "select {s}.retry($1::bigint[])",
    "resume": "select {s}.resume($1::bigint[])",
    "delete": "select {s}.delete($1::bigint[])",
}
_JOB_FIELDS = [field.name for field in attrs.fields(JobRecord)]
_JOBS: LiteralString = f"select {', '.join(_JOB_FIELDS)} from {{s}}.jobs"  # noqa: S608 - the fields of a class
_JOB: LiteralString = _JOBS + " where id = $1"
_NEWEST_JOBS: LiteralString = (
    _JOBS + " where ($1::text is null or queue = $1) and ($2::text is null or state = $2) order by id desc limit $3"
)


class Store(Claims, Settles, Serving):
    """The SQL functions of one schema. Every method takes the connection to run on."""

    def __init__(self, schema: str) -> None:
        self.schema = schema
        super().__init__(Calls(schema))
        self.flows = Flows(self._calls)
        self.schedules = Schedules(self._calls)

    # queues

    async def create_queue(self, connection: TrioConnection, name: str, options: str) -> str:
        """Returns ``created``, ``exists`` or ``differs: …``. ``options``: a JSON object."""
        text: str = await self._calls.value(connection, "select {s}.create_queue($1, $2::jsonb)", name, options)
        return text

    async def update_queue(self, connection: TrioConnection, name: str, options: str) -> None:
        await self._calls.value(connection, "select {s}.update_queue($1, $2::jsonb)", name, options)

    async def delete_queue(self, connection: TrioConnection, name: str) -> int:
        return int(await self._calls.value(connection, "select {s}.delete_queue($1)", name))

    async def queue(self, connection: TrioConnection, name: str) -> QueueInfo:
        row = await self._calls.row(
            connection,
            "select q.number, {s}.channel(q.number), q.retry_limit, coalesce(q.retention > '0', true), q.max_data_bytes"
            " from {s}.queue_named($1) q",
            name,
        )
        return QueueInfo(*row)

    async def channel(self, connection: TrioConnection, number: int) -> str:
        return str(await self._calls.value(connection, "select {s}.channel($1)", number))

    # send

    async def send(
        self, connection: TrioConnection, queue: str, data: str, options: Mapping[str, Any]
    ) -> tuple[int, bool]:
        if options:
            row = await self._calls.row(connection, _SEND, *send_parameters(queue, data, options))
        else:
            row = await self._calls.row(connection, _SEND_PLAIN, queue, None if data == "null" else data)
        return row[0], row[1]

    async def send_many(
        self, connection: TrioConnection, queue: str, jobs: Iterable[tuple[str, Mapping[str, Any]]]
    ) -> list[tuple[int, bool]]:
        array = f"[{','.join(many_entry(data, options) for data, options in jobs)}]"
        return await self._calls.rows(connection, "select id, created from {s}.send_many($1, $2::jsonb)", queue, array)

    # operate

    async def operate(self, connection: TrioConnection, operation: Operation, jobs: Sequence[int]) -> list[int]:
        """Cancel, retry, resume or delete jobs; returns those affected."""
        ids: list[int] = await self._calls.value(connection, _OPERATIONS[operation], jobs)
        return ids

    async def delete_all(self, connection: TrioConnection, queue: str, state: str | None) -> int:
        return int(await self._calls.value(connection, "select {s}.delete_all($1, $2)", queue, state))

    async def redrive(
        self,
        connection: TrioConnection,
        dead_letter: str,
        source: str | None,
        error_type: str | None,
        how_many: int | None,
        preview: bool,
    ) -> list[tuple[int, str, int | None]]:
        statement: LiteralString = "select id, queue, new_id from {s}.redrive($1, $2, $3, $4, $5)"
        return await self._calls.rows(connection, statement, dead_letter, source, error_type, how_many, preview)

    # look

    async def job(self, connection: TrioConnection, job: int) -> JobRecord | None:
        row = await self._calls.row(connection, _JOB, job)
        return None if row is None else JobRecord(**dict(zip(_JOB_FIELDS, row, strict=True)))

    async def jobs(
        self, connection: TrioConnection, queue: str | None, state: str | None, limit: int
    ) -> list[JobRecord]:
        """The newest jobs, of a queue or in a state."""
        rows = await self._calls.rows(connection, _NEWEST_JOBS, queue, state, limit)
        return [JobRecord(**dict(zip(_JOB_FIELDS, row, strict=True))) for row in rows]

    async def view(self, connection: TrioConnection, name: str) -> list[dict[str, Any]]:
        """All rows of ``queue_stats`` or ``runtimes``."""
        with translated():
            async with connection.dict_cursor() as cursor:
                statement = sql.SQL("select * from {}").format(sql.Identifier(self.schema, name))
                await cursor.execute(statement + sql.SQL(" order by 1"))
                return await cursor.fetchall()

    async def next_due(
        self, connection: TrioConnection, queue: int, due_floor: float | None = None
    ) -> tuple[float | None, float]:
        """The next due time of a queue that is not before the floor, and the server's clock: seconds of the epoch."""
        row: tuple[float | None, float] = await self._calls.row(
            connection,
            "select extract(epoch from {s}.next_due($1, coalesce(to_timestamp($2), '-infinity')))::float8,"
            " extract(epoch from clock_timestamp())::float8",
            queue,
            due_floor,
        )
        return row

    # leases

    async def register(
        self,
        connection: TrioConnection,
        runtime: UUID,
        queues: Sequence[str],
        lease: float,
        pid: int,
        hostname: str,
        version: str,
    ) -> None:
        await self._calls.row(
            connection,
            "select {s}.register($1::uuid, $2::text[], make_interval(secs => $3), $4, $5, $6)",
            runtime,
            queues,
            lease,
            pid,
            hostname,
            version,
        )

    async def stop(self, connection: TrioConnection, runtime: UUID) -> None:
        await self._calls.value(connection, "select {s}.stop($1::uuid)", runtime)

    async def held(self, connection: TrioConnection, runtime: UUID) -> dict[tuple[int, int], float]:
        """When each attempt that the runtime holds, as (job, attempt), was claimed, in seconds of the epoch."""
        statement: LiteralString = "select job, attempt, date_part('epoch', claimed_at) from {s}.held($1::uuid)"
        rows = await self._calls.rows(connection, statement, runtime)
        return {(job, attempt): claimed_at for job, attempt, claimed_at in rows}

    async def deregister(self, connection: TrioConnection, runtime: UUID) -> list[int]:
        rows = await self._calls.rows(connection, "select job from {s}.deregister($1::uuid)", runtime)
        return [job for (job,) in rows]

    async def rescue(self, connection: TrioConnection) -> list[int]:
        return [job for (job,) in await self._calls.rows(connection, "select job from {s}.rescue()")]

    # maintenance

    async def expire(self, connection: TrioConnection) -> int:
        return int(await self._calls.value(connection, "select {s}.expire()"))

    async def purge(self, connection: TrioConnection) -> int:
        return int(await self._calls.value(connection, "select {s}.purge()"))

    async def make_leaves(self, connection: TrioConnection) -> int:
        """Make the archive's leaves for today and the next days, so that completions find them."""
        return int(await self._calls.value(connection, "select {s}.make_leaves()"))

    async def drop_leaf(self, connection: TrioConnection) -> bool:
        return bool(await self._calls.value(connection, "select {s}.drop_leaf()"))

    # listening

    async def listen(self, connection: TrioConnection, *channels: str) -> None:
        """LISTEN, in one round trip however many there are."""
        statements = [sql.SQL("listen {}").format(sql.Identifier(channel)) for channel in channels]
        with translated():
            await connection.execute(sql.SQL("; ").join(statements), prepare=False)

    async def unlisten(self, connection: TrioConnection, *channels: str) -> None:
        statements = [sql.SQL("unlisten {}").format(sql.Identifier(channel)) for channel in channels]
        with translated():
            await connection.execute(sql.SQL("; ").join(statements), prepare=False)

    async def notify(self, connection: TrioConnection, channel: str, payload: str) -> None:
        await self._calls.value(connection, "select pg_notify($1, $2)", channel, payload)

    async def server_process(self, connection: TrioConnection) -> int:
        """The number of the server process that does this connection's work now."""
        return int(await self._calls.value(connection, "select pg_backend_pid()"))

    async def hold_interest(self, connection: TrioConnection, queue: int) -> bool:
        return bool(await self._calls.value(connection, "select {s}.hold_interest($1)", queue))

    async def drop_interest(self, connection: TrioConnection, queue: int) -> bool:
        return bool(await self._calls.value(connection, "select {s}.drop_interest($1)", queue))

    async def no_settle_under_way(self, connection: TrioConnection, queue: int) -> bool:
        return bool(await self._calls.value(connection, "select {s}.no_settle_under_way($1)", queue))

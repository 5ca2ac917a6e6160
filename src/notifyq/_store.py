"""The calls: one small coroutine for each SQL function. The only module beside ``_schema`` with SQL text.

A call is one statement and so one transaction, unless the connection is in one. Errors come translated, see
``_sql.translated``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString

import attrs
from psycopg import sql
from psycopg.rows import class_row

from ._models import Claimed, JobRecord
from ._sql import many_entry, send_parameters, send_statement, translated

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from uuid import UUID

    from ._connection import TrioConnection

__all__ = ["Beat", "QueueInfo", "Store"]


@attrs.frozen
class Beat:
    """What ``beat()`` told: see ``sql/functions/60_lease.sql``."""

    renewed: bool
    cancels: list[int]
    ready: list[int]
    due_in: dict[str, float]
    lapse_in: float | None


@attrs.frozen
class QueueInfo:
    """A queue as the runtime needs it."""

    number: int
    channel: str
    retry_limit: int
    kept: bool
    max_data_bytes: int


_CLAIM: LiteralString = (
    "select * from {s}.claim(%s, %s, %s::uuid, make_interval(secs => %s), %s::smallint[], %s::bigint[])"
)
_CLAIM_UNFLUSHED: LiteralString = (
    "select c.* from set_config('synchronous_commit', 'off', true) s, lateral"
    " {s}.claim(%s, %s, %s::uuid, make_interval(secs => %s), %s::smallint[], %s::bigint[]) c"
)


class Store:
    """The SQL functions of one schema."""

    def __init__(self, schema: str) -> None:
        self.schema = schema
        self._try_send = send_statement(schema, "try_send")
        self._texts: dict[str, bytes] = {}

    def _call(self, text: LiteralString) -> bytes:
        """``text`` with the schema's name in the place of ``{s}``."""
        statement = self._texts.get(text)
        if statement is None:
            composed = sql.SQL(text).format(s=sql.Identifier(self.schema))
            statement = self._texts[text] = composed.as_bytes(None)
        return statement

    async def _row(self, connection: TrioConnection, text: LiteralString, parameters: Sequence[Any] = ()) -> Any:
        with translated():
            cursor = await connection.execute(self._call(text), parameters)
            return await cursor.fetchone()

    async def _rows(self, connection: TrioConnection, text: LiteralString, parameters: Sequence[Any] = ()) -> list[Any]:
        with translated():
            cursor = await connection.execute(self._call(text), parameters)
            return await cursor.fetchall()

    async def _value(self, connection: TrioConnection, text: LiteralString, parameters: Sequence[Any] = ()) -> Any:
        return (await self._row(connection, text, parameters))[0]

    # queues

    async def create_queue(self, connection: TrioConnection, name: str, options: str) -> str:
        text: str = await self._value(connection, "select {s}.create_queue(%s, %s::jsonb)", (name, options))
        return text

    async def update_queue(self, connection: TrioConnection, name: str, options: str) -> None:
        await self._row(connection, "select {s}.update_queue(%s, %s::jsonb)", (name, options))

    async def delete_queue(self, connection: TrioConnection, name: str) -> int:
        return int(await self._value(connection, "select {s}.delete_queue(%s)", (name,)))

    async def queue(self, connection: TrioConnection, name: str) -> QueueInfo:
        row = await self._row(
            connection,
            "select q.number, {s}.channel(q.number), q.retry_limit, coalesce(q.retention > '0', true), q.max_data_bytes"
            " from {s}.queue_named(%s) q",
            (name,),
        )
        return QueueInfo(*row)

    async def channel(self, connection: TrioConnection, number: int) -> str:
        return str(await self._value(connection, "select {s}.channel(%s)", (number,)))

    # send

    async def send(
        self, connection: TrioConnection, queue: str, data: str, options: Mapping[str, Any]
    ) -> tuple[int, bool]:
        with translated():
            cursor = await connection.execute(self._try_send.encode(), send_parameters(queue, data, options))
            row: Any = await cursor.fetchone()
        return row[0], row[1]

    async def send_many(
        self, connection: TrioConnection, queue: str, jobs: Iterable[tuple[str, Mapping[str, Any]]]
    ) -> list[tuple[int, bool]]:
        array = f"[{','.join(many_entry(data, options) for data, options in jobs)}]"
        return await self._rows(connection, "select id, created from {s}.send_many(%s, %s::jsonb)", (queue, array))

    # claim and settle

    async def claim(
        self,
        connection: TrioConnection,
        queue: str,
        how_many: int,
        runtime: UUID | None,
        *,
        lease: float | None = None,
        floors: Mapping[int, int] | None = None,
        durably: bool = True,
    ) -> list[Claimed]:
        """Claim jobs. ``durably=False``: a crash of the server may forget the claim, and the jobs run again."""
        statement = self._call(_CLAIM if durably else _CLAIM_UNFLUSHED)
        priorities = None if floors is None else sorted(floors, reverse=True)
        numbers = None if floors is None or priorities is None else [floors[priority] for priority in priorities]
        parameters = (queue, how_many, runtime, lease, _array(priorities), _array(numbers))
        with translated():
            cursor = await connection.execute(statement, parameters)
            return [Claimed(*row) for row in await cursor.fetchall()]

    async def complete(
        self,
        connection: TrioConnection,
        jobs: Sequence[int],
        outputs: str | None,
        attempts: Sequence[int] | None,
        runtime: UUID | None,
    ) -> list[int]:
        """Complete jobs, given by id in order. ``outputs``: a JSON array. Returns those that were still ours."""
        ids: list[int] = await self._value(
            connection,
            "select {s}.complete(%s::bigint[], %s::jsonb, %s::int[], %s::uuid)",
            (_array(jobs), outputs, _array(attempts), runtime),
        )
        return ids

    async def fail(
        self,
        connection: TrioConnection,
        jobs: Sequence[int],
        errors: str,
        attempts: Sequence[int] | None,
        runtime: UUID | None,
        final: Sequence[bool],
        retry_in: Sequence[float | None],
    ) -> dict[int, str]:
        """Fail attempts. ``errors``: a JSON array. Returns where each stands now, of those that were still ours."""
        rows = await self._rows(
            connection,
            "select id, state from {s}.fail(%s::bigint[], %s::jsonb, %s::int[], %s::uuid, %s::boolean[], %s::interval[])",
            (_array(jobs), errors, _array(attempts), runtime, list(final), _intervals(retry_in)),
        )
        return dict(rows)

    async def snooze(
        self,
        connection: TrioConnection,
        jobs: Sequence[int],
        delays: Sequence[float],
        attempts: Sequence[int] | None,
        runtime: UUID | None,
    ) -> list[int]:
        ids: list[int] = await self._value(
            connection,
            "select {s}.snooze(%s::bigint[], %s::interval[], %s::int[], %s::uuid)",
            (_array(jobs), _intervals(delays), _array(attempts), runtime),
        )
        return ids

    async def release(
        self, connection: TrioConnection, jobs: Sequence[int], attempts: Sequence[int] | None, runtime: UUID | None
    ) -> list[int]:
        ids: list[int] = await self._value(
            connection,
            "select {s}.release(%s::bigint[], %s::int[], %s::uuid)",
            (_array(jobs), _array(attempts), runtime),
        )
        return ids

    async def discard(
        self, connection: TrioConnection, jobs: Sequence[int], attempts: Sequence[int] | None, runtime: UUID | None
    ) -> list[int]:
        ids: list[int] = await self._value(
            connection,
            "select {s}.discard(%s::bigint[], %s::int[], %s::uuid)",
            (_array(jobs), _array(attempts), runtime),
        )
        return ids

    async def touch(
        self, connection: TrioConnection, job: int, seconds: float, attempt: int | None, runtime: UUID | None
    ) -> bool:
        return bool(
            await self._value(
                connection,
                "select {s}.touch(%s, make_interval(secs => %s), %s, %s::uuid)",
                (job, seconds, attempt, runtime),
            )
        )

    async def progress(
        self, connection: TrioConnection, job: int, progress: str, attempt: int | None, runtime: UUID | None
    ) -> bool:
        return bool(
            await self._value(
                connection, "select {s}.progress(%s, %s::jsonb, %s, %s::uuid)", (job, progress, attempt, runtime)
            )
        )

    # operate

    async def cancel(self, connection: TrioConnection, jobs: Sequence[int]) -> list[int]:
        ids: list[int] = await self._value(connection, "select {s}.cancel(%s::bigint[])", (_array(jobs),))
        return ids

    async def retry(self, connection: TrioConnection, jobs: Sequence[int]) -> list[int]:
        ids: list[int] = await self._value(connection, "select {s}.retry(%s::bigint[])", (_array(jobs),))
        return ids

    async def resume(self, connection: TrioConnection, jobs: Sequence[int]) -> list[int]:
        ids: list[int] = await self._value(connection, "select {s}.resume(%s::bigint[])", (_array(jobs),))
        return ids

    async def delete(self, connection: TrioConnection, jobs: Sequence[int]) -> list[int]:
        ids: list[int] = await self._value(connection, "select {s}.delete(%s::bigint[])", (_array(jobs),))
        return ids

    async def delete_all(self, connection: TrioConnection, queue: str, state: str | None) -> int:
        return int(await self._value(connection, "select {s}.delete_all(%s, %s)", (queue, state)))

    async def redrive(
        self,
        connection: TrioConnection,
        dead_letter: str,
        source: str | None,
        error_type: str | None,
        how_many: int | None,
        preview: bool,
    ) -> list[tuple[int, str, int | None]]:
        return await self._rows(
            connection,
            "select id, queue, new_id from {s}.redrive(%s, %s, %s, %s, %s)",
            (dead_letter, source, error_type, how_many, preview),
        )

    async def promote(self, connection: TrioConnection, queue: int) -> int:
        return int(await self._value(connection, "select {s}.promote(%s)", (queue,)))

    # look

    async def job(self, connection: TrioConnection, job: int) -> JobRecord | None:
        with translated():
            async with connection.cursor(row_factory=class_row(JobRecord)) as cursor:
                await cursor.execute(self._call("select * from {s}.jobs where id = %s"), (job,))
                return await cursor.fetchone()

    async def jobs(
        self, connection: TrioConnection, queue: str | None, state: str | None, limit: int
    ) -> list[JobRecord]:
        """The newest jobs, of a queue or in a state."""
        with translated():
            async with connection.cursor(row_factory=class_row(JobRecord)) as cursor:
                await cursor.execute(
                    self._call(
                        "select * from {s}.jobs where (%(queue)s::text is null or queue = %(queue)s)"
                        " and (%(state)s::text is null or state = %(state)s) order by id desc limit %(limit)s"
                    ),
                    {"queue": queue, "state": state, "limit": limit},
                )
                return await cursor.fetchall()

    async def view(self, connection: TrioConnection, name: str) -> list[dict[str, Any]]:
        """All rows of ``queue_stats`` or ``runtimes``."""
        with translated():
            async with connection.dict_cursor() as cursor:
                statement = sql.SQL("select * from {}").format(sql.Identifier(self.schema, name))
                await cursor.execute(statement + sql.SQL(" order by 1"))
                return await cursor.fetchall()

    async def next_due(self, connection: TrioConnection, queue: int) -> tuple[float | None, float]:
        """The next due time of a queue and the server's clock, both in seconds of the epoch."""
        row: tuple[float | None, float] = await self._row(
            connection,
            "select extract(epoch from {s}.next_due(%s))::float8, extract(epoch from clock_timestamp())::float8",
            (queue,),
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
        await self._row(
            connection,
            "select {s}.register(%s::uuid, %s::text[], make_interval(secs => %s), %s, %s, %s)",
            (runtime, list(queues), lease, pid, hostname, version),
        )

    async def beat(self, connection: TrioConnection, runtime: UUID, queues: Sequence[int]) -> Beat:
        return Beat(
            *await self._row(connection, "select * from {s}.beat(%s::uuid, %s::int[])", (runtime, _array(queues)))
        )

    async def held(self, connection: TrioConnection, runtime: UUID) -> set[tuple[int, int]]:
        return set(await self._rows(connection, "select job, attempt from {s}.held(%s::uuid)", (runtime,)))

    async def deregister(self, connection: TrioConnection, runtime: UUID) -> list[int]:
        rows = await self._rows(connection, "select job from {s}.deregister(%s::uuid)", (runtime,))
        return [job for (job,) in rows]

    async def rescue(self, connection: TrioConnection) -> list[int]:
        return [job for (job,) in await self._rows(connection, "select job from {s}.rescue()")]

    # maintenance

    async def maintain(self, connection: TrioConnection) -> bool:
        """Expire, purge and turn the archive's leaves. True: there is more to do."""
        return bool(await self._value(connection, "select {s}.maintain()"))

    async def turn_leaves(self, connection: TrioConnection) -> int:
        """Make the archive's leaves for today and the next days, so that completions find them."""
        return int(await self._value(connection, "select {s}.turn_leaves()"))

    # listening

    async def listen(self, connection: TrioConnection, channel: str) -> None:
        with translated():
            await connection.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))

    async def unlisten(self, connection: TrioConnection, channel: str) -> None:
        with translated():
            await connection.execute(sql.SQL("unlisten {}").format(sql.Identifier(channel)))

    async def notify(self, connection: TrioConnection, channel: str, payload: str) -> None:
        with translated():
            await connection.execute("select pg_notify(%s, %s)", (channel, payload))

    async def keepalive(self, connection: TrioConnection) -> None:
        """Let the server notice within about 15 s that this side is gone, so that no ghost keeps its locks."""
        with translated():
            await connection.execute(
                "select set_config('tcp_keepalives_idle', '5', false), set_config('tcp_keepalives_interval', '3', false),"
                " set_config('tcp_keepalives_count', '3', false)"
            )

    async def hold_interest(self, connection: TrioConnection, queue: int) -> bool:
        return bool(await self._value(connection, "select {s}.hold_interest(%s)", (queue,)))

    async def drop_interest(self, connection: TrioConnection, queue: int) -> bool:
        return bool(await self._value(connection, "select {s}.drop_interest(%s)", (queue,)))

    async def no_settle_under_way(self, connection: TrioConnection, queue: int) -> bool:
        return bool(await self._value(connection, "select {s}.no_settle_under_way(%s)", (queue,)))


def _array(numbers: Sequence[int] | None) -> str | None:
    """An array as the text that a cast turns into one: cheaper than psycopg's adaptation item by item."""
    return None if numbers is None else f"{{{','.join(map(str, numbers))}}}"


def _intervals(seconds: Sequence[float | None]) -> list[str | None]:
    return [None if value is None else f"{value} s" for value in seconds]

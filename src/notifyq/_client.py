"""The client: sends jobs, looks at them, waits for results, works by hand, operates."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

import psycopg
import trio

from . import _schema
from ._codec import from_json, to_json
from ._connection import open_connection
from ._errors import ClientClosed, ConnectionLost, InvalidOption, JobFailed, JobNotFound, LeaseLost
from ._events import Events
from ._listener import Listener
from ._models import In, Job, JobRecord, NewJob, Out, SendOptions, Sent
from ._pool import Pool
from ._queue import Queue
from ._sql import check_schema_name, translated
from ._store import Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from ._connection import TrioConnection

T = TypeVar("T")

__all__ = ["Client", "connect"]

ANY = Queue[Any, Any]

RESULT_POLL = 5.0
"""Seconds between looks for a result when no announcement comes; 1 s while the listener is down."""


def resolve_dsn(dsn: str | None) -> str:
    """The DSN given, or ``DATABASE_URL``. Raises ``InvalidOption``, which never quotes it, if there is none or it is bad."""
    found = dsn if dsn is not None else os.environ.get("DATABASE_URL")
    if not found:
        raise InvalidOption("no database: give dsn=..., or set DATABASE_URL=postgresql://user@host:5432/database")
    try:
        psycopg.conninfo.conninfo_to_dict(found)
    except psycopg.ProgrammingError as error:
        reason = str(error).strip().replace(found, "…")
        raise InvalidOption(
            f"the DSN is not one ({reason.split(':')[0]}): use postgresql://user@host:5432/database, or key=value pairs"
        ) from None
    return found


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
            if trio.current_time() + 0.5 > deadline:
                raise ConnectionLost(f"cannot reach the server within {patience:g} s: {error.__cause__}") from error
            await trio.sleep(0.5)
    try:
        if migrate:
            await _schema.apply(connection, schema)
        else:
            await _schema.check(connection, schema)
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def connect(
    dsn: str | None = None,
    *,
    schema: str = "notifyq",
    migrate: bool = True,
    pool_size: int = 10,
    connect_timeout: float = 10.0,
) -> AsyncIterator[Client]:
    """Open a client for the block.

    Args:
        dsn: a PostgreSQL URI or key=value string (default: the environment's ``DATABASE_URL``).
        schema: the schema that holds this installation.
        migrate: install or upgrade it if need be; False for a role that may not, which is told if it does not fit.
        pool_size: most connections at once, opened when needed.
        connect_timeout: seconds to reach the server at first, and later to wait for a free connection.

    Raises:
        InvalidOption: no DSN, or a bad one; a bad schema name.
        ConnectionLost: the server could not be reached in time.
        SchemaMismatch: the schema is newer, or ``migrate=False`` and it is missing or older.
        MissingPrivilege: the role may not install it.
    """
    dsn = resolve_dsn(dsn)
    check_schema_name(schema)
    await prepare(dsn, schema, migrate=migrate, patience=connect_timeout)
    store = Store(schema)
    raised: Exception | None = None
    async with (
        Pool(dsn, size=pool_size, connect_timeout=connect_timeout) as pool,
        trio.open_nursery() as nursery,
    ):
        listener = Listener(dsn, store, Events())
        client = Client(pool, store, listener, nursery)
        try:
            yield client
        except Exception as error:
            raised = error  # and not the nursery's group of one
        finally:
            client.close()
            nursery.cancel_scope.cancel()
    if raised is not None:
        raise raised


class Client:
    """What ``connect`` gives. Safe to use from many tasks at once.

    Every call is one transaction of its own, unless you pass ``connection``. Cancelling a call rolls it back if the
    server has not committed it yet; a send that must not happen twice needs an ``id_key``.
    """

    def __init__(self, pool: Pool, store: Store, listener: Listener, nursery: trio.Nursery | None) -> None:
        """Use ``connect``. A nursery: the listener is not running, and is started there when first needed."""
        self._pool = pool
        self._store = store
        self._listener = listener
        self._nursery = nursery
        self._waiters: dict[int, set[trio.Event]] = {}
        self._announcements: str | None = None
        self._closed = False
        listener.on_connected(self._wake_all)

    @property
    def schema(self) -> str:
        """The schema that holds the installation."""
        return self._store.schema

    def close(self) -> None:
        """Refuse further calls."""
        self._closed = True

    def connection(self) -> AbstractAsyncContextManager[TrioConnection]:
        """Lend a pooled psycopg connection for an ``async with`` block, in autocommit. It must not leave the block.

        Entering raises ``ConnectionLost`` when none can be had in time, and ``ClientClosed``.
        """
        if self._closed:
            raise ClientClosed("this client is closed")
        return self._pool.connection()

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[TrioConnection]:
        """Lend a connection in a transaction, for ``connection=``: the block's end commits, an exception rolls back."""
        async with self.connection() as connection, connection.transaction():
            yield connection

    def _on(self, connection: TrioConnection | None) -> AbstractAsyncContextManager[TrioConnection]:
        return self.connection() if connection is None else nullcontext(connection)

    # queues

    async def create_queue(self, queue: ANY) -> str:
        """Make sure that a queue exists, and its dead-letter queue if that was given as a queue.

        Returns ``created``, ``exists``, or ``differs: …``, which changes nothing.

        Raises ``InvalidOption`` and ``UnknownQueue`` (its dead-letter queue does not exist).
        """
        async with self.connection() as connection:
            for needed in queue.with_dead_letters():
                done = await self._store.create_queue(connection, needed.name, to_json(needed.options))
        return done

    async def update_queue(self, queue: ANY) -> None:
        """Give the queue in the database the options declared here; jobs sent from then on inherit them."""
        async with self.connection() as connection:
            await self._store.update_queue(connection, queue.name, to_json(queue.options))

    async def delete_queue(self, queue: ANY | str) -> int:
        """Delete a queue with all its jobs; returns how many.

        Raises ``UnknownQueue``, and ``InvalidOption`` while another queue names it as dead letter.
        """
        async with self.connection() as connection:
            return await self._store.delete_queue(connection, _name(queue))

    # send

    async def send(
        self,
        queue: Queue[In, Out],
        data: In,
        /,
        *,
        connection: TrioConnection | None = None,
        **options: Unpack[SendOptions],
    ) -> Sent[Out]:
        """Send one job.

        Args:
            queue: the queue; it must exist in the database.
            data: of the queue's declared type.
            connection: send in the transaction that is open on this connection; the job appears when it commits.
            options: see ``SendOptions``.

        Raises:
            InvalidData: it is not of that type, not JSON, or too large.
            InvalidOption: an option that does not exist, or a bad value.
            UnknownQueue: there is no such queue.
            ConnectionLost: it may or may not have been sent.
        """
        text = queue.encode(data)
        async with self._on(connection) as on:
            job_id, created = await self._store.send(on, queue.name, text, options)
        return Sent(job_id, created, queue)

    async def send_many(
        self,
        queue: Queue[In, Out],
        jobs: Iterable[In | NewJob[In]],
        /,
        *,
        connection: TrioConnection | None = None,
    ) -> list[Sent[Out]]:
        """Send many jobs with one statement, all or none. Returns them in order; raises as ``send``."""
        entries = [
            (queue.encode(job.data), job.options) if isinstance(job, NewJob) else (queue.encode(job), {})
            for job in jobs
        ]
        async with self._on(connection) as on:
            rows = await self._store.send_many(on, queue.name, entries)
        return [Sent(job_id, created, queue) for job_id, created in rows]

    # look

    async def get(self, job: Sent[Any] | int) -> JobRecord:
        """Look at a job in any state. Raises ``JobNotFound``."""
        async with self.connection() as connection:
            # Looked for twice: a job that finished into a leaf attached since the first look was planned is not in it.
            record = await self._store.job(connection, _id(job)) or await self._store.job(connection, _id(job))
        if record is None:
            raise JobNotFound(f"no job {_id(job)}: it never was, was deleted, or was not kept any longer")
        return record

    async def jobs(
        self, *, queue: ANY | str | None = None, state: str | None = None, limit: int = 50
    ) -> list[JobRecord]:
        """The newest jobs, of a queue or in a state."""
        async with self.connection() as connection:
            return await self._store.jobs(connection, None if queue is None else _name(queue), state, limit)

    async def queue_stats(self) -> list[dict[str, Any]]:
        """The rows of ``notifyq.queue_stats``."""
        async with self.connection() as connection:
            return await self._store.view(connection, "queue_stats")

    async def runtimes(self) -> list[dict[str, Any]]:
        """The rows of ``notifyq.runtimes``."""
        async with self.connection() as connection:
            return await self._store.view(connection, "runtimes")

    @overload
    async def result(self, job: Sent[T]) -> T: ...
    @overload
    async def result(self, job: int) -> Any: ...
    async def result(self, job: Sent[Any] | int) -> Any:
        """Wait until a job has finished and return its output, as the queue's declared type.

        It waits for the announcement of the job's end, for as long as it takes: wrap it in ``trio.fail_after``.

        Raises:
            JobFailed: it ended as failed or cancelled.
            JobNotFound: there is no such job, or its queue keeps no finished jobs.
            InvalidData: the stored output is not of the declared type.
        """
        record = await self.get(job)
        if not _finished(record):
            async with self.connection() as connection:
                info = await self._store.queue(connection, record.queue)
            if not info.kept:
                raise JobNotFound(f"queue {record.queue!r} keeps no finished jobs (retention 0), so it has no results")
            await self._hear_announcements()
            async with self._listener.interest(info.number):
                record = await self._wait_finished(record.id, info.number)
        if record.state != "completed":
            error = record.error or {}
            raise JobFailed(record.id, record.state, error.get("type"), error.get("message"))
        if isinstance(job, Sent):
            return from_json(record.output, job.queue.output_type)
        return record.output

    async def _wait_finished(self, job_id: int, queue: int) -> JobRecord:
        while True:
            announced = trio.Event()
            waiters = self._waiters.setdefault(job_id, set())
            waiters.add(announced)
            try:
                await self._wait_settles(queue)
                record = await self.get(job_id)
                if _finished(record):
                    return record
                with trio.move_on_after(RESULT_POLL if self._listener.up else 1.0):
                    await announced.wait()
            finally:
                waiters.discard(announced)
                if not waiters:
                    del self._waiters[job_id]

    async def _wait_settles(self, queue: int) -> None:
        """Wait until no settle is under way that began before we held interest: those announce nothing."""
        for pause in (0.001, 0.002, 0.004, 0.005, 0.005, 0.005, 0.01, 0.02, 0.05):
            async with self.connection() as connection:
                if await self._store.no_settle_under_way(connection, queue):
                    return
            await trio.sleep(pause)

    async def _hear_announcements(self) -> None:
        if self._announcements is not None:
            return
        async with self.connection() as connection:
            self._announcements = await self._store.channel(connection, -1)
        self._listener.add_channel(self._announcements, self._announced)
        if self._nursery is not None:
            await self._nursery.start(self._listener.run)
        else:
            with contextlib.suppress(ConnectionLost):
                await self._listener.listen(self._announcements, self._announced)

    def _announced(self, payload: str) -> None:
        if self._waiters:
            for text in payload.split(","):
                for waiter in self._waiters.get(int(text), ()):
                    waiter.set()

    def _wake_all(self) -> None:
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.set()

    # work by hand

    async def fetch(self, queue: Queue[In, Any], how_many: int = 1, *, lease: float | None = None) -> list[Job[In]]:
        """Claim up to ``how_many`` jobs by hand; none if there are none.

        Settle each with ``complete`` or ``fail`` within ``lease`` seconds (default: its timeout), or it is claimed anew.
        Raises ``UnknownQueue``, ``InvalidOption`` and ``InvalidData`` (that job's attempt has failed for good).
        """
        async with self.connection() as connection:
            claimed = await self._store.claim(connection, queue.name, how_many, None, lease=lease)
        return [
            Job(
                c.id, queue.name, c.attempt, c.retry_limit, c.priority, c.timeout, c.sent_at,
                from_json(c.data, queue.data_type), c.headers or {}, c.provenance,
            )
            for c in claimed
        ]  # fmt: skip

    async def complete(self, job: Job[Any], output: Any = None) -> bool:
        """Complete a job fetched by hand; False, and nothing changes, if it was not ours any longer."""
        async with self.connection() as connection:
            return bool(await self._store.complete(connection, [job.id], f"[{to_json(output)}]", [job.attempt], None))

    async def fail(
        self, job: Job[Any], error: Exception | str, *, final: bool = False, retry_in: float | None = None
    ) -> bool:
        """Fail the attempt of a job fetched by hand; it is retried as its options say, or in ``retry_in`` seconds.

        False, and nothing changes, if it was not ours any longer.
        """
        type_ = type(error).__name__ if isinstance(error, Exception) else "Error"
        errors = to_json([{"type": type_, "message": str(error)}])
        async with self.connection() as connection:
            return bool(await self._store.fail(connection, [job.id], errors, [job.attempt], None, [final], [retry_in]))

    async def touch(self, job: Job[Any], seconds: float) -> None:
        """Give a job fetched by hand so many seconds from now. Raises ``LeaseLost``."""
        async with self.connection() as connection:
            if not await self._store.touch(connection, job.id, seconds, job.attempt, None):
                raise LeaseLost(job.id, job.attempt)

    # operate

    async def cancel(self, *jobs: Sent[Any] | int) -> list[int]:
        """Cancel jobs: waiting ones at once, running ones by request to their runtime. Returns the ids affected."""
        async with self.connection() as connection:
            return await self._store.cancel(connection, _ids(jobs))

    async def retry(self, *jobs: Sent[Any] | int) -> list[int]:
        """Give failed jobs one more attempt, at once. Returns the ids affected."""
        async with self.connection() as connection:
            return await self._store.retry(connection, _ids(jobs))

    async def resume(self, *jobs: Sent[Any] | int) -> list[int]:
        """Put cancelled jobs back in line. Returns the ids affected."""
        async with self.connection() as connection:
            return await self._store.resume(connection, _ids(jobs))

    async def delete(self, *jobs: Sent[Any] | int) -> list[int]:
        """Delete jobs in any state. Returns the ids affected."""
        async with self.connection() as connection:
            return await self._store.delete(connection, _ids(jobs))

    async def delete_all(self, queue: ANY | str, state: str | None = None) -> int:
        """Delete a queue's jobs in one state, its ``waiting`` or ``finished`` ones, or all; returns how many."""
        async with self.connection() as connection:
            return await self._store.delete_all(connection, _name(queue), state)

    async def redrive(
        self,
        dead_letter: ANY | str,
        *,
        source: ANY | str | None = None,
        error_type: str | None = None,
        how_many: int | None = None,
        preview: bool = False,
    ) -> list[tuple[int, str, int | None]]:
        """Send dead letters back to the queues they came from, oldest first.

        Returns (id of the dead letter, queue, id of the new job); with ``preview`` nothing changes and the last is None.
        """
        async with self.connection() as connection:
            return await self._store.redrive(
                connection, _name(dead_letter), None if source is None else _name(source), error_type, how_many, preview
            )


def _name(queue: ANY | str) -> str:
    return queue if isinstance(queue, str) else queue.name


def _id(job: Sent[Any] | int) -> int:
    return job if isinstance(job, int) else job.id


def _ids(jobs: Sequence[Sent[Any] | int]) -> list[int]:
    return [_id(job) for job in jobs]


def _finished(record: JobRecord) -> bool:
    return record.state in ("completed", "failed", "cancelled")

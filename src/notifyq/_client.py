"""The client: sends jobs, looks at them, waits for results, works by hand, operates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, get_args, overload

from ._codec import from_json, to_json
from ._errors import ClientClosed, InvalidData, InvalidOption, JobFailed, LeaseLost
from ._models import In, Job, JobRecord, NewJob, Out, SendOptions, Sent, State
from ._queue import Queue, job_of
from ._results import Results, has_finished
from ._sql import flag, seconds, text, whole

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from datetime import timedelta

    from ._connection import TrioConnection
    from ._listener import Listener
    from ._pool import Pool
    from ._store import Store

T = TypeVar("T")

__all__ = ["Client"]

ANY = Queue[Any, Any]


class Client:
    """What ``connect`` gives. Safe to use from many tasks at once.

    Every call is one transaction of its own, unless you pass ``connection``. Cancelling a call rolls it back if the
    server has not committed it yet; a send that must not happen twice needs an ``id_key``.
    """

    def __init__(self, pool: Pool, store: Store, listener: Listener, run_listener: Callable[[], None] | None) -> None:
        """Use ``connect``. ``run_listener`` starts the listener when it is first needed; None: it is running."""
        self._pool = pool
        self._store = store
        self._results = Results(pool, store, listener, run_listener)
        self._closed = False

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
        self._check_open()
        return self._pool.connection()

    def _check_open(self) -> None:
        if self._closed:
            raise ClientClosed("this client is closed")

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
        async with self.transaction() as connection:
            for needed in _queue(queue).with_dead_letters():
                done = await self._store.create_queue(connection, needed.name, to_json(needed.options))
        return done

    async def update_queue(self, queue: ANY) -> None:
        """Give the queue in the database the options declared here; jobs sent from then on inherit them."""
        async with self.connection() as connection:
            await self._store.update_queue(connection, _queue(queue).name, to_json(queue.options))

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
        text = _queue(queue).encode(data)
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
        _queue(queue)
        if isinstance(jobs, str) or not isinstance(jobs, Iterable):
            raise InvalidOption(f"jobs must be a sequence of data or NewJobs, not {jobs!a:.100}")
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
        self._check_open()
        return await self._results.look(_id(job))

    async def jobs(
        self, *, queue: ANY | str | None = None, state: str | None = None, limit: int = 50
    ) -> list[JobRecord]:
        """The newest jobs, of a queue or in a state. Raises ``InvalidOption`` for what is not a state."""
        if state is not None and state not in get_args(State):
            raise InvalidOption(f"{state!a:.100} is not a state: use one of {', '.join(get_args(State))}")
        whole(limit, "limit", 0, 2**31 - 1)
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
        if not has_finished(record):
            record = await self._results.wait(record)
        if record.state != "completed":
            error = record.error or {}
            raise JobFailed(record.id, record.state, error.get("type"), error.get("message"))
        if isinstance(job, Sent):
            return from_json(record.output, job.queue.output_type)
        return record.output

    # work by hand

    async def fetch(
        self, queue: Queue[In, Any], how_many: int = 1, *, lease: float | timedelta | None = None
    ) -> list[Job[In]]:
        """Claim up to ``how_many`` jobs by hand; none if there are none.

        Settle each with ``complete`` or ``fail`` within ``lease`` seconds (default: its timeout), or it is claimed anew.
        One whose data is not of the declared type fails for good, as ``data_invalid``, and is not among them.

        Raises ``UnknownQueue`` and ``InvalidOption``.
        """
        whole(how_many, "how_many", 1, 100_000)
        hold = None if lease is None else seconds(lease, "lease")
        async with self.connection() as connection:
            claimed = await self._store.claim(connection, _queue(queue).name, how_many, None, lease=hold)
            jobs = []
            for one in claimed:
                try:
                    jobs.append(job_of(one, queue))
                except InvalidData as error:
                    failed = to_json([{"type": "data_invalid", "message": str(error)[:2000]}])
                    await self._store.fail(connection, [one.id], failed, [one.attempt], None, [True], [None])
            return jobs

    async def complete(self, job: Job[Any], output: Any = None) -> bool:
        """Complete a job fetched by hand; False, and nothing changes, if it was not ours any longer."""
        outputs = f"[{to_json(output)}]"
        async with self.connection() as connection:
            return bool(await self._store.complete(connection, [_fetched(job).id], outputs, [job.attempt], None))

    async def fail(
        self, job: Job[Any], error: Exception | str, *, final: bool = False, retry_in: float | timedelta | None = None
    ) -> bool:
        """Fail the attempt of a job fetched by hand; it is retried as its options say, or in ``retry_in`` seconds.

        False, and nothing changes, if it was not ours any longer.
        """
        _fetched(job)
        type_ = type(error).__name__ if isinstance(error, Exception) else "Error"
        errors = to_json([{"type": type_, "message": str(error)}])
        delay = None if retry_in is None else seconds(retry_in, "retry_in", least=0.0)
        flag(final, "final")
        async with self.connection() as connection:
            return bool(await self._store.fail(connection, [job.id], errors, [job.attempt], None, [final], [delay]))

    async def touch(self, job: Job[Any], extend: float | timedelta, /) -> None:
        """Give a job fetched by hand so many seconds from now. Raises ``LeaseLost`` and ``InvalidOption``."""
        _fetched(job)
        more = seconds(extend, "touch", least=0.0)
        async with self.connection() as connection:
            if not await self._store.touch(connection, job.id, more, job.attempt, None):
                raise LeaseLost(job.id, job.attempt)

    # operate

    async def cancel(self, *jobs: Sent[Any] | int) -> list[int]:
        """Cancel jobs: waiting ones at once, running ones by request to their runtime. Returns the ids affected."""
        async with self.connection() as connection:
            return await self._store.operate(connection, "cancel", _ids(jobs))

    async def retry(self, *jobs: Sent[Any] | int) -> list[int]:
        """Give failed jobs one more attempt, at once. Returns the ids affected."""
        async with self.connection() as connection:
            return await self._store.operate(connection, "retry", _ids(jobs))

    async def resume(self, *jobs: Sent[Any] | int) -> list[int]:
        """Put cancelled jobs back in line. Returns the ids affected."""
        async with self.connection() as connection:
            return await self._store.operate(connection, "resume", _ids(jobs))

    async def delete(self, *jobs: Sent[Any] | int) -> list[int]:
        """Delete jobs in any state. Returns the ids affected."""
        async with self.connection() as connection:
            return await self._store.operate(connection, "delete", _ids(jobs))

    async def delete_all(self, queue: ANY | str, state: str | None = None) -> int:
        """Delete a queue's jobs in one state, its ``waiting`` or ``finished`` ones, or all; returns how many."""
        if state is not None and (not isinstance(state, str) or state not in (*get_args(State), "waiting", "finished")):
            raise InvalidOption(f"{state!a:.100} is not a state: use waiting, finished, {', '.join(get_args(State))}")
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
        if how_many is not None:
            whole(how_many, "how_many", 1, 2**31 - 1)
        if error_type is not None:
            text(error_type, "error_type")
        flag(preview, "preview")
        async with self.connection() as connection:
            return await self._store.redrive(
                connection, _name(dead_letter), None if source is None else _name(source), error_type, how_many, preview
            )


def _queue(queue: Queue[In, Out]) -> Queue[In, Out]:
    if not isinstance(queue, Queue):
        raise InvalidOption(f"give the queue's declaration, not {queue!a:.100}: notifyq.Queue(name)")
    return queue


def _name(queue: ANY | str) -> str:
    return text(queue, "queue") if isinstance(queue, str) else _queue(queue).name


def _fetched(job: Job[Any]) -> Job[Any]:
    if not isinstance(job, Job):
        raise InvalidOption(f"give the job that fetch() returned, not {job!a:.100}")
    return job


def _id(job: Sent[Any] | int) -> int:
    return whole(job.id if isinstance(job, Sent) else job, "a job's id", 1, 2**63 - 1)


def _ids(jobs: Sequence[Sent[Any] | int]) -> list[int]:
    return [_id(job) for job in jobs]

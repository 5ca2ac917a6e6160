"""What a client does beside sending: queues, looking at jobs, operating on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any, get_args

from ._codec import encode_untyped, to_json
from ._connection import TrioConnection
from ._declare import declare
from ._errors import ClientClosed, InvalidOption, shown
from ._models import FlowJob, In, JobRecord, Out, Parent, Sent, State
from ._queue import Queue
from ._sql import KEY_MAX, flag, plain_options, text, whole

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from datetime import datetime, timedelta

    from ._pool import Pool
    from ._store import Store

__all__ = ["Operator", "declared", "job_id", "queue_name"]

ANY = Queue[Any, Any]

UNCHANGED: Any = object()
"""Stands for what was not given, where None is a value, too."""


class Operator:
    """The part of ``Client`` that its other part stands on."""

    def __init__(self, pool: Pool, store: Store) -> None:
        self._pool = pool
        self._store = store
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
        if connection is None:
            return self.connection()
        if not isinstance(connection, TrioConnection):
            raise InvalidOption(
                f"connection must be one that this client, or a worker's transaction, lends, not {shown(connection)};"
                " for others there is Queue.statement"
            )
        return nullcontext(connection)

    def _ids(self, jobs: Sequence[Sent[Any] | int]) -> list[int]:
        return [job_id(job, self.schema) for job in jobs]

    # queues

    async def create_queue(self, queue: ANY) -> str:
        """Make sure that a queue exists, and its dead-letter queue if that was given as a queue.

        Returns ``created``, ``exists``, or ``differs: …``, which changes nothing.

        Raises ``InvalidOption`` and ``UnknownQueue`` (its dead-letter queue does not exist).
        """
        async with self.transaction() as connection:
            for needed in declared(queue).with_dead_letters():
                done = await self._store.create_queue(connection, needed.name, to_json(needed.options))
        return done

    async def declare(self, queues: Iterable[ANY]) -> dict[str, str]:
        """Make what a runtime makes when it starts: these queues and their dead-letter queues, and their schedules.

        For an operator's role, so that runtimes need no right to do it. All or nothing.

        Returns, by queue, ``created``, ``exists``, or ``differs: …``, which changes nothing (``update_queue`` does).

        Raises ``InvalidOption``, ``InvalidData``, ``UnknownQueue`` (a dead-letter queue given by name) and
        ``MissingPrivilege``.
        """
        if not isinstance(queues, Iterable) or isinstance(queues, str | bytes):
            raise InvalidOption(f"queues must be a list of queues' declarations, not {shown(queues)}")
        given = [queue if isinstance(queue, Queue) else declared(queue) for queue in queues]
        async with self.transaction() as connection:
            return await declare(connection, self._store, given)

    async def update_queue(self, queue: ANY) -> None:
        """Give the queue in the database the options declared here; jobs sent from then on inherit them."""
        async with self.connection() as connection:
            await self._store.update_queue(connection, declared(queue).name, to_json(queue.options))

    async def delete_queue(self, queue: ANY | str) -> int:
        """Delete a queue with all its jobs; returns how many.

        Raises ``UnknownQueue``, and ``InvalidOption`` while another queue names it as dead letter.
        """
        async with self.connection() as connection:
            return await self._store.delete_queue(connection, queue_name(queue))

    async def pause(self, queue: ANY | str) -> bool:
        """Let nobody start jobs of a queue until ``resume_queue``; False if it was paused already.

        What runs goes on to its end; what was claimed and has not started is handed back; sends go on. Runtimes learn of
        it at once, or, if the notification was lost, with their next beat (about 5 s): from the commit on, nothing is
        claimed. Raises ``UnknownQueue``.
        """
        async with self.connection() as connection:
            return await self._store.pause(connection, queue_name(queue))

    async def resume_queue(self, queue: ANY | str) -> bool:
        """Let the jobs of a paused queue start again; False if it was not paused. Raises ``UnknownQueue``."""
        async with self.connection() as connection:
            return await self._store.resume_queue(connection, queue_name(queue))

    # look

    async def jobs(
        self, *, queue: ANY | str | None = None, state: str | None = None, limit: int = 50
    ) -> list[JobRecord]:
        """The newest jobs, of a queue or in a state. Raises ``InvalidOption`` for what is not a state."""
        if state is not None and state not in get_args(State):
            raise InvalidOption(f"{shown(state)} is not a state: use one of {', '.join(get_args(State))}")
        whole(limit, "limit", 0, 2**31 - 1)
        async with self.connection() as connection:
            return await self._store.jobs(connection, None if queue is None else queue_name(queue), state, limit)

    async def queue_stats(self) -> list[dict[str, Any]]:
        """The rows of ``notifyq.queue_stats``."""
        async with self.connection() as connection:
            return await self._store.view(connection, "queue_stats")

    async def runtimes(self) -> list[dict[str, Any]]:
        """The rows of ``notifyq.runtimes``."""
        async with self.connection() as connection:
            return await self._store.view(connection, "runtimes")

    async def blocked_keys(self) -> list[dict[str, Any]]:
        """The rows of ``notifyq.blocked_keys``: what holds jobs back."""
        async with self.connection() as connection:
            return await self._store.view(connection, "blocked_keys")

    async def parents(self, job: Sent[Any] | int) -> list[Parent]:
        """The jobs that a job came after in its flow, with their outputs."""
        async with self.connection() as connection:
            return await self._store.flows.parents(connection, job_id(job, self.schema))

    async def flow(self, job: Sent[Any] | int) -> list[FlowJob]:
        """All jobs of the flow that a job belongs to; none if it belongs to none."""
        async with self.connection() as connection:
            return await self._store.flows.flow(connection, job_id(job, self.schema))

    # operate

    async def update_job(
        self,
        job: Sent[Any] | int | None = None,
        /,
        *,
        queue: ANY | str | None = None,
        key: str | None = None,
        id_key: str | None = None,
        data: Any = UNCHANGED,
        priority: int | None = None,
        delay: float | timedelta | datetime | None = None,
        connection: TrioConnection | None = None,
    ) -> int | None:
        """Edit a job that waits: its data, its priority, when it starts; what is left out stays. An active one isn't edited.

        Args:
            job: which, or
            queue: with ``key`` (the one of that key that is next in line) or ``id_key``.
            data: of the queue's declared type, if that is known here; else JSON, or what cattrs turns into it.
            priority: see ``SendOptions``.
            delay: see ``SendOptions``; 0 starts a delayed job at once.
            connection: edit in the transaction that is open on this connection.

        Returns:
            The job's id, or None if none waits.

        Raises:
            InvalidOption: it is named in no way or in two, nothing is to be changed, or a bad value.
            InvalidData: it is not of the queue's type, not JSON, or too large.
            UnknownQueue: there is no such queue.
        """
        named = sum(value is not None for value in (job, key, id_key))
        if named != 1 or (job is None) != (queue is not None):
            raise InvalidOption("name the job by its id alone, or by queue and key, or by queue and id_key")
        for name, value in (("key", key), ("id_key", id_key)):
            if value is not None:
                text(value, name, at_most=KEY_MAX)
        if data is UNCHANGED and priority is None and delay is None:
            raise InvalidOption("give what is to be changed: data, priority or delay")
        declaration = job.queue if isinstance(job, Sent) else queue
        encoded = None
        if data is not UNCHANGED:
            encoded = declaration.encode(data) if isinstance(declaration, Queue) else encode_untyped(data)
        plain = plain_options({"priority": priority, "delay": delay})
        async with self._on(connection) as on:
            return await self._store.flows.update_job(
                on,
                None if job is None else job_id(job, self.schema),
                None if queue is None else queue_name(queue),
                key,
                id_key,
                encoded,
                priority,
                plain.get("delay"),
                plain.get("due_at"),
            )

    async def cancel(self, *jobs: Sent[Any] | int, connection: TrioConnection | None = None) -> list[int]:
        """Cancel jobs: waiting ones at once, running ones by request to their runtime. Returns the ids affected.

        With ``connection`` in the transaction that is open on it: with its rollback nothing has been done.
        """
        async with self._on(connection) as on:
            return await self._store.operate(on, "cancel", self._ids(jobs))

    async def retry(self, *jobs: Sent[Any] | int, connection: TrioConnection | None = None) -> list[int]:
        """Give failed jobs one more attempt, at once. Returns the ids affected. ``connection`` as for ``cancel``.

        Where the queue's policy lets one of a key wait, a job whose key another one has by now is not.
        """
        async with self._on(connection) as on:
            return await self._store.operate(on, "retry", self._ids(jobs))

    async def resume(self, *jobs: Sent[Any] | int, connection: TrioConnection | None = None) -> list[int]:
        """Put cancelled jobs back in line, but for those that ``retry`` would leave, too. Returns the ids affected.

        ``connection`` as for ``cancel``.
        """
        async with self._on(connection) as on:
            return await self._store.operate(on, "resume", self._ids(jobs))

    async def delete(self, *jobs: Sent[Any] | int, connection: TrioConnection | None = None) -> list[int]:
        """Delete jobs in any state. Returns the ids affected. ``connection`` as for ``cancel``."""
        async with self._on(connection) as on:
            return await self._store.operate(on, "delete", self._ids(jobs))

    async def delete_all(self, queue: ANY | str, state: str | None = None) -> int:
        """Delete a queue's jobs in one state, its ``waiting`` or ``finished`` ones, or all; returns how many."""
        if state is not None and (not isinstance(state, str) or state not in (*get_args(State), "waiting", "finished")):
            raise InvalidOption(f"{shown(state)} is not a state: use waiting, finished, {', '.join(get_args(State))}")
        async with self.connection() as connection:
            return await self._store.delete_all(connection, queue_name(queue), state)

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
                connection,
                queue_name(dead_letter),
                None if source is None else queue_name(source),
                error_type,
                how_many,
                preview,
            )


def declared(queue: Queue[In, Out]) -> Queue[In, Out]:
    if not isinstance(queue, Queue):
        raise InvalidOption(f"give the queue's declaration, not {shown(queue)}: notifyq.Queue(name)")
    return queue.single()


def queue_name(queue: ANY | str) -> str:
    return text(queue, "queue") if isinstance(queue, str) else declared(queue).name


def job_id(job: Sent[Any] | int, schema: str) -> int:
    return whole(job.id_in(schema) if isinstance(job, Sent) else job, "a job's id", 1, 2**63 - 1)

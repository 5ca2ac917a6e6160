"""The client: sends jobs, waits for results, works by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

from ._codec import encode_untyped, from_json, to_json
from ._errors import InvalidData, InvalidOption, JobFailed, LeaseLost, shown
from ._flow import Flow, SentFlow
from ._models import In, Job, JobRecord, NewJob, Out, SendOptions, Sent
from ._operator import declared, job_id
from ._planner import Planner
from ._queue import Queue, job_of
from ._results import Results, has_finished
from ._sql import KEY_MAX, flag, plain_options, seconds, text, whole
from ._verdict import failure_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime, timedelta

    from ._connection import TrioConnection
    from ._listener import Listener
    from ._pool import Pool
    from ._store import Store

T = TypeVar("T")

__all__ = ["Client"]


class Client(Planner):
    """What ``connect`` gives. Safe to use from many tasks at once.

    Every call is one transaction of its own, unless you pass ``connection``. Cancelling a call rolls it back if the
    server has not committed it yet; a send that must not happen twice needs an ``id_key``.
    """

    def __init__(self, pool: Pool, store: Store, listener: Listener, run_listener: Callable[[], None] | None) -> None:
        """Use ``connect``. ``run_listener`` starts the listener when it is first needed; None: it is running."""
        super().__init__(pool, store)
        self._results = Results(pool, store, listener, run_listener)

    def close(self) -> None:
        """Refuse further calls, and tell who waits for results."""
        super().close()
        self._results.close()

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
        text = declared(queue).encode(data)
        async with self._on(connection) as on:
            job_id, created = await self._store.send(on, queue.name, text, options)
        return Sent(job_id, created, queue, schema=self.schema)

    async def send_many(
        self,
        queue: Queue[In, Out],
        jobs: Iterable[In | NewJob[In]],
        /,
        *,
        connection: TrioConnection | None = None,
    ) -> list[Sent[Out]]:
        """Send many jobs with one statement, all or none. Returns them in order; raises as ``send``."""
        declared(queue)
        if isinstance(jobs, str) or not isinstance(jobs, Iterable):
            raise InvalidOption(f"jobs must be a sequence of data or NewJobs, not {shown(jobs)}")
        entries = [
            (queue.encode(job.data), job.options) if isinstance(job, NewJob) else (queue.encode(job), {})
            for job in jobs
        ]
        async with self._on(connection) as on:
            rows = await self._store.send_many(on, queue.name, entries)
        return [Sent(job_id, created, queue, schema=self.schema) for job_id, created in rows]

    # look

    async def send_flow(self, flow: Flow, /, *, connection: TrioConnection | None = None) -> SentFlow:
        """Send jobs that wait for each other, all or none.

        A job starts within milliseconds of the end of the last one that it comes after, in whichever process.

        Raises ``UnknownQueue``; ``InvalidOption`` for an empty flow, a job before it that does not exist or has failed, and
        a job whose key its queue's policy has taken.
        """
        if not isinstance(flow, Flow):
            raise InvalidOption(f"send_flow takes a notifyq.Flow, not {shown(flow)}")
        async with self._on(connection) as on:
            return flow.sent(await self._store.flows.send_flow(on, flow.as_json(self.schema)), self.schema)

    async def upsert(
        self,
        queue: Queue[In, Out],
        data: In,
        /,
        *,
        key: str,
        priority: int | None = None,
        delay: float | timedelta | datetime | None = None,
        connection: TrioConnection | None = None,
    ) -> Sent[Out]:
        """Edit the job of this key that waits, or send one, atomically; ``created`` says which. Raises as ``send``.

        While the key's job is active on a queue whose policy is ``exclusive``, neither can be done: as a refused send it
        gives that job, and ``created`` is False.
        """
        encoded = declared(queue).encode(data)
        text(key, "key", at_most=KEY_MAX)
        plain = plain_options({"priority": priority, "delay": delay})
        async with self._on(connection) as on:
            job, created = await self._store.flows.upsert(
                on, queue.name, encoded, key, priority, plain.get("delay"), plain.get("due_at")
            )
        return Sent(job, created, queue, schema=self.schema)

    async def get(self, job: Sent[Any] | int) -> JobRecord:
        """Look at a job in any state. Raises ``JobNotFound``; ``InvalidData`` if Python cannot read what SQL has stored."""
        self._check_open()
        return await self._results.look(job_id(job, self.schema))

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
            InvalidData: the stored output is not of the declared type, or the job is nested too deeply to be read.
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
            claimed = await self._store.claim_by_hand(connection, declared(queue).name, how_many, lease=hold)
            jobs = []
            for one in claimed:
                try:
                    jobs.append(job_of(one, queue))
                except InvalidData as error:
                    failed = to_json([{"type": "data_invalid", "message": str(error)[:2000]}])
                    await self._store.fail(connection, [one.id], failed, [one.attempt], None, [True], [None])
            return jobs

    async def complete(self, job: Job[Any], output: Any = None, *, connection: TrioConnection | None = None) -> bool:
        """Complete a job fetched by hand; False, and nothing changes, if it was not ours any longer.

        ``output``: JSON, or what cattrs turns into it. With ``connection`` in the transaction that is open on it, with
        what else you write there. Raises ``InvalidData``.
        """
        outputs = f"[{encode_untyped(output)}]"
        async with self._on(connection) as on:
            return bool(await self._store.complete(on, [_fetched(job).id], outputs, [job.attempt], None))

    async def fail(
        self,
        job: Job[Any],
        error: Exception | str,
        *,
        final: bool = False,
        retry_in: float | timedelta | None = None,
        connection: TrioConnection | None = None,
    ) -> bool:
        """Fail the attempt of a job fetched by hand; it is retried as its options say, or in ``retry_in`` seconds.

        ``error`` is kept as a worker's is: its type, message and traceback, cut short. ``notifyq.Fail`` is final,
        ``notifyq.Retry`` says when. False, and nothing changes, if it was not ours any longer. ``connection`` as for
        ``complete``. Raises ``InvalidOption``.
        """
        failed = failure_of(_fetched(job), error)
        errors = to_json([{"type": failed.type, "message": failed.message, "traceback": failed.traceback}])
        delay = failed.retry_in if retry_in is None else seconds(retry_in, "retry_in", least=0.0)
        final = flag(final, "final") or failed.final
        async with self._on(connection) as on:
            return bool(await self._store.fail(on, [job.id], errors, [job.attempt], None, [final], [delay]))

    async def touch(self, job: Job[Any], extend: float | timedelta, /) -> None:
        """Give a job fetched by hand so many seconds from now. Raises ``LeaseLost`` and ``InvalidOption``."""
        _fetched(job)
        more = seconds(extend, "touch", least=0.0)
        async with self.connection() as connection:
            if not await self._store.touch(connection, job.id, more, job.attempt, None):
                raise LeaseLost(job.id, job.attempt)


def _fetched(job: Job[Any]) -> Job[Any]:
    if not isinstance(job, Job):
        raise InvalidOption(f"give the job that fetch() returned, not {shown(job)}")
    return job

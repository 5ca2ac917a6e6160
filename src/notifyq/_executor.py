"""Runs one queue's jobs in a fixed number of slots. User code runs here and nowhere else; no SQL.

A slot takes what the claimer has, decodes it, runs the worker under the attempt's deadline and turns what happens
into an outcome. Whatever a handler does, its slot survives; what is not an ``Exception`` ends the runtime.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs
import trio

from ._errors import InvalidData, InvalidOption
from ._middleware import wrap
from ._queue import job_of
from ._verdict import data_invalid, interrupted, judge, judge_batch, timed_out
from .events import HandlerStuck

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Sequence

    from ._atomic import Atomic
    from ._claimer import Claimer
    from ._connection import TrioConnection
    from ._middleware import Middleware
    from ._models import Claimed, Job, JobHandle, Outcome
    from ._queue import Queue
    from .events import Events

__all__ = ["Executor"]

YIELD_EVERY = 0.005
"""Seconds a slot goes on with jobs that never wait before it lets others run."""


@attrs.define(eq=False)
class _Run:
    """One call of the worker under way."""

    jobs: list[Job[Any]]
    scope: trio.CancelScope
    reason: str | None = None
    """Why it is being cancelled: ``cancel``, ``lost``, ``shutdown`` or ``unstarted``; a timeout needs none."""
    given_up: bool = False
    """It ignored a timeout: its jobs were failed, and what it returns is refused."""
    connection: TrioConnection | None = None
    """In the transaction that it writes in, if it has one."""
    decided: bool = False
    """Its transaction is being committed: nothing that happens here can change the end."""


class Executor:
    """The slots of one queue."""

    def __init__(
        self,
        queue: Queue[Any, Any],
        *,
        claimer: Claimer,
        settle: Callable[[Outcome, str], None],
        settled: Callable[[], Awaitable[None]],
        handle: JobHandle,
        middleware: Sequence[Middleware],
        output_limit: int,
        events: Events,
        atomic: Atomic,
    ) -> None:
        """``settle`` takes an outcome and the queue's name; ``settled`` waits while too many are not written yet.

        ``atomic`` runs the handlers that complete their jobs in transactions of their own.
        """
        if queue.worker_function is None:
            raise InvalidOption(f"queue {queue.name!r} has no worker: register one with @queue.worker")
        self._queue = queue
        self._worker = queue.worker_function
        self._claimer = claimer
        self._settle = settle
        self._settled = settled
        self._handle = handle
        self._output_limit = output_limit
        self._events = events
        self._atomic = atomic
        self._runs: dict[int, _Run] = {}
        self._ended = trio.lowlevel.ParkingLot()
        self._threads = trio.CapacityLimiter(self._worker.concurrency)
        self._threads_awaited: set[trio.CancelScope] = set()
        self._call = wrap(self._innermost(), (*middleware, *self._worker.middleware))

    def _innermost(self) -> Callable[[Any], Awaitable[Any]]:
        function = self._worker.function
        if self._worker.transaction:
            return lambda job: function(job, self._runs[job.id].connection)
        if self._worker.kind != "sync":
            return function

        async def in_thread(job: Any) -> Any:
            # A thread can't be cancelled: the slot waits for it, unless the process is to end.
            with trio.CancelScope(shield=True) as waiting:
                self._threads_awaited.add(waiting)
                try:
                    return await trio.to_thread.run_sync(function, job, limiter=self._threads, abandon_on_cancel=True)
                finally:
                    self._threads_awaited.discard(waiting)
            await trio.lowlevel.checkpoint()  # only an executor that is being cancelled leaves its threads
            return None

        return in_thread

    def leave_threads(self) -> None:
        """Wait no longer for functions that run in threads: they are left behind, and what they return is dropped."""
        for waiting in list(self._threads_awaited):
            waiting.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run jobs until cancelled; a call under way is then cancelled, too (``drain`` first)."""
        async with trio.open_nursery() as nursery:
            for _ in range(self._worker.concurrency):
                nursery.start_soon(self._slot)
            task_status.started()

    async def wait_idle(self) -> None:
        """Wait until no worker function runs."""
        while self._runs:
            await self._ended.park()

    def cancel(self, job_ids: Container[int]) -> None:
        """Cancel the handlers of these jobs, as far as they run here; they end as cancelled."""
        for job_id, run in list(self._runs.items()):
            # A batch is one call, which can't be cancelled for one of its jobs: if that fails, it is not tried again.
            if job_id in job_ids and len(run.jobs) == 1:
                self._stop(run, "cancel")

    def running(self) -> set[tuple[int, int]]:
        """The attempts that run here, as (job, attempt), but those that are no longer ours."""
        ours = (run for run in self._runs.values() if not run.given_up and run.reason != "lost")
        return {(job.id, job.attempt) for run in ours for job in run.jobs}

    def keys(self) -> list[str]:
        """The key of each job whose handler has not returned."""
        return [job.key or "" for run in self._runs.values() for job in run.jobs]

    def together(self, job_id: int) -> list[Job[Any]]:
        """The running jobs of the call that handles this one, itself among them; none if it does not run here."""
        run = self._runs.get(job_id)
        return [] if run is None else run.jobs

    def extend(self, job_id: int, seconds: float) -> None:
        """Move the deadline of a running call to so many seconds from now."""
        run = self._runs.get(job_id)
        if run is not None:
            run.scope.deadline = trio.current_time() + seconds
            for job in run.jobs:
                job.deadline = run.scope.deadline

    def abandon(self, lost: Container[tuple[int, int]] | None) -> None:
        """Cancel the handlers of these attempts (None: all): they are somebody else's now."""
        for run in list(self._runs.values()):
            if lost is None or any((job.id, job.attempt) in lost for job in run.jobs):
                self._stop(run, "lost")

    def stop_all(self) -> None:
        """Cancel every handler; their jobs are tried again."""
        for run in list(self._runs.values()):
            started = run.connection is not None or not self._worker.transaction
            self._stop(run, "shutdown" if started else "unstarted")

    def _stop(self, run: _Run, reason: str) -> None:
        run.reason = run.reason or reason
        run.scope.cancel()

    def give_up_stuck(self) -> None:
        """Fail the jobs of handlers that ignore their timeout. The slot stays taken until the handler returns."""
        for run in list(self._runs.values()):
            late = run.scope.deadline < trio.current_time() - 1.0
            if late and not run.given_up and not run.decided and run.reason is None:
                run.given_up = True
                for job in run.jobs:
                    self._settle(timed_out(job), self._queue.name)
                    self._events.emit(HandlerStuck(f"job {job.id} of queue {job.queue} ignores its timeout"))

    async def _slot(self) -> None:
        rested = trio.current_time()
        while True:
            batch = await self._claimer.take(self._worker.batch_size)
            outcomes = await self._run(batch)
            for outcome in outcomes:
                self._settle(outcome, self._queue.name)
            for claimed in batch:
                self._claimer.finished(claimed)
            await self._settled()
            now = trio.current_time()
            if now > rested + YIELD_EVERY:
                await trio.lowlevel.checkpoint()
                rested = trio.current_time()

    async def _run(self, batch: list[Claimed]) -> list[Outcome]:
        jobs = []
        for claimed in batch:
            try:
                jobs.append(job_of(claimed, self._queue, self._handle))
            except InvalidData as error:
                self._settle(data_invalid(claimed.id, claimed.attempt, error), self._queue.name)
        return await self._run_jobs(jobs) if jobs else []

    async def _run_jobs(self, jobs: list[Job[Any]]) -> list[Outcome]:
        started = trio.current_time()
        timeout = jobs[0].timeout if len(jobs) == 1 else min(job.timeout for job in jobs)
        deadline = started + timeout
        run = _Run(jobs, trio.CancelScope(deadline=deadline))
        for job in jobs:
            job.deadline = deadline
            self._runs[job.id] = run
        error: Exception | None = None
        result: Any = None
        left: Outcome | None = None
        try:
            with run.scope:
                if self._worker.transaction:
                    left = await self._run_in_transaction(run)
                    run.decided = True
                else:
                    result = await self._call(jobs if self._worker.kind == "batch" else jobs[0])
        except Exception as raised:  # also what is left of a group whose other part was our cancelling
            error = raised
        finally:
            for job in jobs:
                if self._runs.get(job.id) is run:  # and not a later attempt's
                    del self._runs[job.id]
            if self._ended:
                self._ended.unpark_all()
        if run.given_up:
            return []
        if run.decided and error is None:
            return [] if left is None else [left]
        if run.scope.cancel_called:
            # Also when it returned nevertheless: a result that comes after the end was decided is refused.
            ended = run.scope.cancelled_caught or error is not None or trio.current_time() >= run.scope.deadline
            if ended or run.reason == "lost":
                return [outcome for job in jobs if (outcome := interrupted(job, run.reason)) is not None]
        rules = self._rules(started)
        if self._worker.kind == "batch":
            return judge_batch(jobs, result, error, **rules)
        return [judge(jobs[0], result, error, **rules)]

    def _rules(self, started: float) -> dict[str, Any]:
        return {
            "type_": self._queue.output_type,
            "limit": self._output_limit,
            "elapsed": trio.current_time() - started,
        }

    async def _run_in_transaction(self, run: _Run) -> Outcome | None:
        """Returns what is left to be settled. Raises what the handler raised: then nothing was written."""
        [job] = run.jobs
        started = 0.0
        run.scope.deadline = math.inf  # it does not run while it waits for a connection

        async def call(connection: TrioConnection) -> Any:
            nonlocal started
            started = trio.current_time()
            run.connection = connection
            run.scope.deadline = job.deadline = started + job.timeout
            return await self._call(job)

        def committing() -> None:
            run.decided = True

        return await self._atomic.run(
            job, call, lambda result: judge(job, result, None, **self._rules(started)), committing
        )

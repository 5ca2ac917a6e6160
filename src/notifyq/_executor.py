"""Runs one queue's jobs in a fixed number of slots. User code runs here and nowhere else; no SQL.

A slot takes what the claimer has, decodes it, runs the worker under the attempt's deadline and turns what happens
into an outcome. Whatever a handler does, its slot survives; what is not an ``Exception`` fails its attempt and ends the
runtime, and what runs beside it is tried again, as when the runtime is stopped.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs
import trio

from ._bell import Bell
from ._ending import being_cancelled, ends_all, survived
from ._errors import InvalidOption, LeaseLost
from ._leaks import CleanContext
from ._middleware import wrap
from ._queue import job_of
from ._threads import Threads
from ._verdict import data_invalid, interrupted, judge, judge_batch, timed_out
from .events import HandlerStuck

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Mapping, Sequence

    from ._answers import Claimed
    from ._atomic import Atomic
    from ._claimer import Claimer
    from ._connection import TrioConnection
    from ._middleware import Middleware
    from ._models import Job, JobHandle, Outcome
    from ._queue import Queue
    from .events import Events

__all__ = ["Executor"]

TURN = 0.005
"""Seconds that the slots together go on with jobs that never wait before they let claims, settles and all else run."""


@attrs.define(eq=False)
class _Run:
    """One slot's calls of the worker, one after the other, for as long as none of them is cancelled or comes too late.

    The scope is that of all of them; the other fields are those of the call under way.
    """

    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    batch: list[Claimed] = attrs.field(factory=list)
    """What was taken for the call under way; empty between two calls."""
    jobs: list[Job[Any]] = attrs.field(factory=list)
    """Those whose data could be read."""
    started: float = 0.0
    ended: float = 0.0
    deadline: float = math.inf
    """When it times out, on ``trio.current_time()``'s clock."""
    noted: bool = False
    """It is among those whose scopes get their deadline if they still run when that is next done."""
    cancelled: bool = False
    """Its scope was, or the call came too late or was given up: it serves for no further call."""
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
        settle: Callable[[Outcome, str], bool],
        settled: Callable[[], Awaitable[None]],
        handle: JobHandle,
        middleware: Sequence[Middleware],
        output_limit: int,
        events: Events,
        atomic: Atomic,
    ) -> None:
        """``settle`` takes an outcome and the queue's name. False: too many are not written; ``settled`` waits for that.
        ``atomic`` runs the handlers that complete their jobs in transactions of their own.
        """
        if queue.worker_function is None:
            raise InvalidOption(f"queue {queue.name!r} has no worker: register one with @queue.worker")
        self._queue, self._worker = queue, queue.worker_function
        self._claimer = claimer
        self._settle, self._settled = settle, settled
        self._handle, self._events, self._atomic = handle, events, atomic
        self._output_limit = output_limit
        self._runs: dict[int, _Run] = {}
        self._ended = trio.lowlevel.ParkingLot()
        self._turn_ends, self._turn_is_over = -math.inf, False
        self._set_out: list[_Run] = []
        self._watch = Bell()
        self.threads = Threads(self._worker.concurrency)
        self._call = wrap(self._innermost(), (*middleware, *self._worker.middleware))

    def _innermost(self) -> Callable[[Any], Awaitable[Any]]:
        function = self._worker.function
        if self._worker.transaction:
            return lambda job: function(job, self._connection_of(job))
        return self.threads.call(function) if self._worker.kind == "sync" else function

    def _connection_of(self, job: Job[Any]) -> TrioConnection | None:
        """Raises ``LeaseLost`` if a middleware held out until the job was taken away: it may run here again already."""
        run = self._runs.get(job.id)
        if run is None or run.jobs[0].attempt != job.attempt:
            raise LeaseLost(job.id, job.attempt)
        return run.connection

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run jobs until cancelled; a call under way is then cancelled, too (``wait_idle()`` first)."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_deadlines)
            for _ in range(self._worker.concurrency):
                nursery.start_soon(self._slot, nursery, CleanContext())
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
        return [job.key or "" for run in set(self._runs.values()) for job in run.jobs]

    def together(self, job_id: int) -> list[Job[Any]]:
        """The running jobs of the call that handles this one, itself among them; none if it does not run here."""
        run = self._runs.get(job_id)
        return [] if run is None else run.jobs

    def extend(self, job_id: int, seconds: float) -> None:
        """Move the deadline of a running call to so many seconds from now."""
        if (run := self._runs.get(job_id)) is not None:
            run.scope.deadline = run.deadline = trio.current_time() + seconds
            for job in run.jobs:
                job.deadline = run.deadline

    def abandon(self, lost: Container[tuple[int, int]] | None) -> None:
        """Cancel the handlers of these attempts (None: all): they are somebody else's now."""
        for run in list(self._runs.values()):
            if lost is None or any((job.id, job.attempt) in lost for job in run.jobs):
                self._stop(run, "lost")

    def lose_older(self, attempts: Mapping[int, int]) -> None:
        """These, by job, were claimed here again: what runs of them has a claim that a server which crashed forgot."""
        if again := {(job_id, attempts[job_id]) for job_id in attempts.keys() & self._runs.keys()}:
            self.abandon(again)

    def stop_all(self) -> None:
        """Cancel every handler; their jobs are tried again."""
        for run in list(self._runs.values()):
            self._stop_for_shutdown(run)

    def _stop_for_shutdown(self, run: _Run) -> None:
        started = run.connection is not None or not self._worker.transaction
        self._stop(run, "shutdown" if started else "unstarted")

    def _stop(self, run: _Run, reason: str) -> None:
        run.reason = "lost" if reason == "lost" else run.reason or reason
        run.cancelled = True
        run.scope.cancel()

    def give_up_stuck(self) -> None:
        """Fail the jobs of handlers that ignore their timeout. The slot stays taken until the handler returns."""
        for run in list(self._runs.values()):
            late = run.deadline < trio.current_time() - 1.0
            if late and not run.given_up and not run.decided and run.reason is None:
                run.given_up = True
                for job in run.jobs:
                    self._settle(timed_out(job), self._queue.name)
                    self._events.emit(HandlerStuck(f"job {job.id} of queue {job.queue} ignores its timeout"))

    async def _slot(self, slots: trio.Nursery, clean: CleanContext) -> None:
        while not clean.is_left():
            run = _Run()
            error: Exception | None = None
            try:
                with run.scope:  # it serves until it is cancelled: to enter one takes as long as a small job
                    while await self._take_and_call(run) and not clean.is_left():
                        pass
            except Exception as raised:  # what is left of a group whose other part was our cancelling, above all
                error = raised
            except BaseException as raised:  # the runtime ends, by this handler, or by another one that this ran beside
                if not ends_all(raised):
                    self._stop_for_shutdown(run)
                self._settle_all(run, None, raised)
                raise
            self._settle_all(run, None, error)
            await self._settled()
            if run.ended >= self._turn_ends:
                await self._give_way()
        clean.run(slots.start_soon, self._slot, slots, clean)  # what a handler has set is for its own job

    async def _take_and_call(self, run: _Run) -> bool:
        """One call of the worker, settled. False: the scope of the call has been cancelled."""
        run.batch = await self._claimer.hands.take(self._worker.batch_size)
        result: Any = None
        error: Exception | None = None
        if called := self._begins(run):
            try:
                if self._worker.transaction:
                    result = await self._run_in_transaction(run)
                    run.decided = True
                else:
                    result = await self._call(run.jobs if self._worker.kind == "batch" else run.jobs[0])
            except BaseException as raised:
                error = survived(raised)
                if being_cancelled() and not run.scope.cancel_called:  # for another handler has ended the runtime
                    self._stop_for_shutdown(run)
        room = self._settle_all(run, result, error)
        if run.cancelled:
            return False
        if not room or not called:
            await self._settled()
        if run.ended >= self._turn_ends:
            await self._give_way()
        return True

    async def _give_way(self) -> None:
        """Let all other tasks run once. The first slot to come here begins the next turn; until then a slot does one job."""
        first, self._turn_is_over = not self._turn_is_over, True
        await trio.lowlevel.checkpoint()
        if first:
            self._turn_is_over = False
            self._turn_ends = trio.current_time() + TURN

    def _begins(self, run: _Run) -> bool:
        """Read the data of what was taken. False: there is nothing to call the worker with."""
        run.jobs = []
        for claimed in run.batch:
            try:
                job = job_of(claimed, self._queue, self._handle)
            except Exception as error:  # whatever it is: a job that nobody runs must not stand active
                self._settle(data_invalid(claimed, error), self._queue.name)
            else:
                run.jobs.append(job)
                self._runs[job.id] = run
        if self._worker.transaction:  # it does not run while it waits for a connection
            run.started, run.deadline, run.connection, run.decided = trio.current_time(), math.inf, None, False
        elif run.jobs:
            self._sets_out(run)
        return bool(run.jobs)

    def _sets_out(self, run: _Run) -> None:
        """The worker is about to be called: its time runs."""
        run.started = trio.current_time()
        timeout = run.jobs[0].timeout if len(run.jobs) == 1 else min(job.timeout for job in run.jobs)
        run.deadline = run.started + timeout
        for job in run.jobs:
            job.deadline = run.deadline
        if not run.noted:
            run.noted = True
            self._set_out.append(run)
            self._watch.ring()

    async def _watch_deadlines(self) -> None:
        """Give the calls that wait their deadlines; those that never wait end before this runs, and ``_judge()`` looks."""
        while True:
            await self._watch.wait()
            self._watch.clear()
            set_out, self._set_out = self._set_out, []
            for run in set_out:
                run.noted = False
                if run.batch:
                    run.scope.deadline = run.deadline

    def _ends(self, run: _Run) -> None:
        """The worker has returned, or was cancelled."""
        run.ended = trio.current_time()
        if run.scope.deadline != math.inf:
            run.cancelled = run.scope.cancel_called
            run.scope.deadline = math.inf
        for job in run.jobs:
            if self._runs.get(job.id) is run:  # and not a later attempt's
                del self._runs[job.id]
        if self._ended:
            self._ended.unpark_all()

    def _settle_all(self, run: _Run, result: Any, error: BaseException | None) -> bool:
        """The call has ended: settle what it brought, if that is not done. False: too much is not written yet."""
        self._ends(run)
        room = True
        for outcome in self._judge(run, result, error):
            room = self._settle(outcome, self._queue.name)
        if run.batch and (free := self._worker.batch_size - len(run.batch)):
            self._claimer.hands.left_free(free)
        for claimed in run.batch:
            self._claimer.finished(claimed)
        run.batch, run.jobs = [], []
        return room

    def _judge(self, run: _Run, result: Any, error: BaseException | None) -> list[Outcome]:
        run.cancelled |= run.given_up
        if not run.jobs or run.given_up:
            return []
        if run.decided and not isinstance(error, Exception):
            return [] if result is None else [result]
        late = run.ended >= run.deadline
        if late or run.cancelled:
            # Also when it returned nevertheless: a result that comes after the end was decided is refused.
            run.cancelled = True
            if late or run.scope.cancelled_caught or error is not None or run.reason == "lost":
                return [outcome for job in run.jobs if (outcome := interrupted(job, run.reason)) is not None]
        limit, elapsed = self._output_limit, run.ended - run.started
        if self._worker.kind == "batch":
            return judge_batch(run.jobs, result, error, type_=self._queue.output_type, limit=limit, elapsed=elapsed)
        return [judge(run.jobs[0], result, error, type_=self._queue.output_type, limit=limit, elapsed=elapsed)]

    async def _run_in_transaction(self, run: _Run) -> Outcome | None:
        """Returns what is left to be settled. Raises what the handler raised: then nothing was written."""
        [job] = run.jobs

        async def call(connection: TrioConnection) -> Any:
            run.connection = connection
            self._sets_out(run)
            return await self._call(job)

        def judged(result: Any) -> Outcome:
            elapsed = trio.current_time() - run.started
            return judge(job, result, None, type_=self._queue.output_type, limit=self._output_limit, elapsed=elapsed)

        def committing() -> None:
            run.decided = True

        return await self._atomic.run(job, call, judged, committing)

"""Runs one queue's jobs in a fixed number of slots. User code runs here and nowhere else; no SQL.

A slot takes what the claimer has, decodes it, runs the worker under the attempt's deadline and turns what happens
into an outcome. Whatever a handler does, its slot survives; what is not an ``Exception`` ends the runtime.
"""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import attrs
import trio

from ._codec import encode, from_json
from ._errors import InvalidData, InvalidOption
from ._events import HandlerStuck
from ._models import Claimed, Completed, Discarded, Failed, Job, Released, Snoozed
from ._signals import Discard, Fail, Retry, Snooze
from ._sql import seconds

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._claimer import Claimer
    from ._events import Events
    from ._models import JobHandle, Outcome
    from ._queue import Queue

__all__ = ["Executor", "Middleware"]

MESSAGE_LIMIT = 2_000
TRACEBACK_LIMIT = 16_000
"""Characters kept of an error's message and traceback; of the traceback the end, where the error is."""

YIELD_EVERY = 0.005
"""Seconds a slot goes on with jobs that never wait before it lets others run."""

Middleware = Any
"""``async def middleware(job, call_next)``, which returns ``await call_next(job)``; or a function of the job that
returns an async context manager. Around a batch it gets the list of jobs."""


@attrs.define(eq=False)
class _Run:
    """One call of the worker under way."""

    jobs: list[Job[Any]]
    scope: trio.CancelScope
    started: float
    reason: str | None = None
    """Why it is being cancelled: ``cancel``, ``lost`` or ``shutdown``; a timeout needs none."""
    given_up: bool = False
    """It ignored a timeout: its jobs were failed, and what it returns is refused."""


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
    ) -> None:
        """``settle`` takes an outcome and the queue's name; ``settled`` waits while too many are not written yet."""
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
        self._runs: dict[int, _Run] = {}
        self._ended = trio.lowlevel.ParkingLot()
        self._threads = trio.CapacityLimiter(self._worker.concurrency)
        self._call = _wrap(self._innermost(), (*middleware, *self._worker.middleware))

    def _innermost(self) -> Callable[[Any], Awaitable[Any]]:
        function = self._worker.function
        if self._worker.kind != "sync":
            return function

        async def in_thread(job: Any) -> Any:
            return await trio.to_thread.run_sync(function, job, limiter=self._threads)

        return in_thread

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

    def cancel(self, job_ids: Sequence[int]) -> None:
        """Cancel the handlers of these jobs, as far as they run here; they end as cancelled."""
        for job_id in job_ids:
            run = self._runs.get(job_id)
            # A batch is one call: it can't be cancelled for one of its jobs.
            if run is not None and len(run.jobs) == 1:
                self._stop(run, "cancel")

    def running(self) -> set[tuple[int, int]]:
        """The attempts that run here, as (job, attempt)."""
        return {(job.id, job.attempt) for run in self._runs.values() for job in run.jobs}

    def extend(self, job_id: int, seconds: float) -> None:
        """Move a running job's deadline to so many seconds from now."""
        run = self._runs.get(job_id)
        if run is not None:
            run.scope.deadline = trio.current_time() + seconds
            for job in run.jobs:
                job.deadline = run.scope.deadline

    def abandon(self, held: set[tuple[int, int]]) -> None:
        """Cancel the handlers of attempts that are not among these: they are somebody else's now."""
        for run in list(self._runs.values()):
            if any((job.id, job.attempt) not in held for job in run.jobs):
                self._stop(run, "lost")

    def stop_all(self) -> None:
        """Cancel every handler; their jobs are tried again."""
        for run in list(self._runs.values()):
            self._stop(run, "shutdown")

    def _stop(self, run: _Run, reason: str) -> None:
        run.reason = run.reason or reason
        run.scope.cancel()

    def give_up_stuck(self) -> None:
        """Fail the jobs of handlers that ignore their timeout. The slot stays taken until the handler returns."""
        for run in list(self._runs.values()):
            if run.scope.deadline < trio.current_time() - 1.0 and not run.given_up and run.reason is None:
                run.given_up = True
                for job in run.jobs:
                    self._settle(_timed_out(job), self._queue.name)
                    self._events.emit(HandlerStuck(f"job {job.id} of queue {job.queue} ignores its timeout"))

    async def _slot(self) -> None:
        rested = trio.current_time()
        while True:
            batch = await self._claimer.take(self._worker.batch_size)
            outcomes = await self._run(batch)
            for outcome in outcomes:
                self._settle(outcome, self._queue.name)
            for _ in batch:
                self._claimer.finished()
            await self._settled()
            now = trio.current_time()
            if now > rested + YIELD_EVERY:
                await trio.lowlevel.checkpoint()
                rested = trio.current_time()

    async def _run(self, batch: list[Claimed]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        jobs = []
        for claimed in batch:
            try:
                jobs.append(self._decode(claimed))
            except InvalidData as error:
                outcomes.append(Failed(claimed.id, claimed.attempt, "data_invalid", _short(str(error)), final=True))
        if jobs:
            outcomes.extend(await self._run_jobs(jobs))
        return outcomes

    def _decode(self, claimed: Claimed) -> Job[Any]:
        return Job(
            claimed.id,
            self._queue.name,
            claimed.attempt,
            claimed.retry_limit,
            claimed.priority,
            claimed.timeout,
            claimed.sent_at,
            from_json(claimed.data, self._queue.data_type),
            claimed.headers or {},
            claimed.provenance,
            self._handle,
        )

    async def _run_jobs(self, jobs: list[Job[Any]]) -> list[Outcome]:
        started = trio.current_time()
        deadline = started + min(job.timeout for job in jobs)
        run = _Run(jobs, trio.CancelScope(deadline=deadline), started)
        for job in jobs:
            job.deadline = deadline
            self._runs[job.id] = run
        error: Exception | None = None
        result: Any = None
        wall = time.perf_counter()
        try:
            with run.scope:
                try:
                    result = await self._call(jobs if self._worker.kind == "batch" else jobs[0])
                except Exception as raised:
                    error = raised
        finally:
            for job in jobs:
                if self._runs.get(job.id) is run:  # and not a later attempt's
                    del self._runs[job.id]
            if self._ended:
                self._ended.unpark_all()
        if run.scope.cancel_called:
            # Also when it returned nevertheless: a result that comes after the end was decided is refused.
            interrupted = run.scope.cancelled_caught or trio.current_time() >= run.scope.deadline
            if run.given_up:
                return []
            if interrupted or run.reason == "lost":
                return [o for job in jobs if (o := self._interrupted(job, run)) is not None]
        elapsed = time.perf_counter() - wall
        if self._worker.kind == "batch":
            return self._split(jobs, result, error, elapsed)
        return [self._judge(jobs[0], result, error, elapsed)]

    def _interrupted(self, job: Job[Any], run: _Run) -> Outcome | None:
        if run.reason == "lost":
            return None
        if run.reason == "cancel":
            return Discarded(job.id, job.attempt)
        if run.reason == "shutdown":
            # The last attempt is handed back unspent: stopping a process must not make dead letters.
            if job.attempt > job.retry_limit:
                return Released(job.id, job.attempt)
            return Failed(job.id, job.attempt, "shutdown", "its runtime stopped before it ended", retry_in=0)
        return _timed_out(job)

    def _split(self, jobs: list[Job[Any]], result: Any, error: Exception | None, elapsed: float) -> list[Outcome]:
        """What a batch worker returned or raised, as one outcome a job."""
        if error is None and isinstance(result, Mapping):
            missing = [job for job in jobs if job.id not in result]
            outcomes: list[Outcome] = [
                self._judge_returned(job, result[job.id], elapsed) for job in jobs if job.id in result
            ]
            outcomes += [
                Failed(job.id, job.attempt, "not_settled", "the batch worker returned no outcome for this job")
                for job in missing
            ]
            return outcomes
        if error is None and result is not None:
            if isinstance(result, str) or not isinstance(result, Sequence) or len(result) != len(jobs):
                error = InvalidData(
                    f"a batch worker returns None, {len(jobs)} outcomes for {len(jobs)} jobs, or a mapping by job id;"
                    f" not {result!r:.200}"
                )
            else:
                return [self._judge_returned(job, value, elapsed) for job, value in zip(jobs, result, strict=True)]
        return [self._judge(job, None, error, elapsed) for job in jobs]

    def _judge_returned(self, job: Job[Any], value: Any, elapsed: float) -> Outcome:
        if isinstance(value, Exception):
            return self._judge(job, None, value, elapsed)
        return self._judge(job, value, None, elapsed)

    def _judge(self, job: Job[Any], result: Any, error: Exception | None, elapsed: float) -> Outcome:
        if error is not None:
            return _failure(job, error)
        if result is None:
            return Completed(job.id, job.attempt, "null", elapsed)
        try:
            output = encode(result, self._queue.output_type)
            if len(output) > self._output_limit or len(output.encode()) > self._output_limit:
                raise InvalidData(f"output is over the limit of {self._output_limit} bytes")
        except InvalidData as invalid:
            return Failed(job.id, job.attempt, "output_invalid", _short(str(invalid)), final=True)
        return Completed(job.id, job.attempt, output, elapsed)


def _timed_out(job: Job[Any]) -> Failed:
    return Failed(job.id, job.attempt, "timeout", f"not done within {job.timeout:g} s")


def _failure(job: Job[Any], error: Exception) -> Outcome:
    try:
        if isinstance(error, Snooze):
            return Snoozed(job.id, job.attempt, max(0.0, seconds(error.delay, "Snooze")))
        if isinstance(error, Discard):
            return Discarded(job.id, job.attempt)
        if isinstance(error, Retry):
            delay = None if error.delay is None else max(0.0, seconds(error.delay, "Retry"))
            return Failed(job.id, job.attempt, "Retry", _short(error.reason), retry_in=delay)
    except InvalidOption as invalid:
        error = invalid
    final = isinstance(error, Fail)
    text = "".join(traceback.format_exception(error))
    return Failed(
        job.id,
        job.attempt,
        type(error).__name__,
        _short(_message(error)),
        _clean(text if len(text) <= TRACEBACK_LIMIT else "[…]\n" + text[-TRACEBACK_LIMIT:]),
        final=final,
    )


def _message(error: Exception) -> str:
    try:
        return str(error)
    except Exception as broken:
        return f"(its message could not be read: {type(broken).__name__})"


def _short(text: str) -> str:
    return _clean(text if len(text) <= MESSAGE_LIMIT else text[:MESSAGE_LIMIT] + "[…]")


def _clean(text: str) -> str:
    """Text that jsonb takes: no NUL, no lone surrogates."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


def _wrap(
    innermost: Callable[[Any], Awaitable[Any]], middleware: Sequence[Middleware]
) -> Callable[[Any], Awaitable[Any]]:
    call = innermost
    for layer in reversed(middleware):
        call = _layer(layer, call)
    return call


def _layer(layer: Middleware, call_next: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    if inspect.iscoroutinefunction(layer):

        async def wrapped(job: Any) -> Any:
            return await layer(job, call_next)

        return wrapped

    async def within(job: Any) -> Any:
        context = layer(job)
        if not isinstance(context, AbstractAsyncContextManager):
            raise InvalidOption(f"middleware {layer!r} must return an async context manager, not {context!r}")
        async with context:
            return await call_next(job)

    return within

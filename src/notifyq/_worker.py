"""One queue's claimer and executor wired together, its database calls bound."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from ._answers import Haul
from ._claimer import Claimer
from ._claimer_calls import ClaimerCalls
from ._connection import ANSWER_TIMEOUT, answered_within
from ._errors import NoLease, UnknownQueue
from ._executor import Executor
from ._models import Discarded, Released

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Sequence
    from uuid import UUID

    from ._answers import Claimed, QueueInfo
    from ._atomic import Atomic
    from ._calls import Bound
    from ._listener import Listener
    from ._lock import QuickLock
    from ._middleware import Middleware
    from ._models import JobHandle
    from ._pool import Pool
    from ._queue import Queue
    from ._settler import Settler
    from ._standing import Standing
    from ._store import Store
    from .events import Events

__all__ = ["QueueWorker"]


REFUSED = (NoLease, UnknownQueue)
"""What a claim raises before it has taken anything."""


class QueueWorker:
    """Claims and runs the jobs of one queue."""

    def __init__(
        self,
        queue: Queue[Any, Any],
        info: QueueInfo,
        *,
        pool: Pool,
        store: Store,
        listener: Listener,
        runtime: UUID,
        settler: Settler,
        handle: JobHandle,
        middleware: Sequence[Middleware],
        events: Events,
        turns: tuple[QuickLock, QuickLock],
        atomic: Atomic,
        standing: Standing,
        gone: Callable[[], object],
        answer_lost: Callable[[], object],
    ) -> None:
        """``gone`` is called when the queue was not there any longer, ``answer_lost`` when a claim may have brought jobs and
        nobody here knows of them.

        ``turns`` are shared by a process's claimers: one claims at a time, so that many queues need few connections, and
        one of those with rules, which may have to wait for a gate.
        """
        worker = queue.worker_function
        assert worker is not None
        self.queue = queue
        self.priorities = worker.priorities
        self._key_limit = worker.key_limit
        self.info = info
        self._pool = pool
        self._store = store
        self._listener = listener
        self._runtime = runtime
        self._settler = settler
        self._turns = turns
        self._gated = False
        self.claimer = Claimer(
            queue.name,
            ClaimerCalls(
                claim=self._claim,
                claim_at_once=self._claim_at_once,
                next_due=self._next_due,
                stand_free=partial(standing.free, info.number),
                stand_busy=partial(standing.busy, info.number),
                stand_far=partial(standing.far, info.number),
                say_taken=partial(standing.say_taken, info.number),
                release=self._release,
                gone=gone,
            ),
            capacity=min(worker.concurrency, atomic.most)
            if worker.transaction
            else worker.concurrency * worker.batch_size,
            poll_interval=worker.poll_interval,
            priorities=worker.priorities,
            events=events,
        )
        self.executor = Executor(
            queue,
            claimer=self.claimer,
            settle=settler.put,
            settled=partial(settler.wait_room, queue.name),
            handle=handle,
            middleware=middleware,
            output_limit=info.max_data_bytes,
            events=events,
            atomic=atomic,
        )
        self._claiming = trio.CancelScope()
        self._started = False
        self._stopped = trio.Event()
        self._lease_number = 0
        self._answer_lost = answer_lost
        self._claiming_since = self._asking_since = math.inf
        self._durably = info.retry_limit == 0
        self._cancelled: Collection[int] = ()
        self._bound_for = 1
        self._bound = self._bind(1)
        listener.will_ask(self._bound)

    def is_gated(self, gated: bool) -> None:
        """Whether the queue has rules. Until that is known, what is done for it may hold up other queues."""
        self._gated = gated
        self._settler.is_gated(self.queue.name, gated)

    def forget(self) -> None:
        """The queue is served no longer, by nobody else of this name either."""
        self._settler.forget(self.queue.name)

    @property
    def claiming_since(self) -> float:
        """When the older claim that is under way was sent, on ``trio.current_time()``'s clock; infinite: there is none."""
        return min(self._claiming_since, self._asking_since)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Claim until ``stop()``, run jobs until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.executor.run)
            self._started = True
            task_status.started()
            try:
                with self._claiming:
                    await self.claimer.run()
            finally:  # also when a handler has ended the runtime
                for claimed in self.claimer.hands.shelf.take_back():
                    self._release(claimed)
                self._stopped.set()

    async def stop(self) -> None:
        """Claim no more, hand back what has not started, and wait until what runs has ended."""
        self._claiming.cancel()
        if self._started:
            await self._stopped.wait()
        await self.executor.wait_idle()

    def leave(self) -> None:
        """Wait no longer for what was cancelled and does not end: it may have effects yet, so it ends as lost."""
        self.executor.abandon(None)
        self.executor.threads.leave()

    def lose_all(self) -> None:
        """The lease lapsed: drop what has not started and cancel what runs, without settling."""
        self._lease_number += 1  # what a claim under way brings is not ours, either
        self.claimer.hands.shelf.take_back()
        self.executor.abandon(None)

    def lose(self, attempts: Container[tuple[int, int]]) -> None:
        """These attempts are no longer ours: drop or cancel them, without settling."""
        self.claimer.drop({job for job, attempt in self.claimer.hands.shelf.waiting() if (job, attempt) in attempts})
        self.executor.abandon(attempts)

    def cancel(self, jobs: Collection[int]) -> None:
        """Cancel jobs, as far as they run or wait here; they end as cancelled."""
        self._cancelled = jobs
        for claimed in self.claimer.drop(jobs):
            self._discard(claimed)
        self.executor.cancel(jobs)

    def _discard(self, claimed: Claimed) -> None:
        self._settler.put(Discarded(claimed.id, claimed.attempt, claimed.as_of), self.queue.name)

    def known(self) -> set[tuple[int, int]]:
        """The attempts that run or wait here, as (job, attempt)."""
        return self.executor.running() | self.claimer.hands.shelf.waiting()

    def _release(self, claimed: Claimed) -> None:
        self._settler.put(Released(claimed.id, claimed.attempt, claimed.as_of), self.queue.name)

    # A claim that a crash of the server forgets is made again; without retries it must not run twice: claim durably.

    async def _claim(self, how_many: int, floors: dict[int, int] | None, due_floor: float | None) -> Haul:
        async with self._turns[self._gated], self._pool.connection() as connection:
            lease_number = self._before_claim()
            self._claiming_since = trio.current_time()
            try:
                if self._key_limit is not None or (floors is None and self.priorities is not None):
                    haul = await self._store.run_claim(connection, self._bind(how_many))
                else:
                    haul = await self._store.claim(
                        connection,
                        self.queue.name,
                        how_many,
                        self._runtime,
                        floors=floors,
                        due_floor=due_floor,
                        durably=self._durably,
                    )
            except BaseException as error:
                if not isinstance(error, REFUSED):
                    self._answer_lost()
                # It was not answered in time. What breaks the connection says nothing of looks.
                if floors is None and isinstance(error, trio.Cancelled):
                    self.claimer.looks.made(self._claiming_since, trio.current_time())
                raise
            finally:
                self._claiming_since = math.inf
        return self._still_ours(haul, lease_number)

    def _claim_at_once(self, how_many: int, answered: Callable[[Haul | Exception], None]) -> bool:
        """Send a claim on the connection that has just heard of a job, if that is free.

        Not if it may have to wait for a gate, and others, which never have to, would not hear of their jobs meanwhile.
        """
        if self._gated and self._settler.without_rules:
            return False
        # An idle queue asks for the same number each time.
        if how_many != self._bound_for or self._key_limit is not None:
            self._bound_for, self._bound = how_many, self._bind(how_many)
        lease_number = self._before_claim()

        def heard(answer: list[Any] | Exception) -> None:
            self._asking_since = math.inf
            if isinstance(answer, Exception):
                if not isinstance(answer, REFUSED):
                    self._answer_lost()
                answered(answer)
            else:
                answered(self._still_ours(self._store.haul(answer), lease_number))

        if not self._listener.ask(self._bound, heard):
            return False
        self._asking_since = trio.current_time()
        return True

    def _bind(self, how_many: int) -> Bound:
        self._told = self._at_work()
        return self._store.bind_claim(
            self.queue.name,
            how_many,
            self._runtime,
            durably=self._durably,
            priorities=self.priorities,
            key_limit=self._key_limit,
            at_work=self._told,
        )

    def _at_work(self) -> Counter[str]:
        """How many jobs of each key are here, those without one under ""; not counted unless there is a limit."""
        if self._key_limit is None:
            return Counter()
        return Counter((*self.executor.keys(), *self.claimer.hands.shelf.keys()))

    def _learn_full_keys(self, claimed: list[Claimed], limit: int) -> None:
        """A claim brought these: of which keys it may have left some, as of what it was told."""
        brought = Counter(job.key or "" for job in claimed)
        full = {key for key, number in (self._told + brought).items() if number >= limit}
        self.claimer.full_keys = full
        now = self._at_work() + brought
        if any(now[key] < limit for key in full):  # jobs ended while it was under way
            self.claimer.bell.ring()

    def _before_claim(self) -> int:
        """Call before a claim is sent: what happens from here on may concern the jobs that it brings."""
        self._cancelled = ()
        return self._lease_number

    def _still_ours(self, haul: Haul, lease_number: int) -> Haul:
        """What a claim brought, less what was lost or cancelled while it was under way."""
        jobs = haul.jobs
        if jobs:
            self._lose_older({job.id: job.attempt for job in jobs})
        if self._key_limit is not None:
            self._learn_full_keys(jobs, self._key_limit)
        if lease_number == self._lease_number and not self._cancelled:
            return haul
        self.claimer.bell.ring()  # fewer than were asked for does not mean now that there are no more
        if lease_number != self._lease_number:
            self._answer_lost()
            return Haul([])  # it is found that we hold them, and they are released
        for job in jobs:
            if job.id in self._cancelled:
                self._discard(job)
        return Haul([job for job in jobs if job.id not in self._cancelled], haul.left, haul.due_floor)

    def _lose_older(self, attempts: dict[int, int]) -> None:
        """Drop or cancel what is here of attempts that were claimed again: a server that crashed forgot the older claim."""
        self.claimer.drop(attempts)
        self.executor.lose_older(attempts)

    async def _next_due(self, due_floor: float | None) -> tuple[float | None, float]:
        async with self._turns[self._gated], self._pool.connection() as connection:
            with answered_within(ANSWER_TIMEOUT):
                return await self._store.next_due(connection, self.info.number, due_floor)

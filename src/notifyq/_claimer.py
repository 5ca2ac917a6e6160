"""Claims one queue's jobs: woken by the bell, a due time or the poll, it claims until the queue is dry or hands are full."""

from __future__ import annotations

import math
import random
from collections import deque
from typing import TYPE_CHECKING

import attrs
import psycopg
import trio

from ._backoff import reconnect_delay
from ._bell import Bell
from ._errors import NoLease, NotifyqError
from .events import JobClaimed, ServerTrouble

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container

    from ._models import Claimed
    from .events import Events

__all__ = ["Claimer", "demand"]

PREFETCH_SECONDS = 0.1
"""Observed work claimed beyond what can start at once: enough to hide a round trip, too little to starve a peer."""

PREFETCH_MAX = 2000
"""Jobs; a larger batch gains nothing measurable and holds its memory."""

LOOK_EVERY = 1.0
"""Seconds between looks from the beginning while busy, for what no notification told of."""

LOOK_SHARE = 0.05
"""Share of the time that such looks may take: a long-open snapshot makes them dear."""

CHEAP_LOOK = 0.004
"""Seconds: a look that takes less, the round trip included, meets no dead index entries worth avoiding."""

TRAIL_SECONDS = 1.0
"""How far the floor trails the head: transactions may commit a lower number this much later unnoticed."""

MEASURE_SECONDS = 0.02
MEASURE_COUNT = 10
"""A sample of the rate is either so many seconds of work or so many jobs."""

STALE_SECONDS = 1.0
"""A job that has waited here so long for a slot is handed back: the work has become slower than it was when it was claimed,
somebody else may have a slot free, and the deadline in the database has been running."""

DUE_AGAIN = 0.01
"""Seconds until a due ticket that another runtime is promoting is looked for again."""


def demand(capacity: int, running: int, buffered: int, per_second: float) -> int:
    """How many jobs to claim now: enough for the free slots and about 100 ms of work, but no trickles."""
    prefetch = min(PREFETCH_MAX, int(per_second * PREFETCH_SECONDS))
    if buffered > prefetch // 2:
        return 0
    return max(0, capacity + prefetch - running - buffered)


@attrs.define(eq=False)
class Floor:
    """Where the live part of the ready index begins, by priority. A hint: looks from the beginning correct it."""

    numbers: dict[int, int] = attrs.field(factory=dict)
    _samples: dict[int, deque[tuple[float, int]]] = attrs.field(factory=dict)

    def lower(self, priority: int, number: int) -> None:
        """A ticket was written at this number."""
        standing = self.numbers.get(priority)
        if standing is None or number < standing:
            self.numbers[priority] = number

    def claimed(self, jobs: list[Claimed], now: float) -> None:
        """Tickets up to these numbers were claimed; the floor follows a second later."""
        for job in (jobs[0], jobs[-1]):
            samples = self._samples.setdefault(job.priority, deque())
            if not samples or samples[-1][1] < job.number:
                samples.append((now, job.number))
            self.numbers.setdefault(job.priority, job.number)
        for priority, samples in self._samples.items():
            while samples and samples[0][0] <= now - TRAIL_SECONDS:
                self.numbers[priority] = max(self.numbers.get(priority, 0), samples.popleft()[1])

    def reset(self) -> None:
        """Forget everything: the next look from the beginning shows where the live part begins."""
        self.numbers.clear()
        self._samples.clear()


@attrs.define(eq=False)
class Rate:
    """Jobs finished per second while there was something to do."""

    per_second: float = 0.0
    _count: int = 0
    _busy_seconds: float = 0.0
    _busy_since: float | None = None

    def busy(self, now: float) -> None:
        """There is work from now on."""
        if self._busy_since is None:
            self._busy_since = now

    def finished(self, now: float | None) -> None:
        """A job ended; ``now`` if it was the last one in hand."""
        self._count += 1
        if now is not None and self._busy_since is not None:
            self._busy_seconds += now - self._busy_since
            self._busy_since = None

    def reset(self) -> None:
        """What was observed holds no longer."""
        self.per_second, self._count, self._busy_seconds = 0.0, 0, 0.0

    def measure(self, now: float) -> float:
        """The rate up to now, half of it from what happened since the last time."""
        if self._busy_since is not None:
            self._busy_seconds += now - self._busy_since
            self._busy_since = now
        if self._busy_seconds >= MEASURE_SECONDS or self._count >= MEASURE_COUNT:
            sample = self._count / max(self._busy_seconds, 1e-6)
            self.per_second = 0.5 * (self.per_second + sample)
            self._count, self._busy_seconds = 0, 0.0
        return self.per_second


class Claimer:
    """Feeds the slots of one queue. Take jobs with ``take()``; say ``finished()`` for each."""

    def __init__(
        self,
        queue: str,
        *,
        capacity: int,
        poll_interval: float | None,
        claim: Callable[[int, dict[int, int] | None], Awaitable[list[Claimed]]],
        next_due: Callable[[], Awaitable[tuple[float | None, float]]],
        release: Callable[[Claimed], object],
        events: Events,
    ) -> None:
        """``claim(how_many, floors)`` and ``next_due()`` are the database calls for this queue.

        ``release`` hands back a job that did not start; it never waits.
        """
        self.queue = queue
        self.bell = Bell()
        self._rate = Rate()
        self._capacity = capacity
        self._poll_interval = poll_interval
        self._claim = claim
        self._next_due = next_due
        self._release = release
        self._events = events
        self._floor = Floor()
        self._buffer: deque[Claimed] = deque()
        self._takers = trio.lowlevel.ParkingLot()
        self._room = Bell()
        self._running = 0
        self._looked_at = -math.inf
        self._look_seconds = 0.0
        self._due_at: float = math.inf
        self._clock_offset: float | None = None
        self._due_unknown = True
        self._random = random.Random()

    # what others call

    def heard(self, payload: str) -> None:
        """A notification of the queue's channel: ``r:<priority>:<number>`` or ``d:<epoch seconds>``."""
        kind, _, rest = payload.partition(":")
        try:
            if kind == "r":
                priority, _, number = rest.partition(":")
                self._floor.lower(int(priority), int(number))
            elif kind == "d" and self._clock_offset is not None:
                due_at = float(rest) + self._clock_offset
                if not due_at < self._due_at:
                    return
                self._due_at = due_at
            else:
                self._due_unknown = True
        except ValueError:
            pass  # not from our trigger; look anyway
        self.bell.ring()

    def look_again(self) -> None:
        """Look from the beginning, and for the next due time: notifications may have been missed."""
        self._looked_at = -math.inf
        self._due_unknown = True
        self.bell.ring()

    def due_in(self, seconds: float) -> None:
        """The beat saw a ticket that is due in so many seconds."""
        due_at = trio.current_time() + seconds
        if due_at < self._due_at - DUE_AGAIN:
            self._due_at = max(due_at, trio.current_time() + DUE_AGAIN)
            self.bell.ring()

    def poll(self) -> None:
        """The beat saw ready jobs: look, unless the queue's own poll interval says that it is too early."""
        if self._poll_interval is None or trio.current_time() >= self._looked_at + self._poll_interval:
            self.look_again()

    async def take(self, how_many: int) -> list[Claimed]:
        """Wait for jobs and take up to so many, in order."""
        while not self._buffer:
            await self._takers.park()
        jobs = [self._buffer.popleft() for _ in range(min(how_many, len(self._buffer)))]
        self._running += len(jobs)
        self._room.ring()
        return jobs

    def finished(self) -> None:
        """A job that was taken has ended."""
        self._running -= 1
        in_hand = self._running or self._buffer
        self._rate.finished(None if in_hand else trio.current_time())
        self._room.ring()

    def take_back(self) -> list[Claimed]:
        """All jobs that have not been taken."""
        jobs = list(self._buffer)
        self._buffer.clear()
        return jobs

    def drop(self, job_ids: Container[int]) -> list[Claimed]:
        """Take these jobs out, as far as they have not been taken."""
        dropped = [job for job in self._buffer if job.id in job_ids]
        if dropped:
            self._buffer = deque(job for job in self._buffer if job.id not in job_ids)
            self._room.ring()
        return dropped

    def waiting(self) -> set[tuple[int, int]]:
        """The attempts that have not been taken, as (job, attempt)."""
        return {(job.id, job.attempt) for job in self._buffer}

    # the loop

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Claim until cancelled. A claim under way is finished, so that no job is claimed and forgotten."""
        task_status.started()
        self.bell.ring()
        failures = 0
        while True:
            await self._wait_for_work()
            self._hand_back_stale()
            try:
                await self._drain()
                if self._due_unknown or self._due_at <= trio.current_time():
                    await self._learn_due()
                failures = 0
            except (NotifyqError, psycopg.Error) as error:
                if failures == 0 and not isinstance(error, NoLease):
                    self._events.emit(ServerTrouble("claim", f"queue {self.queue}: {error}"))
                failures += 1
                await trio.sleep(reconnect_delay(failures, self._random))
                self.look_again()

    async def _wait_for_work(self) -> None:
        wake_at = self._due_at
        if self._poll_interval is not None:
            wake_at = min(wake_at, max(self._looked_at, 0) + self._poll_interval)
        wake_at = min(wake_at, self._stale_at())
        if wake_at == math.inf:
            await self.bell.wait()
        else:
            with trio.move_on_at(wake_at):
                await self.bell.wait()

    def _stale_at(self) -> float:
        return self._buffer[0].claimed_at + STALE_SECONDS if self._buffer else math.inf

    def _hand_back_stale(self) -> None:
        if trio.current_time() < self._stale_at():
            return
        self._rate.reset()
        for job in self.take_back():
            self._release(job)

    async def _drain(self) -> None:
        # One look from the beginning finds all; only when such looks are dear is the floor tried first.
        dry = self._look_seconds < CHEAP_LOOK
        while True:
            await trio.lowlevel.checkpoint_if_cancelled()  # under steady load nothing else in here would see it
            how_many = await self._wait_room()
            self.bell.clear()
            now = trio.current_time()
            whole = dry or not self._floor.numbers or now >= self._looked_at + self._look_interval()
            with trio.CancelScope(shield=True):
                jobs = await self._claim(how_many, None if whole else self._floor.numbers)
            if whole:
                self._looked_at = trio.current_time()
                self._look_seconds = self._looked_at - now
                if not jobs:
                    self._floor.reset()
            if jobs:
                self._deliver(jobs)
            if len(jobs) < how_many:
                # With a floor that may only mean that the rest lies below it: look before resting.
                dry = True
                if whole and not self.bell.rung:
                    return
            else:
                dry = False

    def _look_interval(self) -> float:
        return max(LOOK_EVERY, self._look_seconds / LOOK_SHARE)

    async def _wait_room(self) -> int:
        while True:
            self._room.clear()
            per_second = self._rate.measure(trio.current_time())
            how_many = demand(self._capacity, self._running, len(self._buffer), per_second)
            if how_many:
                return how_many
            with trio.move_on_at(self._stale_at()):
                await self._room.wait()
            self._hand_back_stale()

    def _deliver(self, jobs: list[Claimed]) -> None:
        now = trio.current_time()
        self._floor.claimed(jobs, now)
        self._rate.busy(now)
        for job in jobs:
            job.claimed_at = now
        self._buffer.extend(jobs)
        self._takers.unpark(count=len(jobs))
        if self._events.wants(JobClaimed):
            for job in jobs:
                self._events.emit(JobClaimed(self.queue, job.id, job.attempt))

    async def _learn_due(self) -> None:
        self._due_unknown = False
        self._due_at = math.inf
        try:
            due, server_now = await self._next_due()
        except BaseException:
            self._due_unknown = True
            raise
        now = trio.current_time()
        self._clock_offset = now - server_now
        if due is not None:
            self._due_at = min(self._due_at, max(due + self._clock_offset, now + DUE_AGAIN))

"""Claims one queue's jobs: woken by the bell, a due time or the poll, it claims until the queue is dry or hands are full.

A claimer at rest that hears of a job claims at once, on the connection that heard of it, and need not be woken if that
brings all there is. Everything else is done by its task, on a connection of the pool.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import psycopg
import trio

from ._backoff import reconnect_delay
from ._bell import Bell
from ._connection import ANSWER_TIMEOUT, answered_within
from ._demand import Floor, Looks
from ._due import DueTime
from ._errors import ConnectionLost, NoLease, NotifyqError, UnknownQueue
from ._fleet import Fleet
from ._hands import Hands
from ._sql import reason
from ._watch import Watch
from .events import JobClaimed, ServerTrouble

if TYPE_CHECKING:
    from collections.abc import Container

    from ._answers import Claimed, Haul
    from ._claimer_calls import ClaimerCalls
    from .events import Events

__all__ = ["Claimer"]


class Claimer:
    """Feeds the slots of one queue. Take jobs with ``hands.take()``; say ``finished()`` for each."""

    def __init__(
        self,
        queue: str,
        calls: ClaimerCalls,
        *,
        capacity: int,
        poll_interval: float | None,
        priorities: tuple[int, int] | None = None,
        events: Events,
    ) -> None:
        """``priorities`` are the lowest and the highest that ``calls.claim`` may take."""
        self.queue = queue
        self.bell = Bell()
        self._poll_interval = poll_interval
        self._begun_at = trio.current_time()
        self._calls = calls
        self._watch = Watch()
        self.fleet = Fleet()
        self.hands = Hands(capacity, calls.release)
        self._events = events
        self._floor = Floor(priorities)
        self.looks = Looks()
        self._due = DueTime()
        self._random = random.Random()
        self._resting = False
        self._rest = trio.CancelScope()
        self._asked_for, self._asked_at = 0, -math.inf
        self._answered = trio.lowlevel.ParkingLot()
        self._refusal: Exception | None = None
        self._ending = False
        self._paused = False
        self.full_keys: Container[str] = ()
        """Keys of which the last claim left no more to be claimed here: when a job of one of them ends, it looks again."""

    # what others call

    def heard(self, payload: str) -> None:
        """What the channel said: ``r:<priority>:<number>``, ``d:<due>``, ``t:<taken numbers>``, ``room``, ``look``."""
        kind, _, rest = payload.partition(":")
        asked = False
        try:
            if kind == "r":
                if not self._floor.heard(rest) or self._paused or self._watch.crowded:
                    return
                now = trio.current_time()
                if self._watch.rang(self._resting, now):
                    self._calls.stand_busy()
                elif self._resting and not self.bell.rung and self.fleet.puts_off(int(rest.rpartition(":")[2]), now):
                    self._rest.deadline = self._wake_at()
                    return
                else:
                    asked = self._ask()
            elif kind == "d":
                if not self._due.heard(rest) or self._paused or self._watch.crowded:
                    return
            elif kind not in ("t", "room"):
                self.looks.ask(trio.current_time())
                self._floor.reset()
                self._due.unknown = True
            elif self._paused or self._watch.crowded:
                return
            elif kind == "t":
                self.fleet.taken(rest)
                self._rest.deadline = self._wake_at()
                return
        except ValueError:
            pass  # not from our trigger; look anyway
        if not asked and not self._paused:
            self.bell.ring()

    def connected(self, up: bool) -> None:
        """Notifications are heard (again) from now on, those before may have been missed; or they are heard no longer."""
        self._watch.lost(trio.current_time() if up else math.inf)
        if up:
            self.looks.ask(trio.current_time())  # nobody was told of what appeared below the floors
            self.look_again()

    def pause(self, paused: bool) -> None:
        """Claim nothing, and hand back what has not been taken; or claim again, beginning with a look."""
        if paused == self._paused:
            return
        self._paused = paused
        if paused:
            self.hands.hand_back()
        else:
            self.look_again()

    def look_again(self) -> None:
        """Look, since notifications may have been missed: from the beginning, or (if that is dear) once that is due."""
        if self.looks.dear:
            self.looks.owed = True
        else:
            self.looks.ask(trio.current_time())
        self._due.unknown = True
        self.bell.ring()

    def due_in(self, seconds: float) -> None:
        """The beat saw a ticket that is due in so many seconds."""
        if self._due.told(seconds, trio.current_time()):
            self.bell.ring()

    def poll(self) -> None:
        """The beat saw ready jobs, or did not look: look, unless the queue's own poll interval says that it is too early."""
        if self._poll_interval is None or trio.current_time() >= self.looks.at + self._poll_interval:
            self.look_again()

    def finished(self, job: Claimed) -> None:
        """A job that was taken has ended."""
        self.hands.finished()
        if (job.key or "") in self.full_keys:
            self.bell.ring()

    def drop(self, job_ids: Container[int]) -> list[Claimed]:
        """Take these jobs out, as far as they have not been taken."""
        dropped = self.hands.drop(job_ids)
        if any((job.key or "") in self.full_keys for job in dropped):
            self.bell.ring()
        return dropped

    # the loop

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Claim until cancelled. A claim under way is finished, so that no job is claimed and forgotten."""
        task_status.started()
        self.bell.ring()
        try:
            await self._claim_for_ever()
        finally:
            self._ending = True
            self._calls.stand_busy()
            self._calls.stand_far(None)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + ANSWER_TIMEOUT):
                await self._wait_answered()

    async def _claim_for_ever(self) -> None:
        failures = 0
        while True:
            await self._wait_for_work()
            self.hands.hand_back_stale()
            try:
                if await self._must_look():
                    await self._drain()
                if self._due.unknown or self._due.at <= trio.current_time():
                    await self._learn_due()
                failures = 0
            except (NotifyqError, psycopg.Error) as error:
                if isinstance(error, UnknownQueue):
                    self._calls.gone()
                elif failures == 0 and not isinstance(error, NoLease):
                    self._events.emit(ServerTrouble("claim", f"queue {self.queue}: {reason(error)}"))
                failures += 1
                await trio.sleep(reconnect_delay(failures, self._random))
                self.look_again()

    async def _must_look(self) -> bool:
        """Stand free, unless senders know already what is to be known. False: that showed that there is nothing."""
        if self._watch.told or self._watch.crowded or self._refusal is not None:
            return True
        self.bell.clear()
        asked_at = trio.current_time()
        self._due.learning(asked_at)
        try:
            stance = await self._calls.stand_free(self._due.since(self.looks.dear))
        except ConnectionLost:
            self._due.unknown = True
            return True
        now = trio.current_time()
        self._watch.stood(stance.passed, now)
        self._due.learned(stance.due, stance.clock, now)
        if stance.ready or (stance.due is not None and stance.due <= stance.clock):
            return True
        self.looks.spared(asked_at, now)
        return False

    def _ask(self) -> bool:
        """Send a claim now, before the scheduler comes to any task of ours: that is much of the time from send to start."""
        if not self._resting or self.bell.rung or self._asked_for or not self.looks.cheap:
            return False
        how_many = self.hands.demand()
        if not how_many or not self._calls.claim_at_once(how_many, self._hear):
            return False
        self.fleet.looked()
        self._due.claiming()
        self._asked_for = how_many
        self._asked_at = trio.current_time()
        return True

    def _hear(self, answer: Haul | Exception) -> None:
        """The answer to that claim."""
        asked_for, self._asked_for = self._asked_for, 0
        self._answered.unpark_all()
        if isinstance(answer, Exception):
            self._refusal = answer
            self.bell.ring()
        elif self._ending:
            self.hands.shelf.put(answer.jobs)
        else:
            takers = self.hands.shelf.takers
            self._looked(self._asked_at, asked_for, answer)
            # There may be more, or some may have to wait here.
            if answer.is_full(asked_for) or len(answer.jobs) > takers:
                self.bell.ring()
            elif answer.left:
                self._watch.dry(len(answer.jobs), True, self.looks.at)
                self._rest.deadline = self._wake_at()

    async def _wait_answered(self) -> None:
        while self._asked_for:
            await self._answered.park()

    async def _wait_for_work(self) -> None:
        self._resting = True
        if not self.bell.rung:
            self._watch.rested()
        try:
            while self._paused:
                self.bell.clear()
                await self.bell.wait()
            with trio.move_on_at(self._wake_at()) as self._rest:
                await self.bell.wait()
        finally:
            self._resting = False

    def _wake_at(self) -> float:
        looks_at = min(self._watch.look_at, self.fleet.look_at, self.looks.owed_at, self._poll_at())
        return min(self._due.at, self.hands.shelf.stale_at(), looks_at)

    def _poll_at(self) -> float:
        return max(self.looks.at, self._begun_at) + (math.inf if self._poll_interval is None else self._poll_interval)

    async def _drain(self) -> None:
        brought = 0
        await self._wait_answered()
        if self._refusal is not None:
            refusal, self._refusal = self._refusal, None
            raise refusal
        dry = self._may_look(trio.current_time())
        while True:
            await trio.lowlevel.checkpoint_if_cancelled()  # under steady load nothing else in here would see it
            how_many = await self.hands.wait_demand()
            if self._paused:
                return
            self.bell.clear()
            now = trio.current_time()
            whole = dry or not self._floor.numbers or self.looks.is_due(now)
            self.fleet.looked()
            self._due.claiming()
            floors = None if whole else self._floor.numbers
            with trio.CancelScope(shield=True), answered_within(ANSWER_TIMEOUT):
                haul = await self._calls.claim(how_many, floors, self._due.floor)
            if whole:
                self._looked(now, how_many, haul)
            else:
                self._deliver(haul)
            brought += len(haul.jobs)
            dry = not haul.is_full(how_many)
            if dry:
                # With a floor that may only mean that the rest lies below it: look before resting, or soon if that is dear.
                dry = self._may_look(now)
                if (whole or not dry) and not self.bell.rung:
                    self.looks.owed = not whole
                    self._watch.dry(brought, haul.left, trio.current_time())
                    return

    def _looked(self, since: float, how_many: int, haul: Haul) -> None:
        """A claim from the beginning has ended."""
        self.looks.made(since, trio.current_time())
        self._calls.stand_far(None if self.looks.cheap else self._stands_far)
        if not haul.jobs:
            self._floor.reset()
        self._deliver(haul)
        if not haul.is_full(how_many) and not haul.left and (numbers := self.fleet.says()):
            self._calls.say_taken(numbers)

    def _deliver(self, haul: Haul) -> None:
        self._due.claimed(haul.due_floor)
        jobs = haul.jobs
        if self._paused:  # they were claimed before that
            self.hands.release(jobs)
            return
        if not jobs:
            return
        now = trio.current_time()
        self.fleet.took(jobs)
        self._floor.claimed(jobs, now)
        self.hands.put(jobs, now)
        if self._events.wants(JobClaimed):
            for job in jobs:
                self._events.emit(JobClaimed(self.queue, job.id, job.attempt))

    def _stands_far(self) -> None:
        if self.looks.dear:  # else one comes soon
            self.looks.ask(trio.current_time())  # for what appeared below the floors before that
            self.bell.ring()

    async def _learn_due(self) -> None:
        self._due.learning(trio.current_time())
        try:
            due, server_now = await self._calls.next_due(self._due.since(self.looks.dear))
        except BaseException:
            self._due.unknown = True
            raise
        self._due.learned(due, server_now, trio.current_time())

    def _may_look(self, now: float) -> bool:
        """One look from the beginning finds all; when such looks are dear, one has to be due for that."""
        return self.looks.cheap or self.looks.is_due(now) or now >= self._poll_at()

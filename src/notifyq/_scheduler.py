"""Fires the schedules of the whole installation: any runtime does, and the first one there makes the job.

It knows the schedules that come next and sleeps until the first of them, by the server's clock. It looks again when it is
told of a change: by 'schedule' on the control channel, by a new connection, or by the beat. No leader, no polling.
"""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import attrs
import psycopg
import trio

from ._backoff import reconnect_delay
from ._bell import Bell
from ._connection import ANSWER_TIMEOUT, answered_within
from ._cron import Rule, Step, decide, read_rule
from ._errors import ConnectionLost, InvalidOption, NotifyqError
from ._sql import reason
from ._store_schedules import moment
from .events import ScheduleBroken, ScheduleFired, ScheduleMissed, ServerTrouble

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._pool import Pool
    from ._store_schedules import Ahead, Fired, Schedules
    from .events import Events

__all__ = ["Scheduler", "ServerClock"]

HOW_MANY = 100
"""Schedules known at a time, the next ones: bounds a look, however many there are."""

LOOK_AGAIN = 0.02
"""Seconds between looks while more are due than are known at a time."""

PATIENCE = 1.0
"""Seconds until a schedule is tried again whose firing the server could not do, while the others go on; and at most until
one is whose row somebody has locked: mostly a runtime that fires it, but it may be a transaction that stays open."""

SAY_AGAIN = 60.0
"""Seconds until it is said again that a schedule's jobs are refused for the same reason: it may fire ten times a second."""


class ServerClock:
    """Where the server's clock stands, from answers that said so: between when each was asked for and when it came."""

    def __init__(self) -> None:
        self._offset: float | None = None

    def measured(self, asked: float, answered: float, server: float) -> None:
        """An answer said ``server``, in seconds of the epoch; the others are of ``trio.current_time()``'s clock."""
        least, most = server - answered, server - asked
        self._offset = (least + most) / 2 if self._offset is None else min(max(self._offset, least), most)

    def now(self) -> float:
        """The server's time, in seconds of the epoch; before any answer, this machine's."""
        return datetime.now(UTC).timestamp() if self._offset is None else trio.current_time() + self._offset

    def at(self, epoch: float) -> float:
        """When it will be that time, on ``trio.current_time()``'s clock."""
        return trio.current_time() + epoch - self.now()


@attrs.define(eq=False)
class Known:
    """A schedule that this runtime can fire."""

    number: int
    queue: str
    name: str
    rule: Rule
    missed: str
    changed_at: datetime
    next_at: datetime | None
    """None: not worked out yet."""
    not_before: float = -math.inf
    """On ``trio.current_time()``'s clock."""
    tries: int = 0
    """In a row, at a firing that could not be made."""


class Scheduler:
    """Fires schedules on time."""

    def __init__(self, pool: Pool, schedules: Schedules, events: Events) -> None:
        self.clock = ServerClock()
        self._pool = pool
        self._schedules = schedules
        self._events = events
        self._random = random.Random()
        self._bell = Bell()
        self._known: dict[int, Known] = {}
        self._unreadable: set[int] = set()
        self._said: dict[int, tuple[str, float]] = {}
        self._look_at = -math.inf
        self._told: int | None = None

    def look_again(self) -> None:
        """Schedules were made, changed or removed, or may have been."""
        self._look_at = -math.inf
        self._bell.ring()

    def told(self, schedules: int) -> None:
        """What the beat said: another number than before when they were changed. It has measured the clock, too."""
        if schedules != self._told:
            self._told = schedules
            self._look_at = -math.inf
        self._bell.ring()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fire until cancelled. What fails is tried again; one schedule's trouble does not hold up the others.

        Started after the first look, so that at start it needs no connection at the same time as other parts.
        """
        failures = 0
        started = False
        while True:
            self._bell.clear()
            try:
                if trio.current_time() >= self._look_at:
                    await self._look()
                await self._fire_all(self._due())
                failures = 0
            except (NotifyqError, psycopg.Error) as error:
                if failures == 0:
                    self._events.emit(ServerTrouble("schedules", reason(error)))
                failures += 1
                self._look_at = -math.inf
            if not started:
                started = True
                task_status.started()
            if failures:
                await trio.sleep(reconnect_delay(failures, self._random))
                continue
            with trio.move_on_at(min([self._look_at, *map(self._wake_at, self._known.values())])):
                await self._bell.wait()

    def _due(self) -> list[Known]:
        now = trio.current_time()
        return [known for known in self._known.values() if self._wake_at(known) <= now]

    def _wake_at(self, known: Known) -> float:
        if known.next_at is None:
            return known.not_before
        return max(self.clock.at(known.next_at.timestamp()), known.not_before)

    async def _look(self) -> None:
        """Learn which schedules come next."""
        self._look_at = math.inf
        asked = trio.current_time()
        with answered_within(ANSWER_TIMEOUT):
            async with self._pool.connection() as connection:
                asked = trio.current_time()
                rows = await self._schedules.ahead(connection, sorted(self._unreadable), HOW_MANY)
        if rows:
            self.clock.measured(asked, trio.current_time(), rows[0].clock)
        before, self._known = self._known, {}
        for row in rows:
            try:
                self._known[row.number] = _read(row)
            except InvalidOption as error:
                await self._broken(row.number, row.queue, row.name, str(error))
            else:
                if (known := before.get(row.number)) is not None:
                    self._known[row.number].not_before = known.not_before
                    self._known[row.number].tries = known.tries
        if len(rows) == HOW_MANY:  # there may be more, that come after the last of these
            last = rows[-1].next_at
            at = -math.inf if last is None else self.clock.at(last / 1e6)
            self._look_at = max(at, trio.current_time() + LOOK_AGAIN)

    async def _fire_all(self, due: list[Known]) -> None:
        """Fire in one statement, and so in one transaction: many have the same minute. If that fails, one by one."""
        steps = []
        for known in due:
            try:
                steps.append((known, _plan(known, self.clock.now())))
            except InvalidOption as error:
                await self._broken(known.number, known.queue, known.name, str(error))
        try:
            await self._fire(steps)
        except ConnectionLost:
            raise
        except (NotifyqError, psycopg.Error) as error:
            if len(steps) == 1:
                self._trouble(steps[0][0], error)
                return
            for known, step in steps:
                try:
                    await self._fire([(known, step)])
                except ConnectionLost:
                    raise
                except (NotifyqError, psycopg.Error) as own:
                    self._trouble(known, own)

    async def _fire(self, steps: Sequence[tuple[Known, Step]]) -> None:
        if not steps:
            return
        calls = [(known.number, known.next_at, step.fired_for, step.next_at) for known, step in steps]
        with answered_within(ANSWER_TIMEOUT):
            async with self._pool.connection() as connection:
                asked = trio.current_time()
                answers = await self._schedules.fire(connection, calls)
        answered = trio.current_time()
        for (known, step), fired in zip(steps, answers, strict=True):
            self.clock.measured(asked, answered, fired.clock)
            self._take(known, step, fired)

    def _take(self, known: Known, step: Step, fired: Fired) -> None:
        """What ``fire()`` answered."""
        if fired.done == "changed":
            del self._known[known.number]
            self._look_at = -math.inf
            return
        since, known.next_at = known.next_at, None if fired.next_at is None else moment(fired.next_at)
        if fired.done == "busy":
            known.not_before = trio.current_time() + min(PATIENCE, reconnect_delay(known.tries + 1, self._random))
            known.tries += 1
            return
        if fired.done != "planned":  # passing over firings tells nothing of the next one
            known.tries = 0
        if fired.done == "early":
            assert step.fired_for is not None
            known.not_before = trio.current_time() + max(step.fired_for.timestamp() - fired.clock, 0.0)
        elif fired.done != "beaten":
            if step.missed and since is not None:
                self._events.emit(ScheduleMissed(known.queue, known.name, since, step.fired_for))
            if fired.job is not None and step.fired_for is not None:
                self._events.emit(ScheduleFired(known.queue, known.name, fired.job, step.fired_for))
            if fired.error is not None:
                self._refused(known, fired.error)
            elif fired.done == "fired":
                self._said.pop(known.number, None)

    def _refused(self, known: Known, error: str) -> None:
        """Say why a firing made no job: when that is new, and now and then while it lasts."""
        now = trio.current_time()
        said, at = self._said.get(known.number, ("", -math.inf))
        if error != said or now >= at + SAY_AGAIN:
            self._said[known.number] = (error, now)
            self._events.emit(ScheduleBroken(known.queue, known.name, error))

    def _trouble(self, known: Known, error: Exception) -> None:
        """Say once for a row of failures that the server could not fire one, and let the others go on meanwhile."""
        if not known.tries:
            self._events.emit(ServerTrouble("schedules", f"{known.name} of queue {known.queue}: {reason(error)}"))
        known.tries += 1
        known.not_before = trio.current_time() + PATIENCE

    async def _broken(self, number: int, queue: str, name: str, reason: str) -> None:
        """Say once that a schedule cannot be fired here, and leave it to others."""
        self._known.pop(number, None)
        self._unreadable.add(number)
        self._events.emit(ScheduleBroken(queue, name, reason))
        with answered_within(ANSWER_TIMEOUT):
            async with self._pool.connection() as connection:
                await self._schedules.keep_error(connection, number, reason)


def _plan(known: Known, now: float) -> Step:
    """Pure. Raises ``InvalidOption`` if there is no further firing."""
    if known.next_at is None:
        return Step(None, known.rule.next_after(known.changed_at), missed=False)
    moment_now = max(datetime.fromtimestamp(now, UTC), known.next_at)
    return decide(known.rule, known.next_at, moment_now, known.missed)


def _read(row: Ahead) -> Known:
    """Raises ``InvalidOption`` for what cannot be read here."""
    rule = read_rule(row.cron, row.every, row.timezone)
    next_at = None if row.next_at is None else moment(row.next_at)
    return Known(row.number, row.queue, row.name, rule, row.missed, moment(row.changed_at), next_at)

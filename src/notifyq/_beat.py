"""The one statement an idle runtime runs: it renews the lease, proves the listener, and is the poll.

A runtime that cannot renew cancels its own handlers before others may take their jobs.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import psycopg
import trio

from ._bell import Bell
from ._errors import NotifyqError
from ._lock import QuickLock
from ._sql import reason
from .events import LeaseGivenUp, ServerTrouble

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._answers import Beat
    from .events import Events

__all__ = ["Heart"]

RETRY = 0.5
"""Seconds between tries to renew while the server can't be reached."""


class Heart:
    """Beats every 5 to 6 s with the default lease of 12 s (5/12 to 1/2 of the lease), and when asked to."""

    def __init__(
        self,
        runtime: str,
        lease: float,
        *,
        beat: Callable[[], Awaitable[Beat]],
        register: Callable[[], Awaitable[None]],
        told: Callable[[Beat], object],
        lost: Callable[[], object],
        events: Events,
    ) -> None:
        """``register`` lets go of all jobs, here and in the database, and begins a new lease.

        ``told`` gets what each beat said.
        ``lost`` is called when the lease lapsed, or is about to.
        """
        self._runtime = runtime
        self._lease = lease
        self._margin = lease / 6
        """Own handlers end before the lease does: so much of it is left for them to end in."""
        self._beat = beat
        self._register = register
        self._told = told
        self._lost = lost
        self._events = events
        self._random = random.Random()
        self._held_until = -math.inf
        self._asked = Bell()
        self._failing = False
        self._beating = trio.CancelScope()
        self._running = QuickLock()

    def soon(self) -> None:
        """Beat at once: there is something to be told."""
        self._asked.ring()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Beat until cancelled, or stopped. Started after the first beat."""
        async with self._running:
            with self._beating:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._give_up_in_time)
                    await self._beat_for_ever(task_status)

    async def stop(self) -> None:
        """Beat no more. After that nothing is under way that might register the runtime again."""
        self._beating.cancel()
        async with self._running:
            pass

    async def _beat_for_ever(self, task_status: trio.TaskStatus[None]) -> None:
        self._held_until = trio.current_time() + self._lease
        await self._beat_once()
        task_status.started()
        beaten = True
        last = trio.current_time()
        while True:
            # From the start of the last beat: a slow one does not put off the next.
            pause = self._random.uniform(5 / 12, 1 / 2) * self._lease if beaten else RETRY
            with trio.move_on_at(last + pause):
                await self._asked.wait()
            self._asked.clear()
            last = trio.current_time()
            beaten = await self._beat_once()

    async def _beat_once(self) -> bool:
        """Beat; give the lease up in time if that fails. True if it is renewed."""
        started = trio.current_time()
        if started >= self._held_until - self._margin:
            self._give_up()
        given_up = self._held_until == -math.inf
        try:
            with trio.move_on_at(
                started + self._lease / 2 if given_up else self._held_until - self._margin
            ) as patience:
                beat = await self._beat()
            if patience.cancelled_caught:
                self._give_up()
                return False
            if self._held_until == -math.inf or not beat.renewed:
                # What is still ours in the database was cancelled here: start with empty hands.
                self._give_up()
                await self._register()
        except (NotifyqError, psycopg.Error) as error:
            if not self._failing:
                self._events.emit(ServerTrouble("beat", reason(error)))
            self._failing = True
            return False
        self._failing = False
        self._held_until = started + self._lease
        self._told(beat)
        return True

    async def _give_up_in_time(self) -> None:
        """Whatever a beat that hangs does: to let go of its connection may take it seconds."""
        while True:
            left = self._held_until - self._margin - trio.current_time()
            if left <= 0:
                self._give_up()
            await trio.sleep(left if left > 0 else self._margin)

    def _give_up(self) -> None:
        if self._held_until != -math.inf:
            self._held_until = -math.inf
            self._events.emit(LeaseGivenUp(self._runtime))
            self._lost()

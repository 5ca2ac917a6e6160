"""What any runtime does for all: rescues the jobs of dead ones, expires, purges, turns the archive's leaves.

Every runtime does it; the SQL functions let one at a time through. No leader.
"""

from __future__ import annotations

import contextlib
import math
import random
from typing import TYPE_CHECKING

import psycopg
import trio

from ._errors import NotifyqError
from ._sql import reason
from .events import JobsRescued, ServerTrouble

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._pool import Pool
    from ._store import Store
    from .events import Events

__all__ = ["Maintenance"]

EVERY = (300.0, 360.0)
FIRST = (1.0, 5.0)
"""Seconds between rounds, and until the first one, evenly spread, so that a fleet's rounds do not meet. Nothing here is
urgent (claims refuse what has expired, rescues come at their moment), and a round's five statements and the beats must stay
under one in 5 s."""

AGAIN = (0.5, 1.0)
"""Seconds after a rescue until the next of the same, if it left something: it stepped over a runtime's row that is in use,
or that somebody else rescues, or over jobs of a queue whose gate is in use. Evenly spread, as a fleet's should not meet."""

BATCH = 1000
"""What expire() and purge() do at a time: see ``sql/functions/80_maintain.sql``."""


class Maintenance:
    """Rounds of maintenance, and rescues at the moment a lease lapses."""

    def __init__(self, pool: Pool, store: Store, events: Events, look: Callable[[], object]) -> None:
        """``look`` asks for a beat at once, which says ``lapses_in()``."""
        self._pool = pool
        self._store = store
        self._events = events
        self._look = look
        self._random = random.Random()
        self._look_at = math.inf
        self._rescue_at = math.inf
        self._rescued_at = -math.inf
        self._again_at = -math.inf
        self._sleep = trio.CancelScope()

    def lapses_in(self, seconds: float | None) -> None:
        """Of the leases of others the first one lapses in so many seconds if it is not renewed; None: there are none.

        At that very moment it is looked at again, for the next beat may be far: who is dead is rescued, and then the
        next one's is known. While nobody dies all have been renewed before.
        """
        now = trio.current_time()
        self._look_at = self._rescue_at = math.inf
        if seconds is not None and seconds > 0:
            self._look_at = now + seconds
        elif seconds is not None and now + seconds > self._rescued_at:
            self._rescue_at = now
        elif seconds is not None:  # the last rescue has left it
            self._rescue_at = max(now, self._again_at)
        self._sleep.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Maintain until cancelled. What fails is left to the next round, or beat."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._rounds)
            nursery.start_soon(self._rescues)  # which no round holds up: much to purge takes long

    async def _rounds(self) -> None:
        await trio.sleep(self._random.uniform(*FIRST))
        while True:
            started = trio.current_time()
            with self._trouble_told():
                await self._round()
            await trio.sleep_until(started + self._random.uniform(*EVERY))

    async def _rescues(self) -> None:
        while True:
            with trio.CancelScope(deadline=min(self._look_at, self._rescue_at)) as self._sleep:
                await trio.sleep_forever()
            now = trio.current_time()
            if now >= self._rescue_at:
                with self._trouble_told():
                    await self._rescue()
                    self._look()
            elif now >= self._look_at:
                self._look_at = math.inf
                self._look()

    @contextlib.contextmanager
    def _trouble_told(self) -> Iterator[None]:
        try:
            yield
        except (NotifyqError, psycopg.Error) as error:
            self._events.emit(ServerTrouble("maintenance", reason(error)))

    async def _round(self) -> None:
        """Each step is a transaction of its own: none waits for another, and none undoes another."""
        await self._rescue()
        async with self._pool.connection() as connection:
            await self._store.make_leaves(connection)
            while await self._store.expire(connection) == BATCH:
                pass
            while await self._store.purge(connection) == BATCH:
                pass
            while await self._store.drop_leaf(connection):
                pass

    async def _rescue(self) -> None:
        self._rescue_at = math.inf
        self._rescued_at = trio.current_time()
        self._again_at = math.inf  # until it is known how long it takes
        try:
            async with self._pool.connection() as connection:
                rescued = await self._store.rescue(connection)
        finally:
            self._again_at = trio.current_time() + self._random.uniform(*AGAIN)
        if rescued:
            self._events.emit(JobsRescued(tuple(rescued)))

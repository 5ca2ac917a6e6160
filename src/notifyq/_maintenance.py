"""What any runtime does for all: rescues the jobs of dead ones, expires, purges, turns the archive's leaves.

Every runtime does it; the SQL functions let one at a time through. No leader.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import psycopg
import trio

from ._errors import NotifyqError
from ._sql import reason
from .events import JobsRescued, ServerTrouble

if TYPE_CHECKING:
    from ._pool import Pool
    from ._store import Store
    from .events import Events

__all__ = ["Maintenance"]

EVERY = (300.0, 360.0)
FIRST = (1.0, 5.0)
"""Seconds between rounds, and until the first one, evenly spread, so that a fleet's rounds do not meet. Nothing here is
urgent (claims refuse what has expired, rescues come at their moment), and a round's five statements and the beats must stay
under one in 5 s."""

BATCH = 1000
"""What expire() and purge() do at a time: see ``sql/functions/80_maintain.sql``."""


class Maintenance:
    """Rounds of maintenance, and rescues at the moment a lease lapses."""

    def __init__(self, pool: Pool, store: Store, events: Events) -> None:
        self._pool = pool
        self._store = store
        self._events = events
        self._random = random.Random()
        self._rescue_at = math.inf
        self._sleep = trio.CancelScope()

    def rescue_in(self, seconds: float | None) -> None:
        """A lease of somebody else lapses in so many seconds, if it is not renewed before; None: nobody's does."""
        self._rescue_at = math.inf if seconds is None else trio.current_time() + max(seconds, 0.0) + 0.05
        self._sleep.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Maintain until cancelled. What fails is left to the next round."""
        task_status.started()
        next_round = trio.current_time() + self._random.uniform(*FIRST)
        while True:
            try:
                if trio.current_time() >= next_round:
                    next_round = trio.current_time() + self._random.uniform(*EVERY)
                    await self._round()
                if trio.current_time() >= self._rescue_at:
                    await self._rescue()
            except (NotifyqError, psycopg.Error) as error:
                self._events.emit(ServerTrouble("maintenance", reason(error)))
            with trio.CancelScope(deadline=min(next_round, self._rescue_at)) as self._sleep:
                await trio.sleep_forever()

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
        self._rescue_at = math.inf  # the next beat knows the next one
        async with self._pool.connection() as connection:
            rescued = await self._store.rescue(connection)
        if rescued:
            self._events.emit(JobsRescued(tuple(rescued)))

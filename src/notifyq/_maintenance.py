"""What any runtime does for all: rescues the jobs of dead ones, expires, purges, turns the archive's leaves.

Every runtime does it; the SQL functions let one at a time through. No leader.
"""

from __future__ import annotations

import contextlib
import math
import random
from typing import TYPE_CHECKING

import trio

from ._errors import ConnectionLost
from ._events import JobsRescued

if TYPE_CHECKING:
    from ._events import Events
    from ._pool import Pool
    from ._store import Store

__all__ = ["Maintenance"]

EVERY = (90.0, 120.0)
"""Seconds between rounds, evenly spread, so that a fleet's rounds do not meet."""


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
        """Maintain until cancelled; the first round at once."""
        task_status.started()
        next_round = -math.inf
        while True:
            with contextlib.suppress(ConnectionLost):
                if trio.current_time() >= next_round:
                    next_round = trio.current_time() + self._random.uniform(*EVERY)
                    await self._round()
                if trio.current_time() >= self._rescue_at:
                    await self._rescue()
            with trio.CancelScope(deadline=min(next_round, self._rescue_at)) as self._sleep:
                await trio.sleep_forever()

    async def _round(self) -> None:
        more = True
        while more:
            async with self._pool.connection() as connection:
                more = await self._store.maintain(connection)

    async def _rescue(self) -> None:
        self._rescue_at = math.inf  # the next beat knows the next one
        async with self._pool.connection() as connection:
            rescued = await self._store.rescue(connection)
        if rescued:
            self._events.emit(JobsRescued(tuple(rescued)))

"""The jobs in hand: those that wait here for a slot and those that run; and how many more there is room for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from ._bell import Bell
from ._demand import Rate, demand
from ._shelf import Shelf

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from ._answers import Claimed

__all__ = ["Hands"]


class Hands:
    """One queue's jobs in this process, from their claim to their end."""

    def __init__(self, capacity: int, release: Callable[[Claimed], object]) -> None:
        """``capacity``: how many jobs can run at once. ``release`` hands one back to the database; it never waits."""
        self.shelf = Shelf()
        self._capacity = capacity
        self._release = release
        self._rate = Rate(capacity)
        self._room = Bell()
        self._running = 0
        self._idle_demand = 0

    async def take(self, how_many: int) -> list[Claimed]:
        """Wait for jobs and take up to so many, in order, to run them in one call, whose places they all occupy."""
        jobs = await self.shelf.take(how_many)
        self._running += how_many
        self._room.ring()
        return jobs

    def left_free(self, places: int) -> None:
        """A call is about to end that was given fewer jobs than it has places."""
        self._running -= places

    def finished(self) -> None:
        """A job that was taken has ended."""
        self._running -= 1
        in_hand = self._running or self.shelf
        self._rate.finished(None if in_hand else trio.current_time())
        self._idle_demand = 0 if in_hand else self.demand()
        self._room.ring()

    def put(self, jobs: list[Claimed], now: float) -> None:
        """These have just been claimed."""
        self._idle_demand = 0
        self._rate.busy(now)
        for job in jobs:
            job.claimed_at = now
        self.shelf.put(jobs)

    def drop(self, job_ids: Container[int]) -> list[Claimed]:
        """Take these jobs out, as far as they have not been taken."""
        dropped = self.shelf.drop(job_ids)
        if dropped:
            self._room.ring()
        return dropped

    def demand(self) -> int:
        """How many jobs to claim now."""
        # What it was when the last job ended holds as long as nothing is in hand: a claim at once need not work it out.
        if self._idle_demand:
            return self._idle_demand
        per_second = self._rate.measure(trio.current_time())
        return demand(self._capacity, self._running, len(self.shelf), per_second)

    async def wait_demand(self) -> int:
        """Wait until there is room for more, and say for how many."""
        while True:
            self._room.clear()
            if how_many := self.demand():
                return how_many
            with trio.move_on_at(self.shelf.stale_at()):
                await self._room.wait()
            self.hand_back_stale()

    def hand_back(self) -> None:
        """All jobs that have not been taken."""
        self.release(self.shelf.take_back())
        self._room.ring()

    def release(self, jobs: list[Claimed]) -> None:
        """Hand back jobs that are nowhere here."""
        for job in jobs:
            self._release(job)

    def hand_back_stale(self) -> None:
        """The same if the first of them has waited too long."""
        stale_at = self.shelf.stale_at()
        if stale_at != math.inf and trio.current_time() >= stale_at:
            self._rate.reset()
            self.hand_back()

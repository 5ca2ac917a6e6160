"""The jobs that were claimed and wait for a slot."""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from ._answers import Claimed

__all__ = ["Shelf"]

STALE_SECONDS = 1.0
"""A job that has waited here so long for a slot is handed back: the work has become slower than it was when it was claimed,
somebody else may have a slot free, and the deadline in the database has been running."""


class Shelf:
    """A queue of jobs, in order, with those who wait for one."""

    def __init__(self) -> None:
        self.fair = False
        """Keys take turns here, too: a job waits for one of each other key, and not for all that were claimed before it."""
        self._jobs: deque[Claimed] = deque()
        self._takers = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def takers(self) -> int:
        """How many wait for jobs."""
        return len(self._takers)

    def put(self, jobs: list[Claimed]) -> None:
        """Add jobs and wake as many takers."""
        self._jobs.extend(jobs)
        if self.fair:
            self._jobs = _in_turns(self._jobs)
        self._takers.unpark(count=len(jobs))

    async def take(self, how_many: int) -> list[Claimed]:
        """Wait for jobs and take up to so many, in order."""
        while not self._jobs:
            await self._takers.park()
        if how_many == 1:
            return [self._jobs.popleft()]
        return [self._jobs.popleft() for _ in range(min(how_many, len(self._jobs)))]

    def take_back(self) -> list[Claimed]:
        """All jobs that have not been taken."""
        jobs = list(self._jobs)
        self._jobs.clear()
        return jobs

    def drop(self, job_ids: Container[int]) -> list[Claimed]:
        """Take these jobs out, as far as they have not been taken."""
        dropped = [job for job in self._jobs if job.id in job_ids]
        if dropped:
            self._jobs = deque(job for job in self._jobs if job.id not in job_ids)
        return dropped

    def waiting(self) -> set[tuple[int, int]]:
        """The attempts that have not been taken, as (job, attempt)."""
        return {(job.id, job.attempt) for job in self._jobs}

    def keys(self) -> list[str]:
        """The key of each job that has not been taken."""
        return [job.key or "" for job in self._jobs]

    def stale_at(self) -> float:
        """When the first of them has waited too long, on ``trio.current_time()``'s clock."""
        # While there are takers, what is here is about to be taken.
        waits = self._jobs and not self._takers
        return self._jobs[0].claimed_at + STALE_SECONDS if waits else math.inf


def _in_turns(jobs: Iterable[Claimed]) -> deque[Claimed]:
    """Of each priority, the first job of each key, then the second ones, and so on; the highest priority first."""
    turns: Counter[tuple[int, str | None]] = Counter()
    places = []
    for place, job in enumerate(jobs):
        turn = turns[job.priority, job.key] = turns[job.priority, job.key] + 1
        places.append((-job.priority, turn, place, job))
    return deque(job for *_, job in sorted(places))

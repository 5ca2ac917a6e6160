"""What a runtime holds, by the database, is compared with what it knows of: the answer to a claim may have been lost, and a
server that crashed may have forgotten a claim.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import psycopg
import trio

from ._bell import Bell
from ._errors import NotifyqError
from ._maintenance import EVERY
from ._models import Released

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from ._pool import Pool
    from ._settler import Settler
    from ._store import Store
    from ._worker import QueueWorker

__all__ = ["Reconciler"]

DOUBT = 60.0
"""Seconds after the answer to a claim was lost in which it is looked for what that brought: the server may have the claim
waiting for a gate still. What it brings later yet is found by looks every few minutes, from then on."""

AGAIN = 3.0
"""Seconds between two looks while there is doubt."""


class Reconciler:
    """Hands back what one runtime holds and does not know of, and takes from it what it does not hold."""

    def __init__(
        self, runtime: UUID, pool: Pool, store: Store, settler: Settler, workers: Callable[[], Sequence[QueueWorker]]
    ) -> None:
        """``workers`` gives all that there are, also those that are ending."""
        self._runtime = runtime
        self._pool = pool
        self._store = store
        self._settler = settler
        self._workers = workers
        self._bell = Bell()
        self._reconnected = False
        self._in_doubt_until = -math.inf
        self._strays: dict[tuple[int, int, float], float] = {}
        """What we hold and do not know of, as (job, attempt, when it was claimed), and since when we know that."""

    def known(self) -> set[tuple[int, int]]:
        """The attempts that wait, run, or have ended and are not settled yet, as (job, attempt)."""
        return self._at_work() | self._settler.unsettled()

    def _at_work(self) -> set[tuple[int, int]]:
        return set().union(*(worker.known() for worker in self._workers()))

    def answer_lost(self) -> None:
        """A claim may have brought, or may bring yet, what is not known here."""
        self._in_doubt_until = trio.current_time() + DOUBT
        self._bell.ring()

    def reconnected(self) -> None:
        """The server may have been restarted, or be another one."""
        if self.known():
            self._reconnected = True
            self._bell.ring()

    async def run(self) -> None:
        """Look while there is doubt, and every few minutes once an answer was lost, until cancelled."""
        while True:
            with trio.move_on_after(self._pause()):
                await self._bell.wait()
            self._bell.clear()
            try:
                await self._look()
            except (NotifyqError, psycopg.Error):
                self._reconnected = True  # compare all when it answers again, whatever the doubt was

    def _pause(self) -> float:
        if self._strays or self._is_in_doubt():
            return AGAIN
        return math.inf if self._in_doubt_until == -math.inf else random.uniform(*EVERY)

    def _is_in_doubt(self) -> bool:
        return self._reconnected or trio.current_time() < self._in_doubt_until

    async def _look(self) -> None:
        # A busy runtime always has jobs on their way to or from here: a look for those that were found finds no others.
        afresh = self._is_in_doubt() or not self._strays
        before = self._at_work()
        reconnected, self._reconnected = self._reconnected, False
        async with self._pool.connection() as connection:
            held = await self._store.held(connection, self._runtime)
        if reconnected:  # what the server has forgotten runs again
            for worker in self._workers():
                worker.lose(before - held.keys())
        # Unknown at two looks, and no claim from before the first is under way any longer: the answer to it was lost.
        now = trio.current_time()
        oldest_claim = min((worker.claiming_since for worker in self._workers()), default=math.inf)
        known = self.known()
        strays = [(*attempt, claimed_at) for attempt, claimed_at in held.items() if attempt not in known]
        self._strays = {stray: self._strays.get(stray, now) for stray in strays if afresh or stray in self._strays}
        for (job, attempt, claimed_at), seen in self._strays.items():
            if seen < min(now, oldest_claim):
                self._settler.put(Released(job, attempt, claimed_at), "")

"""Who sends: in bulk and one by one, with delays, keys, id_keys and flows. What returned is in the ledger."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import psycopg
import trio

import notifyq
from notifyq import NewJob, Queue

from .ledger import Send
from .queues import ALONE, BULK, LUCK, STEP

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .ledger import Ledger

__all__ = ["Producers"]

BACKLOG = 4000
"""Bulk jobs that wait at most: what is left when the load ends has to be worked off."""

ERROR_PAUSE = 0.05
"""Seconds after a send that failed."""


class Producers:
    """Tasks of this process that send until they are told to stop."""

    def __init__(self, dsn: str, ledger: Ledger, dice: random.Random, *, rate: float, pool_size: int) -> None:
        """``rate``: most bulk jobs in a second."""
        self._pool_size = pool_size
        self._dsn = dsn
        self._ledger = ledger
        self._seed = dice.random()
        self._rate = rate
        self._stopping = trio.Event()

    def stop(self) -> None:
        """End when the send that is under way has returned."""
        self._stopping.set()

    async def run(self) -> None:
        """Send until ``stop()``."""
        sorts = (self._bulk, self._bulk, self._single, self._lucky, self._alone, self._flow)
        async with (
            notifyq.connect(self._dsn, migrate=False, connect_timeout=5, pool_size=self._pool_size) as nq,
            trio.open_nursery() as nursery,
        ):
            for number, sort in enumerate(sorts):
                nursery.start_soon(self._repeat, nq, sort, random.Random(f"{self._seed} {number}"))

    async def _repeat(
        self, nq: notifyq.Client, sort: Callable[[notifyq.Client, random.Random], Awaitable[None]], dice: random.Random
    ) -> None:
        while not self._stopping.is_set():
            try:
                await sort(nq, dice)
            except (notifyq.NotifyqError, psycopg.Error) as error:
                self._ledger.refused[type(error).__name__] += 1
                await trio.sleep(ERROR_PAUSE)

    async def _send_many(self, nq: notifyq.Client, queue: Queue[int, int], jobs: list[NewJob[int]]) -> None:
        called = time.monotonic()
        with self._ledger.attempt(len(jobs)):
            sent = await nq.send_many(queue, jobs)
        delays = [float(job.options.get("delay", 0.0)) for job in jobs]  # type: ignore[arg-type]
        self._ledger.sent(
            (one.id, Send(queue.name, called, delay)) for one, delay in zip(sent, delays, strict=True) if one.created
        )

    async def _send(self, nq: notifyq.Client, queue: Queue[int, int], data: int, **options: object) -> None:
        """One job; with an ``id_key`` again until the answer comes: it is made once all the same."""
        key = options.get("id_key")
        called = time.monotonic()
        while True:
            try:
                with self._ledger.attempt(1):
                    sent = await nq.send(queue, data, **options)  # type: ignore[arg-type]
                break
            except (notifyq.NotifyqError, psycopg.Error) as error:
                if key is None or self._stopping.is_set():
                    raise
                self._ledger.refused[type(error).__name__] += 1
                await trio.sleep(ERROR_PAUSE)
        if key is not None:
            self._ledger.id_keys.setdefault(str(key), set()).add(sent.id)
        self._ledger.sent([(sent.id, Send(queue.name, called, float(options.get("delay", 0.0))))])  # type: ignore[arg-type]

    async def _bulk(self, nq: notifyq.Client, dice: random.Random) -> None:
        """Hundreds at once; one in 30 takes a while, a few are delayed."""
        many = dice.randrange(100, 500)
        while self._ledger.outstanding(BULK.name) > BACKLOG and not self._stopping.is_set():
            await trio.sleep(0.02)
        jobs: list[NewJob[int]] = []
        for _ in range(many):
            takes = int(dice.expovariate(1 / 30)) if dice.random() < 0.03 else 0
            delayed = dice.random() < 0.01
            jobs.append(NewJob(takes, {"delay": round(dice.uniform(0.1, 1), 3)} if delayed else {}))
        await self._send_many(nq, BULK, jobs)
        await trio.sleep(2 * many / self._rate)

    async def _single(self, nq: notifyq.Client, dice: random.Random) -> None:
        """One by one, some under an id_key, some of which are sent again."""
        if dice.random() < 0.5:
            key = f"{dice.random()}"
            for _ in range(dice.choice([1, 2])):
                await self._send(nq, BULK, 1, id_key=key)
        else:
            await self._send(nq, BULK, 0, priority=dice.randrange(3))
        await trio.sleep(dice.expovariate(50))

    async def _lucky(self, nq: notifyq.Client, dice: random.Random) -> None:
        if dice.random() < 0.5:
            await self._send(nq, LUCK, 0, delay=dice.choice([0, 0, 0.2]))
        else:
            await self._send_many(nq, LUCK, [NewJob(0) for _ in range(dice.randrange(2, 10))])
        await trio.sleep(dice.expovariate(20))

    async def _alone(self, nq: notifyq.Client, dice: random.Random) -> None:
        jobs: list[NewJob[int]] = [NewJob(0, {"key": f"k{dice.randrange(20)}"}) for _ in range(dice.randrange(1, 6))]
        await self._send_many(nq, ALONE, jobs)
        await trio.sleep(dice.expovariate(10))

    async def _flow(self, nq: notifyq.Client, dice: random.Random) -> None:
        """Some jobs, and one that comes after them."""
        flow = notifyq.Flow()
        parts = [flow.add(STEP, number) for number in range(dice.randrange(1, 4))]
        last = flow.add(STEP, 0, after=parts)
        called = time.monotonic()
        with self._ledger.attempt(len(flow)):
            sent = await nq.send_flow(flow)
        parents = tuple(sent[part].id for part in parts)
        self._ledger.sent([(job, Send(STEP.name, called)) for job in parents])
        self._ledger.sent([(sent[last].id, Send(STEP.name, called, after=parents))])
        await trio.sleep(dice.expovariate(5))

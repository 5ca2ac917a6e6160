"""Several faults at once."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import psycopg
import trio

from . import faults, sessions
from .faults import Fault

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .cell import Scene

__all__ = ["Mixed"]


class OpenAgain(sessions.LongTransaction):
    """As long as nothing ends it, but no longer than until the next one."""

    async def inflict(self, scene: Scene) -> None:
        with contextlib.suppress(psycopg.Error):
            await self.mend(scene)
        await super().inflict(scene)


class Mixed(Fault):
    """Two at a time of: kill, sigterm, stop, terminate-backend, restart-fast, restart-immediate, server-crash, half-open,
    network, no-connections, alien-locks, open-transaction (until a restart ends it), notify-queue-full. The wrong clock
    ticks all the time."""

    name = "mixed"
    pause = 1.0
    goal = 15.0

    def __init__(self) -> None:
        self._network = sessions.Network()
        self._half_open = sessions.HalfOpen()
        self._clock = sessions.Clock()
        self._transaction = OpenAgain()
        self._parts: list[Fault] = [
            faults.Kill(),
            faults.Terminate(),
            faults.Stop(),
            faults.Backends(),
            faults.Restart(),
            faults.RestartImmediate(),
            faults.Crash(),
            self._half_open,
            self._network,
            sessions.NoConnections(),
            sessions.AlienLocks(),
            self._transaction,
        ]
        self._notify_queue = sessions.NotifyQueue()

    def missing(self) -> str | None:
        if not self.settings and self._notify_queue.missing() is None:
            self.settings = self._notify_queue.settings
            self._parts.append(self._notify_queue)
        return None

    @contextlib.asynccontextmanager
    async def stage(self, scene: Scene) -> AsyncIterator[None]:
        async with self._clock.stage(scene), self._network.stage(scene):
            self._half_open.proxy = self._network.proxy
            yield

    async def inflict(self, scene: Scene) -> None:
        await self._clock.inflict(scene)
        async with trio.open_nursery() as nursery:
            for part in scene.dice.sample(self._parts, 2):
                nursery.start_soon(self._inflict, part, scene)

    async def _inflict(self, part: Fault, scene: Scene) -> None:
        # the other one has got in its way
        with contextlib.suppress(psycopg.Error, trio.TooSlowError, ProcessLookupError):
            await part.inflict(scene)

    async def mend(self, scene: Scene) -> None:
        await self._half_open.mend(scene)
        await self._network.mend(scene)
        with contextlib.suppress(psycopg.Error):
            await self._transaction.mend(scene)

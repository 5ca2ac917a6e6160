"""Batches whatever arrives while the last flush is in flight: no timer, and no added latency when idle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

import trio

from ._bell import Bell
from ._lock import QuickLock

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

__all__ = ["Batcher"]


class Batcher(Generic[T]):
    """Collects items and hands them to ``flush`` in order, a batch at a time.

    A flush that is cancelled or fails keeps its batch: it is flushed again, by ``run()`` or ``close()``.
    """

    def __init__(self, flush: Callable[[list[T]], Awaitable[None]], *, limit: int) -> None:
        """Flush up to ``limit`` items at a time."""
        self._flush = flush
        self._limit = limit
        self._items: list[T] = []
        self._bell = Bell()
        self._flushed = trio.lowlevel.ParkingLot()
        self._in_flight: list[T] = []
        self._flushing = QuickLock()

    def put(self, item: T) -> None:
        """Add an item; never waits. Whoever puts without bound should look at ``backlog``."""
        self._items.append(item)
        self._bell.ring()

    @property
    def backlog(self) -> int:
        """Items that have not been flushed."""
        return len(self._in_flight) + len(self._items)

    def pending(self) -> list[T]:
        """Items that have not been flushed, in order."""
        return self._in_flight + self._items

    async def wait_backlog_below(self, limit: int) -> None:
        """Wait until fewer than ``limit`` items are unflushed."""
        while self.backlog >= limit:
            await self._flushed.park()

    async def run(self) -> None:
        """Flush until cancelled."""
        while True:
            await self._bell.wait()
            while self._items:  # without a trip through the scheduler: those who wait for room would come first
                await self._flush_once()

    async def close(self) -> None:
        """Wait until all is flushed, by ``run()`` or, if that has ended, here."""
        while self.backlog:
            await self._flush_once()

    async def _flush_once(self) -> None:
        async with self._flushing:
            self._bell.clear()
            batch, self._items = self._items[: self._limit], self._items[self._limit :]
            self._in_flight = batch
            try:
                if batch:
                    await self._flush(batch)
            except BaseException:
                self._items[:0] = batch
                self._bell.ring()
                raise
            finally:
                self._in_flight = []
                self._flushed.unpark_all()

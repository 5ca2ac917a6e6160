"""Locks that cost no trip through the scheduler while they are free: what they guard has a checkpoint of its own."""

from __future__ import annotations

import trio

__all__ = ["QuickLock"]


class QuickLock:
    """A lock, or several permits, for ``async with``. Fair once somebody waits, as trio's are."""

    def __init__(self, permits: int = 1) -> None:
        self._permits = permits
        self._free = permits
        self._waiters = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        if not self.acquire_nowait():
            await self._waiters.park()  # release() leaves the permit to whom it wakes

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def acquire_nowait(self) -> bool:
        """Take it if it is free; True if it was. Then ``release`` it."""
        if not self._free:
            return False
        self._free -= 1
        return True

    def release(self) -> None:
        """Give it back."""
        if self._waiters:
            self._waiters.unpark()
        else:
            self._free += 1

    @property
    def held(self) -> int:
        """Permits in use."""
        return self._permits - self._free

    @property
    def waiting(self) -> int:
        """Tasks that wait for one."""
        return len(self._waiters)

"""Locks that cost no trip through the scheduler while they are free: what they guard has a checkpoint of its own."""

from __future__ import annotations

import trio

__all__ = ["QuickLock"]


class QuickLock:
    """A lock, or several permits, for ``async with``. Fair once somebody waits, as trio's are."""

    def __init__(self, permits: int = 1) -> None:
        self._semaphore = trio.Semaphore(permits, max_value=permits)
        self._permits = permits

    async def __aenter__(self) -> None:
        if not self.acquire_nowait():
            await self._semaphore.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._semaphore.release()

    def acquire_nowait(self) -> bool:
        """Take it if it is free; True if it was. Then ``release`` it."""
        try:
            self._semaphore.acquire_nowait()
        except trio.WouldBlock:
            return False
        return True

    def release(self) -> None:
        """Give it back."""
        self._semaphore.release()

    @property
    def held(self) -> int:
        """Permits in use."""
        return self._permits - self._semaphore.value

    @property
    def waiting(self) -> int:
        """Tasks that wait for one."""
        return self._semaphore.statistics().tasks_waiting

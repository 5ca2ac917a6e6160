"""A wake-up that is never lost and never queued: however often it rings, one waiter wakes once."""

from __future__ import annotations

import trio

__all__ = ["Bell"]


class Bell:
    """Level-triggered: a ring while nobody waits is kept. Clear it *before* looking for what it rang for."""

    def __init__(self) -> None:
        self._rung = False
        self._lot = trio.lowlevel.ParkingLot()

    @property
    def rung(self) -> bool:
        """Whether it has rung since it was cleared."""
        return self._rung

    def ring(self) -> None:
        """Wake the waiter, now or when it comes to wait."""
        if not self._rung:  # else nobody is parked
            self._rung = True
            self._lot.unpark_all()

    def clear(self) -> None:
        """Forget past rings."""
        self._rung = False

    async def wait(self) -> None:
        """Wait until it has rung since it was last cleared. Cancelled: the ring is kept."""
        if self._rung:
            await trio.lowlevel.checkpoint()
        while not self._rung:
            await self._lot.park()

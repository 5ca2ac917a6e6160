"""Functions that are no coroutines, run in threads. A thread can't be cancelled: it is waited for, or left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Threads"]


class Threads:
    """The threads of one queue's slots."""

    def __init__(self, how_many: int) -> None:
        """``how_many``: at once."""
        self._limiter = trio.CapacityLimiter(how_many)
        self._awaited: set[trio.CancelScope] = set()

    def call(self, function: Callable[[Any], Any]) -> Callable[[Any], Awaitable[Any]]:
        """The function as a coroutine, which ends when its thread does, also when it is cancelled; or with ``leave()``."""

        async def in_thread(job: Any) -> Any:
            with trio.CancelScope(shield=True) as waiting:
                self._awaited.add(waiting)
                try:
                    return await trio.to_thread.run_sync(function, job, limiter=self._limiter, abandon_on_cancel=True)
                finally:
                    self._awaited.discard(waiting)
            await trio.lowlevel.checkpoint()  # only an executor that is being cancelled leaves its threads
            return None

        return in_thread

    def leave(self) -> None:
        """Wait no longer: they are left behind, and what they return is dropped."""
        for waiting in list(self._awaited):
            waiting.cancel()

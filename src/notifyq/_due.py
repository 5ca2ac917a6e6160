"""When the next ticket of a queue is due, as far as is known, on the event loop's clock. Pure."""

from __future__ import annotations

import math

import attrs

__all__ = ["DUE_AGAIN", "DueTime"]

DUE_AGAIN = 0.01
"""Seconds until a due ticket that another runtime is promoting is looked for again."""


@attrs.define(eq=False)
class DueTime:
    """Told by notifications in the server's time, by the beat in seconds from now, and learned from the database."""

    at: float = math.inf
    unknown: bool = True
    """It must be learned."""
    _clock_offset: float | None = None

    def heard(self, epoch_seconds: str) -> bool:
        """A ticket is due then; False if that changes nothing. Raises ``ValueError`` for what is not a number."""
        if self._clock_offset is None:
            self.unknown = True
            return True
        at = float(epoch_seconds) + self._clock_offset
        if not at < self.at:
            return False
        self.at = at
        return True

    def told(self, seconds: float, now: float) -> bool:
        """A ticket is due in so many seconds; False if that changes nothing."""
        if not now + seconds < self.at - DUE_AGAIN:
            return False
        self.at = max(now + seconds, now + DUE_AGAIN)
        return True

    def learning(self) -> None:
        """The database is being asked: what is told meanwhile counts, too."""
        self.unknown = False
        self.at = math.inf

    def learned(self, due: float | None, server_now: float, now: float) -> None:
        """What the database said, both in seconds of the epoch."""
        self._clock_offset = now - server_now
        if due is not None:
            self.at = min(self.at, max(due + self._clock_offset, now + DUE_AGAIN))

"""When the next ticket of a queue is due, as far as is known, and from when on one may be looked for. Pure."""

from __future__ import annotations

import math

import attrs

from ._demand import TRAIL_SECONDS

__all__ = ["DUE_AGAIN", "DueTime"]

DUE_AGAIN = 0.01
"""Seconds until a due ticket that another runtime is promoting is looked for again."""


@attrs.define(eq=False)
class DueTime:
    """Told by notifications in the server's time, by the beat in seconds from now, and learned from the database."""

    at: float = math.inf
    """On the event loop's clock."""
    unknown: bool = True
    """It must be learned."""
    floor: float | None = None
    """No ticket is due before that, in seconds of the epoch; None: not known. A hint, as ``Floor`` is."""
    _heard: float = math.inf
    _clock_offset: float | None = None
    _asked_at: float = 0.0

    def heard(self, epoch_seconds: str) -> bool:
        """A ticket is due then; False if that changes nothing. Raises ``ValueError`` for what is not a number."""
        self._heard = min(self._heard, float(epoch_seconds))
        if self.floor is not None:
            self.floor = min(self.floor, self._heard)
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

    def claiming(self) -> None:
        """A claim begins: what is told from now on it may not see."""
        self._heard = math.inf

    def claimed(self, floor: float | None) -> None:
        """A claim said where its successor may begin."""
        self.floor = None if floor is None else min(floor, self._heard)

    def learning(self, now: float) -> None:
        """The database is being asked: what is told meanwhile counts, too."""
        self._asked_at = now
        self._heard = math.inf
        self.unknown = False
        self.at = math.inf

    def since(self, is_dear: bool) -> float | None:
        """From when on to ask for due times (None: for all) where that is dear: only claims find what was due before."""
        if not is_dear:
            return None
        return math.inf if self.floor is None else self.floor

    def learned(self, due: float | None, server_now: float, now: float) -> None:
        """What the database said, both in seconds of the epoch."""
        self._clock_offset = now - server_now
        seen_all_until = server_now - (now - self._asked_at) - TRAIL_SECONDS
        self.claimed(seen_all_until if due is None else min(due, seen_all_until))
        if due is not None:
            self.at = min(self.at, max(due + self._clock_offset, now + DUE_AGAIN))

"""What a worker raises to end its attempt on purpose. They are verbs, not errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import timedelta

__all__ = ["Discard", "Fail", "Retry", "Snooze"]


class Signal(Exception):
    """Base of the signals."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class Retry(Signal):
    """Fail this attempt and try again after ``delay`` (seconds or timedelta; none: the job's backoff). Spends an attempt."""

    def __init__(self, delay: float | timedelta | None = None, reason: str = "") -> None:
        super().__init__(reason)
        self.delay = delay


class Snooze(Signal):
    """Run again after ``delay`` (seconds or timedelta) without spending an attempt."""

    def __init__(self, delay: float | timedelta, reason: str = "") -> None:
        super().__init__(reason)
        self.delay = delay


class Fail(Signal):
    """Fail for good, whatever retries are left: the job goes to failed and to the dead-letter queue."""


class Discard(Signal):
    """End the job as cancelled: no retry, no dead letter."""

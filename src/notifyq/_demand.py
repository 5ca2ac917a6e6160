"""How much to claim, and from where: the demand, the rate it follows, and the floor of the ready index. Pure."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._answers import Claimed

__all__ = ["Floor", "Looks", "Rate", "demand"]

PREFETCH_SECONDS = 0.1
"""Observed work claimed beyond what can start at once: enough to hide a round trip, too little to starve a peer."""

PREFETCH_MAX = 2000
"""Jobs; a larger batch gains nothing measurable and holds its memory."""

TRAIL_SECONDS = 1.0
"""How far the floor trails the head: transactions may commit a lower number this much later unnoticed."""

LOOK_EVERY = 1.0
"""Seconds between looks from the beginning while busy, for what no notification told of."""

LOOK_SHARE = 0.01
"""Share of the time that such looks of one queue may take: a long-open snapshot makes them dear."""

LOOK_LATEST = 300.0
"""Seconds: no look from the beginning is put off for longer, however dear it is."""

CHEAP_LOOK = 0.004
"""Seconds: a look that takes less, the round trip included, meets no dead index entries worth avoiding."""

DEAR = 12
"""A look that takes more than so many times as long is not made by the way either: by a beat, or who stands free."""

MEASURE_SECONDS = 0.02
MEASURE_ROUNDS = 2
"""A sample of the rate is either so many seconds of work, or so many jobs of each slot: with fewer, slots that end at one
moment would look like a high rate, and what was claimed for it would wait for seconds."""


def _within(text: str, limit: int) -> int:
    """The number in a notification, which anybody may send. Raises ``ValueError`` if it is none that a ticket can have."""
    number = int(text)
    if not -limit <= number < limit:
        raise ValueError(f"{number} is out of range")
    return number


def demand(capacity: int, running: int, buffered: int, per_second: float) -> int:
    """How many jobs to claim now: enough for the free slots and about 100 ms of work, but no trickles."""
    prefetch = min(PREFETCH_MAX, int(per_second * PREFETCH_SECONDS))
    if buffered > prefetch * 3 // 4:  # while the claim is under way the rest must last
        return 0
    return max(0, capacity + prefetch - running - buffered)


@attrs.define(eq=False)
class Floor:
    """Where the live part of the ready index begins, by priority. A hint: looks from the beginning correct it."""

    priorities: tuple[int, int] | None = None
    """The lowest and the highest that are claimed; None: all."""
    numbers: dict[int, int] = attrs.field(factory=dict)
    _samples: dict[int, deque[tuple[float, int]]] = attrs.field(factory=dict)

    def heard(self, ring: str) -> bool:
        """Tickets were written, the highest priority among them at ``<priority>:<number>``. False: too low to be claimed.

        Raises ``ValueError`` for what no ticket can have.
        """
        text, _, rest = ring.partition(":")
        priority, number = _within(text, 2**15), _within(rest, 2**63)
        low, high = self.priorities or (priority, priority)
        if low <= priority <= high:
            self.lower(priority, number)
        return priority >= low  # above it: what else was written is not told

    def lower(self, priority: int, number: int) -> None:
        """A ticket was written at this number. What was claimed before says no longer where the live part begins."""
        standing = self.numbers.get(priority)
        if standing is None or number < standing:
            self.numbers[priority] = number
            self._samples.pop(priority, None)

    def claimed(self, jobs: list[Claimed], now: float) -> None:
        """Tickets up to these numbers were claimed; the floor follows a second later."""
        ends: Iterable[Claimed] = (jobs[0], jobs[-1])
        if jobs[0].priority != jobs[-1].priority:  # the first and the last of each
            ends = [
                *{job.priority: job for job in reversed(jobs)}.values(),
                *{job.priority: job for job in jobs}.values(),
            ]
        for job in ends:
            samples = self._samples.setdefault(job.priority, deque())
            if not samples or samples[-1][1] < job.number:
                samples.append((now, job.number))
            self.numbers.setdefault(job.priority, job.number)
        for priority, samples in self._samples.items():
            while samples and samples[0][0] <= now - TRAIL_SECONDS:
                self.numbers[priority] = max(self.numbers.get(priority, 0), samples.popleft()[1])

    def reset(self) -> None:
        """Forget everything: the next look from the beginning shows where the live part begins."""
        self.numbers.clear()
        self._samples.clear()


@attrs.define(eq=False)
class Looks:
    """When the ready index was last looked at from its beginning, and how long that took."""

    at: float = -math.inf
    owed: bool = False
    """It rests without one, since they are dear: what lies below the floor, untold of, has to wait until one is due."""
    _since: float = -math.inf
    _asked_at: float = -math.inf
    _last: float = 0.0
    _before: float = 0.0

    @property
    def seconds(self) -> float:
        """How long they take: the shorter of the last two, since one alone may have waited for the machine."""
        return min(self._last, self._before)

    @property
    def cheap(self) -> bool:
        """A look from the beginning costs no more than one from the floor."""
        return self.seconds < CHEAP_LOOK

    @property
    def dear(self) -> bool:
        """It costs so much that it is made only when it is due."""
        return self.seconds > DEAR * CHEAP_LOOK

    @property
    def owed_at(self) -> float:
        """When to make the one that is owed."""
        return self._due_at if self.owed else math.inf

    def ask(self, now: float) -> None:
        """One is wanted that begins after now, however dear it is."""
        self._asked_at = now

    def made(self, since: float, now: float) -> None:
        """One was begun then, and has ended, or was not answered in time."""
        self._last, self._before = now - since, self._last
        self.spared(since, now)

    def spared(self, since: float, now: float) -> None:
        """It is known without one that there was nothing then."""
        self.at, self._since, self.owed = now, since, False

    def is_due(self, now: float) -> bool:
        """It is time for another one, though busy."""
        return now >= self._due_at

    @property
    def _due_at(self) -> float:
        if self._asked_at >= self._since:
            return -math.inf
        return self.at + min(max(LOOK_EVERY, self.seconds / LOOK_SHARE), LOOK_LATEST)


@attrs.define(eq=False)
class Rate:
    """Jobs finished per second while there was something to do."""

    slots: int
    """How many may end at one moment."""
    per_second: float = 0.0
    _count: int = 0
    _busy_seconds: float = 0.0
    _busy_since: float | None = None

    def busy(self, now: float) -> None:
        """There is work from now on."""
        if self._busy_since is None:
            self._busy_since = now

    def finished(self, now: float | None) -> None:
        """A job ended; ``now`` if it was the last one in hand."""
        self._count += 1
        if now is not None and self._busy_since is not None:
            self._busy_seconds += now - self._busy_since
            self._busy_since = None

    def reset(self) -> None:
        """What was observed holds no longer."""
        self.per_second, self._count, self._busy_seconds = 0.0, 0, 0.0

    def measure(self, now: float) -> float:
        """The rate up to now, half of it from what happened since the last time."""
        if self._busy_since is not None:
            self._busy_seconds += now - self._busy_since
            self._busy_since = now
        if self._busy_seconds >= MEASURE_SECONDS or self._count >= MEASURE_ROUNDS * self.slots:
            sample = self._count / max(self._busy_seconds, 1e-6)
            self.per_second = 0.5 * (self.per_second + sample)
            self._count, self._busy_seconds = 0, 0.0
        return self.per_second

"""Which of many idle runtimes takes up a job that all hear of: one or two at once, the others if nobody has. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._answers import Claimed

__all__ = ["Fleet"]

FEW = 4
"""So many runtimes may all look at once."""

AT_ONCE = 2
"""How many of more look at once; who that is goes round with the numbers of the tickets."""

PATIENCE, STEP = 0.03, 0.02
"""Seconds until the next one looks if none of those has said that it took the job, and between the others after it."""

MOST_NAMED = 100
"""Tickets that one notification names: what more bring is worth a look by the others anyway."""


@attrs.define(eq=False)
class Fleet:
    """What one claimer knows of the runtimes that serve the same queues, as of the last beat."""

    place: int = 0
    """How many of them come before this one."""
    size: int = 1
    _put_off: dict[int, float] = attrs.field(factory=dict)
    _took: list[int] = attrs.field(factory=list)

    def puts_off(self, number: int, now: float) -> bool:
        """A ticket of this number was written. True: others look first; ``look_at`` says when it is this one's turn."""
        rank = (self.place + number) % self.size
        if self.size <= FEW or rank < AT_ONCE:
            return False
        self._put_off[number] = now + PATIENCE + (rank - AT_ONCE) * STEP
        return True

    @property
    def look_at(self) -> float:
        """When to look, on the event loop's clock, if nobody takes what was put off."""
        return min(self._put_off.values(), default=math.inf)

    def taken(self, numbers: str) -> None:
        """Somebody took these tickets, and saw that no others are left. Raises ``ValueError`` for what is not numbers."""
        for number in numbers.split(","):
            self._put_off.pop(int(number), None)

    def looked(self) -> None:
        """A look, which what was put off is not below: it has been seen to."""
        self._put_off.clear()

    def took(self, jobs: Sequence[Claimed]) -> None:
        """A claim brought these."""
        if self.size > FEW and len(self._took) <= MOST_NAMED:
            self._took += [job.number for job in jobs]

    def says(self) -> str | None:
        """What to tell the others when a look has shown that there is no more than was taken."""
        took, self._took = self._took, []
        return ",".join(map(str, took)) if 0 < len(took) <= MOST_NAMED else None

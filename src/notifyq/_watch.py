"""Whether a claimer has to be told of new jobs, or looks by itself anyway. Pure."""

from __future__ import annotations

import math

import attrs

__all__ = ["Watch"]

RINGS = 16
"""So many rings while it was at work, and it looks by itself from then on: it would have looked anyway."""

RING_PACE = 0.01
"""Seconds: at rest, rings that follow each other as fast make it try whether looking by itself brings more at a time. Then
the rings are what keeps senders from being faster, since commits with a NOTIFY wait for each other."""

FEWEST_RINGS, MOST_RINGS = 4, 512
"""How many such rings it takes: the fewer the more often that did bring more, the more the more often it did not."""

PAUSE, EMPTY_LOOKS = 0.002, 4
"""Seconds between looks by itself, and how many must bring nothing, one after the other, before it stands free again."""

FIRST_LOOKS = (0.001, 0.002, 0.004)
LATER_LOOK, LAST_LOOK = 0.005, 0.25
"""Seconds to the next look while a sender that saw nobody free is under way: longer ones once that takes long."""


@attrs.define(eq=False)
class Watch:
    """What one claimer and the senders know of each other; the locks that say so are in ``sql/functions/20_bell.sql``."""

    told: bool = False
    """Senders ring: it stands free, and none that did not see that is under way."""
    crowded: bool = False
    """It has so much to do that it looks by itself."""
    look_at: float = math.inf
    """When it looks by itself, on the event loop's clock."""
    _rings_at_work: int = 0
    _rings_at_rest: int = 0
    _rings_since: float = 0.0
    _patience: int = RINGS
    _looks: int = 0
    _empty_looks: int = 0
    _brought: int = 0
    _looking_since: float = 0.0

    def rang(self, resting: bool, now: float) -> bool:
        """A ring came. True: so many have come that it is crowded from now on."""
        if self.crowded:
            return False
        if resting:
            if not self._rings_at_rest or now - self._rings_since > self._patience * RING_PACE:
                self._rings_at_rest, self._rings_since = 0, now
            self._rings_at_rest += 1
        else:
            self._rings_at_work += 1
        if self._rings_at_rest < self._patience and self._rings_at_work < RINGS:
            return False
        self.told, self.crowded = False, True
        self._rings_at_rest = self._rings_at_work = self._looks = self._empty_looks = self._brought = 0
        return True

    def rested(self) -> None:
        """It has nothing to do."""
        self._rings_at_work = 0

    def stood(self, passed: bool, now: float) -> None:
        """It stands free; ``passed``: and nobody was under way after that.

        Unless so many rings came before the answer that it is crowded, and stands free no longer.
        """
        if self.crowded:
            return
        self.told = passed
        self._doubt(not passed, now)

    def dry(self, brought: int, left: bool | None, now: float) -> None:
        """It has looked until there was no more, which brought so many jobs; ``left``: but for what others hold."""
        if not self.crowded:
            if self.told or left:
                self._doubt(bool(left), now)
            return
        self._looks += 1
        self._brought += brought
        self._empty_looks = 0 if brought else self._empty_looks + 1
        self.look_at = now + PAUSE
        if self._empty_looks == EMPTY_LOOKS:
            paid = self._brought > 2 * self._looks
            self._patience = max(self._patience // 2, FEWEST_RINGS) if paid else min(2 * self._patience, MOST_RINGS)
            self.crowded, self.look_at, self._looks = False, now, 0

    def _doubt(self, is_left: bool, now: float) -> None:
        """Something may come that nobody rings for: look again, soon at first."""
        if not is_left:
            self._looks, self.look_at = 0, math.inf
            return
        if not self._looks:
            self._looking_since = now
        if self._looks < len(FIRST_LOOKS):
            pause = FIRST_LOOKS[self._looks]
        else:
            pause = min(max(LATER_LOOK, (now - self._looking_since) / 20), LAST_LOOK)
        self._looks += 1
        self.look_at = now + pause

    def lost(self, look_at: float) -> None:
        """The connection that stood free has gone: nobody rings. It looks then, whatever it is doing meanwhile."""
        self.told, self.crowded, self.look_at, self._looks = False, False, look_at, 0

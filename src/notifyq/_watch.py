"""Whether a claimer has to be told of new jobs, or looks by itself anyway. Pure."""

from __future__ import annotations

import math

import attrs

__all__ = ["Watch"]

USELESS_RINGS = 16
"""Rings that came while it was at work anyway, without a rest: from there on senders are spared their NOTIFY."""

PAUSE = 0.002
"""Seconds between the looks of a claimer that is not told, as long as they bring jobs."""

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
    _rings: int = 0
    _looks: int = 0
    _looking_since: float = 0.0

    def rang(self) -> bool:
        """A ring came while it was at work. True: that is enough, it is crowded from now on."""
        self._rings += 1
        if not self.told or self._rings < USELESS_RINGS:
            return False
        self.told, self.crowded = False, True
        return True

    def rested(self) -> None:
        """It has nothing to do."""
        self._rings = 0

    def stood(self, passed: bool, now: float) -> None:
        """It stands free; ``passed``: and nobody was under way after that."""
        self.told = passed
        if passed:
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

    def dry(self, brought: int, now: float) -> None:
        """It has looked until there was no more, and that brought so many jobs."""
        if self.crowded:
            self.crowded = brought > 0
            self.look_at = now + (PAUSE if brought else 0.0)

    def lost(self) -> None:
        """The connection that stood free has gone: nobody rings, and it looks when it is connected again."""
        self.told, self.crowded, self.look_at, self._looks = False, False, math.inf, 0

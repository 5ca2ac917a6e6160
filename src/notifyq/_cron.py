"""When a schedule fires: cron rules and intervals. Pure: the moment that it is comes from the caller.

Cron rules are read by cronsim, which does as Debian's cron: a rule of five fields with a fixed minute and hour fires once
on a day whose clocks change, at the end of a gap and at the first of two equal times; one with a star in minute or hour,
or with six fields (seconds first), fires by the clock that there is. All moments in and out are aware, those out in UTC.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import attrs
from cronsim import CronSim, CronSimError

from ._errors import InvalidOption, shown

__all__ = ["EVERY_LEAST", "EVERY_MOST", "Cron", "Every", "Rule", "Step", "decide", "read_rule", "zone_named"]

EVERY_LEAST = 0.1
EVERY_MOST = 366 * 86_400.0
"""Seconds between firings; what ``sql/functions/70_schedule.sql`` takes."""

LATE = timedelta(seconds=10)
"""A firing that is later than this was missed: longer than any runtime that lives needs, and than a quick restart."""

OVERTAKEN = timedelta(seconds=1)
"""One that is later than this was missed, too, if a later firing is due as well: what a stall of a moment
holds up is made up for one by one, what an outage held up is not."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TICK = timedelta(microseconds=1)


@attrs.frozen
class Cron:
    """A cron rule in a time zone."""

    text: str
    zone: ZoneInfo

    def next_after(self, moment: datetime) -> datetime:
        """The first firing after a moment. Raises ``InvalidOption`` if there is none in the next 50 years."""
        try:
            for found in CronSim(self.text, moment.astimezone(self.zone)):
                # In the second of two equal hours, cronsim begins with the first one's firings.
                if (at := found.astimezone(UTC)) > moment:
                    return at
        except (CronSimError, OverflowError):
            pass
        raise _never_fires(self.text)


@attrs.frozen
class Every:
    """An interval; it fires at its multiples since 1970-01-01 00:00 UTC, so that everybody finds the same moments."""

    microseconds: int

    def next_after(self, moment: datetime) -> datetime:
        """The first firing after a moment."""
        return EPOCH + ((moment - EPOCH) // TICK // self.microseconds + 1) * self.microseconds * TICK


Rule = Cron | Every


@attrs.frozen
class Step:
    """What to do about a schedule whose next firing is due."""

    fired_for: datetime | None
    """Make a job for this firing; None: for none."""
    next_at: datetime
    """The firing to come then, which may be due as well."""
    missed: bool
    """Firings were passed over."""


def read_rule(cron: str | None, every: float | None, timezone: str = "UTC") -> Rule:
    """Read a rule: cron's text, or seconds. Raises ``InvalidOption`` for what is not one or never fires."""
    if (cron is None) == (every is None):
        raise InvalidOption("a schedule must have either cron or every: Schedule('0 3 * * *') or Schedule(every=60)")
    if every is not None:
        if not EVERY_LEAST <= every <= EVERY_MOST:
            raise InvalidOption(f"every must be from {EVERY_LEAST:g} seconds to 366 days, not {shown(every)} seconds")
        if timezone != "UTC":
            raise InvalidOption("a schedule with every has no time zone: leave timezone out, or use cron")
        return Every(round(every * 1e6))
    rule = Cron(_checked(cron), zone_named(timezone))
    rule.next_after(datetime.now(UTC))
    return rule


def _checked(cron: object) -> str:
    shape = "five fields, minute hour day month weekday, or six with the second before them"
    if not isinstance(cron, str) or len(cron) > 200 or not cron.isascii():
        raise InvalidOption(f"not a cron rule: {shown(cron, 200)}: give text of {shape}")
    try:
        CronSim(cron, EPOCH)
    except (CronSimError, AssertionError, ValueError) as error:
        if "day-of-month" in str(error) and _is_rule_in_january(cron):
            raise _never_fires(cron) from None
        raise InvalidOption(f"not a cron rule: {cron!r}: {error} (a rule has {shape})") from None
    return cron


def _is_rule_in_january(cron: str) -> bool:
    """Whether it is one with its month replaced by one that has all days: then its days are only not in its own."""
    *others, _, weekday = cron.split()
    try:
        CronSim(" ".join((*others, "1", weekday)), EPOCH)
    except (CronSimError, AssertionError, ValueError):
        return False
    return True


def _never_fires(cron: str) -> InvalidOption:
    return InvalidOption(f"cron rule {shown(cron, 200)} never fires: look at its day, month and weekday")


def zone_named(name: object) -> ZoneInfo:
    """A time zone by its name. Raises ``InvalidOption`` if there is none here."""
    try:
        if isinstance(name, str):
            return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        pass
    raise InvalidOption(
        f"there is no time zone named {shown(name)} here: use a name such as 'Europe/Berlin'"
        " (a system without zones needs the package tzdata)"
    )


def decide(rule: Rule, next_at: datetime, now: datetime, missed: str) -> Step:
    """Say what to do about a firing that is due.

    Firings that were missed make no job if ``missed`` is ``skip``. With ``once`` they make one, for the last of them,
    unless one that is due now was not missed.
    """
    following = rule.next_after(next_at)
    late = now - next_at
    if late <= OVERTAKEN or (late <= LATE and following > now):
        return Step(next_at, following, missed=False)
    newest = _last_until(rule, next_at, now)
    if now - newest > LATE:
        return Step(newest if missed == "once" else None, rule.next_after(newest), missed=True)
    kept = newest if now - newest > OVERTAKEN else rule.next_after(now - OVERTAKEN - TICK)
    return Step(None, kept, missed=True)


def _last_until(rule: Rule, known: datetime, until: datetime) -> datetime:
    """The last firing up to a moment, from an earlier firing on: by halving, since there may have been millions."""
    found = known
    before, beyond = known - TICK, until  # found is the firing after the one, the firing after the other is too late
    while beyond - before > TICK:
        middle = before + (beyond - before) / 2
        following = rule.next_after(middle)
        if following <= until:
            found = following
            before = following - TICK
        else:
            beyond = middle
    return found

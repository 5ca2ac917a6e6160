"""A schedule as it is declared, and as it stands in the database."""

from __future__ import annotations

import itertools
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal
from zoneinfo import ZoneInfo

import attrs

from ._codec import to_json
from ._cron import Cron, read_rule, zone_named
from ._errors import InvalidData, InvalidOption, shown
from ._sql import seconds, whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._cron import Rule

__all__ = ["Missed", "Schedule", "ScheduleRecord", "check_name", "distinct", "firings"]

Missed = Literal["skip", "once"]

_NAME = re.compile(r"[A-Za-z0-9_./-]{1,100}")


def check_name(name: Any, of: str) -> str:
    """The name of a queue, a schedule or an event. Raises ``InvalidOption`` with the rule if it can't be one."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidOption(f"{of} {shown(name, 120)}: use 1 to 100 letters, digits and _ . - /")
    return name


def _seconds(value: Any) -> float | None:
    return None if value is None else seconds(value, "every")


def _zone_name(value: Any) -> str:
    return value.key if isinstance(value, ZoneInfo) and value.key is not None else zone_named(value).key


@attrs.frozen
class Schedule:
    """When a queue gets a job by itself: by a cron rule, or every so many seconds.

        Schedule("30 3 * * MON-FRI", timezone="Europe/Berlin", data=Report("daily"))
        Schedule(every=timedelta(minutes=5), name="poll", missed="skip")

    A cron rule has five fields, or six with the second first. Where clocks change, one of five with a fixed minute and hour
    fires once a day: at the end of a gap, and at the first of two equal times. One of six goes by the clock that there is:
    not at a time in a gap, and at both of two equal times. Firings of ``every`` are the multiples of it since
    1970-01-01 00:00 UTC, so 3600 is each full hour.

    Raises ``InvalidOption`` when it is made: a rule that is not one or never fires, a time zone that is not known here,
    ``every`` under 0.1 seconds or over 366 days; and ``InvalidData`` for headers that are not JSON.
    """

    cron: str | None = None
    every: float | timedelta | None = attrs.field(default=None, kw_only=True, converter=_seconds)
    """Seconds; give either this or ``cron``."""
    name: str = attrs.field(default="default", kw_only=True)
    """Tells the schedules of one queue apart."""
    timezone: str | ZoneInfo = attrs.field(default="UTC", kw_only=True, converter=_zone_name)
    """In which ``cron`` is read."""
    data: Any = attrs.field(default=None, kw_only=True)
    """Of each job; of the queue's declared type."""
    headers: dict[str, Any] | None = attrs.field(default=None, kw_only=True)
    """Of each job, beside ``schedule`` (its name) and ``fired_for``."""
    missed: Missed = attrs.field(default="once", kw_only=True)
    """What becomes of firings while no runtime ran: ``once``, one job for all of them; ``skip``, none. A firing is missed
    when it is over 10 seconds late, or over a second and the next one is due as well."""

    def __attrs_post_init__(self) -> None:
        check_name(self.name, "schedule name")
        try:
            self.rule()
        except InvalidOption as error:
            raise InvalidOption(f"schedule {self.name!r}: {error}") from None
        if self.missed not in ("skip", "once"):
            raise InvalidOption(f"schedule {self.name!r}: missed must be 'skip' or 'once', not {shown(self.missed)}")
        if self.headers is not None:
            if not isinstance(self.headers, dict):
                raise InvalidOption(f"schedule {self.name!r}: headers must be a dict, not {shown(self.headers)}")
            try:
                to_json(self.headers)
            except InvalidData as error:
                raise InvalidData(f"schedule {self.name!r}: headers: {error}") from error

    def rule(self) -> Rule:
        """Its rule, read."""
        return read_rule(self.cron, self.every, self.timezone)  # type: ignore[arg-type] # converted

    def next_firings(self, count: int = 5, *, after: datetime | None = None) -> list[datetime]:
        """The first so many firings after a moment (default: now), in its time zone. Raises ``InvalidOption``."""
        whole(count, "count", 1, 10_000)
        if after is not None and (not isinstance(after, datetime) or after.tzinfo is None):
            raise InvalidOption(f"after must be an aware datetime, not {shown(after)}")
        return list(itertools.islice(firings(self.rule(), after or datetime.now(UTC)), count))


def firings(rule: Rule, after: datetime) -> Iterator[datetime]:
    """All firings of a rule after a moment, in its time zone. Raises ``InvalidOption`` where there is no further one."""
    zone = rule.zone if isinstance(rule, Cron) else UTC
    while True:
        after = rule.next_after(after)
        yield after.astimezone(zone)


def distinct(schedules: Any, queue: str, policy: str | None = None) -> tuple[Schedule, ...]:
    """The schedules declared with a queue. Raises ``InvalidOption`` unless they are that, with names of their own."""
    if isinstance(schedules, str | Schedule) or not hasattr(schedules, "__iter__"):
        raise InvalidOption(f"queue {queue!r}: schedules must be a sequence of Schedules, not {shown(schedules)}")
    found = tuple(schedules)
    names: set[str] = set()
    for schedule in found:
        if not isinstance(schedule, Schedule):
            raise InvalidOption(f"queue {queue!r}: schedules must be Schedules, not {shown(schedule)}")
        if schedule.name in names:
            raise InvalidOption(f"queue {queue!r}: two schedules are named {schedule.name!r}: give each a name=")
        names.add(schedule.name)
    if found and policy == "ordered":
        raise InvalidOption(
            f"queue {queue!r} is ordered by key, and the jobs of a schedule have none:"
            " give the schedule to another queue, whose worker sends to this one with a key"
        )
    return found


@attrs.frozen(kw_only=True)
class ScheduleRecord:
    """A schedule as ``notifyq.schedules`` shows it."""

    queue: str
    name: str
    cron: str | None
    every: timedelta | None
    timezone: str
    missed: Missed
    data: Any
    headers: dict[str, Any] | None
    declared: bool
    """It was declared with its queue: it goes when a runtime starts that does not declare it any more."""
    next_at: datetime | None
    """The firing to come; None until a runtime has worked it out."""
    fired_for: datetime | None
    """The last firing."""
    job: int | None
    """The job that it made."""
    error: str | None
    """Why it cannot fire, or why its last firing made no job."""
    changed_at: datetime

    def next_firings(self, count: int = 5) -> list[datetime]:
        """The firings to come, in its time zone. Raises ``InvalidOption`` if its rule cannot be read here."""
        whole(count, "count", 1, 10_000)
        rule = read_rule(self.cron, None if self.every is None else self.every.total_seconds(), self.timezone)
        now = datetime.now(UTC)
        after = now if self.next_at is None else max(now, self.next_at - timedelta(microseconds=1))
        return list(itertools.islice(firings(rule, after), count))

"""The calls of schedules and events: see ``sql/functions/70_schedule.sql`` and ``75_events.sql``."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, LiteralString

import attrs

from ._codec import to_json
from ._schedule import ScheduleRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._calls import Calls
    from ._connection import TrioConnection
    from ._schedule import Schedule

__all__ = ["Ahead", "Fired", "Schedules", "moment"]

_FIELDS = [field.name for field in attrs.fields(ScheduleRecord)]
_SCHEDULES: LiteralString = (
    f"select {', '.join(_FIELDS)} from {{s}}.schedules"  # noqa: S608 - the fields of a class
    " where ($1::text is null or queue = $1) and ($2::text is null or name = $2) order by queue, name"
)


@attrs.frozen
class Ahead:
    """A schedule as a runtime must know it. Field order is the function's column order."""

    number: int
    queue: str
    name: str
    cron: str | None
    every: float | None
    """Seconds."""
    timezone: str
    missed: str
    changed_at: int
    next_at: int | None
    """Microseconds of the epoch, as is ``changed_at``; see ``moment``."""
    clock: float
    """The server's, in seconds of the epoch."""


@attrs.frozen
class Fired:
    """What ``fire()`` did."""

    done: str
    job: int | None
    error: str | None
    next_at: int | None
    """Microseconds of the epoch."""
    clock: float
    """The server's, in seconds of the epoch."""


class Schedules:
    """The SQL functions of schedules and events in one schema. Every method takes the connection to run on."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    # schedules

    async def put(self, connection: TrioConnection, queue: str, schedule: Schedule, data: str) -> str:
        """Returns ``created``, ``changed`` or ``unchanged``. ``data``: JSON text."""
        statement: LiteralString = (
            "select {s}.schedule($1, $2, make_interval(secs => $3), $4, $5, nullif($6::jsonb, 'null'), $7::jsonb, $8)"
        )
        done: str = await self._calls.value(
            connection,
            statement,
            queue,
            schedule.cron,
            schedule.every,
            schedule.name,
            schedule.timezone,
            data,
            None if schedule.headers is None else to_json(schedule.headers),
            schedule.missed,
        )
        return done

    async def remove(self, connection: TrioConnection, queue: str, name: str) -> bool:
        return bool(await self._calls.value(connection, "select {s}.unschedule($1, $2)", queue, name))

    async def declare(
        self, connection: TrioConnection, queue: str, schedules: Sequence[tuple[Schedule, str]]
    ) -> list[str]:
        """Make a queue's declared schedules these, each with its data as JSON text.

        Returns the names of those that were declared otherwise, while a live runtime serves the queue.
        """
        entries = ",".join(
            f'{to_json({name: getattr(schedule, name) for name in _DECLARED})[:-1]},"data":{data}}}'
            for schedule, data in schedules
        )
        statement: LiteralString = "select {s}.declare_schedules($1, $2::jsonb)"
        overruled: list[str] = await self._calls.value(connection, statement, queue, f"[{entries}]")
        return overruled

    async def records(self, connection: TrioConnection, queue: str | None, name: str | None) -> list[ScheduleRecord]:
        rows = await self._calls.rows(connection, _SCHEDULES, queue, name)
        return [ScheduleRecord(**dict(zip(_FIELDS, row, strict=True))) for row in rows]

    async def ahead(self, connection: TrioConnection, besides: Sequence[int], how_many: int) -> list[Ahead]:
        """Those that come next, those that were not worked out yet first."""
        statement: LiteralString = (
            "select number, queue, name, cron, every, timezone, missed, changed_at, next_at, clock"
            " from {s}.schedules_ahead($1::bigint[], $2)"
        )
        return [Ahead(*row) for row in await self._calls.rows(connection, statement, list(besides), how_many)]

    async def fire(
        self,
        connection: TrioConnection,
        steps: Sequence[tuple[int, datetime | None, datetime | None, datetime]],
    ) -> list[Fired]:
        """Take steps of (number, the next firing as it is known, the firing to make a job for, the next firing then)."""
        statement: LiteralString = (
            "select f.done, f.job, f.error, f.next_at, f.clock"
            " from unnest($1::bigint[], $2::timestamptz[], $3::timestamptz[], $4::timestamptz[])"
            " with ordinality t (number, expected, fired_for, then_at, place)"
            " cross join lateral {s}.fire(t.number, t.expected, t.fired_for, t.then_at) f order by t.place"
        )
        columns = [list(map(_moment_text, column)) for column in zip(*steps, strict=True)]
        return [Fired(*row) for row in await self._calls.rows(connection, statement, *columns)]

    async def keep_error(self, connection: TrioConnection, number: int, error: str) -> bool:
        """Keep why it cannot fire; True if that is new."""
        statement: LiteralString = "select {s}.keep_schedule_error($1::bigint, $2)"
        return bool(await self._calls.value(connection, statement, number, error))

    # events

    async def publish(
        self, connection: TrioConnection, event: str, data: str, headers: str | None, id_key: str | None
    ) -> list[tuple[str, int, bool]]:
        """Returns (queue, id, created) of each job. ``data``, ``headers``: JSON text."""
        statement: LiteralString = (
            "select queue, id, created from {s}.publish($1, nullif($2::jsonb, 'null'), $3::jsonb, $4)"
        )
        return await self._calls.rows(connection, statement, event, data, headers, id_key)

    async def subscribe(self, connection: TrioConnection, event: str, queue: str) -> bool:
        return bool(await self._calls.value(connection, "select {s}.subscribe($1, $2)", event, queue))

    async def unsubscribe(self, connection: TrioConnection, event: str, queue: str) -> bool:
        return bool(await self._calls.value(connection, "select {s}.unsubscribe($1, $2)", event, queue))


_DECLARED = ("name", "cron", "every", "timezone", "headers", "missed")


def _moment_text(value: int | datetime | None) -> int | str | None:
    return value.isoformat() if isinstance(value, datetime) else value


def moment(microseconds: int) -> datetime:
    """A moment from microseconds of the epoch."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)

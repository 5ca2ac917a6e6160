"""The calls that end attempts, or move their deadline: ``sql/functions/40_complete.sql``, ``50_fail.sql``, ``60_lease.sql``.

``as_of`` is when each job's claim had been made, in seconds of the epoch: see ``Claimed``.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, LiteralString

from ._calls import intervals

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from ._calls import Calls
    from ._connection import TrioConnection

__all__ = ["Settles"]


def _moments(moments: LiteralString, counts: LiteralString) -> LiteralString:
    """The moments that ``_runs()`` says; a double holds seconds of the epoch to the microsecond, there and back."""
    return (
        "array(select to_timestamp(moment) from unnest("  # noqa: S608 - of literals
        f"{moments}::float8[], {counts}::int[]"
        ") u (moment, count), generate_series(1, count))"
    )


def _runs(as_of: Sequence[float | None] | None) -> tuple[list[float | None], list[int]]:
    """Moments, and how many times each comes one after the other, since a claim brings many jobs; all alike: one for all."""
    runs = [(moment, len(list(run))) for moment, run in itertools.groupby(as_of or ())]
    return [moment for moment, _ in runs], [count for _, count in runs] if len(runs) > 1 else [1] * len(runs)


_COMPLETE: LiteralString = (
    "select {s}.complete($1::bigint[], $2::jsonb, $3::int[], $4::uuid, " + _moments("$5", "$6") + ")"
)
_SET_OUTPUT: LiteralString = "select set_config('notifyq.output', $1, true)"
_COMPLETION: LiteralString = (
    "select {s}.complete_or_raise({job}, current_setting({output})::jsonb, {attempt}, {runtime},"
    " to_timestamp({as_of}::float8))"
)
_FAIL: LiteralString = (
    "select id, state from {s}.fail($1::bigint[], $2::jsonb, $3::int[], $4::uuid, $5::boolean[], $6::interval[],"  # noqa: S608
    + _moments("$7", "$8")
    + ")"
)
_SNOOZE: LiteralString = (
    "select {s}.snooze($1::bigint[], $2::interval[], $3::int[], $4::uuid, " + _moments("$5", "$6") + ")"
)
_RELEASE: LiteralString = "select {s}.release($1::bigint[], $2::int[], $3::uuid, " + _moments("$4", "$5") + ")"
_DISCARD: LiteralString = "select {s}.discard($1::bigint[], $2::int[], $3::uuid, " + _moments("$4", "$5") + ")"


class Settles:
    """The part of ``Store`` that settles."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def complete(
        self,
        connection: TrioConnection,
        jobs: Sequence[int],
        outputs: str | None,
        attempts: Sequence[int] | None,
        runtime: UUID | None,
        as_of: Sequence[float | None] | None = None,
    ) -> list[int]:
        """Complete jobs, given by id in order. ``outputs``: a JSON array. Returns those that were still ours."""
        arguments: list[Any] = [jobs, outputs, attempts, runtime, *_runs(as_of)]
        return list(await self._calls.value(connection, _COMPLETE, *arguments))

    async def completion(
        self,
        connection: TrioConnection,
        job: int,
        output: str,
        attempt: int,
        runtime: UUID,
        *,
        as_of: float | None,
    ) -> bytes:
        """The statement that completes a job in the transaction under way, or fails, with ``NOT_HELD`` if it is not ours.

        It is to be sent as text, which servers log where it fails: so the output, unless it is null, goes there before it.
        """
        if output != "null":
            await self._calls.rows(connection, _SET_OUTPUT, output)
        where = None if output == "null" else "notifyq.output"
        return self._calls.text(_COMPLETION, job=job, output=where, attempt=attempt, runtime=runtime, as_of=as_of)

    async def fail(
        self,
        connection: TrioConnection,
        jobs: Sequence[int],
        errors: str,
        attempts: Sequence[int] | None,
        runtime: UUID | None,
        final: Sequence[bool],
        retry_in: Sequence[float | None],
        as_of: Sequence[float | None] | None = None,
    ) -> dict[int, str]:
        """Fail attempts. ``errors``: a JSON array. Returns where each stands now, of those that were still ours."""
        more = (final, intervals(retry_in), *_runs(as_of))
        return dict(await self._calls.rows(connection, _FAIL, jobs, errors, attempts, runtime, *more))

    async def snooze(
        self,
        connection: TrioConnection,
        jobs: Sequence[int],
        delays: Sequence[float],
        attempts: Sequence[int] | None,
        runtime: UUID | None,
        as_of: Sequence[float | None] | None = None,
    ) -> list[int]:
        put_off = intervals(delays)
        return list(await self._calls.value(connection, _SNOOZE, jobs, put_off, attempts, runtime, *_runs(as_of)))

    async def release(
        self,
        connection: TrioConnection,
        jobs: Sequence[int],
        attempts: Sequence[int],
        runtime: UUID,
        as_of: Sequence[float | None] | None = None,
    ) -> list[int]:
        return list(await self._calls.value(connection, _RELEASE, jobs, attempts, runtime, *_runs(as_of)))

    async def discard(
        self,
        connection: TrioConnection,
        jobs: Sequence[int],
        attempts: Sequence[int],
        runtime: UUID,
        as_of: Sequence[float | None] | None = None,
    ) -> list[int]:
        return list(await self._calls.value(connection, _DISCARD, jobs, attempts, runtime, *_runs(as_of)))

    async def touch(
        self, connection: TrioConnection, job: int, seconds: float, attempt: int | None, runtime: UUID | None
    ) -> bool:
        statement: LiteralString = "select {s}.touch($1, make_interval(secs => $2), $3, $4::uuid)"
        return bool(await self._calls.value(connection, statement, job, seconds, attempt, runtime))

    async def progress(
        self, connection: TrioConnection, job: int, progress: str, attempt: int | None, runtime: UUID | None
    ) -> bool:
        statement: LiteralString = "select {s}.progress($1, $2::jsonb, $3, $4::uuid)"
        return bool(await self._calls.value(connection, statement, job, progress, attempt, runtime))

"""The calls that claim: ``sql/functions/30_claim.sql``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString

from ._answers import Claimed, Haul
from ._codec import to_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from ._calls import Bound, Calls
    from ._connection import TrioConnection

__all__ = ["Claims", "Priorities"]

Priorities = tuple[int, int] | None
"""The lowest and the highest priority to claim; None: all."""

_COLUMNS: LiteralString = (
    "select c.id, c.attempt, c.number, c.priority, c.retry_limit, c.timeout, date_part('epoch', c.sent_at),"
    " c.data::text, c.headers::text, c.provenance::text, c.key"
)
_CLAIM_BY_HAND: LiteralString = _COLUMNS + " from {s}.claim($1, $2, null, make_interval(secs => $3)) c"
_CLAIM: LiteralString = _COLUMNS + " from {s}.claim($1, $2, $3::uuid, durably => $4, look => true) c"
_CLAIM_FROM: LiteralString = (
    _COLUMNS + " from {s}.claim($1, $2, $3::uuid, null, $5::smallint[], $6::bigint[], durably => $4, look => true,"
    " due_floor => to_timestamp($7::float8)) c"
)
_CLAIM_SOME: LiteralString = (
    _COLUMNS + " from {s}.claim($1, $2, $3::uuid, durably => $4, look => true,"
    " min_priority => $5::int, max_priority => $6::int, key_limit => $7::int, at_work => $8::jsonb) c"
)

_SAY_TAKEN: LiteralString = (
    "select {s}.say_taken(case set_config('synchronous_commit', 'off', true) when 'off' then $1::int end, $2)"
)


class Claims:
    """The part of ``Store`` that claims."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def claim_by_hand(
        self, connection: TrioConnection, queue: str, how_many: int, *, lease: float | None = None
    ) -> list[Claimed]:
        """Claim jobs for no runtime. ``lease``: seconds."""
        rows = await self._calls.rows(connection, _CLAIM_BY_HAND, queue, how_many, lease)
        return [Claimed(*row) for row in rows]

    async def claim(
        self,
        connection: TrioConnection,
        queue: str,
        how_many: int,
        runtime: UUID,
        *,
        floors: Mapping[int, int] | None,
        due_floor: float | None = None,
        durably: bool,
    ) -> Haul:
        """Claim jobs, if there are floors from there on.

        ``durably=False``: a crash of the server may forget the claim, and the jobs run again.
        """
        if floors is None:
            return await self.run_claim(connection, self.bind_claim(queue, how_many, runtime, durably=durably))
        priorities = sorted(floors, reverse=True)
        numbers = [floors[priority] for priority in priorities]
        claim = self._calls.bind(_CLAIM_FROM, queue, how_many, runtime, durably, priorities, numbers, due_floor)
        return await self.run_claim(connection, claim)

    async def run_claim(self, connection: TrioConnection, claim: Bound) -> Haul:
        """Make a claim that was bound."""
        return self.haul(await self._calls.run(connection, claim))

    async def say_taken(self, connection: TrioConnection, queue: int, numbers: str) -> None:
        """Tell other runtimes that these tickets are taken; a crash of the server may forget it."""
        await self._calls.rows(connection, _SAY_TAKEN, queue, numbers)

    @staticmethod
    def haul(rows: list[Any]) -> Haul:
        """What the rows of a claim say."""
        *claimed, (_, left, _, _, _, due_floor, now, *_) = rows
        jobs = [Claimed(*row) for row in claimed]
        for job in jobs:
            job.as_of = now
        return Haul(jobs, None if left is None else bool(left), due_floor)

    def bind_claim(
        self,
        queue: str,
        how_many: int,
        runtime: UUID,
        *,
        durably: bool,
        priorities: Priorities = None,
        key_limit: int | None = None,
        at_work: Mapping[str, int] | None = None,
    ) -> Bound:
        """A claim from the beginning, to be sent without waiting; ``haul()`` reads its rows.

        It brings at most ``key_limit`` jobs of a key, less those ``at_work``.
        """
        if priorities is None and key_limit is None:
            return self._calls.bind(_CLAIM, queue, how_many, runtime, durably)
        least, most = priorities or (None, None)
        at_work_json = to_json(at_work or {})
        return self._calls.bind(_CLAIM_SOME, queue, how_many, runtime, durably, least, most, key_limit, at_work_json)

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

_CLAIMED: LiteralString = (
    "select c.id, c.attempt, c.number, c.priority, c.retry_limit, c.timeout, c.sent_at,"
    " c.data::text, c.headers::text, c.provenance::text, c.key"
)
_CLAIM_BY_HAND: LiteralString = _CLAIMED + " from {s}.claim($1, $2, null, make_interval(secs => $3)) c"
# The last row: whether tickets are left, of a claim from the beginning, and what time it is then. What is united is
# done in order.
_LEFT: LiteralString = (
    " union all select null, (%)::int, null, null, null, null, clock_timestamp(), null, null, null, null"
)
_CLAIM_FROM: LiteralString = (
    _CLAIMED + " from {s}.claim($1, $2, $3::uuid, null, $4::smallint[], $5::bigint[]) c" + _LEFT.replace("%", "null")
)
_CLAIM: LiteralString = _CLAIMED + " from {s}.claim($1, $2, $3::uuid) c" + _LEFT.replace("%", "{s}.any_left($1)")
_CLAIM_SOME: LiteralString = (
    _CLAIMED + " from {s}.claim($1, $2, $3::uuid, min_priority => $4::int, max_priority => $5::int,"
    " key_limit => $6::int, at_work => $7::jsonb) c"
    + _LEFT.replace("%", "case when $6::int is null then {s}.any_left($1, $4::int, $5::int) end")
)
# The setting is made where an argument is evaluated, before the call: a join with set_config() costs a claim 3 %.
_UNFLUSHED: LiteralString = "case set_config('synchronous_commit', 'off', true) when 'off' then $2::int end"
_CLAIM_UNFLUSHED: LiteralString = _CLAIM.replace("$2", _UNFLUSHED)
_CLAIM_FROM_UNFLUSHED: LiteralString = _CLAIM_FROM.replace("$2", _UNFLUSHED)
_CLAIM_SOME_UNFLUSHED: LiteralString = _CLAIM_SOME.replace("$2", _UNFLUSHED)

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
        durably: bool,
    ) -> Haul:
        """Claim jobs. ``durably=False``: a crash of the server may forget the claim, and the jobs run again."""
        if floors is None:
            return await self.run_claim(connection, self.bind_claim(queue, how_many, runtime, durably=durably))
        priorities = sorted(floors, reverse=True)
        numbers = [floors[priority] for priority in priorities]
        statement = _CLAIM_FROM if durably else _CLAIM_FROM_UNFLUSHED
        return self.haul(await self._calls.rows(connection, statement, queue, how_many, runtime, priorities, numbers))

    async def run_claim(self, connection: TrioConnection, claim: Bound) -> Haul:
        """Make a claim that was bound."""
        return self.haul(await self._calls.run(connection, claim))

    async def say_taken(self, connection: TrioConnection, queue: int, numbers: str) -> None:
        """Tell other runtimes that these tickets are taken; a crash of the server may forget it."""
        await self._calls.rows(connection, _SAY_TAKEN, queue, numbers)

    @staticmethod
    def haul(rows: list[Any]) -> Haul:
        """What the rows of a claim say."""
        *claimed, (_, left, _, _, _, _, now, *_) = rows
        jobs = [Claimed(*row) for row in claimed]
        for job in jobs:
            job.as_of = now
        return Haul(jobs, None if left is None else bool(left))

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
            return self._calls.bind(_CLAIM if durably else _CLAIM_UNFLUSHED, queue, how_many, runtime)
        statement = _CLAIM_SOME if durably else _CLAIM_SOME_UNFLUSHED
        least, most = priorities or (None, None)
        return self._calls.bind(statement, queue, how_many, runtime, least, most, key_limit, to_json(at_work or {}))

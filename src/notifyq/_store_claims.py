"""The calls that claim: ``sql/functions/30_claim.sql``."""

from __future__ import annotations

from typing import TYPE_CHECKING, LiteralString

from ._codec import to_json
from ._models import Claimed

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
_CLAIM: LiteralString = (
    _CLAIMED + " from {s}.claim($1, $2, $3::uuid, make_interval(secs => $4), $5::smallint[], $6::bigint[]) c"
)
_CLAIM_AT_ONCE: LiteralString = _CLAIMED + " from {s}.claim($1, $2, $3::uuid) c"
_CLAIM_SOME: LiteralString = (
    _CLAIMED + " from {s}.claim($1, $2, $3::uuid, min_priority => $4::int, max_priority => $5::int,"
    " key_limit => $6::int, at_work => $7::jsonb) c"
)
# The setting is made where an argument is evaluated, before the call: a join with set_config() costs a claim 3 %.
_UNFLUSHED: LiteralString = "case set_config('synchronous_commit', 'off', true) when 'off' then $2::int end"
_CLAIM_UNFLUSHED: LiteralString = _CLAIM.replace("$2", _UNFLUSHED)
_CLAIM_AT_ONCE_UNFLUSHED: LiteralString = _CLAIM_AT_ONCE.replace("$2", _UNFLUSHED)
_CLAIM_SOME_UNFLUSHED: LiteralString = _CLAIM_SOME.replace("$2", _UNFLUSHED)


class Claims:
    """The part of ``Store`` that claims."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def claim(
        self,
        connection: TrioConnection,
        queue: str,
        how_many: int,
        runtime: UUID | None,
        *,
        lease: float | None = None,
        floors: Mapping[int, int] | None = None,
        durably: bool = True,
    ) -> list[Claimed]:
        """Claim jobs. ``durably=False``: a crash of the server may forget the claim, and the jobs run again."""
        priorities = None if floors is None else sorted(floors, reverse=True)
        numbers = None if floors is None or priorities is None else [floors[priority] for priority in priorities]
        statement = _CLAIM if durably else _CLAIM_UNFLUSHED
        rows = await self._calls.rows(connection, statement, queue, how_many, runtime, lease, priorities, numbers)
        return [Claimed(*row) for row in rows]

    async def run_claim(self, connection: TrioConnection, claim: Bound) -> list[Claimed]:
        """Make a claim that was bound."""
        return [Claimed(*row) for row in await self._calls.run(connection, claim)]

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
        """A claim from the beginning, to be sent without waiting; its rows are those of ``Claimed``.

        It brings at most ``key_limit`` jobs of a key, less those ``at_work``.
        """
        if priorities is None and key_limit is None:
            return self._calls.bind(_CLAIM_AT_ONCE if durably else _CLAIM_AT_ONCE_UNFLUSHED, queue, how_many, runtime)
        statement = _CLAIM_SOME if durably else _CLAIM_SOME_UNFLUSHED
        least, most = priorities or (None, None)
        return self._calls.bind(statement, queue, how_many, runtime, least, most, key_limit, to_json(at_work or {}))

"""The calls about the queues that a runtime serves: which they are, whether they are paused, what the beat tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, LiteralString

from ._answers import Beat, QueueInfo, Served, Stance

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from ._calls import Calls
    from ._connection import TrioConnection

__all__ = ["Serving"]


class Serving:
    """The part of ``Store`` that a runtime asks what it serves."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def served(self, connection: TrioConnection, names: Sequence[str]) -> list[Served]:
        """The queues that exist of these names and patterns, in the order in which they were made."""
        rows = await self._calls.rows(
            connection,
            "select q.name, q.paused, q.fair, q.gated, q.number, {s}.channel(q.number), q.retry_limit,"
            " coalesce(q.retention > '0', true), q.max_data_bytes from {s}.served($1::text[]) q order by q.number",
            names,
        )
        return [Served(name, paused, fair, gated, QueueInfo(*info)) for name, paused, fair, gated, *info in rows]

    async def beat(
        self,
        connection: TrioConnection,
        runtime: UUID,
        queues: Sequence[int],
        lows: Sequence[int | None] | None = None,
        highs: Sequence[int | None] | None = None,
        *,
        look: bool = True,
    ) -> Beat:
        """Beat, and ``look`` what is ready.

        Of the i-th queue only jobs with priorities from ``lows[i]`` to ``highs[i]`` count.
        """
        statement: LiteralString = (
            "select renewed, cancels, ready, due_in, lapse_in, schedules, clock, serves, fleet, place"
            " from {s}.beat($1::uuid, $2::int[], $3::int[], $4::int[], $5)"
        )
        return Beat(*await self._calls.row(connection, statement, runtime, queues, lows, highs, look))

    async def stand_free(
        self,
        connection: TrioConnection,
        queues: Sequence[int],
        held: Sequence[bool],
        due_floors: Sequence[float | None],
    ) -> dict[int, Stance]:
        """Stand free for these queues, on the listening connection; ``held``: for which of them it does so already.

        ``due_floors``: not None where looks from the beginning are dear.
        """
        rows = await self._calls.rows(
            connection,
            "select queue, stands, passed, ready, due, clock from {s}.stand_free($1::int[], $2::boolean[],"
            " array(select to_timestamp(u.due_floor) from unnest($3::float8[]) u (due_floor)))",
            queues,
            held,
            due_floors,
        )
        return {queue: Stance(*rest) for queue, *rest in rows}

    async def stand_busy(self, connection: TrioConnection, queues: Sequence[int]) -> None:
        await self._calls.rows(connection, "select {s}.stand_busy($1::int[])", queues)

    async def stand_far(
        self, connection: TrioConnection, queues: Sequence[int], far: Sequence[bool]
    ) -> dict[int, bool]:
        """Say on the listening connection for which queues looks from the beginning are dear from now on, or no longer."""
        statement: LiteralString = "select queue, stands from {s}.stand_far($1::int[], $2::boolean[])"
        return dict(await self._calls.rows(connection, statement, queues, far))

    async def pause(self, connection: TrioConnection, queue: str) -> bool:
        return bool(await self._calls.value(connection, "select {s}.pause($1)", queue))

    async def resume_queue(self, connection: TrioConnection, queue: str) -> bool:
        return bool(await self._calls.value(connection, "select {s}.resume_queue($1)", queue))

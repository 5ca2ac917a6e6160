"""The workload of many queues: what a claim and a pickup cost among them."""

from __future__ import annotations

import random
import statistics
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ._pairs import SIDES, Watch, claim_and_complete, in_pair, in_turn
from ._parts import GAP, TURN, Found, Role, Settings, Tell, wait_finished
from ._sql import (
    BARE_QUEUED_FILL,
    BARE_QUEUED_SETUP,
    BARE_QUEUED_TAKE,
    CLEAR,
    FILL_QUEUES,
    OUTPUTS,
    SEND_MOMENT,
    UNFINISHED,
)

if TYPE_CHECKING:
    from ._pairs import Connection

__all__ = ["queues"]

WAITING = 50_000
"""Jobs that wait on either side, in one queue or spread over all."""

PICKUPS = 75


def queues(settings: Settings, tell: Tell) -> Found:
    """Claims of 50 of 50,000 jobs in one queue, and spread over many, in turn.

    Also pickup by a runtime that serves one queue, and by one that serves many by a pattern, in turn. The limit:
    deletes of 50 rows from a bare table with as many queues in an indexed column.
    """

    def measure(dsns: dict[str, str], sides: dict[str, Connection]) -> Found:
        numbers = {"small": 1, "large": settings.queues}
        claims, bare = Watch(), Watch()
        for side, connection in sides.items():
            connection.execute(BARE_QUEUED_SETUP)
            for statement in (FILL_QUEUES, BARE_QUEUED_FILL):
                connection.execute(statement, {"queues": numbers[side], "each": WAITING // numbers[side] + 50})
            connection.execute("vacuum analyze")
        tell(0.2)
        for turn, side, connection in in_turn(sides):
            queue = turn % numbers[side] + 1
            claim_and_complete(claims, side, connection, f"bench.q{queue}", 50)
            with bare.of(f"{side}_take"):
                connection.execute(BARE_QUEUED_TAKE, (queue, 50)).fetchall()
        tell(0.4)
        pickups = _pickups(dsns, sides, numbers, tell)
        p50 = {side: statistics.median(found) for side, found in pickups.items()}
        return {
            "queues": settings.queues,
            "claim_ratio": claims.ratio("claim_50"),
            "claim_ms": claims.ms("large_claim_50"),
            "limit_claim_ratio": bare.ratio("take"),
            "limit_claim_ms": bare.ms("large_take"),
            "pickup_p50_ms": p50["large"],
            "one_pickup_p50_ms": p50["small"],
            "pickup_ratio": p50["large"] / p50["small"],
        }

    return in_pair(settings, (1, settings.queues), measure)


def _pickups(
    dsns: dict[str, str], sides: dict[str, Connection], numbers: dict[str, int], tell: Tell
) -> dict[str, list[float]]:
    """Milliseconds from send to start on either side, a few sends of each in turn, the first turn of each a warm-up."""
    with ExitStack() as stack:
        for side, connection in sides.items():
            connection.execute(CLEAR)
            stack.enter_context(Role("pattern", dsns[side]))
        turns = PICKUPS // TURN + 1
        for turn in range(turns):
            for side, connection in sides.items():
                for _ in range(TURN):
                    time.sleep(random.uniform(0.5, 1.5) * GAP)  # both sides have gone to sleep by then
                    queue = f"bench.q{random.randint(1, numbers[side])}"
                    connection.execute(SEND_MOMENT, (queue, time.monotonic_ns()))
                wait_finished(connection, UNFINISHED)
            tell(0.4 + 0.6 * (turn + 1) / turns)
    return {side: [row[0] for row in sides[side].execute(OUTPUTS).fetchall()][TURN:] for side in SIDES}

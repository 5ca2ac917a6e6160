"""The workload of a large backlog: what claims cost when many jobs wait, are blocked, or are kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ._pairs import Watch, claim, claim_and_complete, in_pair, in_turn
from ._parts import Found, Role, Settings, Tell, part_of, telling_sleep
from ._sql import BARE_FILL_MANY, BARE_TAKE, CLAIM_HELD, COMPLETE, FILL, FILL_HELD, SEND_25_KEYS, STAND_READY

if TYPE_CHECKING:
    from typing import LiteralString

    from ._pairs import Connection

__all__ = ["SMALL", "backlog"]

SMALL = 10_000
"""Jobs in the smaller database, and jobs in each statement that fills either."""

QUEUE, KEYED = "bench.q1", "bench.keyed"

BATCHES = (50, 100)
"""Jobs in a claim."""

FINISH = 5000
"""Jobs in each of the claims that make a backlog finished ones."""


def backlog(settings: Settings, tell: Tell) -> Found:
    """Claims of 50 and of 100 with 10,000 jobs waiting and with many more, in turn; the same with as many finished ones.

    Also claims and completions by key with as many blocked, and the memory of a runtime while as many wait. The limit:
    deletes of 50 rows from a bare table of as many.
    """

    def measure(dsns: dict[str, str], sides: dict[str, Connection]) -> Found:
        sizes = dict(zip(sides, (SMALL, settings.backlog), strict=True))
        _fill(sides, sizes, FILL, part_of(tell, 0, 0.15))
        waiting = _claims(sides)
        mib = _memory(settings, dsns["large"], part_of(tell, 0.15, 0.25))
        _fill(sides, sizes, BARE_FILL_MANY, part_of(tell, 0.25, 0.3))
        bare = _bare_takes(sides)
        _fill(sides, sizes, FILL_HELD, part_of(tell, 0.3, 0.5))
        blocked = _by_key(sides)
        _finish(sides, sizes, part_of(tell, 0.5, 1))
        kept = _claims(sides)
        return {
            "jobs": settings.backlog,
            "claim_ratio": waiting.ratio("claim_50"),
            "claim_100_ratio": waiting.ratio("claim_100"),
            "claim_ms": waiting.ms("large_claim_50"),
            "claim_ratio_kept": kept.ratio("claim_50"),
            "claim_100_ratio_kept": kept.ratio("claim_100"),
            "complete_ratio_kept": kept.ratio("complete_50"),
            "blocked_claim_ratio": blocked.ratio("claim_25"),
            "blocked_complete_ratio": blocked.ratio("complete_25"),
            "limit_claim_ratio": bare.ratio("take"),
            "limit_claim_ms": bare.ms("large_take"),
            "runtime_mib": mib,
        }

    return in_pair(settings, (1, 1), measure)


def _fill(sides: dict[str, Connection], sizes: dict[str, int], statement: LiteralString, tell: Tell) -> None:
    """Add as many jobs or rows as each side is to have, and let the server look at them."""
    for side, connection in sides.items():
        statements = math.ceil(sizes[side] / SMALL)
        for number in range(statements):
            connection.execute(statement, {"rows": SMALL})
            tell(number / statements)
        connection.execute("vacuum analyze")


def _claims(sides: dict[str, Connection]) -> Watch:
    watch = Watch()
    for how_many in BATCHES:
        for _, side, connection in in_turn(sides):
            claim_and_complete(watch, side, connection, QUEUE, how_many)
    return watch


def _bare_takes(sides: dict[str, Connection]) -> Watch:
    watch = Watch()
    for _, side, connection in in_turn(sides):
        with watch.of(f"{side}_take"):
            connection.execute(BARE_TAKE, {"rows": BATCHES[0], "kept": True}).fetchall()
    return watch


def _by_key(sides: dict[str, Connection]) -> Watch:
    """Claim and complete jobs of 25 free keys while other keys, of jobs that were claimed by hand, hold back all others."""
    watch = Watch()
    for connection in sides.values():
        while connection.execute(STAND_READY, (KEYED,)).rowcount:
            connection.execute(CLAIM_HELD, (KEYED,))  # it looks at some thousands, and may bring none of them
        connection.execute("vacuum analyze")
    for _, side, connection in in_turn(sides):
        connection.execute(SEND_25_KEYS)
        for _ in range(2):  # the second half was blocked by the first
            claim_and_complete(watch, side, connection, KEYED, 25)
    return watch


def _memory(settings: Settings, dsn: str, tell: Tell) -> float:
    """Most MiB resident of a runtime whose slots are full while the others wait."""
    with Role("full", dsn) as runtime:
        telling_sleep(settings.seconds, tell)
        runtime.go()
        mib: float = runtime.hear()["mib"]
        return mib


def _finish(sides: dict[str, Connection], sizes: dict[str, int], tell: Tell) -> None:
    """Finish as many jobs as either side is to have kept; as many wait on both then."""
    for side, connection in sides.items():
        for _ in range(2):
            connection.execute(FILL, {"rows": SMALL})
        finished = 0
        while finished < sizes[side]:
            jobs = claim(connection, QUEUE, min(FINISH, sizes[side] - finished))
            connection.execute(COMPLETE, (jobs,))
            finished += len(jobs)
            tell(finished / sizes[side])
        connection.execute("vacuum analyze")

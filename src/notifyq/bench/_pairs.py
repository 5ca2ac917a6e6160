"""Two databases, a small one and a large one, and a watch for what is done in either in turn."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import psycopg

from ._databases import own_database
from ._sql import CLAIM, COMPLETE, MAKE_QUEUES, REGISTER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._parts import Found, Settings

    Connection = psycopg.Connection[Any]

__all__ = ["SIDES", "Watch", "claim", "claim_and_complete", "in_pair", "in_turn"]

SIDES = ("small", "large")

TURNS = 45
SKIPPED = 5
"""Claims of each kind on each side, and how many of them, the first ones, do not count."""


class Watch:
    """Times what is done in turn, by name."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Time the block."""
        started = time.perf_counter()
        yield
        self._seconds[name].append(time.perf_counter() - started)

    def ms(self, name: str) -> float:
        """The median, without the first ones."""
        return statistics.median(self._seconds[name][SKIPPED:]) * 1000

    def ratio(self, what: str) -> float:
        """The median on the large side over the one on the small side."""
        return self.ms(f"large_{what}") / self.ms(f"small_{what}")


def in_pair(
    settings: Settings, queues: tuple[int, int], measure: Callable[[dict[str, str], dict[str, Connection]], Found]
) -> Found:
    """Call ``measure`` with the DSNs of two databases of so many queues, and a connection to each, then drop them."""

    with ExitStack() as stack:
        dsns = {side: stack.enter_context(own_database(settings.dsn)) for side in SIDES}
        sides = {side: stack.enter_context(psycopg.connect(dsn, autocommit=True)) for side, dsn in dsns.items()}
        for connection, number in zip(sides.values(), queues, strict=True):
            connection.execute(MAKE_QUEUES, (number,))
            connection.execute(REGISTER)
        return measure(dsns, sides)


def in_turn(sides: dict[str, Connection]) -> Iterator[tuple[int, str, Connection]]:
    """Each side once a turn, with the turn's number; the one that was last in a turn is first in the next."""
    order = list(sides.items())
    for turn in range(TURNS):
        for side, connection in order:
            yield turn, side, connection
        order.reverse()


def claim(connection: Connection, queue: str, how_many: int) -> list[int]:
    """Claim jobs for a runtime that only exists in the database."""
    row = connection.execute(CLAIM, (queue, how_many)).fetchone()
    assert row is not None
    jobs: list[int] = row[0] or []
    return jobs


def claim_and_complete(watch: Watch, side: str, connection: Connection, queue: str, how_many: int) -> None:
    """Claim so many jobs and complete them, both timed, by the number claimed."""
    with watch.of(f"{side}_claim_{how_many}"):
        jobs = claim(connection, queue, how_many)
    if len(jobs) != how_many:
        raise RuntimeError(f"only {len(jobs)} of {how_many} jobs were there to be claimed")
    with watch.of(f"{side}_complete_{how_many}"):
        connection.execute(COMPLETE, (jobs,))

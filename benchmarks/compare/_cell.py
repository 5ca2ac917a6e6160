"""A cell: one peer with one row of settings, in a database of its own, about to be measured by one verb."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import attrs

from ._process import Role

if TYPE_CHECKING:
    from ._peers import Peer
    from ._server import Database

__all__ = ["CHUNK", "Cell", "Options", "await_runs"]

CHUNK = 100
"""Jobs of a send in a steady state."""


@attrs.frozen
class Options:
    """How much of everything."""

    jobs: int = 50_000
    """Of a drain."""
    pickups: int = 300
    sends_seconds: float = 5
    seconds: float = 30
    """Of sustained; pinned, its control and idle take twice as many."""
    in_flight: int = 4000
    """Jobs that are sent and not begun in a steady state, at most."""
    limit: float = 60
    """Most seconds of a drain, and of any answer of a process."""

    def of(self, verb: str) -> dict[str, Any]:
        """Those that its figures depend on: a change of the others needs no new run."""
        return {name: getattr(self, name) for name in _BY_VERB[verb]}


_BY_VERB = {
    "pickup": ("pickups",),
    "sends": ("sends_seconds",),
    "sends_heard": ("sends_seconds",),
    "drain": ("jobs", "limit"),
    "drain2": ("jobs", "limit"),
    "sustained": ("seconds", "in_flight"),
    "control": ("seconds", "in_flight"),
    "pinned": ("seconds", "in_flight"),
    "idle": ("seconds",),
}


@attrs.frozen
class Cell:
    """A peer in a database of its own."""

    peer: Peer
    settings: dict[str, Any]
    database: Database
    command: list[str]
    variables: dict[str, str]
    options: Options

    def role(self, *, queues: int = 1) -> Role:
        """A process of it."""
        names = ["compare", *(f"compare{number}" for number in range(1, queues))]
        return Role(
            self.command, self.variables, {"dsn": self.database.uri, "settings": self.settings, "queues": names}
        )

    def install(self, *, queues: int = 1) -> None:
        """Make its schema."""
        with self.role(queues=queues) as role:
            role.ask("install")

    def outstanding(self) -> int:
        """How many jobs wait, run, or have an end that is not committed."""
        return self.database.value(self.peer.outstanding)


def await_runs(worker: Role, runs: int, limit: float) -> None:
    """Wait until so many handlers have begun, at most so many seconds."""
    until = time.monotonic() + limit
    while worker.ask("ran")["ran"] < runs and time.monotonic() < until:
        time.sleep(0.05)

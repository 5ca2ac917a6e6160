"""What workloads are made of: their settings, and the processes that they start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, LiteralString

import attrs
import psycopg

from ._sql import CLEAR

__all__ = [
    "GAP",
    "TURN",
    "CannotMeasure",
    "Found",
    "ProcessEnded",
    "Role",
    "Settings",
    "Tell",
    "Workload",
    "clear",
    "part_of",
    "telling_sleep",
]

Found = dict[str, Any]
"""What one run found: figures by name, and lists of samples, which stay with the run."""

Tell = Callable[[float], object]
"""Told by a workload how much of a run is done, from 0 to 1."""

GAP = 0.02
"""Seconds between the sends of the latency workload: both sides have gone to sleep by then."""

TURN = 25
"""Sends of the latency workload before it is the other side's turn: about half a second."""


@attrs.frozen
class Settings:
    """What to measure with."""

    dsn: str = attrs.field(repr=False)
    jobs: int
    processes: int
    concurrency: int
    batch: int
    kept: bool
    senders: int = 32
    """Connections that send single rows."""
    seconds: float = 30.0
    """How long a workload that lasts is measured."""
    queues: int = 10
    backlog: int = 1_000_000
    """Jobs that wait, or are kept, in the larger of two databases."""
    own_server: bool = False
    """It was started for this run: its settings may be changed."""


Workload = Callable[[Settings, Tell], Found]


class CannotMeasure(RuntimeError):
    """Why there are no figures, in a line."""


class ProcessEnded(CannotMeasure):
    """A process of the benchmark has ended by itself, which is a fault of it or of the server."""


class Role:
    """A process of the benchmark."""

    def __init__(self, role: str, dsn: str, *numbers: object) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", "notifyq.bench._roles", role, *map(str, numbers)],
            env={**os.environ, "DATABASE_URL": dsn},  # others can read a command line
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Role:
        try:
            self.hear()  # ready
        except BaseException:
            self.kill()
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def kill(self) -> None:
        """End it now."""
        self._process.kill()

    def go(self, what: str = "") -> None:
        """Let it begin."""
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Wait for its next line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ProcessEnded("a process of the benchmark ended early: its own error is above")
        said: dict[str, Any] = json.loads(line)
        return said


def clear(dsn: str) -> None:
    """Leave nothing of a run behind."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(CLEAR)
        with suppress(psycopg.errors.InsufficientPrivilege):  # on a server given it may not
            connection.execute("checkpoint")


def part_of(tell: Tell, begin: float, end: float) -> Tell:
    """Tell of something that is this part of a run."""
    return lambda done: tell(begin + (end - begin) * done)


def telling_sleep(seconds: float, tell: Tell) -> None:
    """Let so many seconds pass, and tell of them."""
    started = time.monotonic()
    while (passed := time.monotonic() - started) < seconds:
        tell(passed / seconds)
        time.sleep(min(0.5, seconds - passed))


def wait_finished(connection: psycopg.Connection[Any], unfinished: LiteralString) -> None:
    """Wait until a query no longer says that there is something to do. It is asked, since nobody is told of the last one."""
    while connection.execute(unfinished).fetchone() == (True,):
        time.sleep(0.01)

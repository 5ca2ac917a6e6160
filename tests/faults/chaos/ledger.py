"""What was sent, what was done to whom, and what ran, in files outside the database.

Each process appends to a file of its own, a line with one ``write()``: a killed process loses none that it has written.
Moments are of ``time.monotonic()``, which is one clock for all processes of a machine and cannot be set.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from notifyq.events import Event

__all__ = ["Incident", "Ledger", "Pen", "Run", "Send"]


@attrs.define
class Run:
    """One run of a handler."""

    job: int
    attempt: int
    process: str
    began: float
    ended: float | None = None
    """When it had done its work."""
    broke_off: float | None = None
    """When it raised or was cancelled. Neither: it is still under way, or its process died in the midst of it."""

    @property
    def over(self) -> float | None:
        """When it ended, one way or the other."""
        return self.ended if self.broke_off is None else self.broke_off


@attrs.frozen
class Send:
    """A send that returned."""

    queue: str
    called: float
    """When it was begun."""
    delay: float = 0.0
    after: tuple[int, ...] = ()
    """The jobs that have to end before it starts."""


@attrs.frozen
class Incident:
    """Something that was done to the processes, the server or the network between them."""

    kind: str
    began: float
    ended: float
    process: str | None = None
    """The worker that it was done to; None: all of them."""
    waits_for: str | None = None
    """When it has been got over: see ``recoveries()``."""
    job: int | None = None
    """The job in the midst of which the worker was hit."""
    excuses: bool = True
    """Whether a job may run twice for it: some process, or its connection, is lost with what it has not settled."""


class Pen:
    """A worker process's side."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._runs = 0

    @contextlib.contextmanager
    def run(self, job: int, attempt: int) -> Iterator[None]:
        """Write down that a handler begins with the block, and how it ends."""
        number = self.began(job, attempt)
        try:
            yield
        except BaseException:
            self.broke_off(number)
            raise
        self.ended(number)

    def began(self, job: int, attempt: int) -> int:
        """Write down that a handler begins; gives the number of the run."""
        self._runs += 1
        os.write(self._file, b"b %d %d %d %.6f\n" % (self._runs, job, attempt, time.monotonic()))
        return self._runs

    def ended(self, run: int) -> None:
        """Write down that it has done all it had to do."""
        os.write(self._file, b"e %d %.6f\n" % (run, time.monotonic()))

    def broke_off(self, run: int) -> None:
        """Write down that it raised, or was cancelled."""
        os.write(self._file, b"f %d %.6f\n" % (run, time.monotonic()))

    def tell(self, event: Event) -> None:
        """Write down that the runtime said something."""
        os.write(self._file, b"x %s %.6f\n" % (type(event).__name__.encode(), time.monotonic()))


class Ledger:
    """The harness's side: it writes down what was sent, and reads what the workers write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sends: dict[int, Send] = {}
        self.refused: Counter[str] = Counter()
        self.unknown = 0
        """Jobs of sends that did not return: they may have been made, or not."""
        self.id_keys: dict[str, set[int]] = {}
        self.runs: list[Run] = []
        self.incidents: list[Incident] = []
        self.events: Counter[str] = Counter()
        self.told: list[tuple[str, str, float]] = []
        self.completed: Counter[str] = Counter()
        self._sent_by_queue: Counter[str] = Counter()
        self._ended: set[int] = set()
        self._read: dict[str, tuple[int, bytes]] = {}
        self._open: dict[tuple[str, int], Run] = {}
        self._file = (folder / "sends").open("a", encoding="utf-8")
        self._incidents = (folder / "incidents").open("a", encoding="utf-8")

    def close(self) -> None:
        """Close its own files."""
        self._file.close()
        self._incidents.close()

    @contextlib.contextmanager
    def attempt(self, jobs: int) -> Iterator[None]:
        """A send of so many jobs is under way: unless the block ends well, nobody knows what became of it."""
        self.unknown += jobs
        yield
        self.unknown -= jobs

    def sent(self, jobs: Iterable[tuple[int, Send]]) -> None:
        """A send has returned."""
        for job, send in jobs:
            if job not in self.sends:
                self._sent_by_queue[send.queue] += 1
                self.completed[send.queue] += job in self._ended
            self.sends[job] = send
            self._file.write(f"{job} {send.queue} {send.called:.6f} {send.delay}\n")
        self._file.flush()

    def outstanding(self, queue: str) -> int:
        """How many jobs of a queue have been sent and have not been run to their end, as far as is known."""
        return self._sent_by_queue[queue] - self.completed[queue]

    def note(self, incident: Incident) -> None:
        """Something was done. The file is for who wants to know later what a job that ran twice had met with."""
        self.incidents.append(incident)
        times = f"{incident.began:.6f} {incident.ended:.6f}"
        self._incidents.write(f"{times} {incident.process or '-'} {incident.kind}\n")
        self._incidents.flush()

    def read(self) -> None:
        """Read what the workers have written since the last time."""
        for path in self.folder.glob("effects-*"):
            process = path.name.removeprefix("effects-")
            offset, rest = self._read.get(process, (0, b""))
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
            *lines, left = (rest + data).split(b"\n")
            self._read[process] = (offset + len(data), left)
            for line in lines:
                self._take(process, line.split())

    def _take(self, process: str, words: list[bytes]) -> None:
        match words[0]:
            case b"b":
                run = Run(int(words[2]), int(words[3]), process, float(words[4]))
                self._open[process, int(words[1])] = run
                self.runs.append(run)
            case b"e":
                run = self._open.pop((process, int(words[1])))
                run.ended = float(words[2])
                if run.job not in self._ended:
                    self._ended.add(run.job)
                    if (send := self.sends.get(run.job)) is not None:
                        self.completed[send.queue] += 1
            case b"f":
                self._open.pop((process, int(words[1]))).broke_off = float(words[2])
            case b"x":
                self.events[words[1].decode()] += 1
                self.told.append((process, words[1].decode(), float(words[2])))

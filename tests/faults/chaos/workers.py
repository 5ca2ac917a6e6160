"""The worker processes: ``notifyq run``, started, signalled, waited for."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Worker", "Workers", "processes_in"]

ROOT = Path(__file__).parents[3]
HOW_MANY = 3
END_SECONDS = 30.0
"""Seconds in which a process that was told to has to end: its grace is one, and what it waits for of the server 10."""


def processes_in(folder: Path) -> list[str]:
    """Command lines of all processes that work in a folder, or name it in their arguments or their environment."""
    known = re.compile(rb"%s(/|\0|$)" % re.escape(os.fsencode(folder)))
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is somebody else's
            line = (process / "cmdline").read_bytes()
            where = os.fsencode(os.readlink(process / "cwd"))  # a server's processes name nothing else
            if known.search(b"\0".join((line, where, (process / "environ").read_bytes()))):
                found.append(line.replace(b"\0", b" ").decode(errors="replace").strip())
    return found


@attrs.frozen
class Worker:
    """One process."""

    name: str
    process: subprocess.Popen[bytes]


class Workers:
    """Three processes. One that ends is replaced by whoever ended it."""

    def __init__(self, folder: Path, environment: Mapping[str, str], wrapped: tuple[str, ...] = ()) -> None:
        """``wrapped``: a command that runs a command."""
        self._folder = folder
        self._environment = {**os.environ, "TMPDIR": str(folder), **environment}
        self._wrapped = wrapped
        self._started = 0
        self._log = (folder / "log").open("ab")
        self.all: list[Worker] = []
        self._ending: list[Worker] = []
        self.bad_ends: list[str] = []

    def start(self) -> None:
        """Start all three."""
        self.all = [self._start() for _ in range(HOW_MANY)]

    def _start(self) -> Worker:
        self._started += 1
        name = str(self._started)
        process = subprocess.Popen(
            [*self._wrapped, sys.executable, "-m", "notifyq", "run", "tests.faults.chaos.app:runtime"],
            cwd=ROOT,
            env={**self._environment, "CHAOS_LEDGER": str(self._folder / f"effects-{name}")},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        return Worker(name, process)

    def at_work(self, name: str) -> Worker | None:
        """The one of this name, unless somebody ends it."""
        return next((one for one in self.all if one.name == name and one not in self._ending), None)

    async def end(self, worker: Worker, number: signal.Signals) -> None:
        """Send a signal that ends it, wait until it has, and start another in its place; nothing if it is ending already."""
        if worker in self._ending:
            return
        self._ending.append(worker)
        worker.process.send_signal(number)
        await self.gone(worker, (number,))
        self.all[self.all.index(worker)] = self._start()

    async def gone(self, worker: Worker, by: tuple[signal.Signals, ...] = (signal.SIGTERM,)) -> None:
        """Wait until it has ended; how, is looked at: by itself only as 0, or by SIGTERM while it imports."""
        with trio.move_on_after(END_SECONDS):
            while worker.process.poll() is None:
                await trio.sleep(0.01)
        code = worker.process.poll()
        if code is None:
            worker.process.kill()
            worker.process.wait()
            self.bad_ends.append(f"worker {worker.name} did not end within {END_SECONDS:g} s")
        elif code not in (0, *(-number for number in by)):
            self.bad_ends.append(f"worker {worker.name} ended with {code}")

    async def stop(self) -> None:
        """End all of them."""
        for worker in self.all:
            worker.process.send_signal(signal.SIGCONT)
            worker.process.terminate()
        for worker in self.all:
            await self.gone(worker)

    def kill(self) -> None:
        """End all of them at once, whatever happened."""
        for worker in self.all:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
        self._log.close()

    def log(self) -> str:
        """What they logged, without the failures that the load is made of."""
        with (self._folder / "log").open(encoding="utf-8", errors="replace") as log:
            return "".join(line for line in log if "bad luck" not in line)

"""The worker processes: ``notifyq run``, started, signalled, waited for."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Restart", "Worker", "Workers", "processes_in"]

ROOT = Path(__file__).parents[3]
HOW_MANY = 3
END_SECONDS = 30.0
"""Seconds in which a process that was told to has to end: its grace is one, and what it waits for of the server 10."""
RESTART_SECONDS = 0.5
"""Until a worker is started again that could not start."""
COULD_NOT_START = re.compile(
    rb"notifyq: (cannot reach the server within|the connection to the server broke|no connection to the server in"
    rb"|the server did not answer within)[^\n]+\n"
)
"""All that a worker says whose connection breaks while it starts; later it reconnects for ever."""
WORDS_KEPT = 2000


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


@attrs.define(eq=False)
class Worker:
    """One process."""

    name: str
    process: subprocess.Popen[bytes]
    began: float = attrs.Factory(time.monotonic)
    words: bytes = b""
    """What it said first."""
    reader: threading.Thread = attrs.field(init=False)

    def could_not_start(self) -> bool:
        """Whether it has ended as one does whose connection breaks while it starts: with 1 and one line."""
        if self.process.poll() != 1:
            return False
        self.reader.join(END_SECONDS)
        return COULD_NOT_START.fullmatch(self.words) is not None


@attrs.frozen
class Restart:
    """A worker that could not start, and was started again."""

    name: str
    began: float
    ended: float
    words: str


class Workers:
    """Three processes. One that ends is replaced by whoever ended it; one that could not start is started again."""

    def __init__(self, folder: Path, environment: Mapping[str, str], wrapped: tuple[str, ...] = ()) -> None:
        """``wrapped``: a command that runs a command."""
        self._folder = folder
        self._environment = {**os.environ, "TMPDIR": str(folder), **environment}
        self._wrapped = wrapped
        self._started = 0
        self._log = (folder / "log").open("ab", buffering=0)
        self.all: list[Worker] = []
        self._ending: list[Worker] = []
        self.bad_ends: list[str] = []
        self.restarts: list[Restart] = []

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
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        worker = Worker(name, process)
        worker.reader = threading.Thread(target=self._copy, args=(worker,), daemon=True)
        worker.reader.start()
        return worker

    def _copy(self, worker: Worker) -> None:
        """Its words into the log, a line at a time."""
        assert worker.process.stdout is not None
        with worker.process.stdout as lines:
            for line in lines:
                if len(worker.words) < WORDS_KEPT:
                    worker.words += line
                self._log.write(line)

    async def keep_up(self) -> None:
        """Start those again that could not start, as a process manager would; how others ended, gone() looks at."""
        while True:
            for worker in self.all:
                if worker not in self._ending and worker.could_not_start():
                    self._ending.append(worker)
                    await trio.sleep(RESTART_SECONDS)
                    self._note(worker)
                    self.all[self.all.index(worker)] = self._start()
            await trio.sleep(0.05)

    def _note(self, worker: Worker) -> None:
        words = worker.words.decode(errors="replace").strip()
        self.restarts.append(Restart(worker.name, worker.began, time.monotonic(), words))

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
        elif worker.could_not_start():
            self._note(worker)  # before the signal came
        elif code not in (0, *(-number for number in by)):
            self.bad_ends.append(f"worker {worker.name} ended with {code}")

    async def stop(self) -> None:
        """End all of them."""
        self._ending += self.all
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
            worker.reader.join(END_SECONDS)
        self._log.close()

    def log(self) -> str:
        """What they logged, without the failures that the load is made of."""
        with (self._folder / "log").open(encoding="utf-8", errors="replace") as log:
            return "".join(line for line in log if "bad luck" not in line)

"""Runs several worker processes and replaces one that crashes."""

from __future__ import annotations

import logging
import random
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import trio

from ._backoff import reconnect_delay

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

__all__ = ["supervise"]

log = logging.getLogger("notifyq")

HEALTHY_SECONDS = 10.0
"""A process that ran this long did not fail to start."""

CLEAN = (0, -signal.SIGTERM)
"""Exit statuses of a stopped process: by itself, or by the signal while it was still importing."""


async def supervise(
    arguments: list[str], processes: int, environment: Mapping[str, str], asked: Sequence[int] = ()
) -> int:
    """Run ``python -m notifyq`` with these arguments in so many processes until SIGTERM or SIGINT.

    ``asked``: signals that came before; then it does not begin.

    Each gets the signals that this process gets, and stops by itself when this process is gone: its stdin is a pipe that
    nobody else holds open. One that crashes is started again, with a growing delay. As long as none has ever run for
    ``HEALTHY_SECONDS``, one that fails to start (exit code 1 or 2) ends them all, and its code is returned; else 0, or 1
    if one could not be stopped cleanly.
    """
    fleet = _Fleet(arguments, environment)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        if asked:
            return 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fleet.obey, signals)
            async with trio.open_nursery() as keepers:
                for _ in range(processes):
                    keepers.start_soon(fleet.keep_one)
            nursery.cancel_scope.cancel()
    return fleet.code


class _Fleet:
    def __init__(self, arguments: list[str], environment: Mapping[str, str]) -> None:
        self._command = [sys.executable, "-m", "notifyq", *arguments]
        self._environment = environment
        self._stopping = trio.Event()
        self._running: set[trio.Process] = set()
        self._ever_healthy = False
        self._random = random.Random()
        self.code = 0

    def stop(self) -> None:
        self._stopping.set()
        for process in self._running:
            process.terminate()

    async def obey(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            if self._stopping.is_set():
                for process in self._running:
                    process.send_signal(number)
            else:
                log.info("%s: stopping %d worker processes", signal.Signals(number).name, len(self._running))
                self.stop()

    async def keep_one(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            status, seconds = await self._run_one()
            if self._stopping.is_set():
                self.code = max(self.code, 0 if status in CLEAN else 1)
                return
            healthy = seconds >= HEALTHY_SECONDS
            self._ever_healthy |= healthy
            if status in (1, 2) and not self._ever_healthy:
                self.code = status
                self.stop()
                return
            failures = 1 if healthy else failures + 1
            log.error("a worker process ended with status %d after %.0f s: starting another", status, seconds)
            with trio.move_on_after(0 if healthy else reconnect_delay(failures, self._random)):
                await self._stopping.wait()

    async def _run_one(self) -> tuple[int, float]:
        """Run a process to its end; returns its status and how many seconds it ran."""
        started = trio.current_time()
        try:
            process = await trio.lowlevel.open_process(
                self._command, stdin=subprocess.PIPE, env=self._environment, start_new_session=True
            )
        except OSError as error:  # no memory, or too many processes
            log.error("cannot start a worker process: %s", error)
            return 1, 0.0  # as one that failed to start
        self._running.add(process)
        log.info("worker process %d started", process.pid)
        if self._stopping.is_set():
            process.terminate()
        with trio.move_on_after(HEALTHY_SECONDS):
            await process.wait()
        self._ever_healthy |= process.returncode is None
        status = await process.wait()
        self._running.discard(process)
        assert process.stdin is not None
        await process.stdin.aclose()
        return status, trio.current_time() - started

"""Runs several worker processes and replaces one that crashes."""

from __future__ import annotations

import logging
import random
import signal
import subprocess
import sys

import trio

from ._backoff import reconnect_delay

__all__ = ["supervise"]

log = logging.getLogger("notifyq")

HEALTHY_SECONDS = 10.0
"""A process that ran this long did not fail to start."""

CLEAN = (0, -signal.SIGTERM)
"""Exit statuses of a stopped process: by itself, or by the signal while it was still importing."""


async def supervise(arguments: list[str], processes: int) -> int:
    """Run ``python -m notifyq`` with these arguments in so many processes until SIGTERM or SIGINT.

    Each gets the signals that this process gets. One that crashes is started again, with a growing delay. If none has
    ever run for ``HEALTHY_SECONDS`` and one fails to start (exit code 1 or 2), all are stopped and its code returned;
    else 0, or 1 if one could not be stopped cleanly.
    """
    code = 0
    stopping = trio.Event()
    running: set[trio.Process] = set()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            def stop() -> None:
                stopping.set()
                for process in running:
                    process.terminate()

            async def keep_one() -> None:
                nonlocal code
                failures = 0
                rng = random.Random()
                while not stopping.is_set():
                    started = trio.current_time()
                    process = await trio.lowlevel.open_process(
                        [sys.executable, "-m", "notifyq", *arguments], stdin=subprocess.DEVNULL, start_new_session=True
                    )
                    running.add(process)
                    log.info("worker process %d started", process.pid)
                    if stopping.is_set():
                        process.terminate()
                    status = await process.wait()
                    running.discard(process)
                    if stopping.is_set():
                        code = max(code, 0 if status in CLEAN else 1)
                        return
                    healthy = trio.current_time() - started >= HEALTHY_SECONDS
                    if status in (1, 2) and not healthy:
                        code = status
                        stop()
                        return
                    failures = 1 if healthy else failures + 1
                    log.error("worker process %d ended with status %d: starting another", process.pid, status)
                    with trio.move_on_after(0 if healthy else reconnect_delay(failures, rng)):
                        await stopping.wait()

            async def obey() -> None:
                async for number in signals:
                    if stopping.is_set():
                        for process in running:
                            process.send_signal(number)
                    else:
                        log.info("%s: stopping %d worker processes", signal.Signals(number).name, len(running))
                        stop()

            nursery.start_soon(obey)
            async with trio.open_nursery() as keepers:
                for _ in range(processes):
                    keepers.start_soon(keep_one)
            nursery.cancel_scope.cancel()
    return code

"""Notices, from a thread, that a handler blocks the event loop, while there is still time before the lease lapses."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

import trio

from .events import HandlerStuck

if TYPE_CHECKING:
    from .events import Events

__all__ = ["Watchdog"]

log = logging.getLogger("notifyq")


class Watchdog:
    """Asks the event loop for a sign of life every quarter of a lease, and warns if none comes within another."""

    def __init__(self, lease: float, events: Events) -> None:
        self._quarter = lease / 4
        self._events = events
        self._ended = threading.Event()
        self._alive = threading.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled."""
        token = trio.lowlevel.current_trio_token()
        thread = threading.Thread(
            target=self._watch, args=(token, threading.get_ident()), name="notifyq watchdog", daemon=True
        )
        thread.start()
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            self._ended.set()

    def _watch(self, token: trio.lowlevel.TrioToken, loop_thread: int) -> None:
        while not self._ended.wait(self._quarter):
            self._alive.clear()
            asked = time.monotonic()
            try:
                token.run_sync_soon(self._alive.set)
                if self._alive.wait(self._quarter) or self._ended.is_set():
                    continue
                frame = sys._current_frames().get(loop_thread)
                where = "".join(traceback.format_stack(frame)[-3:]) if frame else ""
                # Logged from here: subscribers are called in the event loop, which does not turn.
                log.warning("the event loop is blocked; run blocking code in a sync worker. It is in:\n%s", where)
                while not self._alive.wait(self._quarter) and not self._ended.is_set():
                    pass
                token.run_sync_soon(self._report, time.monotonic() - asked)
            except trio.RunFinishedError:
                return

    def _report(self, seconds: float) -> None:
        self._events.emit(
            HandlerStuck(f"the event loop was blocked for {seconds:.1f} s: run blocking code in a sync worker")
        )

"""The one statement an idle runtime runs: it renews the lease, proves the listener, and is the poll.

A runtime that cannot renew cancels its own handlers before others may take their jobs.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import trio

from ._errors import ConnectionLost
from ._events import HandlerStuck

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._events import Events
    from ._store import Beat

__all__ = ["Heart"]

RETRY = 0.5
"""Seconds between tries to renew while the server can't be reached."""


class Heart:
    """Beats every 5 to 6 s with the default lease of 12 s (5/12 to 1/2 of the lease)."""

    def __init__(
        self,
        lease: float,
        *,
        beat: Callable[[], Awaitable[Beat]],
        register: Callable[[], Awaitable[None]],
        told: Callable[[Beat], Awaitable[None]],
        lost: Callable[[], Awaitable[None]],
        events: Events,
    ) -> None:
        """``register`` lets go of all jobs and begins a new lease; ``told`` gets what each beat said.

        ``lost`` is called once when the lease lapsed, or is about to.
        """
        self._lease = lease
        self._beat = beat
        self._register = register
        self._told = told
        self._lost = lost
        self._events = events
        self._random = random.Random()
        self._held_until = -math.inf

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Beat until cancelled. Started after the first beat."""
        self._held_until = trio.current_time() + self._lease
        await self._beat_once()
        task_status.started()
        interval = self._random.uniform(5 / 12, 1 / 2) * self._lease
        while True:
            woken = trio.current_time() + interval
            await trio.sleep_until(woken)
            late = trio.current_time() - woken
            if late > self._lease / 4:
                self._events.emit(
                    HandlerStuck(f"the event loop was blocked for {late:.1f} s: run blocking code in a sync worker")
                )
            beaten = await self._beat_once()
            interval = self._random.uniform(5 / 12, 1 / 2) * self._lease if beaten else RETRY

    async def _beat_once(self) -> bool:
        """Beat; give the lease up in time if that fails. True if it is renewed."""
        started = trio.current_time()
        # Own handlers end before the lease does: what is left of it, less a margin for them to end in.
        margin = self._lease / 6
        if started >= self._held_until - margin:
            await self._give_up()
        given_up = self._held_until == -math.inf
        try:
            with trio.move_on_at(started + self._lease / 2 if given_up else self._held_until - margin) as patience:
                beat = await self._beat()
        except ConnectionLost:
            return False
        if patience.cancelled_caught:
            await self._give_up()
            return False
        if given_up or not beat.renewed:
            # What is still ours in the database was cancelled here: start with empty hands.
            await self._give_up()
            try:
                await self._register()
            except ConnectionLost:
                return False
        self._held_until = started + self._lease
        await self._told(beat)
        return True

    async def _give_up(self) -> None:
        if self._held_until != -math.inf:
            self._held_until = -math.inf
            await self._lost()

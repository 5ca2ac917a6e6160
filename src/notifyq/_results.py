"""Waiting for results: by the announcement of a job's end, with a slow poll behind it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio

from ._errors import ClientClosed, ConnectionLost, JobNotFound

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._listener import Listener
    from ._models import JobRecord
    from ._pool import Pool
    from ._store import Store

__all__ = ["Results", "has_finished"]

POLL = 5.0
"""Seconds between looks for a result when no announcement comes; 1 s while the listener is down."""

SETTLE_PAUSES = (0.001, 0.002, 0.004, 0.005, 0.005, 0.005, 0.01, 0.02, 0.05)
"""Seconds between looks whether a settle is under way that may not have seen our interest; a settle takes about 10 ms."""


class Results:
    """The jobs a client waits for. Holds interest in their queues' results while it does."""

    def __init__(self, pool: Pool, store: Store, listener: Listener, run_listener: Callable[[], None] | None) -> None:
        """``run_listener`` starts the listener, once, when it is first needed; None: it is running."""
        self._pool = pool
        self._store = store
        self._listener = listener
        self._run_listener = run_listener
        self._preparing = trio.Lock()
        self._hearing = False
        self._came_up = trio.Event()
        self._closed = False
        self._waiters: dict[int, set[trio.Event]] = {}
        listener.on_connected(self._look_again)

    def close(self) -> None:
        """Whoever waits gets ``ClientClosed``."""
        self._closed = True
        self._look_again()

    async def wait(self, record: JobRecord) -> JobRecord:
        """Wait until a job has finished, and return what became of it. Raises ``JobNotFound``."""
        async with self._pool.connection() as connection:
            info = await self._store.queue(connection, record.queue)
        if not info.kept:
            raise JobNotFound(f"queue {record.queue!r} keeps no finished jobs (retention 0), so it has no results")
        await self._hear()
        announced = trio.Event()
        waiters = self._waiters.setdefault(record.id, set())
        waiters.add(announced)
        try:
            async with self._listener.interest(info.number):
                await self._wait_settles(info.number)
                while True:
                    found = await self.look(record.id)
                    if has_finished(found):
                        return found
                    with trio.move_on_after(POLL if self._listener.up else 1.0):
                        await announced.wait()
                    if self._closed:
                        raise ClientClosed("this client is closed")
                    if announced.is_set():
                        waiters.discard(announced)
                        announced = trio.Event()
                        waiters.add(announced)
        finally:
            waiters.discard(announced)
            if not waiters:
                del self._waiters[record.id]

    async def look(self, job_id: int) -> JobRecord:
        """Look at a job in any state. Raises ``JobNotFound``."""
        async with self._pool.connection() as connection:
            # Looked for twice: a job that finished into a leaf attached since the first look was planned is not in it.
            record = await self._store.job(connection, job_id) or await self._store.job(connection, job_id)
        if record is None:
            raise JobNotFound(f"no job {job_id}: it never was, was deleted, or was not kept any longer")
        return record

    async def _wait_settles(self, queue: int) -> None:
        """Wait until no settle is under way that began before we held interest: those announce nothing."""
        for pause in SETTLE_PAUSES:
            async with self._pool.connection() as connection:
                if await self._store.no_settle_under_way(connection, queue):
                    return
            await trio.sleep(pause)

    async def _hear(self) -> None:
        """Hear announcements from now on, if the server can be reached; the poll bridges the time until then."""
        async with self._preparing:
            if self._hearing:
                return
            async with self._pool.connection() as connection:
                channel = await self._store.channel(connection, -1)
            self._listener.add_channel(channel, self._announced)
            if self._run_listener is not None:
                self._run_listener()
                self._hearing = True
                with trio.move_on_after(1.0):
                    await self._came_up.wait()
            else:
                with contextlib.suppress(ConnectionLost):
                    await self._listener.listen(channel, self._announced)
                self._hearing = True

    def _announced(self, payload: str) -> None:
        for text in payload.split(",") if self._waiters else ():
            if text.isdecimal() and len(text) < 20:  # anybody may send on this channel
                self._wake(int(text))

    def _look_again(self) -> None:
        self._came_up.set()
        for job_id in self._waiters:
            self._wake(job_id)

    def _wake(self, job_id: int) -> None:
        for waiter in self._waiters.get(job_id, ()):
            waiter.set()


def has_finished(record: JobRecord) -> bool:
    """Whether a job will not run again by itself."""
    return record.state in ("completed", "failed", "cancelled")

"""The queues that a runtime serves right now: those it names, and those that match its patterns.

Whether a queue was made, deleted, paused, resumed, made fair or given rules is told on the control channel, and by the
beat if that was lost; then one statement says what there is. A worker is started for each queue that is new, and ended for
one that has gone.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any

import psycopg
import trio

from ._backoff import reconnect_delay
from ._bell import Bell
from ._errors import ConnectionLost, NotifyqError
from ._sql import reason
from .events import ServerTrouble

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ._answers import Beat, QueueInfo, Served
    from ._listener import Listener
    from ._pool import Pool
    from ._queue import Queue
    from ._store import Store
    from ._worker import QueueWorker
    from .events import Events

__all__ = ["Roster"]


class Roster:
    """Starts and ends the workers of one runtime."""

    def __init__(
        self,
        queues: Sequence[Queue[Any, Any]],
        make: Callable[[Queue[Any, Any], QueueInfo], QueueWorker],
        *,
        pool: Pool,
        store: Store,
        listener: Listener,
        events: Events,
    ) -> None:
        """``make(queue, info)`` gives the worker of one queue."""
        self._plain = {queue.name: queue for queue in queues if not queue.is_pattern}
        self._patterns = [queue for queue in queues if queue.is_pattern]
        self.names = tuple(queue.name for queue in queues)
        self._make = make
        self._pool = pool
        self._store = store
        self._listener = listener
        self._events = events
        self._random = random.Random()
        self._serving: dict[int, QueueWorker] = {}
        self._leaving: list[QueueWorker] = []
        self._scopes: dict[QueueWorker, trio.CancelScope] = {}
        self._unheard: list[QueueWorker] = []
        self._bell = Bell()
        self._open = trio.CancelScope()
        self._told_serves: str | None = ""
        listener.on_connected(self._connected)
        listener.on_disconnected(self._disconnected)

    @property
    def workers(self) -> list[QueueWorker]:
        """All, also those that are ending."""
        return [*self._serving.values(), *self._leaving]

    # what others call

    def look(self) -> None:
        """Something was said of queues: look which there are."""
        self._bell.ring()

    def before_beat(self) -> dict[str, Any]:
        """What the beat is to ask: queue numbers, the bounds of the priorities that count in each, and whether to look.

        It does not while looks are dear: the lease has to be renewed in time. Then the claimers poll.
        """
        bounds = [worker.priorities or (None, None) for worker in self._serving.values()]
        asked: dict[str, Any] = {
            "queues": list(self._serving),
            "look": not any(worker.claimer.looks.dear for worker in self._serving.values()),
        }
        if any(worker.priorities for worker in self._serving.values()):
            asked |= {"lows": [low for low, _ in bounds], "highs": [high for _, high in bounds]}
        return asked

    def told(self, beat: Beat) -> None:
        """What a beat said."""
        if beat.renewed and beat.serves != self._told_serves:
            self._told_serves = beat.serves
            self._bell.ring()
        ready = self._serving.keys() if beat.ready is None else set(beat.ready)
        for worker in self.workers:
            worker.cancel(beat.cancels)
            worker.executor.give_up_stuck()
        for number, worker in self._serving.items():
            if beat.renewed:
                worker.claimer.fleet.place, worker.claimer.fleet.size = beat.place, beat.fleet
            if number in ready:
                worker.claimer.poll()
            if (due_in := beat.due_in.get(str(number), 0.0 if beat.ready is None else None)) is not None:
                worker.claimer.due_in(due_in)

    def _connected(self) -> None:
        for worker in self._serving.values():
            worker.claimer.connected(True)
        self._bell.ring()

    def _disconnected(self) -> None:
        for worker in self._serving.values():
            worker.claimer.connected(False)

    # workers

    async def begin(self) -> None:
        """Make the workers of the queues that there are. Raises ``UnknownQueue`` if one that is named is missing."""
        async with self._pool.connection() as connection:
            found = await self._store.served(connection, self.names)
            for name in self._plain.keys() - {one.name for one in found}:
                await self._store.queue(connection, name)  # which says that there is none
        for one in found:
            self._add(one)

    async def run(
        self, running: trio.Nursery, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Start the workers, in ``running``, and keep to what is told, until closed."""
        with self._open:
            await self._start(running, self.workers)
            task_status.started()
            failures = 0
            while True:
                await self._bell.wait()
                self._bell.clear()
                try:
                    await self._follow(running)
                    failures = 0
                except (NotifyqError, psycopg.Error) as error:
                    if failures == 0:
                        self._events.emit(ServerTrouble("queues", reason(error)))
                    failures += 1
                    self._bell.ring()
                    await trio.sleep(reconnect_delay(failures, self._random))

    def close(self) -> None:
        """Start and end no more workers."""
        self._open.cancel()

    async def _follow(self, running: trio.Nursery) -> None:
        found = {one.info.number: one for one in await self._served()}
        for number in self._serving.keys() - found.keys():
            worker = self._serving.pop(number)
            self._leaving.append(worker)
            running.start_soon(self._end, worker)
        added = []
        for number, one in found.items():
            if number in self._serving:
                self._tell(number, one)
            else:
                added.append(self._add(one))
        if added or self._unheard:
            late, self._unheard = self._unheard, [*self._unheard, *added]
            try:
                with contextlib.suppress(ConnectionLost):  # with the next connection all are heard
                    await self._listener.hear()
                self._unheard = []
                for worker in late:
                    worker.claimer.look_again()
            finally:  # without notifications, if need be: the beats find their jobs
                await self._start(running, added)

    async def _served(self) -> list[Served]:
        """On the listening connection, which is at rest most of the time, or another."""
        with contextlib.suppress(ConnectionLost):
            return await self._listener.call(lambda connection: self._store.served(connection, self.names))
        async with self._pool.connection() as connection:
            return await self._store.served(connection, self.names)

    def _add(self, one: Served) -> QueueWorker:
        queue = self._plain.get(one.name)
        if queue is None:
            queue = next(each for each in self._patterns if each.serves(one.name)).named(one.name)
        worker = self._make(queue, one.info)
        self._serving[one.info.number] = worker
        self._tell(one.info.number, one)
        self._listener.add_channel(one.info.channel, worker.claimer.heard)
        return worker

    def _tell(self, number: int, one: Served) -> None:
        worker = self._serving[number]
        worker.is_gated(one.gated)
        claimer = worker.claimer
        claimer.hands.shelf.fair = one.fair
        claimer.pause(one.paused)

    async def _start(self, running: trio.Nursery, workers: Iterable[QueueWorker]) -> None:
        # A worker that is stopped half-started would be waited for in vain.
        with trio.CancelScope(shield=True):
            for worker in workers:
                if not self._open.cancel_called:
                    await running.start(self._run_worker, worker)

    async def _run_worker(self, worker: QueueWorker, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.CancelScope() as self._scopes[worker]:
            await worker.run(task_status=task_status)

    async def _end(self, worker: QueueWorker) -> None:
        """The queue has gone, or is another's now: what runs may end, and what it comes to is the fence's to judge."""
        if worker.info.number not in self._serving:
            with contextlib.suppress(NotifyqError, psycopg.Error):
                await self._listener.forget(worker.info.channel)
        await worker.stop()
        if all(other.queue.name != worker.queue.name for other in self._serving.values()):
            worker.forget()
        if (scope := self._scopes.pop(worker, None)) is not None:
            scope.cancel()
        self._leaving.remove(worker)

"""One run of a runtime, from register to deregister: starts its parts, passes on what the heart and the listener hear."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import trio

from ._atomic import Atomic
from ._beat import Heart
from ._client import Client
from ._codec import to_json
from ._declare import declare_at_start
from ._errors import ConnectionLost, LeaseLost, NotifyqError
from ._lock import QuickLock
from ._maintenance import Maintenance
from ._reconciler import Reconciler
from ._roster import Roster
from ._scheduler import Scheduler
from ._schema import VERSION
from ._settler import Settler
from ._sql import seconds
from ._standing import Standing
from ._watchdog import Watchdog
from ._worker import QueueWorker
from .events import RuntimeStarted, RuntimeStopped

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta
    from uuid import UUID

    from ._answers import Beat, QueueInfo
    from ._connection import TrioConnection
    from ._listener import Listener
    from ._middleware import Middleware
    from ._models import Job
    from ._pool import Pool
    from ._queue import Queue
    from ._store import Store
    from .events import Events

__all__ = ["Session", "Settings"]

FLUSH_SECONDS = 10.0
"""Seconds the last outcomes and the goodbye get when the server is slow or away; after that, others rescue."""

STOP_SECONDS = 5.0
"""Seconds a cancelled handler gets to end; after that the process goes on without it."""


@attrs.frozen
class Settings:
    """What a runtime was told to do."""

    id: UUID
    queues: Sequence[Queue[Any, Any]]
    middleware: Sequence[Middleware]
    lease: float
    """Seconds."""
    grace: float
    """Seconds."""
    events: Events


class Session:
    """One run of a runtime, from register to deregister."""

    def __init__(self, settings: Settings, store: Store, listener: Listener, pool: Pool, handlers: Pool) -> None:
        """``pool`` is for what the runtime itself does, ``handlers`` for the client that its jobs get."""
        self._settings = settings
        self._id = settings.id
        self._events = settings.events
        self._pool = pool
        self._store = store
        self._listener = listener
        self._standing = Standing(listener, store)
        self._settler = Settler(pool, store, settings.id, settings.events)
        self._scheduler = Scheduler(pool, store.schedules, settings.events)
        self._heart = Heart(
            str(settings.id),
            settings.lease,
            beat=self._beat,
            register=self._register_anew,
            told=self._told,
            lost=self._lose,
            events=settings.events,
        )
        self._maintenance = Maintenance(pool, store, settings.events, self._heart.soon)
        self._roster = Roster(
            settings.queues, self._make_worker, pool=pool, store=store, listener=listener, events=settings.events
        )
        self._atomic = Atomic(handlers, store, settings.id, settings.events)
        self._turns = QuickLock(), QuickLock()
        self._reconciler = Reconciler(self._id, pool, store, self._settler, lambda: self._workers)
        self._grace = trio.CancelScope()
        self.client = Client(handlers, store, listener, None)

    @property
    def _workers(self) -> list[QueueWorker]:
        return self._roster.workers

    def _make_worker(self, queue: Queue[Any, Any], info: QueueInfo) -> QueueWorker:
        return QueueWorker(
            queue,
            info,
            pool=self._pool,
            store=self._store,
            listener=self._listener,
            runtime=self._id,
            settler=self._settler,
            handle=self,
            middleware=self._settings.middleware,
            events=self._events,
            turns=self._turns,
            atomic=self._atomic,
            standing=self._standing,
            gone=self._roster.look,
            answer_lost=self._reconciler.answer_lost,
        )

    async def begin(self, *, declare: bool) -> None:
        """Create the queues if need be, learn their numbers, register."""
        async with self._pool.connection() as connection:
            if declare:
                await declare_at_start(connection, self._store, self._settings.queues)
            self._listener.add_channel(await self._store.channel(connection, 0), self._told_by_control)
            self._listener.on_connected(self._reconciler.reconnected)
            self._listener.on_connected(self._scheduler.look_again)
            self._listener.on_disconnected(self._pool.distrust)
            # If this fails, maintenance makes up for it, and the default leaf takes the rows until then.
            with contextlib.suppress(NotifyqError):
                await self._store.make_leaves(connection)
        await self._roster.begin()
        try:
            await self._register()
        except BaseException:  # its answer is unknown
            with trio.move_on_after(STOP_SECONDS, shield=True), contextlib.suppress(NotifyqError, psycopg.Error):
                await self._deregister()
            raise

    async def run(self, stopping: trio.Event, task_status: trio.TaskStatus[Client]) -> None:
        """Start all parts, wait for the stop, and end them in order, also when cancelled: then without grace."""
        ended = trio.Event()

        async def parts() -> None:
            try:
                with trio.CancelScope(shield=True):
                    await self._run_parts(stopping, task_status)
            finally:
                ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(parts)
            try:
                await ended.wait()
            finally:
                self._grace.cancel()
                stopping.set()

    async def _run_parts(self, stopping: trio.Event, task_status: trio.TaskStatus[Client]) -> None:
        async with trio.open_nursery() as support, trio.open_nursery() as running:
            try:
                await support.start(self._listener.run)
                await support.start(self._standing.run)
                await support.start(self._settler.run)
                await support.start(self._heart.run)
                await support.start(Watchdog(self._settings.lease, self._events).run)
                support.start_soon(self._reconciler.run)
                await support.start(self._scheduler.run)
                await support.start(self._maintenance.run)
                await support.start(self._roster.run, running)
                self._events.emit(RuntimeStarted(str(self._id), self._roster.names))
                task_status.started(self.client)
                await stopping.wait()
                self._roster.close()
                support.start_soon(self._say_stopping)
                with self._grace:
                    self._grace.deadline = trio.current_time() + self._settings.grace
                    await self._stop_workers()
            finally:
                with trio.CancelScope(shield=True):
                    await self._end(running, support)
                self._events.emit(RuntimeStopped(str(self._id)))

    async def _end(self, running: trio.Nursery, support: trio.Nursery) -> None:
        self._roster.close()
        with trio.move_on_after(STOP_SECONDS):
            for worker in self._workers:
                worker.executor.stop_all()
            await self._stop_workers()
        for worker in self._workers:
            worker.leave()
        running.cancel_scope.cancel()
        with trio.move_on_after(FLUSH_SECONDS), contextlib.suppress(NotifyqError, psycopg.Error):
            await self._settler.close()
            await self._heart.stop()  # only now: the lease holds while outcomes are written
            await self._deregister()
        self.client.close()
        support.cancel_scope.cancel()

    async def _stop_workers(self) -> None:
        async with trio.open_nursery() as nursery:
            for worker in self._workers:
                nursery.start_soon(worker.stop)

    # leases

    async def _register(self) -> None:
        async with self._pool.connection() as connection:
            await self._store.register(
                connection,
                self._id,
                self._roster.names,
                self._settings.lease,
                os.getpid(),
                socket.gethostname(),
                VERSION,
            )

    async def _deregister(self) -> None:
        async with self._pool.connection() as connection:
            await self._store.deregister(connection, self._id)

    async def _register_anew(self) -> None:
        await self._deregister()
        self._lose()  # also what was claimed since the lease was given up: it has just been let go of
        await self._register()

    async def _say_stopping(self) -> None:
        with contextlib.suppress(NotifyqError, psycopg.Error):
            async with self._pool.connection() as connection:
                await self._store.stop(connection, self._id)

    async def _beat(self) -> Beat:
        """On the listening connection, which that proves; if it does not answer, on another."""
        asked = self._roster.before_beat()
        with contextlib.suppress(ConnectionLost), trio.move_on_after(self._settings.lease / 6):
            return await self._listener.call(lambda connection: self._beat_on(connection, asked))
        async with self._pool.connection() as connection:
            return await self._beat_on(connection, asked)

    async def _beat_on(self, connection: TrioConnection, asked: dict[str, Any]) -> Beat:
        sent_at = trio.current_time()
        beat = await self._store.beat(connection, self._id, **asked)
        self._scheduler.clock.measured(sent_at, trio.current_time(), beat.clock)
        return beat

    def _told(self, beat: Beat) -> None:
        """What a beat said."""
        self._maintenance.lapses_in(beat.lapse_in)
        self._scheduler.told(beat.schedules)
        self._roster.told(beat)

    def _lose(self) -> None:
        """The lease lapsed, or is about to: nothing that runs here is ours any longer."""
        for worker in self._workers:
            worker.lose_all()

    # control requests

    def _told_by_control(self, payload: str) -> None:
        """Anybody may send this: it is a hint that there is something to be told, and what it says is not believed."""
        what, _, ids = payload.partition(":")
        if what == "schedule":
            self._scheduler.look_again()
        if what == "queues":
            self._roster.look()
        if what != "cancel":
            return
        known = {str(job) for job, _attempt in self._reconciler.known()}
        # While a claim is under way its jobs are not known here yet.
        if any(turn.held for turn in self._turns) or self._listener.asked or not known.isdisjoint(ids.split(",")):
            self._heart.soon()

    # what a job asks of its runtime

    async def progress(self, job: Job[Any], progress: Any) -> None:
        async with self.client.connection() as connection:
            if not await self._store.progress(connection, job.id, to_json(progress), job.attempt, self._id):
                raise LeaseLost(job.id, job.attempt)

    async def touch(self, job: Job[Any], extend: float | timedelta) -> None:
        more = seconds(extend, "touch", least=0.0)
        for worker in self._workers:
            # A batch is one call with one deadline: all its jobs get the time.
            together = worker.executor.together(job.id)
            if any(each is job for each in together):
                async with self.client.connection() as connection:
                    for each in together:
                        touched = await self._store.touch(connection, each.id, more, each.attempt, self._id)
                        if not touched and each is job:
                            raise LeaseLost(job.id, job.attempt)
                worker.executor.extend(job.id, more)
                return
        raise LeaseLost(job.id, job.attempt)

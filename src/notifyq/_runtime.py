"""A process's runtime: one nursery, one listening connection, and the order in which they start and stop."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import trio

from . import _logging
from ._beat import Heart
from ._client import Client, prepare, resolve_dsn
from ._codec import to_json
from ._errors import ConnectionLost, InvalidOption, LeaseLost
from ._events import Events, RuntimeStarted, RuntimeStopped
from ._listener import Listener
from ._lock import QuickLock
from ._maintenance import Maintenance
from ._models import Released
from ._pool import Pool
from ._schema import VERSION
from ._settler import Settler
from ._sql import check_schema_name
from ._store import Store
from ._worker import QueueWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ._events import Event
    from ._executor import Middleware
    from ._models import Job
    from ._queue import Queue
    from ._store import Beat

__all__ = ["Runtime", "run"]

log = logging.getLogger("notifyq")

FLUSH_SECONDS = 10.0
"""Seconds the last outcomes and the goodbye get when the server is slow or away; after that, others rescue."""

STOP_SECONDS = 5.0
"""Seconds a cancelled handler gets to end; after that the process goes on without it."""


class Runtime:
    """Runs the workers of some queues. Make one at module level, and ``notifyq run module:runtime``."""

    def __init__(
        self,
        queues: Iterable[Queue[Any, Any]],
        *,
        dsn: str | None = None,
        schema: str = "notifyq",
        migrate: bool = True,
        middleware: Sequence[Middleware] = (),
        lease: float = 12.0,
        grace: float = 30.0,
        pool_size: int = 10,
        connect_timeout: float = 10.0,
    ) -> None:
        """Declare what to run; nothing starts yet.

        Args:
            queues: queues, each with a worker.
            dsn: a PostgreSQL URI or key=value string (default: the environment's ``DATABASE_URL``).
            schema: the schema that holds the installation.
            migrate: install or upgrade it, and create the queues, at start.
            middleware: around every job, the first outermost: ``async def (job, call_next)``, or a function of the job
                that returns an async context manager.
            lease: seconds after the last beat until other runtimes take over the jobs of one that died (at least 1).
            grace: seconds that running jobs get to end when the runtime stops; then they are cancelled and tried again.
            pool_size: most database connections beside the listening one (opened when needed; idle ones are closed).
            connect_timeout: seconds to reach the server at start.

        Raises:
            InvalidOption: no queue, a queue without worker or twice, or a value out of range.
        """
        self.queues = list(queues)
        names = [queue.name for queue in self.queues]
        if not names:
            raise InvalidOption("a runtime needs at least one queue")
        for queue in self.queues:
            if queue.worker_function is None:
                raise InvalidOption(f"queue {queue.name!r} has no worker: register one with @queue.worker")
            if names.count(queue.name) > 1:
                raise InvalidOption(f"queue {queue.name!r} is given twice")
        if not 1 <= lease <= 3600:
            raise InvalidOption(f"lease must be from 1 to 3600 seconds, not {lease!r}")
        if not 0 <= grace < math.inf:
            raise InvalidOption(f"grace must be zero or more seconds, not {grace!r}")
        self.id: UUID = uuid4()
        self.events = Events()
        self.dsn = dsn
        self._schema = check_schema_name(schema)
        self._migrate = migrate
        self._middleware = tuple(middleware)
        self.lease = lease
        self.grace = grace
        self._pool_size = pool_size
        self._connect_timeout = connect_timeout
        self._stopping: trio.Event | None = None
        self._logged = False

    def subscribe(self, subscriber: Callable[[Event], object], *kinds: type[Event]) -> None:
        """Call ``subscriber`` with every event of these kinds (none: all), in the event loop. It must not block."""
        self.events.subscribe(subscriber, *kinds)

    def stop(self) -> None:
        """Begin the graceful stop; ``run`` returns when it is done. Does nothing if it does not run."""
        if self._stopping is not None:
            self._stopping.set()

    @property
    def stopping(self) -> bool:
        """Whether ``stop()`` was called."""
        return self._stopping is not None and self._stopping.is_set()

    async def run(self, *, task_status: trio.TaskStatus[Client] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until ``stop()``. Started, with the runtime's client, when jobs are picked up.

        Stopping: no more claims; what has not started is handed back; what runs gets ``grace`` seconds and is then
        cancelled and tried again; outcomes are written. Cancelling does the same without grace.

        Raises:
            ConnectionLost: the server could not be reached in time at start. Later it reconnects for ever.
            SchemaMismatch, MissingPrivilege, UnknownQueue, InvalidOption: it cannot start like this.
        """
        dsn = resolve_dsn(self.dsn)
        self.id = uuid4()
        self._stopping = trio.Event()
        if not self._logged:
            self._logged = True
            _logging.subscribe(self.events)
        await prepare(dsn, self._schema, migrate=self._migrate, patience=self._connect_timeout)
        store = Store(self._schema)
        listener = Listener(dsn, store, self.events)
        async with Pool(dsn, size=self._pool_size, connect_timeout=self._connect_timeout) as pool:
            session = _Session(self, pool, store, listener)
            await session.begin(self.queues, self._middleware, declare=self._migrate)
            await session.run(self._stopping, task_status)


class _Session:
    """One run of a runtime, from register to deregister."""

    def __init__(self, runtime: Runtime, pool: Pool, store: Store, listener: Listener) -> None:
        self._runtime = runtime
        self._id = runtime.id
        self._events = runtime.events
        self._pool = pool
        self._store = store
        self._listener = listener
        self._settler = Settler(pool, store, runtime.id, runtime.events)
        self._maintenance = Maintenance(pool, store, runtime.events)
        self._workers: list[QueueWorker] = []
        self._strays: set[tuple[int, int]] = set()
        self._grace = trio.CancelScope()
        self._turn = QuickLock()
        self.client = Client(pool, store, listener, None)

    async def begin(self, queues: list[Queue[Any, Any]], middleware: Sequence[Middleware], *, declare: bool) -> None:
        """Create the queues if need be, learn their numbers, register."""
        async with self._pool.connection() as connection:
            declared = [needed for queue in queues for needed in queue.with_dead_letters()] if declare else []
            for queue in dict.fromkeys(declared):
                done = await self._store.create_queue(connection, queue.name, to_json(queue.options))
                if done.startswith("differs"):
                    log.warning("queue %s: in the database %s (update_queue changes it)", queue.name, done)
            for queue in queues:
                info = await self._store.queue(connection, queue.name)
                worker = QueueWorker(
                    queue,
                    info,
                    pool=self._pool,
                    store=self._store,
                    runtime=self._id,
                    settler=self._settler,
                    handle=self,
                    middleware=middleware,
                    events=self._events,
                    turn=self._turn,
                )
                self._workers.append(worker)
                self._listener.add_channel(info.channel, worker.claimer.heard)
                self._listener.on_connected(worker.claimer.look_again)
            self._listener.add_channel(await self._store.channel(connection, 0), self._told_by_control)
            await self._store.turn_leaves(connection)
        await self._register()

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
        heart = Heart(
            self._runtime.lease,
            beat=self._beat,
            register=self._register_anew,
            told=self._told,
            lost=self._lose,
            events=self._events,
        )
        names = tuple(worker.queue.name for worker in self._workers)
        async with trio.open_nursery() as support, trio.open_nursery() as running:
            try:
                await support.start(self._listener.run)
                await support.start(self._settler.run)
                await support.start(heart.run)
                await support.start(self._maintenance.run)
                for worker in self._workers:
                    await running.start(worker.run)
                self._events.emit(RuntimeStarted(str(self._id), names))
                task_status.started(self.client)
                await stopping.wait()
                with self._grace:
                    self._grace.deadline = trio.current_time() + self._runtime.grace
                    await self._stop_workers()
            finally:
                with trio.CancelScope(shield=True):
                    await self._end(running, support)
                self._events.emit(RuntimeStopped(str(self._id)))

    async def _end(self, running: trio.Nursery, support: trio.Nursery) -> None:
        with trio.move_on_after(STOP_SECONDS):
            for worker in self._workers:
                worker.executor.stop_all()
            await self._stop_workers()
        running.cancel_scope.cancel()
        with trio.move_on_after(FLUSH_SECONDS), contextlib.suppress(ConnectionLost):
            await self._settler.close()
            async with self._pool.connection() as connection:
                await self._store.deregister(connection, self._id)
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
                [worker.queue.name for worker in self._workers],
                self._runtime.lease,
                os.getpid(),
                socket.gethostname(),
                VERSION,
            )

    async def _register_anew(self) -> None:
        async with self._pool.connection() as connection:
            await self._store.deregister(connection, self._id)
        await self._register()

    async def _beat(self) -> Beat:
        queues = [worker.info.number for worker in self._workers]
        with contextlib.suppress(ConnectionLost):
            return await self._listener.call(lambda connection: self._store.beat(connection, self._id, queues))
        async with self._pool.connection() as connection:
            return await self._store.beat(connection, self._id, queues)

    async def _told(self, beat: Beat) -> None:
        """What a beat said."""
        self._maintenance.rescue_in(beat.lapse_in)
        self._cancel(beat.cancels)
        for worker in self._workers:
            worker.executor.give_up_stuck()
            if worker.info.number in beat.ready:
                worker.claimer.poll()
        await self._reconcile()

    async def _lose(self) -> None:
        """The lease lapsed, or is about to: nothing that runs here is ours any longer."""
        for worker in self._workers:
            worker.lose_all()

    async def _reconcile(self) -> None:
        """Release what a claim took whose answer was lost: held by us, but unknown here, at two beats in a row."""
        if not self._strays and not any(worker.claim_failed for worker in self._workers):
            return
        for worker in self._workers:
            worker.claim_failed = False
        try:
            async with self._pool.connection() as connection:
                held = await self._store.held(connection, self._id)
        except ConnectionLost:
            self._workers[0].claim_failed = True
            return
        known = set().union(*(worker.known() for worker in self._workers))
        strays = held - known
        for job, attempt in strays & self._strays:
            self._settler.put(Released(job, attempt), "")
        self._strays = strays - self._strays

    # control requests

    def _told_by_control(self, payload: str) -> None:
        what, _, ids = payload.partition(":")
        if what == "cancel":
            self._cancel([int(text) for text in ids.split(",")])

    def _cancel(self, jobs: list[int]) -> None:
        if jobs:
            for worker in self._workers:
                worker.executor.cancel(jobs)

    # what a job asks of its runtime

    async def progress(self, job: Job[Any], progress: Any) -> None:
        async with self._pool.connection() as connection:
            if not await self._store.progress(connection, job.id, to_json(progress), job.attempt, self._id):
                raise LeaseLost(job.id, job.attempt)

    async def touch(self, job: Job[Any], seconds: float) -> None:
        async with self._pool.connection() as connection:
            if not await self._store.touch(connection, job.id, seconds, job.attempt, self._id):
                raise LeaseLost(job.id, job.attempt)
        for worker in self._workers:
            worker.executor.extend(job.id, seconds)


def run(runtime: Runtime) -> None:
    """Run a runtime as this process's main program. SIGTERM or SIGINT stops it gracefully, a second one at once.

    Raises what ``Runtime.run`` raises.
    """
    trio.run(run_until_signal, runtime)


async def run_until_signal(runtime: Runtime) -> None:
    """Run a runtime until SIGTERM or SIGINT; a second signal cancels it without grace."""
    raised: Exception | None = None
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def obey() -> None:
                async for number in signals:
                    if runtime.stopping:
                        log.warning("second signal: stopping at once")
                        nursery.cancel_scope.cancel()
                        return
                    log.info("%s: finishing what runs", signal.Signals(number).name)
                    runtime.stop()

            nursery.start_soon(obey)
            try:
                await runtime.run()
            except Exception as error:
                raised = error
            nursery.cancel_scope.cancel()
    if raised is not None:
        raise raised

"""A process's runtime: one nursery, one listening connection, and the order in which they start and stop."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import trio

from . import _logging
from ._connect import prepare, resolve_dsn, resolve_listen_dsn
from ._errors import InvalidOption, shown
from ._listener import Listener
from ._middleware import check_middleware
from ._pool import Pool
from ._queue import Queue
from ._session import Session, Settings
from ._sql import LONGEST, check_schema_name, flag, seconds, whole
from ._store import Store
from .events import Events

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import timedelta

    from ._client import Client
    from ._middleware import Middleware
    from .events import Event

__all__ = ["Runtime", "run"]

log = logging.getLogger("notifyq")

RUNTIME_CONNECTIONS = 6
"""For claims (one at a time), outcomes, schedules and maintenance, and for claims and outcomes of queues with rules, which
may wait for a gate. Handlers have a pool of their own: they may take all of that."""


class Runtime:
    """Runs the workers of some queues. Make one at module level, and ``notifyq run module:runtime``."""

    def __init__(
        self,
        queues: Iterable[Queue[Any, Any]],
        *,
        dsn: str | None = None,
        listen_dsn: str | None = None,
        schema: str = "notifyq",
        migrate: bool = True,
        middleware: Sequence[Middleware] = (),
        lease: float | timedelta = 12.0,
        grace: float | timedelta = 30.0,
        pool_size: int = 10,
        connect_timeout: float | timedelta = 10.0,
    ) -> None:
        """Declare what to run; nothing starts yet.

        Args:
            queues: queues, each with a worker.
            dsn: a PostgreSQL URI or key=value string (default: the environment's ``DATABASE_URL``).
            listen_dsn: the same database without a pooler in between, for the one listening connection (default: ``dsn``).
            schema: the schema that holds the installation.
            migrate: install or upgrade it, and create the queues, at start. A worker's role may do neither: it needs
                none of it if somebody else has (``docs/rights.md``). False: don't try.
            middleware: around every job, the first outermost: ``async def (job, call_next)``, or a function of the job
                that returns an async context manager.
            lease: seconds after the last beat until other runtimes take over the jobs of one that died (at least 1).
            grace: seconds that running jobs get to end when the runtime stops; then they are cancelled and tried again.
            pool_size: most database connections of the handlers (opened when needed; idle ones are closed). The runtime
                itself usually needs up to 5 more, 7 at most.
            connect_timeout: seconds to reach the server at start, and later to wait for a free connection.

        Raises:
            InvalidOption: no queue, a queue without worker or twice, or a value out of range.
        """
        self.queues = _checked(queues)
        self.id: UUID = uuid4()
        self.events = Events()
        self.dsn = dsn
        self.listen_dsn = listen_dsn
        self.schema = check_schema_name(schema)
        self._migrate = flag(migrate, "migrate")
        self.middleware = check_middleware(middleware, "the runtime")
        self.lease = _duration(lease, "lease", 1.0, 3600.0)
        self.grace = _duration(grace, "grace", 0.0, LONGEST)
        self._pool_size = whole(pool_size, "pool_size", 1, 1000)
        self._connect_timeout = _duration(connect_timeout, "connect_timeout", 0.1, 86_400.0)
        self._stopping: trio.Event | None = None
        self._reaching = trio.CancelScope()
        self._logged = False

    def subscribe(self, subscriber: Callable[[Event], object], *kinds: type[Event]) -> None:
        """Call ``subscriber`` with every event of these kinds (none: all), in the event loop. It must not block.

        Raises ``InvalidOption`` for what is no function, or no kind of event.
        """
        self.events.subscribe(subscriber, *kinds)

    def stop(self) -> None:
        """Begin the graceful stop; ``run`` returns when it is done. Does nothing if it does not run."""
        if self._stopping is not None:
            self._stopping.set()
            self._reaching.cancel()

    @property
    def running(self) -> bool:
        """Whether ``run()`` has begun and not ended."""
        return self._stopping is not None

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
            RuntimeError: it runs already.
        """
        if self.running:
            raise RuntimeError("this runtime runs already: to run another, make another of the same queues")
        dsn = resolve_dsn(self.dsn)
        listen_dsn = resolve_listen_dsn(self.listen_dsn, dsn)
        self.id = uuid4()
        self._stopping = trio.Event()
        if not self._logged:
            self._logged = True
            _logging.subscribe(self.events)
        try:
            with trio.CancelScope() as self._reaching:
                await prepare(dsn, self.schema, migrate=self._migrate, patience=self._connect_timeout)
            if self.stopping:
                return
            store = Store(self.schema)
            async with (
                Pool(dsn, size=RUNTIME_CONNECTIONS, connect_timeout=self._connect_timeout) as own,
                Pool(dsn, size=self._pool_size, connect_timeout=self._connect_timeout) as handlers,
            ):
                settings = Settings(self.id, self.queues, self.middleware, self.lease, self.grace, self.events)
                session = Session(settings, store, Listener(listen_dsn, store, self.events), own, handlers)
                await session.begin(declare=self._migrate)
                await session.run(self._stopping, task_status)
        finally:
            self._stopping = None


def _checked(queues: Iterable[Queue[Any, Any]]) -> list[Queue[Any, Any]]:
    if isinstance(queues, str | Queue) or not isinstance(queues, Iterable):
        raise InvalidOption(f"queues must be a sequence of queues, not {shown(queues)}")
    names: set[str] = set()
    queues = list(queues)
    for queue in queues:
        if not isinstance(queue, Queue):
            raise InvalidOption(f"give the declarations of queues, not {shown(queue)}: notifyq.Queue(name)")
        if queue.worker_function is None:
            raise InvalidOption(f"queue {queue.name!r} has no worker: register one with @queue.worker")
        if queue.name in names:
            raise InvalidOption(f"queue {queue.name!r} is given twice")
        names.add(queue.name)
    if not queues:
        raise InvalidOption("a runtime needs at least one queue")
    return queues


def _duration(value: float | timedelta, option: str, least: float, most: float) -> float:
    number = seconds(value, option)
    if not least <= number <= most:
        raise InvalidOption(f"{option} must be from {least:g} to {most:g} seconds, not {value!r}")
    return number


def run(runtime: Runtime) -> None:
    """Run a runtime as this process's main program. SIGTERM or SIGINT stops it gracefully, a second one at once.

    Raises what ``Runtime.run`` raises.
    """
    if not isinstance(runtime, Runtime):
        raise InvalidOption(f"give a notifyq.Runtime, not {shown(runtime)}")
    trio.run(run_until_signal, runtime)


async def run_until_signal(runtime: Runtime, asked: Sequence[int] = (), *, supervised: bool = False) -> None:
    """Run a runtime until SIGTERM or SIGINT; a second signal cancels it without grace, a third ends the process.

    ``asked``: signals that came before it began; then it does not begin.
    ``supervised``: also until stdin, a pipe from the supervisor, is closed at its other end.
    """
    raised: Exception | None = None
    running = trio.CancelScope()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        if asked:
            return
        async with trio.open_nursery() as nursery:

            async def obey() -> None:
                async for number in signals:
                    if running.cancel_called:
                        log.warning("third signal: the process ends, whatever it is doing")
                        os._exit(1)
                    if runtime.stopping:
                        log.warning("second signal: stopping at once")
                        running.cancel()
                    elif not runtime.running:
                        running.cancel()
                    else:
                        log.info("%s: finishing what runs", signal.Signals(number).name)
                        runtime.stop()

            async def outlive_nobody() -> None:
                await trio.lowlevel.wait_readable(0)
                log.warning("the supervisor is gone: finishing what runs")
                runtime.stop()

            nursery.start_soon(obey)
            if supervised:
                nursery.start_soon(outlive_nobody)
            with running:
                try:
                    await runtime.run()
                except Exception as error:
                    raised = error
            nursery.cancel_scope.cancel()
    if raised is not None:
        raise raised

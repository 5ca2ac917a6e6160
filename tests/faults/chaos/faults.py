"""What is done to workers, connections and a server."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

import psycopg
import trio

from .queues import BULK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping
    from pathlib import Path

    from .cell import Scene
    from .ledger import Run
    from .workers import Worker

__all__ = [
    "Backends",
    "Crash",
    "Fault",
    "Kill",
    "KillDefault",
    "Nothing",
    "Restart",
    "RestartImmediate",
    "Stop",
    "Terminate",
]


HANDLER_MS = 500
"""How long a handler takes, so that its process can be killed or stopped there."""


class Fault:
    """One way to break things. A class for each; its docstring is what docs/faults.md says of it."""

    name: str
    lease = 2.0
    pool = 4
    """Connections that the handlers of a worker share."""
    senders = 10
    """Connections that the senders share."""
    rate = 1e9
    """Most bulk jobs in a second."""
    pause = 2.0
    """Seconds between two blows, on average."""
    settings: Mapping[str, str] = {}
    """Of the server."""
    least = 0.0
    """Seconds of load that it needs to mean something; it gets them if half of the time is left to the others."""
    goal: float | None = None
    """Seconds in which it has to be got over; it is not good otherwise."""
    drain = 90.0
    """Seconds in which everything has to have ended after the load: retries, leases and reconnects included."""
    patience = 20.0
    """Seconds in which what a killed worker left has to be gone: its lease, and the server's keepalive."""

    def missing(self) -> str | None:
        """Why it cannot be tried on this machine."""
        return None

    def place(self, folder: Path) -> Path:
        """Where the server's data directory is to be."""
        return folder / "data"

    def leave(self, folder: Path) -> None:
        """Clean up after the server has gone."""

    @contextlib.asynccontextmanager
    async def stage(self, scene: Scene) -> AsyncIterator[None]:
        """What there is for the time that the workers run."""
        yield

    async def inflict(self, scene: Scene) -> None:
        """One blow."""

    async def mend(self, scene: Scene) -> None:
        """The last blow has been dealt: put everything in order."""

    def expected(self, scene: Scene) -> Iterable[str]:
        """Complaints if the fault did not do what it is there for."""
        return ()


def somebody(scene: Scene) -> Worker:
    """A worker, by chance."""
    return scene.dice.choice(scene.workers.all)


async def in_a_handler(scene: Scene, milliseconds: int, after: float = 0) -> tuple[Worker, Run] | None:
    """A worker that began so many seconds ago with a job of that data; None if somebody else ends it."""
    run = await scene.started(await scene.send(BULK.name, milliseconds, priority=9))
    await trio.sleep(after)
    worker = scene.workers.at_work(run.process)
    return None if worker is None else (worker, run)


class Nothing(Fault):
    """Nothing is broken: what is counted here is what the harness itself does not see rightly."""

    name = "none"


class Kill(Fault):
    """`kill -9` of a worker in the midst of a handler, at a random moment; another is started in its place. Leases of
    1.5 s."""

    name = "kill"
    lease = 1.5
    goal = 2.0

    async def inflict(self, scene: Scene) -> None:
        if (found := await in_a_handler(scene, HANDLER_MS, scene.dice.uniform(0, HANDLER_MS / 2000))) is None:
            return
        worker, run = found
        with scene.incident("kill", worker.name, waits_for="affected", job=run.job):
            await scene.workers.end(worker, signal.SIGKILL)


class KillDefault(Kill):
    """The same with the default lease of 12 s."""

    name = "kill-default-lease"
    lease = 12.0
    goal = 15.0
    pause = 8.0


class Terminate(Fault):
    """SIGTERM to a worker at a random moment, with a grace of 1 s; another is started in its place."""

    name = "sigterm"

    async def inflict(self, scene: Scene) -> None:
        worker = somebody(scene)
        with scene.incident("sigterm", worker.name, excuses=False):
            await scene.workers.end(worker, signal.SIGTERM)


class Stop(Fault):
    """SIGSTOP of a worker in the midst of a handler for twice its lease, then SIGCONT: what it settles then is refused."""

    name = "stop"
    goal = 2.5

    async def inflict(self, scene: Scene) -> None:
        if (found := await in_a_handler(scene, -HANDLER_MS)) is None:
            return
        worker, run = found
        try:
            with scene.incident("stop", worker.name, waits_for="affected", job=run.job):
                worker.process.send_signal(signal.SIGSTOP)
                scene.ledger.read()
                scene.stopped_in_handlers += run.over is None
                await trio.sleep(2 * self.lease)
        finally:
            worker.process.send_signal(signal.SIGCONT)

    def expected(self, scene: Scene) -> Iterable[str]:
        if scene.stopped_in_handlers and not scene.ledger.events["LeaseLost"]:
            yield "no outcome of a stopped worker was refused"
        if not scene.ledger.events["LeaseGivenUp"]:
            yield "no stopped worker gave its lease up"


VICTIMS = {
    "listener": "application_name = 'notifyq listener'",
    "claimer": "query like '%.claim(%' and state = 'active'",
    "settler": "query like '%.complete(%' and state = 'active'",
    "all": "backend_type = 'client backend'",
}
"""A session that is idle says what it did last, and that is no claim which is cut off."""

CATCH_SECONDS = 2.0
"""How long a statement is waited for that takes a millisecond: under load there are dozens in a second."""


class Backends(Fault):
    """`pg_terminate_backend`, in turn, of listeners, of what is claiming, of what is completing, and of all connections."""

    name = "terminate-backend"
    pause = 0.8

    def __init__(self) -> None:
        self._next: list[str] = []
        self._missed: list[str] = []

    async def inflict(self, scene: Scene) -> None:
        if not self._next:
            self._next = scene.dice.sample(sorted(VICTIMS), len(VICTIMS))
        victims = self._next.pop()
        kill = (
            "select pg_terminate_backend(pid) from pg_stat_activity"
            f" where datname = current_database() and pid <> pg_backend_pid() and {VICTIMS[victims]}"
        )

        def catch() -> tuple[float, int]:
            until = time.monotonic() + CATCH_SECONDS
            with psycopg.connect(scene.direct_dsn, autocommit=True, connect_timeout=5) as connection:
                while True:
                    began = time.monotonic()
                    if (caught := len(connection.execute(kill.encode()).fetchall())) or began > until:
                        return began, caught

        began, caught = await trio.to_thread.run_sync(catch)
        if caught:
            scene.note(f"terminated {victims}", began, waits_for="sent")
        else:
            self._missed.append(victims)

    def expected(self, scene: Scene) -> Iterable[str]:
        hit = {incident.kind.removeprefix("terminated ") for incident in scene.ledger.incidents}
        for victims in sorted({*self._missed} - hit):
            yield f"no {victims} was terminated, in {self._missed.count(victims)} tries"


class Restart(Fault):
    """The server is stopped (fast: its clients are told) and started half a second later."""

    name = "restart-fast"
    goal = 2.0
    pause = 5.0
    number = signal.SIGINT

    async def inflict(self, scene: Scene) -> None:
        with scene.incident(self.name, waits_for="next"):
            await scene.server.stop(self.number)
            await trio.sleep(0.5)
            await scene.server.start()


class RestartImmediate(Restart):
    """The same, stopped immediately: it comes back by crash recovery."""

    name = "restart-immediate"
    number = signal.SIGQUIT


class Crash(Fault):
    """`kill -9` of one of the server's processes: it ends all of them, and recovers."""

    name = "server-crash"
    goal = 2.0
    pause = 5.0

    async def inflict(self, scene: Scene) -> None:
        pids = await scene.query(
            "select pid from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()"
        )
        if not pids:
            return
        with scene.incident(self.name, waits_for="next"):
            os.kill(scene.dice.choice(sorted(pids))[0], signal.SIGKILL)
            await trio.sleep(0.5)
            await scene.server.accepting()

"""What other sessions, the network and a wrong clock do to it."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import re
import time
from typing import TYPE_CHECKING, Any

import psycopg
import trio

from .faults import Fault
from .servers import binary_version
from .workers import ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from .cell import Scene
    from .proxy import Link

__all__ = [
    "AlienLocks",
    "Clock",
    "HalfOpen",
    "LongTransaction",
    "Network",
    "NoConnections",
    "NotifyQueue",
    "lock_purposes",
]


KEEPALIVE = 14.0
"""Seconds in which a server notices that a client answers no more: what our sessions ask of it, 5 s and three times 3."""


async def aside(function: Any, *arguments: Any) -> Any:
    """Run something that blocks in a thread."""
    return await trio.to_thread.run_sync(lambda: function(*arguments))


def session(dsn: str) -> psycopg.Connection[Any]:
    """A connection of somebody else's."""
    return psycopg.connect(dsn, autocommit=True, connect_timeout=5, application_name="alien")


class HalfOpen(Fault):
    """All connections of the workers stay open and carry nothing any more; new ones do. After 14 s the proxy in between
    closes them to the server, as its keepalives would. Leases of 12 s."""

    name = "half-open"
    lease = 12.0
    goal = 15.0
    pause = 3.0

    @contextlib.asynccontextmanager
    async def stage(self, scene: Scene) -> AsyncIterator[None]:
        self.proxy = await scene.put_up_proxy()
        yield

    async def inflict(self, scene: Scene) -> None:
        since = time.monotonic()
        with scene.incident(self.name, waits_for="sent"):
            scene.nursery.start_soon(self._notice, self.proxy.freeze())
            await scene.recovered(since)

    async def _notice(self, links: list[Link]) -> None:
        """Close what the server's keepalives would close: to the proxy they are all well."""
        await trio.sleep(KEEPALIVE)
        for link in links:
            link.scope.cancel()

    async def mend(self, scene: Scene) -> None:
        self.proxy.thaw()  # what was under way comes through, late


class Network(Fault):
    """Between workers and server everything takes 5 to 40 ms, one piece in 50 a second or two (as lost packets do), or all
    is cut."""

    name = "network"

    @contextlib.asynccontextmanager
    async def stage(self, scene: Scene) -> AsyncIterator[None]:
        self.proxy = await scene.put_up_proxy()
        yield

    async def inflict(self, scene: Scene) -> None:
        dice = scene.dice
        if dice.random() < 0.3:
            with scene.incident("network cut", waits_for="sent"):
                self.proxy.cut()
            return
        with scene.incident("network slow"):
            own = random.Random(dice.random())  # how often it is asked is not the seed's
            self.proxy.delay = lambda: own.uniform(1, 2) if own.random() < 0.02 else own.uniform(0.005, 0.04)
            await trio.sleep(4)
            self.proxy.delay = None

    async def mend(self, scene: Scene) -> None:
        self.proxy.delay = None


def lock_purposes() -> list[str]:
    """All classes of advisory locks that the SQL functions take."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "sql").rglob("*.sql"))]
    return sorted({purpose for text in texts for purpose in re.findall(r"lock_class\('(\w+)'\)", text)})


class AlienLocks(Fault):
    """Somebody else's session holds advisory locks of three of the classes that we use, all of them in turn (by those of
    the bell it is known who is free, or far, or sending), for three seconds."""

    name = "alien-locks"

    def __init__(self) -> None:
        self._next: list[str] = []

    async def inflict(self, scene: Scene) -> None:
        held = []
        for _ in range(3):
            if not self._next:
                self._next = scene.dice.sample(purposes := lock_purposes(), len(purposes))
            held.append(self._next.pop())
        form = scene.dice.choice(["pg_try_advisory_lock", "pg_try_advisory_lock_shared"])
        take = f"select {form}(notifyq.lock_class(p), n) from unnest(%s::text[]) p, generate_series(0, 63) n"
        alien = await aside(session, scene.direct_dsn)
        with contextlib.closing(alien), scene.incident(self.name, waits_for="sent", excuses=False):
            await aside(alien.execute, take.encode(), [held])
            await trio.sleep(3)


class LongTransaction(Fault):
    """A transaction with a snapshot and a transaction id of its own is left open for as long as the load lasts: three
    minutes at least, if there are ten."""

    name = "open-transaction"
    least = 185.0
    rate = 1500  # what is dead under the snapshot stays, and so much of it fills no disk
    _alien: psycopg.Connection[Any] | None = None

    async def inflict(self, scene: Scene) -> None:
        if self._alien is not None:
            return
        self._alien = await aside(session, scene.direct_dsn)
        self._began = time.monotonic()
        await aside(self._alien.execute, "begin isolation level repeatable read")
        await aside(self._alien.execute, "select txid_current(), (select count(*) from notifyq.job)")

    async def mend(self, scene: Scene) -> None:
        """Raises if it has not been open until now."""
        alien, self._alien = self._alien, None
        if alien is not None:
            with contextlib.closing(alien):
                await aside(alien.execute, "commit")
            scene.note(self.name, self._began, excuses=False)


class NotifyQueue(Fault):
    """For three seconds a listener is idle in a transaction, and the server's NOTIFY queue (`max_notify_queue_pages`) is
    full."""

    name = "notify-queue-full"
    settings = {"max_notify_queue_pages": "64"}  # noqa: RUF012 - the least that there is

    def missing(self) -> str | None:
        return None if binary_version() >= 17 else "max_notify_queue_pages is of PostgreSQL 17"

    async def inflict(self, scene: Scene) -> None:
        listener, filler = await aside(session, scene.direct_dsn), await aside(session, scene.direct_dsn)
        with (
            scene.incident(self.name, waits_for="next"),  # a handler's own transaction may not be committed
            contextlib.closing(listener),
            contextlib.closing(filler),
        ):
            for statement in ("listen alien", "begin", "select 1"):
                await aside(listener.execute, statement)
            until = trio.current_time() + 3
            while trio.current_time() < until:
                try:
                    await aside(filler.execute, "select pg_notify('alien', repeat('x', 7900))")
                except psycopg.errors.ProgramLimitExceeded:
                    self.filled = True
                    await trio.sleep(0.1)

    def expected(self, scene: Scene) -> Iterable[str]:
        if not getattr(self, "filled", False):
            yield "the NOTIFY queue was never full"


class NoConnections(Fault):
    """Pools of two for the handlers and one for the senders; somebody takes all of the server's connections, ours too, for
    three seconds."""

    name = "no-connections"
    pool = 2
    senders = 1
    settings = {"max_connections": "30"}  # noqa: RUF012

    async def inflict(self, scene: Scene) -> None:
        with scene.incident(self.name, waits_for="next"):
            taken = [await aside(session, scene.direct_dsn)]
            try:
                terminate = (
                    "select pg_terminate_backend(pid) from pg_stat_activity"
                    " where backend_type = 'client backend' and application_name <> 'alien'"
                )
                until = trio.current_time() + 3
                while trio.current_time() < until:
                    try:
                        taken.append(await aside(session, scene.direct_dsn))
                    except psycopg.OperationalError:
                        await aside(taken[0].execute, terminate.encode())
                        await trio.sleep(0.01)
            finally:
                for connection in taken:
                    connection.close()


SHIFTED = """
import datetime, os, time

real, seen, shift = time.time, 0.0, 0.0

def shifted():
    global seen, shift
    now = time.monotonic()
    if now - seen > 0.05:
        seen = now
        with open(os.environ["CHAOS_CLOCK"]) as file:
            shift = float(file.read() or 0)
    return real() + shift

class Kind(type):
    def __instancecheck__(self, value):
        return isinstance(value, plain)

class Shifted(datetime.datetime, metaclass=Kind):
    @classmethod
    def now(cls, tz=None):
        return plain.fromtimestamp(shifted(), tz)

plain = datetime.datetime
time.time, datetime.datetime = shifted, Shifted
"""


class Clock(Fault):
    """The clock of the workers' host is set, by up to a day, forwards or back: leases and due times are the server's."""

    name = "clock"
    pause = 1.0

    @contextlib.asynccontextmanager
    async def stage(self, scene: Scene) -> AsyncIterator[None]:
        folder = scene.folder / "fault"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(SHIFTED, encoding="utf-8")
        self._clock = folder / "clock"
        self._clock.write_text("3600", encoding="utf-8")
        scene.environment |= {
            "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "ignore",  # of a datetime that is not the one that was compiled against
            "CHAOS_CLOCK": str(self._clock),
        }
        yield

    async def inflict(self, scene: Scene) -> None:
        shift = scene.dice.choice([-1, 1]) * scene.dice.choice([0.5, 5, 60, 3600, 86400])
        with scene.incident(self.name, excuses=False):
            part = self._clock.with_name("part")
            part.write_text(str(shift), encoding="utf-8")
            part.replace(self._clock)

    def expected(self, scene: Scene) -> Iterable[str]:
        told = datetime.datetime.fromisoformat(scene.workers.log()[:19])  # at first it is an hour fast
        if told.timestamp() < time.time() + 1800:
            yield f"the workers' clock was not set: they began at {told}"

"""One fault: a server, three workers and their load; it is broken again and again, mended, drained, and judged."""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import trio

import notifyq

from .ledger import Incident, Ledger, Run, Send
from .producers import Producers
from .proxy import Proxy
from .queues import ALL, BULK
from .servers import Server
from .verdict import Found, Verdict, judge, recoveries, unexcused_restarts
from .workers import HOW_MANY, Workers, processes_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from .faults import Fault

__all__ = ["Scene", "run_cell"]

READ_EVERY = 0.05
END_SECONDS = 5.0
"""Seconds in which a process that was killed, or whose server was, has to be gone."""
SPAN = "create table span (job bigint primary key, key text, began_at timestamptz, ended_at timestamptz)"
OVERLAPS = (
    "select a.job from span a join span b on b.key = a.key and b.job <> a.job"
    " and b.began_at between a.began_at and a.ended_at"
)
WAITING = "select coalesce(sum(ready + active + scheduled + blocked), 0) from notifyq.queue_stats where queue <> 'dead'"
FOUND = (
    "select id, queue, state, attempt, retry_limit, error ->> 'type', (provenance ->> 'id')::bigint from notifyq.jobs"
)
LEFT = {
    "connections": "select count(*) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()",
    "locks": "select count(*) from pg_locks where locktype = 'advisory'",
    "prepared transactions": "select count(*) from pg_prepared_xacts",
    "runtimes": "select count(*) from notifyq.runtime",
    "active tickets": "select count(*) from notifyq.active",
    "keys held": "select count(*) from notifyq.key where held > 0 or head is not null",
    "slots held": "select count(*) from notifyq.gate where held > 0",
}

WHERE = """
select j.id, j.queue, j.state, j.attempt, j.key, j.runtime::text, j.claimed_at::text, r.lease_until::text
from notifyq.jobs j
left join notifyq.runtime r on r.id = j.runtime
where j.state in ('ready', 'scheduled', 'blocked', 'active') and j.queue <> 'dead'
order by j.id
limit 5
"""


@attrs.define(eq=False)
class Scene:
    """What a fault has to work with."""

    folder: Path
    template: Path
    server: Server
    ledger: Ledger
    dice: random.Random
    nursery: trio.Nursery
    worker_dsn: str
    sender_dsn: str
    direct_dsn: str
    """For looking at the database, past everything that is broken."""
    environment: dict[str, str] = attrs.Factory(dict)
    wrapped: tuple[str, ...] = ()
    workers: Workers = attrs.field(init=False)
    stopped_in_handlers: int = 0
    """Workers that were stopped before the handler that this was timed for had ended."""

    @contextlib.contextmanager
    def incident(
        self,
        kind: str,
        process: str | None = None,
        waits_for: str | None = None,
        *,
        job: int | None = None,
        excuses: bool = True,
    ) -> Iterator[None]:
        """The block is something that is done; it counts until the block has ended. See ``Incident``."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.note(kind, began, process, waits_for, job=job, excuses=excuses)

    def note(
        self,
        kind: str,
        began: float,
        process: str | None = None,
        waits_for: str | None = None,
        *,
        job: int | None = None,
        excuses: bool = True,
    ) -> None:
        """Something was done, since that moment. See ``Incident``."""
        self.ledger.note(Incident(kind, began, time.monotonic(), process, waits_for, job, excuses))
        if waits_for in ("sent", "next"):
            self.nursery.start_soon(self._send_one)

    async def query(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """The rows of a query, past everything that is broken."""

        def ask() -> list[tuple[Any, ...]]:
            with psycopg.connect(self.direct_dsn, autocommit=True, connect_timeout=5) as connection:
                cursor = connection.execute(query.encode(), parameters)
                return cursor.fetchall() if cursor.description else []

        return await trio.to_thread.run_sync(ask)

    async def send(self, queue: str, data: int, *, priority: int = 0) -> int:
        """Send a job past everything that is broken, and write it down."""
        called = time.monotonic()
        statement = "select notifyq.send(%s, to_jsonb(%s), priority => %s)"
        with self.ledger.attempt(1):
            [(job,)] = await self.query(statement, queue, data, priority)
        self.ledger.sent([(job, Send(queue, called))])
        return int(job)

    async def _send_one(self) -> None:
        """Whoever else sends, and however long they take to reconnect: a job for what waits for one."""
        while True:
            with contextlib.suppress(psycopg.Error):
                await self.send(BULK.name, 0, priority=9)
                return
            await trio.sleep(0.02)

    async def recovered(self, since: float) -> None:
        """Wait until a job has started that was sent after this moment."""
        seen = len(self.ledger.runs)
        with trio.move_on_after(60):
            while True:
                self.ledger.read()
                for run in self.ledger.runs[seen:]:
                    if (send := self.ledger.sends.get(run.job)) is not None and send.called > since:
                        return
                seen = len(self.ledger.runs)
                await trio.sleep(0.02)

    async def started(self, job: int) -> Run:
        """Wait until a worker has begun with a job."""
        seen = 0
        with trio.fail_after(30):
            while True:
                self.ledger.read()
                for run in self.ledger.runs[seen:]:
                    if run.job == job:
                        return run
                seen = len(self.ledger.runs)
                await trio.sleep(0.005)

    async def until(self, query: str, wanted: int, seconds: float) -> int:
        """Look until a query's number is what is wanted, but no longer than so many seconds; gives the last number."""
        number = -1
        with trio.move_on_after(seconds):
            while number != wanted:
                with contextlib.suppress(psycopg.Error):
                    [(number,)] = await self.query(query)
                await trio.sleep(0.05 if number != wanted else 0)
        return number

    async def put_up_proxy(self) -> Proxy:
        """Have the workers reach the server through a proxy."""
        proxy = Proxy(self.server.dsn)
        await self.nursery.start(proxy.run)
        self.worker_dsn = proxy.dsn
        return proxy


async def _temporary_files_left(server: Server, patience: float) -> list[str]:
    """What the server's statements spilled to its disk and is there still."""
    with trio.move_on_after(patience):
        while files := [path.name for path in (server.data / "base" / "pgsql_tmp").glob("*")]:
            await trio.sleep(0.05)
    return files


async def _processes_left(folder: Path) -> list[str]:
    """Command lines of what still runs in a cell's folder, a moment after everything in it was ended."""
    with trio.move_on_after(END_SECONDS):
        while lines := processes_in(folder):
            await trio.sleep(0.05)
    return lines


@attrs.frozen
class Outcome:
    """One run of one fault."""

    fault: str
    verdict: Verdict
    waits: list[float]
    incidents: Counter[str]
    """How often what was done."""
    unknown: int
    refused: dict[str, int]
    events: dict[str, int]
    restarts: int
    """Of workers whose connection broke while they started."""
    seconds: float
    log: str


async def run_cell(
    fault: Fault, *, seconds: float, seed: int, folder: Path, template: Path, rate: float = 20_000
) -> Outcome:
    """Run a fault for so many seconds of load, and judge."""
    started = time.monotonic()
    folder.mkdir()
    folder.chmod(0o711)  # the server has a user of its own
    ledger = Ledger(folder)
    data = await trio.to_thread.run_sync(fault.place, folder)
    server = Server.copied(template, data, {"max_connections": "60", **fault.settings})
    scene: Scene | None = None
    try:
        await server.start()
        async with trio.open_nursery() as nursery:
            dice = random.Random(f"{seed} {fault.name}")
            scene = Scene(folder, template, server, ledger, dice, nursery, server.dsn, server.dsn, server.dsn)
            async with notifyq.connect(server.dsn) as nq:
                for queue in ALL:
                    await nq.create_queue(queue)
            await scene.query(SPAN)
            verdict = await _break(fault, scene, seconds, rate)
            log = scene.workers.log()
            nursery.cancel_scope.cancel()
    finally:
        for one in {server, scene.server if scene else server}:
            one.kill()
        ledger.close()
        fault.leave(folder)
    if left := await _processes_left(folder):
        verdict.complain(f"{len(left)} processes are left: {', '.join(left[:3])}")
    return Outcome(
        fault.name,
        verdict,
        recoveries(verdict, ledger, fault.goal),
        Counter(incident.kind for incident in ledger.incidents),
        ledger.unknown,
        dict(ledger.refused),
        dict(ledger.events),
        len(scene.workers.restarts),
        time.monotonic() - started,
        log,
    )


async def _break(fault: Fault, scene: Scene, seconds: float, rate: float) -> Verdict:
    async with fault.stage(scene), _workers(fault, scene):
        registered = await scene.until("select count(*) from notifyq.runtime", HOW_MANY, 30)
        producers = Producers(
            scene.sender_dsn, scene.ledger, scene.dice, rate=min(rate, fault.rate), pool_size=fault.senders
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read, scene.ledger)
            nursery.start_soon(producers.run)
            until = trio.current_time() + seconds
            await trio.sleep(min(1.0, seconds / 4))
            while trio.current_time() < until:
                await fault.inflict(scene)
                await trio.sleep(scene.dice.uniform(0.5, 1.5) * fault.pause)
            await fault.mend(scene)
            producers.stop()
            waiting = await scene.until(WAITING, 0, fault.drain)
            nursery.cancel_scope.cancel()
        where = await scene.query(WHERE) if waiting else []
        runtimes = await scene.until("select count(*) from notifyq.runtime", HOW_MANY, fault.patience)
        await scene.workers.stop()
    scene.ledger.read()
    verdict = judge(scene.ledger, await _found(scene), fault.lease)
    if registered != HOW_MANY:
        verdict.complain(f"{registered} workers registered at the start, not {HOW_MANY}")
    if waiting:
        verdict.complain(f"{waiting} jobs were not run within {fault.drain:g} s after the load, such as {where}")
    if runtimes != HOW_MANY:
        verdict.complain(f"{runtimes} runtimes are registered at the end, not {HOW_MANY}")
    unexcused = unexcused_restarts(scene.workers.restarts, scene.ledger.incidents)
    for complaint in (*scene.workers.bad_ends, *unexcused, *fault.expected(scene)):
        verdict.complain(complaint)
    await _look_what_is_left(scene, verdict, fault.patience)
    return verdict


@contextlib.asynccontextmanager
async def _workers(fault: Fault, scene: Scene) -> AsyncIterator[None]:
    environment = {
        "DATABASE_URL": scene.worker_dsn,
        "CHAOS_LEASE": str(fault.lease),
        "CHAOS_POOL": str(fault.pool),
        **scene.environment,
    }
    scene.workers = Workers(scene.folder, environment, scene.wrapped)
    scene.workers.start()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.workers.keep_up)
            yield
            nursery.cancel_scope.cancel()
    finally:
        scene.workers.kill()


async def _read(ledger: Ledger) -> None:
    while True:
        ledger.read()
        await trio.sleep(READ_EVERY)


async def _found(scene: Scene) -> dict[int, Found]:
    return {row[0]: Found(*row[1:]) for row in await scene.query(FOUND)}


async def _look_what_is_left(scene: Scene, verdict: Verdict, patience: float) -> None:
    verdict.complain("ran while another of their key did", [job for (job,) in await scene.query(OVERLAPS)])
    odd = (
        "select coalesce(s.job, j.id) from span s full join (select id from notifyq.jobs where queue = 'alone'"
        " and state = 'completed') j on j.id = s.job where s.job is null or j.id is null or s.ended_at is null"
    )
    verdict.complain("are completed or have written, but not both", [job for (job,) in await scene.query(odd)])
    for what, query in LEFT.items():
        if count := await scene.until(query, 0, patience):
            verdict.complain(f"{count} {what} are left")
    if temporary := await _temporary_files_left(scene.server, patience):
        verdict.complain(f"temporary files of the server are left: {', '.join(temporary[:3])}")
    known = re.compile(r"sends|incidents|log|data(\.log)?|effects-\d+|fault")
    if files := [path.name for path in scene.folder.iterdir() if not known.fullmatch(path.name)]:
        verdict.complain(f"files are left: {', '.join(sorted(files)[:10])}")

"""Every place at which a runtime waits is one at which it may end: cancelled there, told to stop, or left by a handler.

A place is one ``await`` (or ``async with``, ``async for``) of ``src/notifyq``. Tasks are looked at after each of their
steps: the first time that one waits at a place where none has been ended yet, that is done. So each run ends at another
place, until a run goes to its end by itself. By default each test makes a number of such runs, and begins at places
that a seed chooses, which is printed (``NOTIFYQ_SEED`` repeats it); ``make cancel`` tries all places, which takes
minutes, and then also holds that no ``await`` of a runtime's modules was left out but those that are named here.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import logging
import os
import random
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import trio

import notifyq
from notifyq import Job, Queue, Runtime, Schedule, Snooze
from notifyq._models import Completed
from notifyq._verdict import judge
from tests.faults.places import AtNewPlace, Place, awaited, places, places_below, untried
from tests.faults.test_cancelled import LEFT, NOTHING, OTHERS, value, wait_none

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator

    from notifyq._connection import TrioConnection

# what a runtime does

T = TypeVar("T")

AT_ONCE, AFTER_FAILING, AFTER_SNOOZING, CALLING, SLEEPING, LASTING, REFUSED = range(7)
"""What a job's data tells its worker to do. SLEEPING ends when the job is cancelled; LASTING takes long the first time; the
server refuses the output of REFUSED."""

LONG = 2.0
"""Seconds: more than a run takes, or is given when it stops."""

UNFINISHED = "select count(*) from notifyq.jobs where state not in ('completed', 'failed', 'cancelled')"
AWAKE = f"{UNFINISHED} and queue <> 'ticks' and data <> '{SLEEPING}'"
NOT_AS_TOLD = f"""
select count(*)
from notifyq.jobs
where state <> 'completed'
and not (state = 'cancelled' and data = '{SLEEPING}')
and not (state = 'failed' and data = '{REFUSED}' and error ->> 'type' = 'output_invalid')
"""
VANISHED = """
select count(*)
from sent s
where queue <> 'tenant-a' -- which goes with its jobs
and not exists (select from notifyq.jobs j where j.id = s.id)
"""
BEGUN_ALL = f"select count(*) = 0 from notifyq.jobs where data = '{LASTING}' and attempt = 0"
NOT_WRITTEN_ONCE = """
select count(*)
from notifyq.jobs j
where queue = 'written'
and state = 'completed'
and (select count(*) from written w where w.id = j.id) <> 1
"""
CANCEL_SLEEPERS = f"""
select notifyq.cancel(coalesce(array_agg(id), '{{}}')) from notifyq.jobs where data = '{SLEEPING}' and state <> 'cancelled'
"""
CONNECTIONS = "update pg_database set datallowconn = %s where datname = current_database() returning 1"
END_BACKENDS = OTHERS.replace("count(*)", "count(pg_terminate_backend(pid))")
END_LISTENERS = f"{END_BACKENDS} and application_name = 'notifyq listener'"


class Work:
    """Queues with workers of every kind, and what their jobs do."""

    def __init__(self, *, at_rest: bool = False) -> None:
        """``at_rest``: it is to end all that there is, and nothing else."""
        self._at_rest = at_rest
        self.calling: dict[trio.lowlevel.Task, trio.CancelScope] = {}
        """Of each handler that calls its runtime or its client, the scope around those calls."""
        options: dict[str, Any] = {"retry_delay": 0, "retry_limit": 1000}
        self.plain = Queue("plain", int, Any, **options)
        keyed = Queue("keyed", int, Any, policy="ordered", **options)
        threaded = Queue("threaded", int, Any, **options)
        together = Queue("together", int, Any, **options)
        written = Queue("written", int, Any, **options)
        tenants = Queue("tenant-*", int, Any)
        schedules = [
            Schedule(every=0.1, name=name, data=AT_ONCE) for name in (() if at_rest else ("good", "bad", "never"))
        ]
        ticks = Queue("ticks", int, Any, schedules=schedules, **options)
        self.queues: list[Queue[int, Any]] = [self.plain, keyed, threaded, together, written, tenants, ticks]

        async def around(job: Job[int], call_next: Callable[[Job[int]], Awaitable[Any]]) -> Any:
            return await call_next(job)

        @contextlib.asynccontextmanager
        async def within(job: Job[int]) -> AsyncIterator[None]:
            await trio.lowlevel.checkpoint()
            yield
            await trio.lowlevel.checkpoint()

        self.plain.worker(concurrency=4, middleware=[around, within])(self._run)
        keyed.worker(concurrency=2, key_limit=1, poll_interval=0.2)(self._run)
        tenants.worker(concurrency=2)(self._run)
        ticks.worker(concurrency=2)(self._run)

        @threaded.worker(concurrency=2)
        def in_thread(job: Job[int]) -> None:
            time.sleep(0.1 if self._lasts(job) else 0.001)
            if job.data == AFTER_FAILING and job.attempt == 1:
                raise ValueError("not at the first attempt")

        @together.batch_worker(batch_size=2, concurrency=1)
        async def run_both(jobs: list[Job[int]]) -> list[Any]:
            if sum(map(self._lasts, jobs)):
                await trio.sleep(LONG)
            with self._may_be_cancelled():
                await jobs[0].touch(60)
            return [ValueError("no") if job.data == AFTER_FAILING and job.attempt == 1 else None for job in jobs]

        @written.worker(concurrency=3, transaction=True)
        async def write(job: Job[int], connection: TrioConnection) -> int:
            await connection.execute("insert into written values (%s)", (job.id,))
            with self._may_be_cancelled():
                async with connection.transaction():
                    await connection.execute("select pg_sleep(0.001)")
            return await self._run(job)

    @contextlib.contextmanager
    def _may_be_cancelled(self) -> Iterator[None]:
        task = trio.lowlevel.current_task()
        with trio.CancelScope() as self.calling[task]:
            try:
                yield
            finally:
                del self.calling[task]

    async def _run(self, job: Job[int]) -> int:
        match job.data:
            case t if t == AFTER_FAILING and job.attempt == 1:
                raise ValueError("not at the first attempt")
            case t if t == AFTER_SNOOZING and job.id not in BEGUN:
                BEGUN.add(job.id)
                raise Snooze(0.02)
            case t if t == CALLING:
                with self._may_be_cancelled():
                    await self._call(job)
            case t if t == SLEEPING:
                await trio.sleep_forever()
            case _ if self._lasts(job):
                await trio.sleep(LONG)
        await trio.lowlevel.checkpoint()
        return job.data

    def _lasts(self, job: Job[int]) -> bool:
        if job.data != LASTING or job.id in BEGUN or self._at_rest:
            return False
        BEGUN.add(job.id)
        return True

    async def _call(self, job: Job[int]) -> None:
        """What a handler may ask of its runtime, and of its client."""
        await job.progress(0.5)
        await job.touch(60)
        await job.parents()
        nq = job.client
        async with nq.connection() as connection:
            await connection.execute("begin")  # which is then to be rolled back
        child = await nq.send(self.plain, AT_ONCE)
        async with nq.transaction() as connection:
            await nq.send_many(self.plain, [AT_ONCE, AT_ONCE], connection=connection)
            async with connection.pipeline():
                await nq.send(self.plain, AT_ONCE, connection=connection)
        await nq.result(child)
        sleeper = await nq.send(self.plain, SLEEPING)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nq.cancel, sleeper)
            with contextlib.suppress(notifyq.JobFailed):
                await nq.result(sleeper)


BEGUN: set[int] = set()
"""The jobs that do something else the first time, and have done that."""


class Drive:
    """What is done to a runtime from outside, on a connection of its own."""

    def __init__(self, runtime: Runtime, connection: TrioConnection) -> None:
        self._runtime = runtime
        self._connection = connection

    async def send(self, *queues: str, kinds: Iterable[int] = (AT_ONCE,)) -> None:
        """A job of each kind to each queue, noted in the same transaction."""
        await self._connection.execute(
            "insert into sent select q, notifyq.send(q, to_jsonb(k), key => 'k')"
            " from unnest(%s::text[]) q, unnest(%s::int[]) k",
            (list(queues), list(kinds)),
        )

    async def do(self, statement: str, *arguments: Any) -> Any:
        return await value(self._connection, statement, *arguments)

    async def until(self, statement: str, *arguments: Any) -> None:
        """Until a statement gives true."""
        while not await value(self._connection, statement, *arguments):
            await trio.sleep(0.002)

    async def rest(self) -> None:
        await wait_none(self._connection, AWAKE)

    async def work(self) -> None:
        """Jobs of all kinds; a pause; a stop in the middle of some that last."""
        await self.send("plain", kinds=(AT_ONCE, AFTER_FAILING, AFTER_SNOOZING, CALLING, SLEEPING, REFUSED))
        await self.send("keyed", "threaded", "together", "written", kinds=(AT_ONCE, AFTER_FAILING, AT_ONCE))
        await self.rest()
        await self.do(CANCEL_SLEEPERS)
        await self.send("plain", "keyed", "written", kinds=(AT_ONCE, CALLING))
        await self.rest()
        await self.do("select notifyq.pause('plain')")
        await self.send("plain", "keyed")
        await trio.sleep(0.02)  # for it to be heard of: no more depends on that than whether it is waited for
        await self.do("select notifyq.resume_queue('plain')")
        await self.rest()
        await self.send("plain", "threaded", "together", "written", "keyed", kinds=(LASTING, AT_ONCE))
        await self.until(BEGUN_ALL)
        self._runtime.stop()

    async def trouble(self) -> None:
        """Broken connections, a lost lease, a runtime that died, a schedule that cannot be read."""
        await self.send("plain", "written", "together", kinds=(AT_ONCE, AFTER_FAILING))
        await self.do(END_LISTENERS)
        await self.rest()
        await self.send("plain", "written", kinds=(LASTING,))
        await self.until(BEGUN_ALL)
        await self.do("select count(*) from notifyq.deregister(%s)", self._runtime.id)
        async with self._connection.transaction():
            await self.do("select notifyq.register(%s, '{plain}', '1 second')::text", DEAD)
            await self.send("keyed", kinds=(AT_ONCE, AT_ONCE))
            await self.do("select count(*) from notifyq.claim('keyed', 1, runtime => %s)", DEAD)
            await self.do("update notifyq.runtime set lease_until = clock_timestamp() where id = %s returning 1", DEAD)
        await self.do(
            "update notifyq.schedule set every = null, next_at = null, cron = '0 0 31 2 *',"
            " timezone = case name when 'bad' then 'Mars' else 'UTC' end"
            " where name in ('bad', 'never') returning pg_notify(notifyq.channel(0), 'schedule')::text"
        )
        await self.until("select count(*) = 0 from notifyq.runtime where id = %s", DEAD)
        await self.until("select count(error) = 2 from notifyq.schedule where name <> 'good'")
        await self.send("plain", "written", "keyed", "threaded", kinds=(AT_ONCE, CALLING, AFTER_FAILING))
        await self.do(END_BACKENDS)
        await self.rest()
        await self.until("select count(*) > 0 from notifyq.runtime where id = %s", self._runtime.id)
        self._runtime.stop()

    async def outage(self) -> None:
        """A database that takes no connections, at the start and later."""
        await trio.sleep(0.05)
        await self.send("plain", "written", "threaded", kinds=(AT_ONCE, CALLING))
        await self._connections(allowed=True)
        await self.rest()
        await self.send("plain", "threaded", "together", kinds=(LASTING, AT_ONCE))
        await self._connections(allowed=False)
        await self.do(END_BACKENDS)
        await self.send("plain", "written")
        await trio.sleep(0.3)
        await self._connections(allowed=True)
        await self.send("keyed")
        await self.until("select count(*) > 0 from notifyq.runtime where id = %s", self._runtime.id)
        self._runtime.stop()

    async def _connections(self, *, allowed: bool) -> None:
        await self.do(CONNECTIONS, allowed)

    async def queues(self) -> None:
        """Queues that come and go."""
        await self.do("select notifyq.create_queue('tenant-a', '{\"retry_delay\": 0}')")
        await self.send("tenant-a", kinds=(AT_ONCE, AFTER_FAILING, AT_ONCE))
        await self.rest()
        await self.do("select notifyq.create_queue('tenant-b')")
        await self.do("select notifyq.delete_queue('tenant-a')")
        await self.send("tenant-b", "plain")
        await self.rest()
        self._runtime.stop()


SCENARIOS = [Drive.queues, Drive.work, Drive.trouble, Drive.outage]
DEAD = "00000000-0000-0000-0000-00000000dead"


def places_of_call(task: trio.lowlevel.Task) -> list[Place]:
    return places_below(task, __file__)


def cancel(scope: trio.CancelScope, _task: trio.lowlevel.Task) -> None:
    scope.cancel()


def end_parts(task: trio.lowlevel.Task) -> bool:
    """Cancel all parts of a runtime where they are, which its own shield keeps its caller from doing: a handler that dies
    does it. False if this task is none of them."""
    part: trio.lowlevel.Task | None = task
    while part is not None and not part.name.endswith(".parts"):
        part = part.parent_nursery and part.parent_nursery.parent_task
    if part is None or not part.child_nurseries:
        return False
    part.child_nurseries[0].cancel_scope.cancel()
    return True


async def run_until_ended(
    dsn: str, connection: TrioConnection, how: str, scenario: Any, tried: set[Place], skip: int
) -> list[Place]:
    """Run a runtime until it ends, and say at which places it was ended, if not by itself."""
    work = Work()
    runtime = Runtime(work.queues, dsn=dsn, pool_size=3, lease=1.0, grace=0.05)
    scope, driving = trio.CancelScope(), trio.CancelScope()

    def where(task: trio.lowlevel.Task) -> list[Place]:
        if how == "call":
            return places_of_call(task) if task in work.calling else []
        return [] if how == "stop" and (runtime.stopping or not runtime.running) else places(task)

    def end(task: trio.lowlevel.Task) -> None:
        if how == "call":
            work.calling[task].cancel()
            return
        driving.cancel()
        if how == "stop":
            runtime.stop()
        elif how == "run" or not end_parts(task):
            scope.cancel()

    instrument = AtNewPlace(tried, where, end, skip=skip, answered=how == "answered")
    instrument.spare()

    async def drive() -> None:
        instrument.spare()
        with driving:
            await scenario(Drive(runtime, connection))
        with trio.CancelScope(shield=True):
            await value(connection, CONNECTIONS, True)

    if scenario is Drive.outage:
        await value(connection, CONNECTIONS, False)
    async with trio.open_nursery() as nursery:
        trio.lowlevel.add_instrument(instrument)
        try:
            with scope:
                nursery.start_soon(drive)
                await call_beside(runtime.run)
        finally:
            trio.lowlevel.remove_instrument(instrument)
        nursery.cancel_scope.cancel()
    assert not runtime.running
    return instrument.ended_at


async def call_beside(function: Callable[[], Awaitable[None]]) -> None:
    """In a task of its own, since the caller's is spared."""
    raised: list[Exception] = []

    async def call() -> None:
        try:
            await function()
        except Exception as error:
            raised.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
    assert raised == []


def threads() -> Counter[str]:
    """Those that are not trio's, which keeps idle ones for the next call."""
    return Counter(thread.name for thread in threading.enumerate() if not thread.name.startswith("Trio thread"))


class Ledger:
    """Whether a run has left anything, and lost anything."""

    def __init__(self, dsn: str, connection: TrioConnection) -> None:
        self._dsn = dsn
        self._connection = connection
        self._threads = threads()
        self._tasks = trio.lowlevel.current_statistics().tasks_living

    async def check_left(self) -> None:
        await wait_none(self._connection, OTHERS)
        await value(self._connection, "select count(*) from notifyq.deregister(%s)", DEAD)
        assert await value(self._connection, LEFT) == NOTHING
        while threads() != self._threads:  # one that was told to end may take a moment
            await trio.sleep(0.002)
        assert trio.lowlevel.current_statistics().tasks_living == self._tasks

    async def check_all(self) -> None:
        """A fresh runtime has nothing left to do when it has done what it finds."""
        await value(self._connection, CONNECTIONS, True)
        await self.check_left()
        await value(self._connection, CANCEL_SLEEPERS)
        await value(self._connection, "select notifyq.resume_queue('plain')")
        work = Work(at_rest=True)
        runtime = Runtime(work.queues, dsn=self._dsn, grace=0.05)
        async with trio.open_nursery() as nursery:
            await nursery.start(runtime.run)
            await wait_none(self._connection, AWAKE)
            while await value(self._connection, UNFINISHED):
                await value(self._connection, CANCEL_SLEEPERS)
            runtime.stop()
        await self.check_left()
        assert await value(self._connection, VANISHED) == 0
        assert await value(self._connection, NOT_AS_TOLD) == 0
        assert await value(self._connection, NOT_WRITTEN_ONCE) == 0
        gc.collect()  # what was left to the garbage collector complains now, as an error

    async def clear(self) -> None:
        await self._connection.execute("truncate sent, written")
        await value(self._connection, "select sum(notifyq.delete_all(name)) from notifyq.queue")
        await value(
            self._connection, "select sum(notifyq.delete_queue(name)) from notifyq.queue where name like 'tenant-%%'"
        )


@pytest.fixture
async def ledger(dsn: str, connection: TrioConnection, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    def judged(job: Job[int], result: Any, error: BaseException | None, **rules: Any) -> Any:
        if error is None and job.data == REFUSED:
            return Completed(job.id, job.attempt, '"\\u0000"', 0)
        return judge(job, result, error, **rules)

    monkeypatch.setattr("notifyq._executor.judge", judged)
    monkeypatch.setattr("notifyq._settler.BACKLOG_MAX", 2)
    monkeypatch.setattr("notifyq._runtime.RUNTIME_CONNECTIONS", 1)  # which each part has to wait for
    monkeypatch.setattr("notifyq._maintenance.FIRST", (0.01, 0.05))
    monkeypatch.setattr("notifyq._maintenance.EVERY", (0.2, 0.3))
    await connection.execute("create table sent (queue text not null, id bigint not null)")
    await connection.execute("create table written (id bigint not null)")
    async with notifyq.connect(dsn) as client:
        await client.declare(Work().queues)
    with trio.fail_after(20):
        await wait_none(connection, OTHERS)
    return Ledger(dsn, connection)


ALL = bool(os.environ.get("NOTIFYQ_ALL_STEPS"))
FEW = 4
"""Runs of each scenario, unless all places are tried, and how many places each passes over at most."""
MOST_SKIPPED = 60

PARTS = (
    *("_runtime", "_session", "_roster", "_worker", "_claimer", "_hands", "_shelf", "_executor", "_atomic", "_threads"),
    *("_settler", "_batcher", "_listener", "_standing", "_beat", "_watchdog", "_maintenance", "_scheduler", "_results"),
    *("_pool", "_opening", "_connection", "_steps", "_connect", "_declare", "_middleware", "_models", "_bell", "_lock"),
)
"""What a runtime is made of, but for its SQL."""

UNTRIED = {
    # It never waits, or only when it is cancelled already.
    "_atomic.Atomic.run: async with contextlib.AsyncExitStack() as stack:",
    "_beat.Heart.run: async with self._running:",
    "_roster.Roster.begin: async with self._pool.connection() as connection:",  # nobody else has begun
    "_claimer.Claimer._drain: await trio.lowlevel.checkpoint_if_cancelled()",
    "_connect.prepare: await connection.close()",
    "_connection.TrioConnection.wait: await trio.lowlevel.checkpoint_if_cancelled()",
    "_connection.TrioConnection.wait: return await self._outlast(step)",
    "_connection.TrioConnection._outlast: return await step.finish()",
    "_connection.TrioConnection._outlast: await self._end_query(step)",
    "_steps._wait_ready: await trio.lowlevel.checkpoint_if_cancelled()",
    "_connection.TrioConnection.prepare: await self._known(statement)",
    "_listener.Listener._connection: await connection.close()",
    "_runtime.Runtime.run: Pool(dsn, size=RUNTIME_CONNECTIONS, connect_timeout=self._connect_timeout) as own,",
    "_runtime.Runtime.run: Pool(dsn, size=self._pool_size, connect_timeout=self._connect_timeout) as handlers,",
    # What is done where something has ended: it is met by these runs, and shielded.
    "_session.Session.begin: await self._deregister()",
    "_threads.Threads.call.in_thread: await trio.lowlevel.checkpoint()",
    # Of a process's main program (test_start_stop.py sends the signals), and of a client (below, and test_cancelled.py).
    "_runtime.run_until_signal: async with trio.open_nursery() as nursery:",
    "_runtime.run_until_signal.obey: async for number in signals:",
    "_runtime.run_until_signal.outlive_nobody: await trio.lowlevel.wait_readable(0)",
    "_runtime.run_until_signal: await runtime.run()",
    "_connect.prepare: await _schema.check(connection, schema)",
    "_connect._Opening.__aenter__: return await self._entered.__aenter__()",
    "_connect._Opening.__aexit__: return await self._entered.__aexit__(*raised)",
    "_connect._opened: await prepare(dsn, schema, migrate=migrate, patience=patience)",
    "_connect._opened: Pool(dsn, size=pool_size, connect_timeout=patience) as pool,",
    "_connect._opened: trio.open_nursery() as nursery,",
    "_results.Results._hear: await self._came_up.wait()",
    # It takes what these scenarios do not have: a pooler, a fleet of five, a server that does not answer, a socket that
    # takes no more, a connection that two tasks use, DEALLOCATE, a firing that the server refuses, a missing queue.
    "_connection.TrioConnection.fetch: async with self.lock:",
    "_connection.TrioConnection.prepare: async with self.lock:",
    "_connection.TrioConnection.fetch: return await self.fetch(statement, parameters)",
    "_steps._wait_ready: await trio.lowlevel.wait_writable(fd)",
    "_steps._wait_ready.race: await wait(fd)",
    "_steps._wait_ready: async with trio.open_nursery() as nursery:",
    "_listener.Listener._send_proof: async with self._connection() as another:",
    "_listener.Listener._send_proof: await self._store.notify(another, control, self._proof)",
    "_listener.Listener._await_answer: await connection.cancel_query()",
    "_listener.Listener._await_answer: await self._hear_out(connection)",
    "_roster.Roster.begin: await self._store.queue(connection, name)",
    "_roster.Roster._served: async with self._pool.connection() as connection:",
    "_roster.Roster._served: return await self._store.served(connection, self.names)",
    "_roster.Roster.run: await trio.sleep(reconnect_delay(failures, self._random))",
    "_scheduler.Scheduler._fire_all: await self._broken(known.number, known.queue, known.name, str(error))",
    "_scheduler.Scheduler._fire_all: await self._fire([(known, step)])",
    "_standing.Standing._tell: await self._store.say_taken(connection, queue, numbers)",
    "_standing.Standing.run: await trio.sleep(reconnect_delay(failures, self._random))",
    # Met in some rounds only: somebody else must be at something at that very moment.
    "_claimer.Claimer._drain: await self._wait_answered()",
    "_claimer.Claimer.run: await self._wait_answered()",
    "_claimer.Claimer._wait_answered: await self._answered.park()",
    "_claimer.Claimer._wait_for_work: await self.bell.wait()",
    "_claimer.Claimer._claim_for_ever: await trio.sleep(reconnect_delay(failures, self._random))",
    "_connect.prepare: await trio.sleep(PATIENCE_PAUSE)",
    "_connection.TrioConnection.wait: await self._end_query(step)",
    "_connection.TrioConnection._end_query: await self.cancel_query()",
    "_connection.TrioConnection._end_query: await step.finish()",
    (
        "_connection.TrioConnection.cancel_query:"
        " await trio.to_thread.run_sync(self.opened.cancel_safe, abandon_on_cancel=True)"
    ),
    "_listener.Listener._begin: await connection.wait_input()",
    "_listener.Listener._begin: await self._hear_all(connection)",
    "_listener.Listener._begin: await self._hold_interest(connection, queue)",
    "_listener.Listener._hold_interest: await trio.sleep(0.001)",
    "_maintenance.Maintenance._rescues: await self._rescue()",
    "_results.Results._wait_settles: await trio.sleep(pause)",
    "_scheduler.Scheduler._broken: async with self._pool.connection() as connection:",
    "_scheduler.Scheduler.run: await trio.sleep(reconnect_delay(failures, self._random))",
    "_session.Session._beat: return await self._beat_on(connection, asked)",
    "_settler.Settler._settle: done = await self._store.release(connection, ids, attempts, self._runtime, as_of)",
    "_settler.Settler._write_until_taken: await trio.sleep(reconnect_delay(failures, self._random))",
}
"""What is awaited where none of these runs need be ended, and why."""


def test_what_is_let_off_is_there():
    assert {said for module in PARTS for said, *_ in awaited(module)} >= UNTRIED


def skips(seed: int) -> Iterator[int]:
    """For each run, how many places are passed over before it is ended."""
    if ALL:
        yield from itertools.repeat(0)
    chosen = random.Random(seed)
    for _ in range(FEW):
        yield chosen.randrange(MOST_SKIPPED)


@pytest.mark.parametrize("how", ["run", "parts", "answered", "stop", "call"])
async def test_a_runtime_ended_wherever_it_waits_leaves_nothing_and_loses_no_job(dsn, connection, ledger, caplog, how):
    """run: its caller cancels it. parts: all its parts are cancelled. answered: the same, when one is about to go on.
    stop: it is stopped. call: a handler gives up what it asks of the runtime, which goes on."""
    caplog.set_level(logging.ERROR)
    seed = int(os.environ.get("NOTIFYQ_SEED") or random.randrange(2**32))
    print(f"NOTIFYQ_SEED={seed}")
    tried: set[Place] = set()
    for scenario in SCENARIOS:
        for skip in skips(seed):
            with trio.fail_after(60):
                at = await run_until_ended(dsn, connection, how, scenario, tried, skip)
                print(scenario.__name__, *(f"{module}:{line}" for module, line, _ in at))
                await ledger.check_all()
                await ledger.clear()
            assert not caplog.records
            if ALL and not at:
                break
    if ALL and how == "parts":
        left = untried(PARTS, tried, ())
        print(f"not tried: {len(left)}", *left, sep="\n")
        assert untried(PARTS, tried, UNTRIED) == []


# what a client does

ONE = Queue("one", int, int, retry_delay=0)
PAIRS = Queue("pairs", int)
HALF_SENT = (
    "select count(*) from (select data from notifyq.jobs where queue = 'pairs' group by data having count(*) % 2 = 1) j"
)
OPEN = OTHERS + "and (state like 'idle in transaction%' or state = 'active')"


class Caller:
    """Makes calls of a client, each again and again until it was ended wherever it waits."""

    def __init__(self, client: notifyq.Client, connection: TrioConnection) -> None:
        self.tried: set[Place] = set()
        self._client = client
        self._connection = connection

    async def __call__(self, call: Callable[[], Awaitable[T]]) -> T:
        while True:
            scope = trio.CancelScope()
            instrument = AtNewPlace(self.tried, places_of_call, functools.partial(cancel, scope))
            async with trio.open_nursery() as nursery:
                await nursery.start(self._crowd, instrument)
                trio.lowlevel.add_instrument(instrument)
                try:
                    with trio.fail_after(30), scope:
                        result = await call()
                finally:
                    trio.lowlevel.remove_instrument(instrument)
                nursery.cancel_scope.cancel()
            assert self._client._pool.statistics().on_loan == 0, instrument.ended_at
            await wait_none(self._connection, OPEN)
            assert await value(self._connection, HALF_SENT) == 0, instrument.ended_at
            if not scope.cancelled_caught:
                return result

    async def _crowd(self, instrument: AtNewPlace, *, task_status: trio.TaskStatus[None]) -> None:
        """Whoever wants the only connection has to wait for it."""
        instrument.spare()
        while True:
            async with self._client.connection():
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                await trio.lowlevel.checkpoint()


async def call_everything(client: notifyq.Client, again: Caller) -> None:
    """Each kind of call. What sends two jobs sends both or none of them."""

    async def in_transaction() -> None:
        async with client.transaction() as connection:
            await client.send(PAIRS, 3, connection=connection)
            await client.send(PAIRS, 3, connection=connection)

    async def fetch() -> Job[int]:
        await client.send(ONE, 1, priority=9)
        return (await client.fetch(ONE))[0]

    async def wait_and_complete() -> None:
        job = await fetch()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.result, job.id)
            while not client._results._waiters:
                await trio.sleep(0.001)
            await client.complete(job, 1)

    async def fetch_unreadable() -> None:
        await client.send(Queue("one"), "not a number", priority=10)
        await client.fetch(ONE)

    async def create_and_delete() -> None:
        await client.create_queue(Queue("another"))
        await client.delete_queue("another")

    flow = notifyq.Flow()
    last = flow.add(PAIRS, 4, after=[flow.add(PAIRS, 4)])
    await again(lambda: client.create_queue(Queue("another")))
    await again(lambda: client.declare([ONE, PAIRS]))
    one = await again(lambda: client.send(ONE, 1))
    await again(lambda: client.send_many(PAIRS, [2, 2]))
    await again(in_transaction)
    sent = (await again(lambda: client.send_flow(flow)))[last]
    await again(lambda: client.parents(sent))
    await again(lambda: client.flow(sent))
    await again(lambda: client.upsert(ONE, 5, key="k"))
    await again(lambda: client.update_job(queue=ONE, key="k", data=6))
    await again(lambda: client.get(one))
    job = await again(fetch)
    await again(lambda: client.touch(job, 60))
    await again(lambda: client.fail(job, "no", final=True))
    await again(wait_and_complete)
    await again(fetch_unreadable)
    await again(lambda: client.pause(ONE))
    await again(lambda: client.resume_queue(ONE))
    await again(lambda: client.update_queue(ONE))
    await again(lambda: client.jobs(queue=ONE))
    await again(client.queue_stats)
    await again(client.runtimes)
    await again(client.blocked_keys)
    await again(lambda: client.cancel(one))
    await again(lambda: client.retry(one))
    await again(lambda: client.resume(one))
    await again(lambda: client.redrive(ONE))
    await again(lambda: client.schedule(ONE, Schedule(every=3600, data=1)))
    await again(lambda: client.schedules(queue=ONE))
    await again(lambda: client.unschedule(ONE))
    await again(lambda: client.subscribe("event", ONE))
    await again(client.subscriptions)
    await again(lambda: client.publish("event", 1))
    await again(lambda: client.unsubscribe("event", ONE))
    await again(lambda: client.delete(one))
    await again(lambda: client.delete_all(ONE))
    await again(create_and_delete)


async def test_a_client_cancelled_wherever_it_waits_is_as_good_as_before(dsn, connection, caplog):
    caplog.set_level(logging.ERROR)
    async with notifyq.connect(dsn, pool_size=1) as client:
        await client.declare([ONE, PAIRS])
        caller = Caller(client, connection)
        await call_everything(client, caller)
    with trio.fail_after(30):
        await wait_none(connection, OTHERS)
    gc.collect()
    assert not caplog.records
    assert untried(["_client", "_operator", "_planner", "_store_flows"], caller.tried, ()) == []

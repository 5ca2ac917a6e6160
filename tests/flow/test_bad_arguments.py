"""What callers get wrong: every mistake is ours to name, before anything is done."""

from __future__ import annotations

import functools
import inspect
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import pytest
import trio

import notifyq
from notifyq import InvalidData, InvalidOption, Job, NewJob, Queue, Runtime, UnknownQueue, testing
from notifyq._errors import shown

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

NAN = float("nan")
INF = float("inf")
HUGE = 10**20
NAIVE = datetime(2030, 1, 1)
NOT_INTS = (True, 2.5, NAN, INF, HUGE, "x", [1])
NOT_SECONDS = (True, NAN, INF, -INF, HUGE, "1", [1], NAIVE)
NOT_ABOVE_ZERO = (*NOT_SECONDS, 0, -1)
NOT_TEXT = (5, True, 2.5, ["q"])
UNREADABLE = ("q\x00x", "\x00", "q\ud800")
"""Texts that PostgreSQL does not take: it would read the first one as ``q``."""

Q = Queue("q", int, int)

OURS = (InvalidOption, InvalidData)


async def refused(
    call: Callable[[Any], Any],
    values: Iterable[Any],
    naming: str,
    errors: tuple[type[Exception], ...] = OURS,
) -> None:
    """Every one of these values is refused, by an error of ours that names what is wrong."""
    wrong = {}
    for value in values:
        told = "nothing was refused"
        try:
            found = call(value)
            if inspect.isawaitable(found):
                await found
        except errors as error:
            told = "" if re.search(naming, str(error)) else repr(error)
        except Exception as error:
            told = repr(error)
        if told:
            wrong[shown(value, 40)] = told
    assert wrong == {}


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("not even this")


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


UNSHOWN = (10**5000, nested(50_000), Broken(), "\ud800", [Broken()])
"""What Python can't put into words, and what no output can be written with."""


async def test_what_cannot_be_shown_is_refused_in_words_all_the_same(nq):
    await nq.create_queue(Q)
    take: Any = Queue
    calls: list[tuple[Callable[[Any], Any], str]] = [
        (lambda value: nq.send(Q, 1, priority=value), "priority"),
        (lambda value: nq.send(Q, 1, delay=value), "delay"),
        (lambda value: nq.send(Q, 1, retry_backoff=value), "retry_backoff"),
        (lambda value: nq.send(Q, 1, key=value), "key"),
        (lambda value: nq.send(Q, 1, headers=value), "headers"),
        (lambda value: nq.send(Queue("text", bool), value), "data"),
        (lambda value: nq.send(value, 1), "queue"),
        (lambda value: nq.send_flow(value), "Flow"),
        (lambda value: nq.complete(value), "fetch"),
        (lambda value: take(value), "queue"),
        (lambda value: take("x", policy=value), "policy"),
        (lambda value: take("x", bell=value), "bell"),
        (lambda value: take("x", schedules=value), "schedules"),
        (lambda value: take("x").worker(value), "worker"),
        (lambda value: Runtime(value), "queue"),
        (lambda value: Runtime([served()], middleware=[value]), "middleware"),
        (lambda value: Runtime([served()], lease=value), "lease"),
        (lambda value: notifyq.Schedule(value), "cron"),
        (lambda value: notifyq.Schedule("* * * * *", timezone=value), "time zone"),
        (lambda value: notifyq.Schedule(every=value), "every"),
    ]
    for call, naming in calls:
        await refused(call, UNSHOWN, naming)


def work(job: Job[int]) -> int:
    return job.data


def served(name: str = "q") -> Queue[int, int]:
    queue = Queue(name, int, int)
    queue.worker(work)
    return queue


# send

SEND_OPTIONS = {
    "priority": (*NOT_INTS, 40_000, -40_000),
    "delay": NOT_SECONDS,
    "retry_limit": (*NOT_INTS, -1, 1001),
    "retry_delay": (*NOT_SECONDS, -1),
    "retry_delay_max": (*NOT_SECONDS, -1),
    "retry_backoff": (1, 0, 2.5, "yes"),
    "timeout": NOT_ABOVE_ZERO,
    "expire_in": NOT_ABOVE_ZERO,
    "headers": ([1], "x", 5, {"x": NAN}, {"x": object()}),
    "id_key": (*NOT_TEXT, *UNREADABLE, Random(1).randbytes(5000).hex()),
    "nonsense": (1,),
    "visibility_timeout": (1,),
    "lock_duration": (1,),
    "name": ("x",),
}


@pytest.mark.parametrize("option", SEND_OPTIONS)
async def test_a_bad_option_of_a_send_is_named_and_nothing_is_sent(nq, option):
    await nq.create_queue(Q)
    await refused(lambda value: nq.send(Q, 1, **{option: value}), SEND_OPTIONS[option], option)
    assert await nq.jobs() == []


@pytest.mark.parametrize("option", SEND_OPTIONS)
async def test_a_bad_option_of_one_job_of_many_is_named_and_none_is_sent(nq, option):
    await nq.create_queue(Q)

    async def send(value: Any) -> None:
        await nq.send_many(Q, [1, NewJob(2, {"priority": 1}), NewJob(3, {option: value})])

    await refused(send, SEND_OPTIONS[option], option)
    assert await nq.jobs() == []


async def test_a_bad_option_of_a_statement_is_named():
    await refused(lambda value: Q.statement(1, delay=value), NOT_SECONDS, "delay")
    await refused(lambda value: Q.statement(1, schema=value), (5, None, "", "No", "pg_x", "a\x00b"), "schema")


async def test_what_is_no_connection_is_refused_and_nothing_is_sent(nq, dsn):
    await nq.create_queue(Q)
    with psycopg.connect(dsn) as alien:
        await refused(lambda value: nq.send(Q, 1, connection=value), (5, "x", alien), "connection must be one")
        await refused(lambda value: nq.cancel(1, connection=value), (5, "x", alien), "connection must be one")
    assert await nq.jobs() == []


async def test_an_option_that_is_none_is_inherited(nq):
    await nq.create_queue(Queue("q", int, int, priority=7))
    await nq.send(Q, 1, priority=None)
    await nq.send_many(Q, [NewJob(2, {"priority": None, "delay": None, "id_key": None, "headers": None})])
    assert [(record.data, record.priority) for record in await nq.jobs()] == [(2, 7), (1, 7)]


async def test_what_are_not_jobs_are_not_sent(nq):
    await nq.create_queue(Q)
    await refused(lambda jobs: nq.send_many(Q, jobs), (5, None, "1", ["1"]), "")
    await refused(lambda options: NewJob(1, options), (5, None, "x"), "options of a NewJob")
    assert await nq.jobs() == []


async def test_bad_data_is_refused_with_its_queue_and_nothing_is_sent(nq):
    await nq.create_queue(Q)
    data = (True, 2.5, "1", None, NAN, [1], NAIVE, object())
    for send in (lambda one: nq.send(Q, one), lambda one: nq.send_many(Q, [1, one]), Q.statement):
        await refused(send, data, "data for queue 'q'", (InvalidData,))
    assert await nq.jobs() == []


# queues

QUEUE_OPTIONS = {
    "retry_limit": (*NOT_INTS, -1, None, NAIVE),
    "retry_delay": (*NOT_SECONDS, -1, None),
    "retry_delay_max": (*NOT_SECONDS, -1, None),
    "retry_backoff": (2.5, "x", None, NAN),
    "timeout": (*NOT_ABOVE_ZERO, None),
    "priority": (*NOT_INTS, 40_000, None),
    "retention": (*NOT_SECONDS, -1),
    "expire_in": NOT_ABOVE_ZERO,
    "dead_letter": (True, 5, NAN, [1], *UNREADABLE),
    "max_data_bytes": (*NOT_INTS, 0, -1, None),
    "bell": (True, 1, "sometimes", None, NAN, "\ud800"),
    "nonsense": (1,),
}


@pytest.mark.parametrize("option", QUEUE_OPTIONS)
async def test_a_bad_option_of_a_queue_is_named_and_no_queue_is_made(nq, option):
    await refused(lambda value: nq.create_queue(Queue("q", int, int, **{option: value})), QUEUE_OPTIONS[option], option)
    assert await nq.queue_stats() == []


@pytest.mark.parametrize("option", QUEUE_OPTIONS)
async def test_a_bad_option_changes_nothing_of_a_queue(nq, option):
    standing = Queue("q", retry_delay_max=7)
    await nq.create_queue(standing)
    await refused(
        lambda value: nq.update_queue(Queue("q", int, int, **{"retry_delay_max": 9, option: value})),
        QUEUE_OPTIONS[option],
        option,
    )
    assert await nq.create_queue(standing) == "exists"


async def test_a_queue_that_cannot_be_made_leaves_no_dead_letter_queue_behind(nq):
    with pytest.raises(InvalidOption, match="retry_limit"):
        await nq.create_queue(Queue("q", retry_limit=-1, dead_letter=Queue("dead")))
    assert await nq.queue_stats() == []


async def test_a_bad_queue_name_is_refused():
    names = (5, None, True, ["q"], "", "a b", "a\n", "x" * 101, "[x]", *UNREADABLE)
    await refused(Queue, names, "queue name", (InvalidOption,))


async def test_what_is_no_type_is_refused_as_data_and_as_output():
    for declare in (lambda type_: Queue("q", type_), lambda type_: Queue("q", int, type_)):
        await refused(declare, (5, "int", (int,), lambda: 1, [int], {}), "queue 'q'", (InvalidData,))


# workers

WORKER_OPTIONS = {
    "concurrency": (*NOT_INTS, 0, -1, 10_001, None),
    "batch_size": (*NOT_INTS, 0, -1, 10_001),
    "poll_interval": NOT_ABOVE_ZERO,
    "middleware": ([42], [None], "x", [lambda: None], [lambda a, b: None], 42),
    "nonsense": (1,),
    "visibility_timeout": (1,),
    "lock_duration": (1,),
    "name": ("x",),
}


@pytest.mark.parametrize("option", WORKER_OPTIONS)
async def test_a_bad_option_of_a_worker_is_named_and_none_is_registered(option):
    async def in_batch(jobs: list[Job[int]]) -> None: ...

    queue = Queue("q", int, int)
    for register in (
        lambda value: queue.batch_worker(**{"batch_size": 2, option: value})(in_batch),
        lambda value: queue.worker(**{option: value})(work),
        lambda value: queue.worker(work, **{option: value}),
    ):
        await refused(register, WORKER_OPTIONS[option], option)
    assert queue.worker_function is None
    queue.worker(work)
    assert queue.worker_function is not None


def test_bounds_of_priorities_and_ageing_exclude_each_other():
    for bound in ("min_priority", "max_priority"):
        with pytest.raises(InvalidOption, match=f"there is no {bound}"):
            Queue("q", int, int, ageing=60).worker(**{bound: 1})(work)


def test_a_subscriber_is_no_async_function():
    async def subscriber(event: notifyq.events.Event) -> None: ...

    with pytest.raises(InvalidOption, match="can't be async"):
        Runtime([served()]).subscribe(subscriber)


async def test_what_cannot_be_a_worker_is_refused():
    def one_too_many(job: Job[int], more: int) -> int:
        return more

    def generates(job: Job[int]) -> Any:
        yield job

    async def generates_asynchronously(job: Job[int]) -> Any:
        yield job

    queue = Queue("q", int, int)
    functions = (5, "work", lambda: 1, one_too_many, generates, generates_asynchronously, int, max)
    await refused(queue.worker, functions, "worker of queue 'q'")
    await refused(queue.batch_worker(batch_size=2), (*functions, work), "worker of queue 'q'")
    assert queue.worker_function is None


class Tenfold:
    async def __call__(self, job: Job[int]) -> int:
        await trio.lowlevel.checkpoint()
        return job.data * 10

    async def method(self, job: Job[int]) -> int:
        return await self(job)

    async def times(self, by: int, job: Job[int]) -> int:
        return await self(job) * by


@pytest.mark.parametrize(
    "function",
    [Tenfold(), Tenfold().method, functools.partial(Tenfold().times, 1)],
    ids=["object", "method", "partial"],
)
async def test_what_is_called_asynchronously_is_an_async_worker(nq, dsn, function):
    queue = Queue("q", int, int)
    queue.worker(function)
    await nq.create_queue(queue)
    sent = await nq.send(queue, 1)
    assert await testing.run_waiting([queue], dsn=dsn) == {"completed": 1}
    assert await nq.result(sent) == 10


@pytest.mark.parametrize("option", ["poll_interval", "lease", "grace", "connect_timeout", "touch"])
async def test_a_duration_of_a_runtime_may_be_a_timedelta(nq, dsn, option):
    queue = Queue("q", int, int)
    second = timedelta(seconds=1)

    @queue.worker(poll_interval=second if option == "poll_interval" else None)
    async def take(job: Job[int]) -> int:
        if option == "touch":
            await job.touch(second)
        return job.data

    runtime = Runtime([queue], dsn=dsn, **({option: second} if option in ("lease", "grace", "connect_timeout") else {}))
    failed: list[notifyq.events.Event] = []
    runtime.subscribe(failed.append, notifyq.events.JobFailed)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            client = await nursery.start(runtime.run)
            sent = await client.send(queue, 1)
            while (await nq.get(sent)).state != "completed" and not failed:
                await trio.sleep(0.01)
            runtime.stop()
    assert failed == []


async def test_a_duration_of_a_client_may_be_a_timedelta(dsn):
    second = timedelta(seconds=1)
    async with notifyq.connect(dsn, connect_timeout=second) as client:
        await client.create_queue(Queue("q", int, int, retry_delay=second))
        await client.send(Q, 1)
        [job] = await client.fetch(Q, lease=second)
        await client.touch(job, timedelta(hours=1))
        assert await client.fail(job, "x", retry_in=second)


# runtimes

RUNTIME_OPTIONS = {
    "lease": (*NOT_ABOVE_ZERO, 0.5, 3601),
    "grace": (*NOT_SECONDS, -1),
    "connect_timeout": (*NOT_ABOVE_ZERO, 86_401),
    "pool_size": (*NOT_INTS, 0, -1, 1001),
    "middleware": ([42], [lambda: None], 42, None),
    "schema": ("", "No", "pg_x", "a b", *UNREADABLE, 5, None),
}


@pytest.mark.parametrize("option", RUNTIME_OPTIONS)
async def test_a_bad_option_of_a_runtime_is_named(option):
    await refused(lambda value: Runtime([served()], **{option: value}), RUNTIME_OPTIONS[option], option)


async def test_what_a_runtime_cannot_serve_is_refused():
    await refused(Runtime, [[]], "at least one queue")
    await refused(Runtime, [[Queue("q")]], "queue 'q' has no worker")
    await refused(Runtime, [[served("a"), served(), served()]], "queue 'q' is given twice")
    await refused(Runtime, [["q"], [5], served(), "q", 5, None], "queue")


# connect

CONNECT_OPTIONS = {
    "pool_size": (*NOT_INTS, 0, -1, 1001),
    "connect_timeout": (*NOT_ABOVE_ZERO, 86_401),
    "schema": ("", "No", "pg_x", "a b", *UNREADABLE, 5, None),
    "dsn": ("", "x", 5, [1], "\ud800"),
}


@pytest.mark.parametrize("option", CONNECT_OPTIONS)
async def test_a_bad_option_of_connect_is_named_and_nothing_is_installed(empty_dsn, option):
    async def connect(value: Any) -> None:
        async with notifyq.connect(**{"dsn": empty_dsn, option: value}):
            pass

    await refused(connect, CONNECT_OPTIONS[option], f"(?i){option}")
    with psycopg.connect(empty_dsn) as connection:
        assert connection.execute("select to_regnamespace('notifyq')").fetchone() == (None,)


@pytest.mark.parametrize(
    "dsn_",
    [
        "postgresql://user:top@secret@nowhere.invalid/db",
        "postgresql://user:top/secret@nowhere.invalid/db",
        "postgresql://user:top#secret@nowhere.invalid/db",
        "postgresql://user:top?secret@nowhere.invalid/db",
        "postgresql://user:top%secret@nowhere.invalid/db",
        "postgresql://user:top secret@nowhere.invalid/db",
        "postgresql://user:secret@[nowhere/db",
        "postgresql://user:secret@nowhere.invalid:port/db",
        "postgresql://user:secret@nowhere.invalid/db?nonsense=1",
        "mysql://user:secret@nowhere.invalid/db",
        "user:secret@nowhere.invalid/db",
        "host=nowhere.invalid password=top secret",
        "host=nowhere.invalid password='secret",
        "host=nowhere.invalid port=x password=secret",
    ],
)
async def test_a_malformed_dsn_never_shows_its_password(dsn_, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", dsn_)
    with trio.fail_after(20), pytest.raises(notifyq.NotifyqError) as caught:
        async with notifyq.connect(connect_timeout=0.2):
            pass
    error: BaseException | None = caught.value
    while error is not None:  # as a traceback would show it
        assert "cret" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


# the client


async def test_what_is_not_a_declaration_is_refused_where_one_is_needed(nq):
    await nq.create_queue(Q)
    for call in (
        nq.create_queue,
        nq.update_queue,
        nq.fetch,
        lambda queue: nq.send(queue, 1),
        lambda queue: nq.send_many(queue, [1]),
    ):
        await refused(call, ("q", None, *NOT_TEXT), "give the queue's declaration")
    assert await nq.jobs() == []


async def test_what_is_no_list_is_refused_where_one_is_needed(nq):
    no_lists = (5, None, True, "q", b"q", Q)
    await refused(nq.declare, no_lists, "queues must be a list")
    await refused(lambda after: notifyq.Flow().add(Q, 1, after=after), no_lists, "after must be a list")
    assert await nq.queue_stats() == []


BY_NAME = {
    "delete_queue": lambda nq, queue: nq.delete_queue(queue),
    "delete_all": lambda nq, queue: nq.delete_all(queue),
    "jobs": lambda nq, queue: nq.jobs(queue=queue),
    "redrive": lambda nq, queue: nq.redrive(queue),
    "source": lambda nq, queue: nq.redrive("dead", source=queue),
}


@pytest.mark.parametrize("call", BY_NAME)
async def test_what_cannot_be_the_name_of_a_queue_touches_none(nq, call):
    await nq.create_queue(Queue("dead", int))
    await nq.create_queue(Queue("q", int, retry_limit=0, dead_letter="dead"))
    await nq.create_queue(Queue("other", int))
    await nq.send(Q, 1)
    await nq.update_queue(Queue("q", dead_letter=None))
    await refused(lambda name: BY_NAME[call](nq, name), (*UNREADABLE, *NOT_TEXT), "q|name|text", (*OURS, UnknownQueue))
    assert [row["queue"] for row in await nq.queue_stats()] == ["dead", "other", "q"]
    assert len(await nq.jobs()) == 1


@pytest.mark.parametrize("call", ["get", "result", "cancel", "retry", "resume", "delete"])
async def test_what_is_not_a_job_is_refused_and_the_others_are_left_alone(nq, call):
    await nq.create_queue(Q)
    sent = await nq.send(Q, 1)
    others = () if call in ("get", "result") else (sent,)
    values = (True, 2.5, NAN, 0, -1, HUGE, "1", None, [1])
    await refused(lambda job: getattr(nq, call)(*others, job), values, "a job's id")
    assert (await nq.get(sent)).state == "ready"


async def test_what_is_not_a_state_is_named(nq):
    states = ("waiting", "finished", "sleeping", "", "Ready", 5, True, *UNREADABLE)
    await refused(lambda state: nq.jobs(state=state), states, "is not a state")


async def test_nothing_is_deleted_for_what_is_not_a_state(nq):
    await nq.create_queue(Q)
    await nq.send(Q, 1)
    states = ("sleeping", "", "Ready", 5, True, "ready\x00x", "\ud800")
    await refused(lambda state: nq.delete_all(Q, state), states, "state")
    assert len(await nq.jobs()) == 1


async def test_a_bad_option_of_fetch_is_named_and_nothing_is_claimed(nq):
    await nq.create_queue(Q)
    await nq.send(Q, 1)
    await refused(lambda value: nq.fetch(Q, value), (*NOT_INTS, 0, -1, 100_001, None), "how_many")
    await refused(lambda value: nq.fetch(Q, lease=value), NOT_ABOVE_ZERO, "lease")
    assert [record.state for record in await nq.jobs()] == ["ready"]


async def test_a_bad_limit_of_jobs_is_named(nq):
    await refused(lambda value: nq.jobs(limit=value), (*NOT_INTS, -1, None), "limit")


REDRIVE_OPTIONS = {
    "how_many": (*NOT_INTS, 0, -1),
    "error_type": (*NOT_TEXT, "Error\x00x", "\ud800"),
    "preview": (2.5, NAN, "no", None),
}


@pytest.mark.parametrize("option", REDRIVE_OPTIONS)
async def test_a_bad_option_of_redrive_is_named_and_nothing_moves(nq, option):
    queue = Queue("q", int, int, dead_letter=Queue("dead"))
    await nq.create_queue(queue)
    await nq.send(queue, 1)
    [job] = await nq.fetch(queue)
    await nq.fail(job, "a", final=True)
    await nq.delete(job.id)
    await refused(lambda value: nq.redrive("dead", **{option: value}), REDRIVE_OPTIONS[option], option)
    assert [record.queue for record in await nq.jobs()] == ["dead"]


WRONG_SETTLES = {
    "touch": (lambda nq, job, value: nq.touch(job, value), (*NOT_SECONDS, -1)),
    "retry_in": (lambda nq, job, value: nq.fail(job, "x", retry_in=value), (*NOT_SECONDS, -1)),
    "final": (lambda nq, job, value: nq.fail(job, "x", final=value), (2.5, "no", None)),
    "data|text": (lambda nq, job, value: nq.complete(job, value), (NAN, object(), "\x00", "\ud800")),
}


@pytest.mark.parametrize("naming", WRONG_SETTLES)
async def test_a_job_that_is_settled_wrongly_is_still_held(nq, naming):
    await nq.create_queue(Q)
    await nq.send(Q, 1)
    [job] = await nq.fetch(Q, lease=600)
    call, values = WRONG_SETTLES[naming]
    await refused(lambda value: call(nq, job, value), values, naming)
    record = await nq.get(job.id)
    assert record.state == "active"
    assert 590 < (record.deadline - record.claimed_at).total_seconds() < 610
    assert await nq.complete(job, 1)


async def test_what_was_not_fetched_cannot_be_settled(nq):
    for call in (nq.complete, lambda job: nq.fail(job, "x"), lambda job: nq.touch(job, 5)):
        await refused(call, (1, None, "1"), "job")


async def test_a_bad_touch_of_a_running_job_is_named_and_costs_it_nothing(start, nq):
    queue = Queue("q", int, int, retry_limit=0)

    @queue.worker
    async def take(job: Job[int]) -> int:
        before = job.deadline
        await refused(job.touch, (*NOT_SECONDS, -1), "touch")
        assert job.deadline == before
        return job.data

    await start(queue)
    with trio.fail_after(5):
        assert await nq.result(await nq.send(queue, 1)) == 1


async def test_fetch_gives_what_can_be_read_and_fails_the_rest_by_name(nq):
    await nq.create_queue(Q)
    good, bad, fine = await nq.send_many(Queue("q"), [1, "two", 3])
    fetched = await nq.fetch(Q, 3)
    assert [(job.id, job.data) for job in fetched] == [(good.id, 1), (fine.id, 3)]
    record = await nq.get(bad)
    assert (record.state, record.attempt) == ("failed", 1)
    assert record.error is not None
    assert record.error["type"] == "data_invalid"
    assert "expected int @ $" in record.error["message"]
    assert [await nq.complete(job, job.data) for job in fetched] == [True, True]


# the command line


def test_a_flow_names_what_is_not_named_and_takes_no_pattern():
    flow = notifyq.Flow()
    flow.add(Q, 1, name="q-2")
    assert [flow.add(Q, 1).name, flow.add(Q, 1).name] == ["q-3", "q-4"]
    with pytest.raises(InvalidOption, match=r"'x\.\*' is a pattern"):
        flow.add(Queue("x.*", int), 1)


UNTAKEN = {"1e5000": Any, "1" + "0" * 400: float}
"""What jsonb holds, and Python cannot read: more digits than an int may have, more than a double's range."""


@pytest.mark.parametrize("data", UNTAKEN)
async def test_a_number_that_python_cannot_take_fails_its_job_alone(start, nq, connection, data):
    queue = Queue("q", UNTAKEN[data], float)
    ran = []

    @queue.batch_worker(batch_size=5)
    async def work(jobs):
        ran.extend(job.id for job in jobs)

    await nq.create_queue(queue)
    sent = [await nq.send(queue, 1.0)]
    cursor = await connection.execute("select notifyq.send('q', %s)", (data,))
    [(huge,)] = await cursor.fetchall()
    sent.append(await nq.send(queue, 2.0))
    seen = await start(queue)
    failed, *_ = await seen.wait(notifyq.events.JobFailed)
    await seen.wait(notifyq.events.JobCompleted, 2)
    assert (failed.job_id, failed.type) == (huge, "data_invalid")
    assert ran == [job.id for job in sent]
    if UNTAKEN[data] is Any:
        with pytest.raises(InvalidData, match="data cannot be read"):
            await nq.get(huge)


async def test_a_number_beyond_a_doubles_range_is_not_sent_as_one(nq):
    queue = Queue("q", float)
    await nq.create_queue(queue)
    with pytest.raises(InvalidData, match="beyond a double's range"):
        await nq.send(queue, 10**400)


@pytest.mark.parametrize(
    ("error", "kind", "message", "state"),
    [
        (ValueError("a\0b\ud800"), "ValueError", "a\ufffdb?", "scheduled"),
        (ValueError("long" * 10_000), "ValueError", "long", "scheduled"),
        ("a\0b", "Error", "a\ufffdb", "scheduled"),
        (notifyq.Fail("never again"), "Fail", "never again", "failed"),
    ],
)
async def test_a_job_fails_by_hand_as_in_a_worker(nq, error, kind, message, state):
    queue = Queue("q", retry_delay=60)
    await nq.create_queue(queue)
    await nq.send(queue, 1)
    [job] = await nq.fetch(queue)
    assert await nq.fail(job, error)
    record = await nq.get(job.id)
    assert (record.state, record.error["type"], record.error["message"].startswith(message)) == (state, kind, True)
    assert len(record.error["message"]) < 3_000
    assert (record.error["traceback"] is not None) == isinstance(error, Exception)


async def test_retry_by_hand_says_when_and_what_fails_nothing_is_refused(nq):
    queue = Queue("q")
    await nq.create_queue(queue)
    await nq.send(queue, 1)
    [job] = await nq.fetch(queue)
    for error in (notifyq.Snooze(1), notifyq.Discard()):
        with pytest.raises(InvalidOption, match=f"not {type(error).__name__}"):
            await nq.fail(job, error)
    assert await nq.fail(job, notifyq.Retry(3600))
    record = await nq.get(job.id)
    assert record.due_at is not None
    assert (record.due_at - record.sent_at).total_seconds() > 3000


async def test_values_of_classes_are_taken_where_no_type_is_declared(nq):
    @attrs.frozen
    class Echo:
        at: datetime

    queue = Queue("q", Echo, Echo)
    await nq.create_queue(queue)
    value, plain = Echo(datetime(2030, 1, 1, tzinfo=UTC)), {"at": "2030-01-01T00:00:00+00:00"}
    sent = await nq.send(queue, value)
    assert await nq.update_job(sent.id, data=value)
    assert (await nq.get(sent)).data == plain
    [job] = await nq.fetch(queue)
    with pytest.raises(InvalidData):
        await nq.complete(job, object())
    assert await nq.complete(job, value)
    assert await nq.result(sent) == value
    await nq.subscribe("done", queue)
    await nq.publish("done", [value])
    assert [record.data for record in await nq.jobs(state="ready")] == [[plain]]


def command(dsn: str, *arguments: str) -> Awaitable[str]:
    """What a command prints."""
    return trio.to_thread.run_sync(
        lambda: (
            subprocess.run(
                [sys.executable, "-m", "notifyq", *arguments],
                env={**os.environ, "DATABASE_URL": dsn, "COLUMNS": "300"},
                stdout=subprocess.PIPE,
                text=True,
                timeout=60,
                check=True,
            ).stdout
        )
    )


async def test_the_command_line_prints_what_looks_like_markup_literally(nq, dsn):
    texts = [
        "[/api/v1] refused",
        "[true]",
        "[bold]loud[/bold]",
        "[link=http://example.org]here[/link]",
        r"C:\new\[x]",
        "ends with \\",
        "{braces} %s 100%",
        "a :bomb: went off",
    ]
    queue = Queue("q", retry_limit=0)
    await nq.create_queue(queue)
    sent = await nq.send_many(queue, [[True] for _ in texts])
    for job, text in zip(await nq.fetch(queue, len(texts)), texts, strict=True):
        await nq.fail(job, text, final=True)
    listed = await command(dsn, "jobs")
    lines = [line.rstrip() for line in listed.splitlines()]
    assert [text for text in texts if not any(line.endswith(f" {text}") for line in lines)] == []
    assert listed.count("[true]") == len(texts) + 1
    shown = [await command(dsn, "show", str(job.id)) for job in sent]
    errors = [[line.rstrip() for line in found.splitlines() if line.startswith("error ")] for found in shown]
    assert errors == [[f"error        Error: {text}"] for text in texts]

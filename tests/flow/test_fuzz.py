"""Whatever a public function is given, it ends in an error of ours that says so, or in jobs that are whole.

So does whatever a handler returns or raises. The arguments always fit the signature. ``NOTIFYQ_FUZZ`` is how many
examples at least, other ones each time (``make fuzz``); without it there are a few, always the same.
"""

from __future__ import annotations

import inspect
import os
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import psycopg
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import notifyq
from notifyq import Flow, Job, NewJob, NotifyqError, Queue, Runtime, Schedule, events, testing

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLES = int(os.environ.get("NOTIFYQ_FUZZ", "0"))
Q = Queue("q", int, int)

CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


class Nested:
    """Stands for a list in a list in a list, so many that hypothesis could not show it."""


NESTED = Nested()


def meant(value: Any) -> Any:
    if value is NESTED:
        value = 1
        for _ in range(20_000):
            value = [value]
    return value


VALUES = (
    *(None, True, False, 0, 1, -1, 1.5, 10**20, 10**400, 2**31, 2**63, -(2**63)),
    *(float("nan"), float("inf"), -float("inf"), 1e308, 1e-320, Decimal("NaN"), Decimal("1e999999"), 1j),
    *(
        "",
        "q",
        "q\x00x",
        "\ud800",
        "a b",
        'a"; drop table x; --',
        "'; drop schema notifyq cascade; --",
        "$$",
        "\\",
        "%s",
        "*",
        "x" * 2000,
    ),
    *(
        "* * * * *",
        "0 0 31 2 *",
        "*/0 * * * *",
        "Europe/Berlin",
        "../../etc/passwd",
        "ready",
        "pg_x",
        "public",
        "quiet",
        "ordered",
    ),
    *(
        b"q",
        bytearray(b"q"),
        [],
        [1],
        ["q"],
        {},
        {"a": 1},
        {1: 2},
        {"a": float("nan")},
        (),
        set(),
        CIRCLE,
        NESTED,
        object(),
        int,
        Q,
        range(3),
    ),
    *(
        datetime.max,
        datetime.min,
        datetime.max.replace(tzinfo=UTC),
        datetime.min.replace(tzinfo=UTC),
        datetime(1969, 1, 1, tzinfo=UTC),
    ),
    *(timedelta.max, timedelta.min, timedelta(0), timedelta(days=36_600), date(2030, 1, 1), lambda: 1, NewJob(1)),
)
anything = (
    st.sampled_from(VALUES)
    | st.text(max_size=20)
    | st.integers()
    | st.floats()
    | st.datetimes()
    | st.timedeltas()
    | st.recursive(
        st.none() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    )
)

SEND = (
    "priority",
    "delay",
    "retry_limit",
    "retry_delay",
    "retry_delay_max",
    "retry_backoff",
    "timeout",
    "expire_in",
    "headers",
    "id_key",
    "key",
    "throttle",
    "debounce",
    "nonsense",
)
QUEUE = (
    *SEND[2:8],
    "priority",
    "retention",
    "dead_letter",
    "max_data_bytes",
    "bell",
    "policy",
    "key_limit",
    "active_limit",
    "rate_limit",
    "rate_period",
    "key_rate_limit",
    "key_rate_period",
    "fair",
    "ageing",
    "schedules",
    "nonsense",
)
WORKER = (
    "concurrency",
    "poll_interval",
    "middleware",
    "min_priority",
    "max_priority",
    "key_limit",
    "transaction",
    "nonsense",
)
RUNTIME = (
    *("lease", "grace", "connect_timeout", "pool_size", "middleware", "schema", "dsn"),
    *("listen_dsn", "migrate"),
)
CONNECT = ("dsn", "listen_dsn", "schema", "migrate", "pool_size", "connect_timeout")

OPENED = "an open transaction"
"""Stands for a connection of the client's, in a transaction."""

METHODS = {
    name: inspect.signature(method)
    for name, method in inspect.getmembers(notifyq.Client, inspect.iscoroutinefunction)
    if not name.startswith("_")
}
FITS: dict[str, Any] = {
    "queue": Q,
    "queues": [Q],
    "data": 1,
    "jobs": [1, 2],
    "event": "event",
    "key": "k",
    "name": "default",
}


def a_few(examples: int, *, shrink: bool = True) -> Any:
    """How hypothesis is to go about it."""
    return settings(
        max_examples=max(EXAMPLES, examples),
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


def some(names: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    """One or two options, anything as their values."""
    return st.dictionaries(st.sampled_from(names), anything, min_size=1, max_size=2)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, list[Any], dict[str, Any]]:
    """A method of the client with its arguments; ``job`` stands for one that was sent or fetched."""
    name = draw(st.sampled_from(sorted(METHODS)))
    parameters = [one for one in METHODS[name].parameters.values() if one.name != "self"]
    wrong = draw(st.sets(st.sampled_from([one.name for one in parameters] or [""]), max_size=2))
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for one in parameters:
        if one.kind is one.VAR_KEYWORD:
            named |= draw(some(SEND))
        elif one.kind is one.VAR_POSITIONAL:
            positional += [draw(anything)] if one.name in wrong else [1]
        elif one.name == "connection" and one.name not in wrong:
            named |= {one.name: OPENED} if draw(st.booleans()) else {}
        elif one.name in wrong:
            value = draw(anything)
            if one.kind is one.KEYWORD_ONLY:
                named[one.name] = value
            else:
                positional.append(value)
        elif one.default is one.empty or (one.name == "job" and draw(st.booleans())):
            value = FITS.get(one.name, one.name)
            if one.kind is one.KEYWORD_ONLY:
                named[one.name] = value
            else:
                positional.append(value)
        elif one.kind is not one.KEYWORD_ONLY:
            positional.append(one.default)
    return name, positional, named


def shown(arguments: Any) -> str:
    """What was given, as far as it can be shown."""
    try:
        return f"{arguments!a:.300}"
    except (RecursionError, ValueError) as error:  # too deep, or an int of too many digits
        return repr(error)


def wrong_with(error: BaseException) -> str | None:
    """What is wrong with an error, if anything."""
    if isinstance(error, NotifyqError):
        return None if str(error) else f"{type(error).__name__} says nothing"
    return f"{type(error).__name__}: {error!s:.300}"


NOT_WHOLE = b"""
with ticket as (
    select job from notifyq.ready union all select job from notifyq.scheduled union all select job from notifyq.blocked
    union all select job from notifyq.active
)
select j.id, count(t.job) from notifyq.job j full join ticket t on t.job = j.id
group by j.id
having count(t.job) <> 1 or j.id is null
"""


@a_few(2, shrink=False)
@given(made=st.lists(calls(), min_size=40, max_size=60))
async def test_every_method_of_the_client_ends_well(
    server: str, template: str, made: list[tuple[str, list[Any], dict[str, Any]]]
) -> None:
    async with testing.fresh_database(server, template=template) as own, notifyq.connect(own) as nq:
        assert await faults(nq, made) == []


async def faults(nq: notifyq.Client, made: list[tuple[str, list[Any], dict[str, Any]]]) -> list[Any]:
    """Make the calls, one after another; what went wrong."""
    found: list[Any] = []
    for name, positional, named in made:
        await nq.create_queue(Q)  # it may have been deleted, or paused
        await nq.resume_queue(Q)
        sent = await nq.send(Q, 1)
        fetched = await nq.fetch(Q)
        job = fetched[0] if name in ("complete", "fail", "touch") and fetched else sent
        called = f"{name}{shown((positional, named))}"
        arguments = [job if value == "job" else meant(value) for value in positional]
        named = {option: meant(value) for option, value in named.items()}
        try:
            with trio.move_on_after(0.05 if name == "result" else 10) as patience:
                if named.get("connection") == OPENED:
                    async with nq.transaction() as named["connection"]:
                        await getattr(nq, name)(*arguments, **named)
                else:
                    await getattr(nq, name)(*arguments, **named)
            if patience.cancelled_caught and name != "result":
                found.append(f"{called} does not end")
        except Exception as error:
            told = wrong_with(error)
            if told:
                found.append(f"{called}: {told}")
    await nq.jobs()
    async with nq.connection() as connection:
        return found + await (await connection.execute(NOT_WHOLE)).fetchall()


def work(job: Job[int]) -> int:
    return job.data


def served() -> Queue[int, int]:
    queue = Queue("q", int, int)
    queue.worker(work)
    return queue


async def work_all(jobs: list[Job[int]]) -> None: ...


RECORD = notifyq.ScheduleRecord(
    queue="q",
    name="default",
    cron="0 0 1 1 *",
    every=None,
    timezone="UTC",
    missed="once",
    data=None,
    headers=None,
    declared=False,
    next_at=None,
    fired_for=None,
    job=None,
    error=None,
    changed_at=datetime(2030, 1, 1, tzinfo=UTC),
)

DECLARATIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "Queue": (lambda **options: Queue("q", int, int, **options), QUEUE),
    "Queue's name": (
        lambda name="q", data_type=int, output_type=int: Queue(name, data_type, output_type),
        ("name", "data_type", "output_type"),
    ),
    "Queue.worker": (lambda **options: Queue("q", int, int).worker(work, **options), WORKER),
    "Queue.worker's function": (lambda function: Queue("q", int, int).worker(function), ("function",)),
    "Queue.batch_worker": (
        lambda batch_size=2, **options: Queue("q", int, int).batch_worker(batch_size=batch_size, **options)(work_all),
        ("batch_size", *WORKER),
    ),
    "Runtime": (lambda **options: Runtime([served()], **options), RUNTIME),
    "Runtime's queues": (lambda queues: Runtime(queues), ("queues",)),
    "Runtime.subscribe": (lambda subscriber: Runtime([served()]).subscribe(subscriber), ("subscriber",)),
    "Runtime.subscribe's kinds": (lambda kind: Runtime([served()]).subscribe(print, kind), ("kind",)),
    "run": (lambda runtime: notifyq.run(runtime), ("runtime",)),
    "Schedule": (
        lambda cron="* * * * *", **options: Schedule(cron, **options),
        ("cron", "every", "name", "timezone", "missed", "data", "headers"),
    ),
    "Schedule.next_firings": (
        lambda count=1, after=None: Schedule("0 0 1 1 *").next_firings(count, after=after),
        ("count", "after"),
    ),
    "ScheduleRecord.next_firings": (lambda count: RECORD.next_firings(count), ("count",)),
    "Queue.statement": (lambda data=1, **options: Q.statement(data, **options), ("data", "schema", *SEND)),
    "NewJob": (lambda options: NewJob(1, options), ("options",)),
    "testing.with_database": (
        lambda dsn="dbname=x", database="y": testing.with_database(dsn, database),
        ("dsn", "database"),
    ),
    "Flow.add": (
        lambda queue=Q, data=1, **options: Flow().add(queue, data, **options),
        ("queue", "data", "name", "after", "on_failure", *SEND),
    ),
}


@a_few(1000)
@given(st.sampled_from(sorted(DECLARATIONS)), st.data())
def test_every_declaration_ends_well(name: str, data: st.DataObject) -> None:
    declare, options = DECLARATIONS[name]
    given_ = data.draw(some(options) if len(options) > 1 else st.fixed_dictionaries({options[0]: anything}))
    told = None
    try:
        declare(**{option: meant(value) for option, value in given_.items()})
    except Exception as error:
        told = wrong_with(error)
    assert told is None, f"{name} {shown(given_)}: {told}"


async def told_by(call: Callable[[], Any], allowed: tuple[type[BaseException], ...] = ()) -> str | None:
    """What is wrong with how something ends, if anything; what is ``allowed`` may be raised."""
    try:
        with trio.fail_after(20):
            await call()
    except allowed:
        return None
    except Exception as error:
        return wrong_with(error)
    return None


@a_few(25, shrink=False)
@given(options=some(CONNECT), runs=st.booleans())
async def test_whatever_a_client_and_a_runtime_are_started_with_ends_well(
    server: str, template: str, options: dict[str, Any], runs: bool
) -> None:
    async with testing.fresh_database(server, template=template) as own:
        given_ = {"dsn": own, "connect_timeout": 1} | {name: meant(value) for name, value in options.items()}

        async def connect() -> None:
            async with notifyq.connect(**given_) as nq:
                await nq.queue_stats()

        async def run() -> None:
            runtime = Runtime([served()], **given_)
            runtime.subscribe(lambda event: runtime.stop(), events.RuntimeStarted)
            await runtime.run()

        assert await told_by(run if runs else connect) is None, shown(options)


# what is for tests


async def entered(block: Any) -> None:
    async with block:
        pass


TESTING: dict[str, tuple[Callable[[notifyq.Client, str, Any], Any], tuple[type[BaseException], ...]]] = {
    "age_jobs": (lambda nq, dsn, value: testing.age_jobs(nq, value), ()),
    "sent": (lambda nq, dsn, value: testing.sent(nq, value), ()),
    "run_waiting": (lambda nq, dsn, value: testing.run_waiting(value, dsn=dsn), ()),
    "run_waiting's schema": (lambda nq, dsn, value: testing.run_waiting([served()], dsn=dsn, schema=value), ()),
    "run_waiting's middleware": (lambda nq, dsn, value: testing.run_waiting([served()], dsn=dsn, middleware=value), ()),
    "fresh_database": (lambda nq, dsn, value: entered(testing.fresh_database(value)), ()),
    "fresh_database's template": (
        lambda nq, dsn, value: entered(testing.fresh_database(dsn, template=value)),
        (psycopg.Error,),  # in the server's words: there is no such database
    ),
}


@a_few(2, shrink=False)
@given(made=st.lists(st.tuples(st.sampled_from(sorted(TESTING)), anything), min_size=30, max_size=40))
async def test_whatever_the_functions_for_tests_are_given_ends_well(
    server: str, template: str, made: list[tuple[str, Any]]
) -> None:
    found = []
    async with testing.fresh_database(server, template=template) as own, notifyq.connect(own) as nq:
        await nq.create_queue(Q)
        await nq.send(Q, 1)
        for name, value in made:
            function, allowed = TESTING[name]
            told = await told_by(lambda: function(nq, own, meant(value)), allowed)  # noqa: B023 - called at once
            found += [f"{name} {shown(value)}: {told}"] if told else []
    assert found == []


# handlers

RAISED: dict[str, Callable[[Any], Exception]] = {
    "raises": ValueError,
    "Retry": notifyq.Retry,
    "Retry's reason": lambda value: notifyq.Retry(0, value),
    "Snooze": notifyq.Snooze,
    "Fail": notifyq.Fail,
    "Discard": notifyq.Discard,
}
ASKED = ("progress", "touch")
WAITING = b"select (select count(*) from notifyq.ready) + (select count(*) from notifyq.active)"


class Handlers:
    """Workers of one job and of many at once, which do the first time what the job's number says, and then nothing."""

    def __init__(self, made: list[tuple[str, Any]]) -> None:
        self.found: list[str] = []
        self._made = made
        self._done: set[int] = set()
        options: dict[str, Any] = {"retry_limit": 1, "retry_delay": 0}
        self.queues: list[Queue[int, Any]] = [Queue(name, int, **options) for name in ("single", "together")]
        self.queues[0].worker(self._handle)
        self.queues[1].batch_worker(batch_size=3)(self._handle_all)

    async def _handle(self, job: Job[int]) -> Any:
        how, value = self._made[job.data]
        if job.id in self._done:
            return None
        self._done.add(job.id)
        if how in RAISED:
            raise RAISED[how](meant(value))
        if how == "returns":
            return meant(value)
        try:
            await getattr(job, how)(meant(value))
        except Exception as error:
            told = wrong_with(error)
            self.found += [f"{how} {shown(value)}: {told}"] if told else []
        return None

    async def _handle_all(self, jobs: list[Job[int]]) -> Any:
        how, value = self._made[jobs[0].data]
        fresh = not self._done.intersection(job.id for job in jobs)
        self._done.update(job.id for job in jobs)
        if not fresh or how in ASKED:
            return None
        outcome = meant(value) if how == "returns" else RAISED[how](meant(value))
        match jobs[0].data % 4:
            case 0:
                return outcome
            case 1:
                return [outcome] * len(jobs)
            case 2:
                return dict.fromkeys([job.id for job in jobs], outcome)
        raise outcome if isinstance(outcome, Exception) else ValueError(outcome)


@a_few(2, shrink=False)
@given(made=st.lists(st.tuples(st.sampled_from(["returns", *RAISED, *ASKED]), anything), min_size=60, max_size=80))
async def test_whatever_a_handler_returns_raises_or_asks_ends_its_attempt_and_no_other(
    server: str, template: str, made: list[tuple[str, Any]]
) -> None:
    handlers = Handlers(made)
    troubles: list[events.Event] = []
    async with testing.fresh_database(server, template=template) as own, notifyq.connect(own) as nq:
        runtime = Runtime(handlers.queues, dsn=own)
        runtime.subscribe(troubles.append, events.ServerTrouble, events.HandlerStuck)
        async with trio.open_nursery() as nursery, nq.connection() as connection:
            await nursery.start(runtime.run)
            for queue in handlers.queues:
                await nq.send_many(queue, range(len(made)))
            with trio.fail_after(30):
                while (await (await connection.execute(WAITING)).fetchall()) != [(0,)]:
                    await trio.sleep(0.01)
            assert await (await connection.execute(NOT_WHOLE)).fetchall() == []
            assert runtime.running
            runtime.stop()
        records = await nq.jobs(limit=1000)
    assert handlers.found == []
    assert troubles == []
    assert len(records) == 2 * len(made)
    told = {record.error["type"] for record in records if record.error}
    ours = {
        "InvalidOption",
        "InvalidData",
        "output_invalid",
        "not_settled",
        "timeout",
        "lost",
    }  # touch(0) ends an attempt
    assert told <= ours | {"ValueError", "Retry", "Fail"}


# that nothing is left out

NOTHING_GIVEN = {
    *("Client.close", "Client.connection", "Client.transaction", "Flow", "Job.parents"),
    *("Queue.with_dead_letters", "Queue.single", "Runtime.run", "Runtime.stop", "Schedule.rule"),
}
OURS = {
    # What calls give, or are given, and nobody makes; and what is there for notifyq's own calls.
    *("BatchResult", "Client", "FlowJob", "Job", "JobRecord", "Parent", "ScheduleRecord", "SendOptions", "Sent"),
    *("SentFlow", "Step", "Flow.as_json", "Flow.sent", "Queue.encode", "Queue.named", "Queue.serves", "Sent.id_in"),
    "testing.embedded_server",  # its options are the server's
}


def public() -> set[str]:
    """What can be called of what notifyq and notifyq.testing name, but for errors, and for psycopg's connection."""
    found = set()
    for module, before in ((notifyq, ""), (testing, "testing.")):
        for name in module.__all__:
            one = getattr(module, name)
            if one is notifyq.Connection or (inspect.isclass(one) and issubclass(one, NotifyqError)):
                continue
            if callable(one):
                found.add(before + name)
            if inspect.isclass(one):
                found |= {
                    f"{before}{name}.{method}"
                    for method, function in inspect.getmembers(one, inspect.isfunction)
                    if not method.startswith("_") and function.__module__.startswith("notifyq")
                }
    return found


def test_no_public_function_is_left_out():
    fuzzed = {name.partition("'")[0] for name in (*DECLARATIONS, *RAISED)} - {"raises"}
    fuzzed |= {f"Client.{name}" for name in METHODS} | {"connect"} | {f"Job.{name}" for name in ASKED}
    fuzzed |= {f"testing.{name.partition(chr(39))[0]}" for name in TESTING}
    left = NOTHING_GIVEN | OURS
    assert public() - fuzzed - left == set()
    assert (fuzzed | left) - public() <= {"BatchResult"}
    assert fuzzed & left == set()

"""Whatever a public method or declaration is given, it ends in an error of ours that says so, or in jobs that are whole.

The arguments always fit the signature. ``NOTIFYQ_FUZZ`` is how many examples, other ones each time; without it there are a
few, always the same.
"""

from __future__ import annotations

import inspect
import os
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import notifyq
from notifyq import Flow, Job, NewJob, NotifyqError, Queue, Runtime, Schedule, testing

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
RUNTIME = ("lease", "grace", "connect_timeout", "pool_size", "middleware", "schema", "dsn")

LEFT_OUT = {"close", "connection", "transaction"}
METHODS = {
    name: inspect.signature(method)
    for name, method in inspect.getmembers(notifyq.Client, inspect.iscoroutinefunction)
    if not name.startswith("_") and name not in LEFT_OUT
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
        max_examples=EXAMPLES or examples,
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
    parameters = [one for one in METHODS[name].parameters.values() if one.name not in ("self", "connection")]
    wrong = draw(st.sets(st.sampled_from([one.name for one in parameters] or [""]), max_size=2))
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for one in parameters:
        if one.kind is one.VAR_KEYWORD:
            named |= draw(some(SEND))
        elif one.kind is one.VAR_POSITIONAL:
            positional += [draw(anything)] if one.name in wrong else [1]
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


DECLARATIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "Queue": (lambda **options: Queue("q", int, int, **options), QUEUE),
    "Queue's name": (
        lambda name="q", data_type=int, output_type=int: Queue(name, data_type, output_type),
        ("name", "data_type", "output_type"),
    ),
    "worker": (lambda **options: Queue("q", int, int).worker(work, **options), WORKER),
    "Runtime": (lambda **options: Runtime([served()], **options), RUNTIME),
    "Runtime's queues": (lambda queues: Runtime(queues), ("queues",)),
    "Schedule": (
        lambda cron="* * * * *", **options: Schedule(cron, **options),
        ("cron", "every", "name", "timezone", "missed", "data", "headers"),
    ),
    "statement": (lambda data=1, **options: Q.statement(data, **options), ("data", "schema", *SEND)),
    "NewJob": (lambda options: NewJob(1, options), ("options",)),
    "Flow": (
        lambda queue=Q, data=1, **options: Flow().add(queue, data, **options),
        ("queue", "data", "after", "on_failure", *SEND),
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

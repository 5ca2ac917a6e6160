"""Whatever a public SQL function is given, it ends in an error of ours that says so, or in jobs that are whole.

Each example is one call in a transaction of its own, on queues of every kind with jobs in every state; then come the calls
that a poisoned row would break. ``NOTIFYQ_FUZZ`` is how many for each function, other ones each time; without it there
are a few, always the same.
"""

from __future__ import annotations

import json
import os
import uuid
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from notifyq import testing

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = int(os.environ.get("NOTIFYQ_FUZZ", "0"))
RUNTIME = "11111111-1111-1111-1111-111111111111"
QUEUES = {
    "plain": {"retry_limit": 1, "dead_letter": "dead"},
    "dead": {},
    "ordered": {"policy": "ordered"},
    "stately": {"policy": "stately"},
    "exclusive": {"policy": "exclusive"},
    "fair": {"fair": True, "key_limit": 2, "key_rate_limit": 2, "key_rate_period": 1},
    "aged": {"ageing": 60, "active_limit": 3, "rate_limit": 5, "rate_period": 10},
    "brief": {"retention": 0, "expire_in": 60, "retry_limit": 0, "max_data_bytes": 100},
}

# What stands before each call: of each queue a job that waits, one that is due later, one that a runtime runs and one that
# somebody claimed by hand, a finished and a failed one; a flow, a schedule and a subscription.
STANDING = f"""
select notifyq.register('{RUNTIME}', '{{*}}', lease => '1 hour');
do $$
declare
    q text;
    job bigint;
begin
    for q in select name from notifyq.queue order by number loop
        for i in 1 .. 6 loop
            perform notifyq.send(q, to_jsonb(i), key => i::text, id_key => case when i = 1 then 'once' end);
        end loop;
        perform notifyq.send(q, delay => '1 hour', key => 'later');
        select id into job from notifyq.claim(q);
        perform notifyq.complete(job, '"done"');
        select id into job from notifyq.claim(q);
        perform notifyq.fail(job, 'bad', final => true);
        perform notifyq.claim(q);
        perform notifyq.claim(q, runtime => '{RUNTIME}');
    end loop;
end
$$;
select notifyq.send_flow('[{{"name": "a", "queue": "plain"}}, {{"name": "b", "queue": "plain", "after": ["a"]}}]');
select notifyq.schedule('plain', every => '1 minute');
select notifyq.subscribe('event', 'plain');
"""

# What is not whole, and what a poisoned row would break: the views, and every queue's claims and settles.
CHECK = f"""
create function pg_temp.faults() returns table (fault text)
language plpgsql
as $$
declare
    q text;
begin
    return query
    select format('job %s has %s tickets', j.id, count(t.job))
    from notifyq.job j
    left join (
        select job from notifyq.ready union all select job from notifyq.scheduled union all select job from notifyq.blocked
        union all select job from notifyq.active
    ) t on t.job = j.id
    group by j.id
    having count(t.job) <> 1
    union all
    select format('ticket %s has no job', t.job)
    from (
        select job from notifyq.ready union all select job from notifyq.scheduled union all select job from notifyq.blocked
        union all select job from notifyq.active
    ) t
    where t.job not in (select id from notifyq.job)
    union all
    select format('job %s is live and in the archive', a.id)
    from notifyq.archive a
    where a.id in (select id from notifyq.job)
    union all
    select format('key %s is of no job', k.key)
    from notifyq.id_key k
    where k.job not in (select id from notifyq.job union all select id from notifyq.archive);
    perform count(j.*::text) from notifyq.jobs j;
    perform count(s.*::text) from notifyq.queue_stats s;
    perform count(s.*::text) from notifyq.schedules s;
    perform count(r.*::text) from notifyq.runtimes r;
    perform count(k.*::text) from notifyq.blocked_keys k;
    perform notifyq.beat('{RUNTIME}', array(select number from notifyq.queue));
    perform notifyq.schedules_ahead();
    perform notifyq.rescue();
    for q in select name from notifyq.queue loop
        perform notifyq.claim(q, 100);
        perform notifyq.fail(array(select job from notifyq.active), (select jsonb_agg('{{}}'::jsonb) from notifyq.active))
        where exists (select from notifyq.active);
    end loop;
    perform notifyq.expire();
    perform notifyq.purge();
end
$$;
"""

# Values that fit, by argument; and what does not, by type.

OPTIONS = [
    "data",
    "priority",
    "delay",
    "due_at",
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
    "queue",
    "after",
    "on_failure",
    "name",
    "cron",
    "every",
    "timezone",
    "missed",
    "policy",
    "retention",
    "dead_letter",
    "max_data_bytes",
    "bell",
    "key_limit",
    "active_limit",
    "rate_limit",
    "rate_period",
    "key_rate_limit",
    "key_rate_period",
    "fair",
    "ageing",
    "type",
    "message",
    "traceback",
]
NUMBERS = (0, 1, -1, 2**15, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 10**30, 1e308, 1.5, -0.0)
TEXTS = (
    *("", " ", "'", '"', "$$", "\\", "%s %I", 'a"; drop table notifyq.job; --', "'; drop schema notifyq cascade; --"),
    *(
        "é",
        "\U0001f600",
        "\u202e",
        "\n",
        "plain\n",
        "*",
        "x" * 101,
        "k" * 1001,
        "x" * 100_000,
        "NaN",
        "infinity",
        "{}",
        "../..",
    ),
    *("* * * * *", "99 * * * *", "0 0 31 2 *", "*/0 * * * *", "1-0 * * * *", "Europe/Berlin", "No/Where"),
    *("ready", "active", "failed", "pg_monitor", "public"),
)
INTERVALS = (
    *("0", "-1 second", "1 microsecond", "1 minute", "1 year", "101 years", "-101 years", "1 month -31 days"),
    *("178000000 years", "-178000000 years", "2147483647 months", "-2147483648 months", "2147483647 days"),
    *("2562047788 hours", "infinity", "-infinity"),
)
MOMENTS = (
    "now",
    "1969-12-31 23:59:59Z",
    "4713-01-01 BC",
    "9999-12-31 23:59:59Z",
    "294276-12-31Z",
    "infinity",
    "-infinity",
)

text = st.sampled_from(TEXTS) | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
intervals = st.sampled_from(INTERVALS)
leaf = st.none() | st.booleans() | st.sampled_from(NUMBERS) | text | intervals | st.sampled_from([*QUEUES, *MOMENTS])
anything = st.recursive(
    leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8
)
options = st.dictionaries(st.sampled_from(OPTIONS), anything, max_size=3)
documents = anything | options | st.lists(options, max_size=3) | st.lists(anything, max_size=3)
deep = st.sampled_from(
    [
        *(
            "[" * 3000 + "]" * 3000,
            '{"a":' * 1000 + "1" + "}" * 1000,
            '"' + "x" * 2_000_000 + '"',
            "9" * 1000,
            "1e400",
            "-1e400",
        ),
        *('{"delay": 1e400}', '[{"delay": 1e400}]', '[{"priority": 1e400}]', "[null]", "[[]]"),
    ]
)
numbers = {
    "smallint": st.sampled_from([0, 1, -1, 2**15 - 1, -(2**15)]),
    "integer": st.sampled_from([0, 1, -1, 8, 2**15, 2**31 - 1, -(2**31)]) | st.integers(-(2**31), 2**31 - 1),
    "bigint": st.sampled_from([0, -1, 2**63 - 1, -(2**63)]) | st.integers(1, 60),
}
NASTY: dict[str, st.SearchStrategy[Any]] = {
    **numbers,
    "text": text | st.sampled_from([*QUEUES, "once", "1"]),
    "boolean": st.booleans(),
    "interval": intervals,
    "timestamp with time zone": st.sampled_from(MOMENTS),
    "jsonb": documents.map(json.dumps) | deep,
    "uuid": st.sampled_from([RUNTIME, str(uuid.UUID(int=0))]),
}
NASTY |= {
    f"{name}[]": st.lists(st.none() | strategy, max_size=3) for name, strategy in NASTY.items() if name != "jsonb"
}
NASTY["bigint[]"] |= st.lists(st.integers(1, 60), max_size=60)

FITS: dict[str, st.SearchStrategy[Any]] = {
    "queue": st.sampled_from(list(QUEUES)),
    "name": st.sampled_from(list(QUEUES)),
    "dead_letter": st.just("dead"),
    "job": st.integers(1, 60),
    "jobs": st.lists(st.integers(1, 60), min_size=1, max_size=9),
    "delays": st.just(["1 minute"] * 9),
    "queues": st.just(["1", "2"]),
    "event": st.just("event"),
    "key": st.just("1"),
    "runtime": st.just(RUNTIME) | st.none(),
    "kind": st.sampled_from(["producer", "worker", "operator"]),
    "role": st.just("notifyq_fuzzed"),
    "message": st.just("bad"),
    "cron": st.just("* * * * *"),
    "every": st.just("1 minute"),
    "number": st.integers(1, 9),
    "at": st.just("now"),
}
JOBS_AS_JSON = {
    "send_many": st.lists(st.fixed_dictionaries({"data": anything}, optional={"key": text}) | options, max_size=3),
    "send_flow": st.lists(st.fixed_dictionaries({"name": text, "queue": st.sampled_from(list(QUEUES))}), max_size=3)
    | st.lists(options.map(lambda more: {"name": "a", "queue": "plain", **more}), max_size=3),
}
PUBLIC = """
select p.proname, p.oid::regprocedure::text, coalesce(p.proargnames, '{}'), p.pronargs - p.pronargdefaults,
    array(select format_type(t, null) from unnest(p.proargtypes) with ordinality o (t, place) order by place)
from pg_proc p
where p.pronamespace = 'notifyq'::regnamespace
and case
    when %(kind)s = 'owner' then p.proname in ('grant_role', 'revoke_role')
    else p.oid::regprocedure::text in (
        select object from notifyq.rights(%(kind)s)
        except
        select object from notifyq.rights('producer') where %(kind)s <> 'producer'
    )
end
order by 2
"""
OURS = ("NQ001", "NQ002", "NQ003", "NQ004", "NQ005", "NQ006", "NQ007")


@pytest.fixture(scope="module")
def sql(server: str, template: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to a database in which jobs of every kind stand."""
    name = f"notifyq_fuzz_{os.getpid()}"
    with psycopg.connect(server, autocommit=True) as outside:
        outside.execute(f"create database {name} template {template}".encode())
        try:
            with psycopg.connect(testing.with_database(server, name), autocommit=True) as connection:
                connection.execute("set statement_timeout = '20s'")
                for queue in ("dead", *QUEUES):
                    connection.execute("select notifyq.create_queue(%s, %s)", (queue, json.dumps(QUEUES[queue])))
                connection.execute(STANDING.encode())
                connection.execute(CHECK.encode())
                yield connection
        finally:
            outside.execute(f"drop database {name} with (force)".encode())


@st.composite
def calls(draw: st.DrawFn, function: tuple[Any, ...]) -> dict[str, tuple[str, Any]]:
    """Arguments by name, each with its type: most fit, and one to three are anything at all."""
    short, _, names, needed, types = function
    places = list(range(len(types)))
    chosen = draw(st.sets(st.sampled_from(places), max_size=3)) if places else set()
    arguments = {}
    for place in places:
        name, type_ = names[place], types[place]
        if place in chosen:
            arguments[name] = (type_, draw(st.none() | NASTY[type_] | NASTY[type_]))
        elif place < needed:
            fitting = JOBS_AS_JSON.get(short) if type_ == "jsonb" else FITS.get(name)
            value = draw(fitting if fitting is not None else NASTY[type_])
            arguments[name] = (type_, json.dumps(value) if type_ == "jsonb" and not isinstance(value, str) else value)
    return arguments


def fails(connection: psycopg.Connection[Any], statement: str, values: list[Any]) -> psycopg.Error | None:
    try:
        connection.execute(statement.encode(), values)
    except psycopg.Error as error:
        return error
    return None


def look(sql: psycopg.Connection[Any], function: tuple[Any, ...], arguments: dict[str, tuple[str, Any]]) -> None:
    """Make the call and judge how it ends."""
    given = ", ".join(f"{name} => %s::{type_}" for name, (type_, _) in arguments.items())
    values = [value for _, value in arguments.values()]
    with sql.transaction(force_rollback=True):
        try:
            with sql.transaction():
                sql.execute(f"select * from notifyq.{function[0]}({given})".encode(), values)
        except psycopg.Error as error:
            if error.sqlstate in OURS:
                return
            casts = "select " + ", ".join(f"%s::{type_}" for type_, _ in arguments.values())
            with sql.transaction(force_rollback=True):
                assume(not arguments or fails(sql, casts, values) is None)  # no value of its type
            raise AssertionError(f"{error.sqlstate} {error}") from None
        sql.execute("set constraints all immediate")
        assert sql.execute("select * from pg_temp.faults()").fetchall() == []


def fuzz(sql: psycopg.Connection[Any], function: tuple[Any, ...]) -> None:
    """Call one function again and again. Raises what was found wrong, with the smallest arguments that show it."""

    @settings(
        max_examples=EXAMPLES or 15,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(function))
    def every(arguments: dict[str, tuple[str, Any]]) -> None:
        look(sql, function, arguments)

    every()


@pytest.mark.parametrize("kind", ["producer", "worker", "operator", "owner"])
def test_every_function_of_a_kind_of_role_ends_well(sql: psycopg.Connection[Any], kind: str) -> None:
    functions = sql.execute(PUBLIC.encode(), {"kind": kind}).fetchall()
    assert functions
    faults = {}
    for function in functions:
        try:
            fuzz(sql, function)
        except Exception as error:
            told = error.exceptions if isinstance(error, ExceptionGroup) else [error]
            faults[function[1]] = [f"{one!s:.1000} {getattr(one, '__notes__', [])!s:.1000}" for one in told]
    assert faults == {}

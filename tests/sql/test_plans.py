"""No call reads more than it is about, whatever the planner believes of the tables.

They go from empty to millions and back between two looks of autovacuum. With the statistics of an empty table, a
claim from 100,000 jobs once walked over all of them for each of the 2,000 that it took: 40 seconds, not 40 milliseconds.
So each call is made with statistics of several ages, and every step of its plans is counted.
"""

from __future__ import annotations

import json
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import pytest
from psycopg import sql

from notifyq import testing

if TYPE_CHECKING:
    from collections.abc import Iterator

STATISTICS = ("of empty tables", "of one job", "never taken", "true")
JOBS = 2_000
"""Waiting jobs of each queue."""

AT_ONCE = 100
"""Jobs that a call is about."""

MOST = 25 * AT_ONCE
"""Rows that one step of a plan may go through in such a call, those that it drops included."""

QUEUES = {
    "plain": {"dead_letter": "dead"},
    "due": {},
    "fair": {"fair": True},
    "few": {"key_limit": 3},
    "kept": {"retention": None},
    "ordered": {"policy": "ordered"},
    "rated": {"key_rate_limit": 3, "key_rate_period": 60},
    "short": {"policy": "short"},
}


@attrs.frozen
class Call:
    """A call whose plans are looked at, and one before it in the same transaction, whose result is %(jobs)s."""

    statement: str
    before: str = "select null"
    jobs: int = AT_ONCE


def each(value: str) -> str:
    """An array with this for each of the jobs."""
    return f"array(select {value} from unnest(%(jobs)s::bigint[]))"


ERRORS = "to_jsonb(" + each("jsonb_build_object('type', 'E', 'message', 'm')") + ")"
HOURS = each("interval '1 hour'")


def many(queue: str, more: str = "") -> str:
    entries = f"select jsonb_agg(jsonb_build_object('key', i::text{more})) from generate_series(1, {AT_ONCE}) i"
    return f"select count(*) from notifyq.send_many('{queue}', ({entries}))"


def calls_of(queue: str) -> Iterator[tuple[str, Call]]:
    claimed = f"select array_agg(id) from notifyq.claim('{queue}', {AT_ONCE})"
    waiting = (
        f"select {{}}(id) from (select id from notifyq.jobs where queue = '{queue}' order by id limit {AT_ONCE}) j"
    )
    these = waiting.format("array_agg")
    yield "claim", Call(f"select count(*) from notifyq.claim('{queue}', {AT_ONCE})")
    yield "claim one", Call(f"select count(*) from notifyq.claim('{queue}')", jobs=1)
    yield "complete", Call("select notifyq.complete(%(jobs)s::bigint[])", claimed)
    yield "fail", Call(f"select count(*) from notifyq.fail(%(jobs)s::bigint[], {ERRORS})", claimed)
    yield (
        "fail for good",
        Call(f"select count(*) from notifyq.fail(%(jobs)s::bigint[], {ERRORS}, final => {each('true')})", claimed),
    )
    yield "snooze", Call(f"select notifyq.snooze(%(jobs)s::bigint[], {HOURS})", claimed)
    yield "release", Call("select notifyq.release(%(jobs)s::bigint[])", claimed)
    yield "discard", Call("select notifyq.discard(%(jobs)s::bigint[])", claimed)
    yield "cancel active ones", Call("select notifyq.cancel(%(jobs)s::bigint[])", claimed)
    yield "delete active ones", Call("select notifyq.delete(%(jobs)s::bigint[])", claimed)
    yield "cancel", Call("select notifyq.cancel(%(jobs)s::bigint[])", these)
    yield "delete", Call("select notifyq.delete(%(jobs)s::bigint[])", these)
    yield "resume", Call("select notifyq.resume(%(jobs)s::bigint[])", f"select notifyq.cancel(({these}))")
    yield (
        "update_job",
        Call("select notifyq.update_job(%(jobs)s::bigint, priority => 3)", waiting.format("max"), jobs=1),
    )
    yield "upsert", Call(f"select notifyq.upsert('{queue}', '1', '7')", jobs=1)
    yield "show", Call("select * from notifyq.jobs where id = %(jobs)s", waiting.format("max"), jobs=1)
    yield "send", Call(f"select notifyq.send('{queue}', key => '7')", jobs=1)
    yield "send many", Call(many(queue))
    yield "send with id_keys", Call(many(queue, ", 'id_key', i::text"))
    yield "throttle", Call(many(queue, ", 'throttle', 60"))
    yield "debounce", Call(many(queue, ", 'debounce', 60"))
    yield "delete all", Call(f"select notifyq.delete_all('{queue}')", jobs=JOBS)
    yield "delete the queue", Call(f"select notifyq.delete_queue('{queue}')", jobs=JOBS)


RUNTIME = "'00000000-0000-0000-0000-000000000001'::uuid"
FAN = (
    'select notifyq.send_flow(\'[{"name": "top", "queue": "flow"}]\'::jsonb || (select jsonb_agg(jsonb_build_object('
    f"'name', i::text, 'queue', 'plain', 'after', jsonb_build_array('top'))) from generate_series(1, {AT_ONCE}) i))"
)
FAILED = (
    f"with c as (select array_agg(id) as jobs from notifyq.claim('plain', {AT_ONCE}))"
    f', f as (select notifyq.fail(c.jobs, (select jsonb_agg(\'{{"type": "E"}}\'::jsonb) from generate_series(1, {AT_ONCE})),'
    f" final => array(select true from generate_series(1, {AT_ONCE}))) from c)"
    " select jobs from c where (select count(*) from f) > 0"
)
OTHERS = {
    "retry": Call("select notifyq.retry(%(jobs)s::bigint[])", FAILED),
    "redrive": Call("select count(*) from notifyq.redrive('dead')", FAILED),
    "delete failed ones": Call("select notifyq.delete(%(jobs)s::bigint[])", FAILED),
    "expire": Call(
        f"select notifyq.expire({AT_ONCE})",
        "update notifyq.job set expires_at = now()"
        f" where id in (select id from notifyq.jobs where queue = 'plain' limit {AT_ONCE}) returning null",
    ),
    "purge": Call(
        f"select notifyq.purge({AT_ONCE})",
        "with c as (select array_agg(id) as jobs from notifyq.claim('kept', 2000))"
        ", d as (select notifyq.complete(c.jobs) from c)"
        ", u as (select notifyq.update_queue('kept', '{\"retention\": 0}') from d) select null from u",
    ),
    "lose a runtime": Call(
        f"select count(*) from notifyq.deregister({RUNTIME})",
        f"with r as (select notifyq.register({RUNTIME}, '{{plain}}')) select null from r, lateral ("
        f"select count(*) from notifyq.claim('plain', {AT_ONCE}, {RUNTIME}) where r is not null) c",
    ),
    "rescue": Call(
        "select count(*) from notifyq.rescue()",
        f"select null; select notifyq.register({RUNTIME}, '{{*}}');"
        f" select count(*) from unnest('{{plain,few,ordered}}'::text[]) q, notifyq.claim(q, {AT_ONCE // 4}, {RUNTIME});"
        f" select count(*) from notifyq.claim('fair', {AT_ONCE // 4});"
        " update notifyq.runtime set lease = '1 ms', lease_until = '2000-01-01';"
        " update notifyq.active set deadline = '2000-01-01' where runtime is null",
    ),
    "beat": Call(
        f"select notifyq.beat({RUNTIME}, array(select number from notifyq.queue where name !~ 'other'))",
        f"select notifyq.register({RUNTIME}, '{{*}}')::text",
    ),
    "send a flow": Call(FAN),
    "complete a parent of many": Call(
        "select notifyq.complete(%(jobs)s::bigint[])",
        f"with f as ({FAN}) select array_agg(c.id) from (select count(*) from f) s, notifyq.claim('flow') c",
    ),
    "fail a parent of many": Call(
        f"select count(*) from notifyq.fail(%(jobs)s::bigint[], {ERRORS}, final => {each('true')})",
        f"with f as ({FAN}) select array_agg(c.id) from (select count(*) from f) s, notifyq.claim('flow') c",
    ),
}
CALLS = {f"{name} of {queue}": call for queue in QUEUES for name, call in calls_of(queue)} | OTHERS


def fill(connection: psycopg.Connection[Any]) -> None:
    connection.execute("select notifyq.create_queue('dead')")
    connection.execute("select notifyq.create_queue('flow')")
    connection.execute("select notifyq.create_queue('other.' || i) from generate_series(1, 300) i")
    for queue, options in QUEUES.items():
        connection.execute("select notifyq.create_queue(%s, %s)", (queue, json.dumps(options)))
        connection.execute(
            "select count(*) from notifyq.send_many(%s, (select jsonb_agg(jsonb_build_object("
            "'key', (i %% 500)::text, 'delay', %s::float8)) from generate_series(1, %s) i))",
            (queue, 0.001 if queue == "due" else 0, JOBS),
        )


def tables(connection: psycopg.Connection[Any]) -> list[sql.Identifier]:
    rows = connection.execute(
        "select relname from pg_class where relnamespace = 'notifyq'::regnamespace and relkind = 'r' order by 1"
    ).fetchall()
    return [sql.Identifier("notifyq", name) for (name,) in rows]


@pytest.fixture(scope="module", params=STATISTICS)
def filled(request: pytest.FixtureRequest, server: str, template: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to a database with waiting jobs, whose statistics are what the parameter says."""
    name = f"notifyq_plans_{STATISTICS.index(request.param)}"
    with psycopg.connect(server, autocommit=True) as outside:
        outside.execute(f"create database {name} template {template}".encode())
        with psycopg.connect(testing.with_database(server, name), autocommit=True) as connection:
            for table in tables(connection):
                connection.execute(sql.SQL("alter table {} set (autovacuum_enabled = false)").format(table))
            if request.param == "of empty tables":
                fill(connection)
                for queue in QUEUES:
                    connection.execute("select notifyq.delete_all(%s)", (queue,))
                for table in tables(connection):
                    connection.execute(sql.SQL("vacuum (analyze, truncate off) {}").format(table))
            elif request.param == "of one job":
                connection.execute("select notifyq.create_queue('one', '{\"fair\": true}')")
                connection.execute("select notifyq.send('one', key => 'x') from generate_series(1, 2)")
                connection.execute("select count(*) from notifyq.claim('one')")
                connection.execute("analyze")
            fill(connection)
            if request.param == "true":
                connection.execute("analyze")
            connection.execute("load 'auto_explain'")
            yield connection
        outside.execute(f"drop database {name}".encode())


def steps(plan: dict[str, Any]) -> Iterator[tuple[float, dict[str, Any]]]:
    """Every step of a plan, with the rows that went through it."""
    if plan["Node Type"] == "Bitmap Index Scan":
        return  # it counts what earlier calls left in the index when they were rolled back; what is above it does not
    read = sum(
        plan.get(key, 0)
        for key in (
            "Actual Rows",
            "Rows Removed by Filter",
            "Rows Removed by Join Filter",
            "Rows Removed by Index Recheck",
        )
    )
    yield read * plan.get("Actual Loops", 0), plan
    for part in plan.get("Plans", ()):
        yield from steps(part)


def explained(connection: psycopg.Connection[Any], statement: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Make a call, and give the plans of all statements in it."""
    plans: list[dict[str, Any]] = []

    def keep(diagnostic: psycopg.errors.Diagnostic) -> None:
        _, found, plan = (diagnostic.message_primary or "").partition("plan:\n")
        if found:
            plans.append(json.loads(plan))

    connection.add_notice_handler(keep)
    try:
        for setting in (
            "log_analyze = on",
            "log_timing = off",
            "log_nested_statements = on",
            "log_format = json",
            "log_level = notice",
            "log_min_duration = 0",
        ):
            connection.execute(f"set local auto_explain.{setting}".encode())
        connection.execute(statement, arguments)
        connection.execute("set local auto_explain.log_min_duration = -1")
    finally:
        connection.remove_notice_handler(keep)
    return plans


@pytest.mark.parametrize("name", CALLS)
def test_no_step_goes_through_more_than_the_call_is_about(filled: psycopg.Connection[Any], name: str) -> None:
    call = CALLS[name]
    for mode in ("force_custom_plan", "force_generic_plan"):
        with filled.transaction(force_rollback=True):
            filled.execute(f"set local plan_cache_mode = {mode}".encode())
            (jobs,) = filled.execute(call.before).fetchone() or (None,)
            plans = explained(filled, call.statement, {"jobs": jobs})
        assert plans
        read, step, text = max(
            ((read, step, plan["Query Text"]) for plan in plans for read, step in steps(plan["Plan"])),
            key=itemgetter(0),
        )
        assert read <= MOST * max(1, call.jobs // AT_ONCE), (
            f"{mode}: {json.dumps(step, indent=1)[:3000]}\n{text[:3000]}"
        )

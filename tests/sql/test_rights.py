"""Who may call, read and change what: every function, view and table of the schema, tried as every kind of role."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import psycopg
import pytest

from notifyq import _schema

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from notifyq._connection import TrioConnection

ROLES = ("stranger", "anybody", "producer", "worker", "operator")
"""No USAGE on the schema; USAGE and nothing else; and the three kinds that can be granted."""

FUNCTIONS = """
    send(queue)                    anybody producer worker operator    definer: makes jobs
    try_send(queue)                anybody producer worker operator    definer: makes jobs
    send_many(queue)               anybody producer worker operator    definer: makes jobs
    send_flow(jobs)                anybody producer worker operator    definer: makes jobs
    publish(event)                 anybody producer worker operator    definer: reads subscriptions, makes jobs

    claim(queue)                   worker             definer: moves tickets, reads jobs
    say_taken(queue)               worker
    complete(jobs)                 worker             definer: moves tickets and jobs
    complete(job)                  worker
    complete_or_raise(job)         worker
    fail(jobs)                     worker             definer: moves tickets and jobs
    fail(job)                      worker
    snooze(jobs)                   worker             definer: moves tickets
    release(jobs)                  worker             definer: moves tickets
    discard(jobs)                  worker             definer: moves tickets and jobs
    touch(job)                     worker             definer: changes tickets
    progress(job)                  worker             definer: changes tickets
    register(runtime)              worker             definer: makes a runtime
    beat(runtime)                  worker             definer: changes a runtime, reads tickets and schedules
    stop(runtime)                  worker             definer: changes a runtime
    held(runtime)                  worker             definer: reads tickets
    deregister(runtime)            worker             definer: deletes a runtime, moves tickets
    rescue()                       worker             definer: deletes runtimes, moves tickets
    served(names)                  worker             definer: reads queues
    stand_free(queues)             worker             definer: reads tickets
    stand_busy(queues)             worker
    stand_far(queues)              worker
    schedules_ahead(besides)       worker             definer: reads schedules
    fire(schedule)                 worker             definer: changes a schedule, makes jobs
    keep_schedule_error(schedule)  worker             definer: changes a schedule
    expire(how_many)               worker             definer: moves tickets and jobs
    purge(how_many)                worker             definer: deletes jobs
    make_leaves(days_ahead)        worker             definer: makes tables
    drop_leaf()                    worker             definer: drops tables
    maintain()                     worker

    queue_named(name)              worker operator    definer: reads queues
    channel(number)                worker operator
    lock_class(purpose)            worker operator
    next_due(queue)                worker operator    definer: reads tickets
    hold_interest(queue)           worker operator
    drop_interest(queue)           worker operator
    no_settle_under_way(queue)     worker operator
    parents(job)                   worker operator    definer: reads jobs

    create_queue(name)             operator           definer: makes queues
    update_queue(name)             operator           definer: changes queues, moves tickets
    delete_queue(name)             operator           definer: deletes queues and jobs
    pause(queue)                   operator           definer: changes queues
    resume_queue(queue)            operator           definer: changes queues
    cancel(jobs)                   operator           definer: moves tickets and jobs
    cancel(job)                    operator
    retry(jobs)                    operator           definer: moves tickets and jobs
    retry(job)                     operator
    resume(jobs)                   operator           definer: moves tickets and jobs
    resume(job)                    operator
    delete(jobs)                   operator           definer: deletes jobs
    delete(job)                    operator
    delete_all(queue)              operator           definer: deletes jobs
    redrive(dead_letter)           operator           definer: moves jobs
    update_job(job)                operator           definer: changes jobs
    upsert(queue)                  operator           definer: changes jobs
    flow(job)                      operator           definer: reads jobs
    schedule(queue)                operator           definer: makes schedules
    unschedule(queue)              operator           definer: deletes schedules
    declare_schedules(queue)       operator           definer: makes and deletes schedules
    subscribe(event)               operator           definer: makes subscriptions
    unsubscribe(event)             operator           definer: deletes subscriptions
    missing_rights()               operator           definer: reads what is granted to whom
"""
"""Who may call it, and why it runs as its owner if it does. All others are for the owner alone:"""

OWNERS = """
    add_keys admit advance announce apply_rights apply_rules as_active backoff check_cron check_event check_options
    check_rules check_schedule copy_to_dead_letter count_starts cron_field cron_fires data_fits debounce_standing
    delete_in duration edit end_expired finish first_of_keys flow_order forget free free_keys free_waiting_keys
    generation give_rights grant_role has_come_since headers_fit how_many_fits key_fits key_options_fit lapsed
    leave_active leave_line leave_waiting leaves_on line_number line_priority line_up lock_gate lock_gates
    lock_parents lock_waiting next_blocked next_multiple options_fit outstanding parents_ended promote put_schedule
    queue_name queue_option_names rate_add rate_next rate_room recover redrivable refuse_claim refuse_time
    release_heads renew_keys renew_worn_keys reserve revive revoke_role rights ring_back ring_look ring_ready
    ring_scheduled send_each send_one sift somebody_may_come somebody_stands_far stand_behind take_ready take_turns
    tell_queues tell_runtimes try_lock_gates unreserve with_options
"""

VIEWS = {
    "jobs": {"operator"},
    "queue_stats": {"operator"},
    "runtimes": {"operator"},
    "blocked_keys": {"operator"},
    "schedules": {"operator"},
    "subscriptions": {"operator"},
}

TABLES = """
    queue job ready scheduled blocked active gate key reserved dependency flow_job archive archive_default archive_kept
    attempt id_key runtime schedule subscription granted
"""
"""Nobody but the owner may read or change them, but for the list of files, which all with USAGE may read."""

READABLE: dict[str, set[str]] = {
    **VIEWS,
    **{name: set() for name in TABLES.split()},
    "installed": {"anybody", "producer", "worker", "operator"},
}


@attrs.frozen
class Decided:
    """What the table above says of a function."""

    roles: frozenset[str]
    reason: str
    """Why it is SECURITY DEFINER; empty: it is not."""


def decided() -> dict[str, Decided]:
    found = {}
    for line in filter(None, map(str.strip, FUNCTIONS.splitlines())):
        function, _, rest = line.partition(" ")
        roles, _, reason = rest.partition("definer:")
        found[function] = Decided(frozenset(roles.split()), reason.strip())
    return found


DECIDED = decided()


@pytest.fixture
async def roles(connection: TrioConnection) -> AsyncIterator[dict[str, str]]:
    """A role of each kind, by kind; their names have this test's own ending, since roles are the whole server's."""
    names = {kind: f"{kind}_{connection.info.dbname[-12:]}" for kind in ROLES}
    for kind in ("stranger", "anybody"):
        await connection.execute(f"create role {names[kind]}".encode())
    await connection.execute(f"grant usage on schema notifyq to {names['anybody']}".encode())
    await _schema.grant_roles(connection, "notifyq", {kind: names[kind] for kind in _schema.KINDS})
    try:
        yield names
    finally:
        await connection.execute("reset role")
        for name in names.values():
            await connection.execute(f"drop owned by {name}".encode())
            await connection.execute(f"drop role {name}".encode())


async def refusal(connection: TrioConnection, role: str, statement: str) -> str | None:
    """Run a statement as a role, undo it, and say what right it lacked; None: none, whatever else became of it."""
    try:
        async with connection.transaction(force_rollback=True):
            await connection.execute(f"set local role {role}".encode())
            await connection.execute("set local statement_timeout = '10s'")
            await connection.execute(statement.encode())
    except psycopg.errors.InsufficientPrivilege as error:
        return error.diag.message_primary
    except psycopg.Error:
        return None
    return None


async def calls(ask) -> list[tuple[str, str, bool]]:
    """Every function, a call of it with nulls, and whether it is SECURITY DEFINER."""
    return await ask(
        "select format('%s(%s)', proname, case when pronargs > 0 then proargnames[1] end),"
        " format('select notifyq.%I(%s)', proname,"
        " (select string_agg('null::' || format_type(t.type, null), ', ' order by t.place)"
        " from unnest(proargtypes::oid[]) with ordinality t (type, place))), prosecdef"
        " from pg_proc where pronamespace = 'notifyq'::regnamespace order by 1"
    )


# who may what


async def test_what_is_decided_is_decided_for_every_function_once(ask):
    found = [function for function, *_ in await calls(ask)]
    assert len(found) == len(set(found))
    others = [function for function in found if function not in DECIDED]
    assert sorted(function.partition("(")[0] for function in others) == OWNERS.split()
    assert DECIDED.keys() <= set(found)


@pytest.mark.parametrize("kind", ROLES)
async def test_a_role_may_call_what_its_kind_may_and_no_other_function(connection, ask, roles, kind):
    expected, found = {}, {}
    for function, call, _ in await calls(ask):
        may = function in DECIDED and kind in DECIDED[function].roles
        refused = await refusal(connection, roles[kind], call)
        expected[function] = may
        found[function] = refused is None
        if refused is not None:
            what = "schema notifyq" if kind == "stranger" else f"function {function.partition('(')[0]}"
            assert refused == f"permission denied for {what}"
    assert found == expected


@pytest.mark.parametrize("kind", ROLES)
async def test_a_role_may_read_the_views_of_its_kind_and_change_nothing(connection, ask, roles, kind):
    found = await ask(
        "select relname from pg_class where relnamespace = 'notifyq'::regnamespace and relkind in ('r', 'p', 'v')"
        " and relname !~ '_[0-9]{8}$' order by 1"
    )
    assert {name for (name,) in found} == READABLE.keys()
    for name, may in READABLE.items():
        assert (await refusal(connection, roles[kind], f"select from notifyq.{name}") is None) == (kind in may), name
        changes = "insert, update, delete, truncate, references, trigger"
        assert await ask("select has_table_privilege(%s, %s, %s)", roles[kind], f"notifyq.{name}", changes) == [
            (False,)
        ]
    for name in READABLE.keys() - VIEWS.keys():
        assert await refusal(connection, roles[kind], f"delete from notifyq.{name}"), name
        assert await refusal(connection, roles[kind], f"insert into notifyq.{name} default values"), name
    sequences = await ask("select relname from pg_class where relnamespace = 'notifyq'::regnamespace and relkind = 'S'")
    assert len(sequences) == 3
    for (name,) in sequences:
        assert await refusal(connection, roles[kind], f"select nextval('notifyq.{name}')")
    for statement in (
        "create table notifyq.mine ()",
        "create function notifyq.mine() returns int language sql as 'select 1'",
    ):
        assert await refusal(connection, roles[kind], statement) == "permission denied for schema notifyq"


@pytest.mark.parametrize("kind", ROLES)
async def test_a_role_may_do_nothing_with_the_leaves_of_the_archive(ask, roles, kind):
    await ask("select notifyq.create_queue('q')")
    assert await ask("select notifyq.make_leaves(1)") == [(2,)]
    leaves = await ask(
        "select relname from pg_class where relnamespace = 'notifyq'::regnamespace and relkind = 'r'"
        " and relname ~ '_[0-9]{8}$'"
    )
    assert len(leaves) == 2
    for (name,) in leaves:
        anything = "select, insert, update, delete, truncate, references, trigger"
        assert await ask("select has_table_privilege(%s, %s, %s)", roles[kind], f"notifyq.{name}", anything) == [
            (False,)
        ], name


async def test_what_runs_as_its_owner_has_a_reason_and_a_pinned_search_path(ask):
    found = await ask(
        "select format('%s(%s)', proname, case when pronargs > 0 then proargnames[1] end), proconfig"
        " from pg_proc where pronamespace = 'notifyq'::regnamespace and prosecdef"
    )
    assert {function for function, _ in found} == {function for function, each in DECIDED.items() if each.reason}
    for function, settings in found:
        assert "search_path=pg_catalog, pg_temp" in settings, function


async def test_what_has_no_pinned_search_path_cannot_be_called_or_reads_no_name(ask):
    """The bell's functions run within one that pins it; the others are inlined, and only an owner's or of plain names."""
    found = await ask(
        "select proname from pg_proc where pronamespace = 'notifyq'::regnamespace"
        " and array_to_string(proconfig, ';') !~ 'search_path=' is not false order by 1"
    )
    assert [name for (name,) in found] == [
        "as_active",
        "backoff",
        "channel",
        "duration",
        "leaves_on",
        "line_number",
        "line_priority",
        "ring_ready",
        "ring_scheduled",
        "somebody_may_come",
    ]


# granting


async def missing(ask) -> list[tuple[str, str]]:
    return await ask("select role, problem from notifyq.missing_rights()")


async def test_rights_come_back_with_an_upgrade_that_makes_functions_and_views_anew(connection, ask, roles):
    assert await missing(ask) == []
    await ask(f"grant select on notifyq.jobs to {roles['worker']}")  # an extra right, which stays
    await ask("drop function notifyq.claim")
    await ask("drop view notifyq.queue_stats")
    await ask(f"revoke execute on all functions in schema notifyq from {roles['operator']}")
    await ask("update notifyq.installed set hash = 'old' where file like 'functions/%'")
    await _schema.apply(connection, "notifyq")
    assert await missing(ask) == []
    assert await refusal(connection, roles["worker"], "select from notifyq.jobs") is None
    assert await refusal(connection, roles["anybody"], "select notifyq.claim('q')")


async def test_what_is_not_as_it_was_granted_is_named(connection, ask, roles):
    worker, operator = roles["worker"], roles["operator"]
    await ask("select notifyq.grant_role('operator', 'gone_for_good')")
    await ask("drop owned by gone_for_good")
    await ask("drop role gone_for_good")
    await ask(f"revoke usage on schema notifyq from {operator}")
    await ask(f"revoke execute on function notifyq.stop(uuid) from {worker}")
    await ask(f"revoke select on notifyq.jobs from {operator}")
    await ask("revoke execute on function notifyq.send_flow(jsonb) from public")
    await ask("grant execute on function notifyq.rescue() to public")
    await ask("grant select on notifyq.job to public")
    await ask(f"grant create on schema notifyq to {roles['producer']}")
    assert sorted(await missing(ask)) == sorted(
        [
            ("gone_for_good", "does not exist"),
            (roles["producer"], "has create on schema notifyq"),
            (operator, "lacks usage on schema notifyq"),
            (operator, "lacks select on notifyq.jobs"),
            ("public", "has execute on notifyq.rescue()"),
            ("public", "has select on notifyq.job"),
            ("public", "lacks execute on notifyq.send_flow(jsonb)"),
            (worker, "lacks execute on notifyq.stop(uuid)"),
        ]
    )


async def test_a_role_of_two_kinds_keeps_what_the_other_one_gives_it(connection, ask, roles):
    worker = roles["worker"]
    await ask(f"select notifyq.grant_role('operator', '{worker}')")
    assert await refusal(connection, worker, "select from notifyq.jobs") is None
    assert await ask(f"select notifyq.revoke_role('operator', '{worker}')") == [(True,)]
    assert await ask(f"select notifyq.revoke_role('operator', '{worker}')") == [(False,)]
    assert await refusal(connection, worker, "select from notifyq.jobs")
    assert await refusal(connection, worker, "select notifyq.cancel(1)")
    assert await missing(ask) == []
    assert await ask(f"select notifyq.revoke_role('worker', '{worker}')") == [(True,)]
    assert await refusal(connection, worker, "select notifyq.send('q')") == "permission denied for schema notifyq"
    assert await ask("select kind from notifyq.granted where role = %s", worker) == []


@pytest.mark.parametrize(
    ("kind", "role", "message"),
    [
        ("'admin'", "'a'", "not a kind of role: 'admin'"),
        ("null", "'a'", "not a kind of role: null"),
        ("'worker'", "null", "not a name of a role: null"),
        ("'worker'", "''", "not a name of a role: ''"),
        ("'worker'", "'public'", "not a name of a role: 'public'"),
        ("'worker'", "'pg_monitor'", "not a name of a role: 'pg_monitor'"),
        ("'worker'", "repeat('a', 64)", "not a name of a role: 'aaa"),
    ],
)
async def test_what_cannot_be_granted_is_refused_in_words(ask, kind, role, message):
    with pytest.raises(psycopg.Error, match=message) as caught:
        await ask(f"select notifyq.grant_role({kind}, {role})")
    assert caught.value.sqlstate == "NQ003"
    assert await ask("select * from notifyq.granted") == []


async def test_a_name_of_a_role_is_no_way_into_the_sql(ask, connection):
    name = 'we"ird; drop table notifyq.job; --' + connection.info.dbname[-12:]
    await ask("select notifyq.grant_role('worker', %s)", name)
    try:
        assert await missing(ask) == []
        assert await ask("select notifyq.revoke_role('worker', %s)", name) == [(True,)]
    finally:
        quoted = '"' + name.replace('"', '""') + '"'
        await ask(f"drop owned by {quoted}")
        await ask(f"drop role {quoted}")


async def test_another_schema_has_roles_of_its_own(connection, ask, roles):
    await _schema.apply(connection, "jobs")
    worker = roles["worker"]
    try:
        await ask("select jobs.create_queue('q')")
        assert await refusal(connection, worker, "select jobs.claim('q')") == "permission denied for schema jobs"
        await _schema.grant_roles(connection, "jobs", {"worker": worker})
        assert await refusal(connection, worker, "select jobs.claim('q')") is None
        assert await ask("select * from jobs.missing_rights()") == []
        assert await ask("select jobs.revoke_role('worker', %s)", worker) == [(True,)]
        assert await refusal(connection, worker, "select notifyq.claim('q')") is None
    finally:
        await ask("drop schema jobs cascade")

"""What a role cannot bring the owner's functions to do, whatever its kind, and what it cannot learn from them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import psycopg
import pytest

from notifyq import _schema

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from notifyq._connection import TrioConnection

SECRET = "Kontonummer-4711"

TRAPS = """
-- Functions and operators named like those that ours use, in a schema that the caller looks into first. Each notes as
-- whom it runs.
do $do$
declare
    called text := (select string_agg(prosrc, ' ') from pg_proc where pronamespace = 'notifyq'::regnamespace);
    trap constant text := $$create function traps.%s(%s) returns %s language plpgsql as
        'begin raise notice ''caught %% %s'', current_user; return %s; end'$$;
    f record;
begin
    for f in
        select quote_ident(p.proname) as name, pg_get_function_identity_arguments(p.oid) as arguments,
            pg_get_function_result(p.oid) as result,
            case when p.proretset or p.prorettype = 'void'::regtype then '' else 'null' end as nothing
        from pg_proc p
        where p.pronamespace = 'pg_catalog'::regnamespace
        and p.prokind = 'f'
        and strpos(called, p.proname || '(') > 0
    loop
        begin
            execute format(trap, f.name, f.arguments, f.result, f.name, f.nothing);
        exception when invalid_function_definition or feature_not_supported then
            null; -- a pseudo-type that plpgsql does not take
        end;
    end loop;
    for f in
        select o.oid as number, o.oprname as name, o.oprleft::regtype as one, o.oprright::regtype as other,
            o.oprresult::regtype as result
        from pg_operator o
        where o.oprnamespace = 'pg_catalog'::regnamespace
        and o.oprkind = 'b'
        and strpos(called, ' ' || o.oprname || ' ') > 0
        and array[o.oprleft, o.oprright] <@ array['text', 'int4', 'int8', 'int2', 'bool', 'jsonb', 'timestamptz',
            'interval', 'date', 'uuid', 'float8', 'numeric', 'name', '"char"']::regtype[]::oid[]
    loop
        execute format(trap, 'op_' || f.number, f.one || ', ' || f.other, f.result, replace(f.name, '%', '%%'), 'null');
        execute format('create operator traps.%s (leftarg = %s, rightarg = %s, function = traps.op_%s)',
            f.name, f.one, f.other, f.number);
    end loop;
end
$do$;
-- Tables, types and functions named like ours, where temporary ones lie, which come first unless they are put last.
create temporary table queue (word text);
create temporary table job (word text);
create temporary table ready (word text);
create temporary table runtime (word text);
create function pg_temp.queue_named(text) returns int language plpgsql as
    'begin raise notice ''caught % queue_named'', current_user; return 1; end';
-- A type of one's own with a cast, which runs as who calls.
create type traps.label as (word text);
create function traps.word(traps.label) returns text language plpgsql as
    'begin raise notice ''caught % cast'', current_user; return ($1).word; end';
create cast (traps.label as text) with function traps.word(traps.label) as implicit;
create table traps.orders (id int);
create function traps.on_order() returns trigger language plpgsql as
    'begin perform notifyq.send(row(''q'')::traps.label, to_jsonb(new.id), key => ''k'', priority => 1); return new; end';
create trigger t after insert on traps.orders for each row execute function traps.on_order();
"""

SENDING = [
    "insert into traps.orders values (1), (2)",
    "select notifyq.send('q', '1', key => 'a', delay => '1 hour', id_key => 'x', headers => '{}')",
    "select notifyq.try_send('q', '1', throttle => '1 minute')",
    "select notifyq.try_send('q', '1', debounce => '1 minute')",
    'select notifyq.send_many(\'q\', \'[{"data": 1}, {"data": 2, "key": "k", "id_key": "y", "delay": 1}]\')',
    'select notifyq.send_flow(\'[{"name": "a", "queue": "q"}, {"name": "b", "queue": "q", "after": ["a"]}]\')',
    "select notifyq.publish('paid', '1')",
]

RUNTIME = "11111111-1111-1111-1111-111111111111"

WORKING = [
    *SENDING,
    f"select notifyq.register('{RUNTIME}', '{{q}}')",
    f"select notifyq.beat('{RUNTIME}', '{{1}}')",
    "select notifyq.stand_free('{1}', '{false}'), notifyq.stand_busy('{1}')",
    f"select notifyq.complete(array[id], '[1]', array[attempt], '{RUNTIME}') from notifyq.claim('q', 1, '{RUNTIME}')",
    f"select notifyq.fail(array[id], '[{{}}]', array[attempt], '{RUNTIME}') from notifyq.claim('q', 1, '{RUNTIME}')",
    f"select notifyq.snooze(array[id], '{{1 second}}', array[attempt], '{RUNTIME}') from notifyq.claim('q', 1, '{RUNTIME}')",
    f"select notifyq.release(array[id], array[attempt], '{RUNTIME}') from notifyq.claim('q', 1, '{RUNTIME}')",
    f"select notifyq.discard(array[id], array[attempt], '{RUNTIME}') from notifyq.claim('q', 1, '{RUNTIME}')",
    "select notifyq.complete(id, '1') from notifyq.claim('q')",
    "select notifyq.fire(number, null, null, '2100-01-01') from notifyq.schedules_ahead()",
    f"select notifyq.deregister('{RUNTIME}')",
    "select notifyq.maintain()",
]

OPERATING = [
    *SENDING,
    "select notifyq.create_queue('new', '{\"policy\": \"exclusive\"}')",
    "select notifyq.update_queue('q', '{\"ageing\": 60, \"key_limit\": 2}')",
    "select notifyq.cancel(array(select id from notifyq.jobs limit 2))",
    "select notifyq.resume(array(select id from notifyq.jobs))",
    "select notifyq.update_job(queue => 'q', key => 'k', data => '1', priority => 3)",
    "select notifyq.upsert('q', '2', 'k'), notifyq.upsert('q', '2', 'z')",
    "select notifyq.schedule('q', '* * * * *', name => 'more'), notifyq.schedule('q', every => '1 hour', name => 'most')",
    "select notifyq.pause('q'), notifyq.resume_queue('q')",
    "select notifyq.redrive('q')",
    "select notifyq.flow(id) from notifyq.jobs",
    "select * from notifyq.missing_rights()",
    "select notifyq.delete_all('q')",
    "select notifyq.delete_queue('new')",
]


@pytest.fixture
async def role(connection: TrioConnection) -> AsyncIterator[str]:
    """A role that may make what it likes in a schema of its own; of no kind yet."""
    role = f"attacker_{connection.info.dbname[-12:]}"
    await connection.execute(
        f"create role {role}; grant usage on schema notifyq to {role}; create schema traps authorization {role};"
        "select notifyq.create_queue('q'); select notifyq.subscribe('paid', 'q');"
        "select notifyq.schedule('q', '* * * * *')".encode()
    )
    try:
        yield role
    finally:
        await connection.execute(
            f"reset role; reset search_path; drop owned by {role} cascade; drop role {role}".encode()
        )


async def spring(connection: TrioConnection, role: str, calls: list[str]) -> set[str]:
    """Set all traps and make the calls; returns as whom which of them ran."""
    caught = []
    connection.add_notice_handler(lambda notice: caught.append(notice.message_primary))
    await connection.execute(f"set role {role}; set search_path = pg_catalog".encode())
    await connection.execute(TRAPS.encode())
    await connection.execute("set search_path = traps, pg_catalog")
    try:
        for call in calls:
            await connection.execute(call.encode())
    finally:
        await connection.execute("reset role; reset search_path")
    return {text.removeprefix("caught ") for text in caught if text.startswith("caught ")}


@pytest.mark.parametrize(("kind", "calls"), [("producer", SENDING), ("worker", WORKING), ("operator", OPERATING)])
async def test_nothing_of_the_callers_runs_as_the_owner(connection, role, kind, calls):
    await _schema.grant_roles(connection, "notifyq", {kind: role})
    caught = await spring(connection, role, calls)
    assert f"{role} cast" in caught
    assert {text for text in caught if not text.startswith(f"{role} ")} == set()


async def test_without_the_pinned_search_path_the_traps_do_spring(connection, ask, role):
    for (function,) in await ask(
        "select oid::regprocedure::text from pg_proc where pronamespace = 'notifyq'::regnamespace"
    ):
        await ask(f"alter function {function} reset search_path")
    caught: list[str] = []
    connection.add_notice_handler(lambda notice: caught.append(notice.message_primary or ""))
    with pytest.raises(psycopg.Error, match="there is no queue named"):  # their = is never true
        await spring(connection, role, ["select notifyq.send('q', '1')"])
    [(owner,)] = await ask("select current_user")
    assert f"caught {owner} quote_literal" in caught
    assert f"caught {owner} =" in caught


# what a producer learns


@pytest.fixture
async def producer(connection: TrioConnection, ask, role):
    """The role is a producer. Somebody else has sent, with each kind of key, and one of the jobs has failed."""
    await ask('select notifyq.create_queue(\'exclusive\', \'{"policy": "exclusive", "max_data_bytes": 100}\')')
    for call in (
        "select notifyq.send('q', %s, id_key => 'order 7', headers => %s)",
        "select notifyq.send('exclusive', %s, key => 'ann', headers => %s)",
        "select notifyq.send('q', %s, throttle => '1 year', headers => %s)",
    ):
        await ask(call, f'"{SECRET}"', f'{{"x": "{SECRET}"}}')
    await ask("select notifyq.send('q', priority => 5)")
    await ask("select notifyq.fail(id, %s, final => true) from notifyq.claim('q')", SECRET)
    await _schema.grant_roles(connection, "notifyq", {"producer": role})
    await connection.execute(f"set role {role}".encode())
    return role


REVEALING = {
    # A send that makes no job names the one that stands, and nothing else of it.
    "select * from notifyq.try_send('q', '1', id_key => 'order 7')": [(1, False)],
    "select notifyq.send('q', '1', id_key => 'order 7')": [(1,)],
    "select * from notifyq.try_send('exclusive', '1', key => 'ann')": [(2, False)],
    "select * from notifyq.try_send('q', '1', throttle => '1 year')": [(3, False)],
    "select * from notifyq.send_many('q', '[{\"id_key\": \"order 7\"}]')": [(1, False)],
    # Whether there is a job of a number, and if it has ended badly, how.
    'select notifyq.send_flow(\'[{"name": "a", "queue": "q", "after": [4]}]\')': "job 4 has failed already",
    'select notifyq.send_flow(\'[{"name": "a", "queue": "q", "after": [99]}]\')': "there is no job 99 to come after",
    'select notifyq.send_flow(\'[{"name": "a", "queue": "exclusive", "key": "ann"}]\')': "is not made: job 2 has its key",
    # Which queues and events there are, and how much data a queue takes.
    "select notifyq.send('none')": "there is no queue named 'none'",
    "select notifyq.publish('none')": "nobody has subscribed to event 'none'",
    "select notifyq.send('exclusive', to_jsonb(repeat('x', 200)), key => 'z')": "over the limit of 100 bytes",
}


@pytest.mark.parametrize("call", REVEALING)
async def test_what_a_producer_learns_of_others_is_this_and_none_of_their_data(ask, producer, call):
    expected = REVEALING[call]
    if isinstance(expected, str):
        with pytest.raises(psycopg.Error, match=expected) as caught:
            await ask(call)
        diagnosis = caught.value.diag
        said = f"{caught.value} {diagnosis.message_detail} {diagnosis.message_hint} {diagnosis.context}"
    else:
        answer = await ask(call)
        assert answer == expected
        said = str(answer)
    assert SECRET not in said


async def test_a_job_sent_after_somebody_elses_gives_its_sender_no_output(ask, producer):
    [(_, child)] = await ask('select * from notifyq.send_flow(\'[{"name": "a", "queue": "q", "after": [1]}]\')')
    for look in (
        f"select * from notifyq.parents({child})",
        f"select * from notifyq.flow({child})",
        "select * from notifyq.jobs",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await ask(look)


async def test_who_listens_hears_numbers_and_no_data(connection, other, ask, role):
    """LISTEN needs no right: anybody who may connect hears of which queue something is ready, and which jobs have ended."""
    await ask("update notifyq.queue set bell = 'always'")
    [(number,)] = await ask("select number from notifyq.queue")
    heard: list[tuple[str, str]] = []
    connection.on_notification(lambda channel, payload: heard.append((channel, payload)))
    for channel in (number, 0, -1):
        [(name,)] = await ask("select notifyq.channel(%s)", channel)
        await ask(f'listen "{name}"')
    await other.execute("select notifyq.hold_interest(%s)", (number,))  # so that ends are announced
    job = f'"{SECRET}"'
    await ask("select notifyq.send('q', %s, key => %s, id_key => %s)", job, SECRET, SECRET)
    await ask("select notifyq.send('q', %s, delay => '1 hour')", job)
    await ask(f"select notifyq.register('{RUNTIME}', '{{q}}')")
    await ask(f"select * from notifyq.claim('q', 1, '{RUNTIME}')")
    await ask("select notifyq.cancel(1)")
    await ask("select notifyq.complete('{1}', %s, '{1}', %s)", f"[{job}]", RUNTIME)
    await ask("select notifyq.pause('q')")
    await ask("select notifyq.schedule('q', '* * * * *', data => %s, name => 'other')", job)
    assert len(heard) >= 6
    for _, payload in heard:
        assert re.fullmatch(r"look|queues|schedule|[a-z]+:[-0-9,:.]+|[0-9,]+", payload), payload

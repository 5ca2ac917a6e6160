"""The edges of the SQL functions: who may call what, what is out of range, what is named twice, what goes with what."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import psycopg
import pytest
import trio

from notifyq._opening import open_connection

if TYPE_CHECKING:
    from notifyq._connection import TrioConnection

RUNTIME = "11111111-1111-1111-1111-111111111111"
STATES = ("ready", "scheduled", "active", "completed", "failed", "cancelled")


@pytest.fixture
async def queue(ask):
    await ask("select notifyq.create_queue('q', '{\"retry_limit\": 1, \"retry_delay\": 0}')")
    return "q"


@pytest.fixture
async def dead(ask):
    """Queue q fails to dead, dead to deader."""
    await ask("select notifyq.create_queue('deader')")
    await ask('select notifyq.create_queue(\'dead\', \'{"dead_letter": "deader", "retry_limit": 3}\')')
    await ask("select notifyq.create_queue('q', '{\"dead_letter\": \"dead\"}')")
    return "dead"


@pytest.fixture
async def runtime(ask, queue):
    await ask(f"select notifyq.register('{RUNTIME}', '{{q}}')")
    return RUNTIME


@pytest.fixture
async def job_in(ask, queue):
    """One job in each state, each with a key of its own; the failed one has failed once."""

    async def send(state: str, delay: str = "0") -> int:
        [(job,)] = await ask("select notifyq.send('q', id_key => %s, delay => %s::interval)", state, delay)
        return job

    async def send_and_claim(state: str) -> int:
        job = await send(state)
        assert await ask("select id from notifyq.claim('q')") == [(job,)]
        return job

    jobs = {"cancelled": await send("cancelled")}
    await ask("select notifyq.cancel(%s)", jobs["cancelled"])
    jobs["completed"] = await send_and_claim("completed")
    await ask("select notifyq.complete(%s)", jobs["completed"])
    jobs["failed"] = await send_and_claim("failed")
    await ask("select notifyq.fail(%s, 'bad', final => true)", jobs["failed"])
    jobs["active"] = await send_and_claim("active")
    jobs["ready"] = await send("ready")
    jobs["scheduled"] = await send("scheduled", "1 hour")
    return jobs


async def states(ask) -> list[str]:
    return [state for (state,) in await ask("select state from notifyq.jobs order by id")]


async def remembered(ask) -> dict[str, int]:
    """How many rows are left of jobs, by table."""
    tables = ("job", "ready", "scheduled", "active", "archive", "attempt", "id_key")
    return {
        table: count for table in tables for (count,) in await ask(f"select count(*) from notifyq.{table}") if count
    }


# rights


@pytest.fixture
async def producer(connection: TrioConnection, queue):
    """A role that has nothing but USAGE on the schema, and may make tables elsewhere."""
    role = f"producer_{connection.info.dbname[-12:]}"
    await connection.execute(f"create role {role}".encode())
    try:
        await connection.execute(f"grant usage on schema notifyq to {role}".encode())
        await connection.execute(f"grant create on schema public to {role}".encode())
        yield role
    finally:
        await connection.execute("reset role")
        await connection.execute(f"drop owned by {role}".encode())
        await connection.execute(f"drop role {role}".encode())


async def test_a_role_with_usage_alone_may_send_in_all_three_ways(ask, producer):
    await ask(f"set role {producer}")
    await ask("select notifyq.send('q', '1')")
    await ask("select notifyq.try_send('q', '2', delay => '1 hour', id_key => 'k')")
    await ask("select notifyq.send_many('q', '[{\"data\": 3}]')")
    await ask('select notifyq.send_many(\'q\', \'[{"data": 4, "id_key": "l"}]\')')
    await ask("reset role")
    assert await ask("select data from notifyq.jobs order by id") == [(1,), (2,), (3,), (4,)]


async def test_a_role_with_usage_alone_may_call_no_other_function_and_read_no_table(ask, producer):
    allowed = await ask(
        "select p.proname from pg_proc p where p.pronamespace = 'notifyq'::regnamespace"
        " and has_function_privilege(%s, p.oid, 'execute') order by 1",
        producer,
    )
    assert allowed == [("publish",), ("send",), ("send_flow",), ("send_many",), ("try_send",)]
    assert await ask("select count(*) > 40 from pg_proc where pronamespace = 'notifyq'::regnamespace") == [(True,)]
    readable = await ask(
        "select c.relname from pg_class c where c.relnamespace = 'notifyq'::regnamespace and c.relkind in ('r', 'p', 'v')"
        " and has_table_privilege(%s, c.oid, 'select, insert, update, delete')",
        producer,
    )
    assert readable == [("installed",)]  # which version there is


@pytest.mark.parametrize("bell", ["ring_ready", "ring_scheduled"])
async def test_a_role_with_usage_alone_cannot_hang_the_bell_on_a_table_of_its_own(ask, producer, bell):
    await ask(f"set role {producer}")
    await ask("create table mine (queue int, priority int, number bigint, due_at timestamptz)")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match=f"permission denied for function .*{bell}"):
        await ask(
            "create trigger bell after insert on mine referencing new table as inserted"
            f" for each statement execute function notifyq.{bell}()"
        )


# cancel requests


@pytest.mark.parametrize(
    "settle",
    [
        "select state from notifyq.fail('{{{job}}}'::bigint[], '[{{}}]', '{{1}}', '{runtime}')",
        "select 'cancelled' from unnest(notifyq.snooze('{{{job}}}', '{{0}}', '{{1}}', '{runtime}'))",
        "select 'cancelled' from unnest(notifyq.snooze('{{{job}}}', '{{1 hour}}', '{{1}}', '{runtime}'))",
        "select 'cancelled' from unnest(notifyq.release('{{{job}}}', '{{1}}', '{runtime}'))",
        "select state from notifyq.deregister('{runtime}')",
    ],
    ids=["fail", "snooze to ready", "snooze to scheduled", "release", "deregister"],
)
async def test_a_cancel_request_is_honoured_by_every_way_back_in_line(ask, runtime, settle):
    [(job,)] = await ask("select notifyq.send('q')")
    await ask(f"select notifyq.claim('q', 1, '{runtime}')")
    assert await ask("select notifyq.cancel(%s)", job) == [(True,)]
    assert await states(ask) == ["active"]
    assert await ask(settle.format(job=job, runtime=runtime)) == [("cancelled",)]
    assert await states(ask) == ["cancelled"]
    assert await ask(f"select notifyq.complete('{{{job}}}', null, '{{1}}', '{runtime}')") == [([],)]


# expiry


async def test_a_claim_fails_an_expired_job_with_a_dead_letter_and_returns_the_others(ask, dead):
    [(expired,)] = await ask("select notifyq.send('q', '1', expire_in => '1 hour')")
    [(job,)] = await ask("select notifyq.send('q', '2')")
    await ask("update notifyq.job set expires_at = now() where id = %s", expired)
    assert await ask("select id from notifyq.claim('q', 5)") == [(job,)]
    assert await ask("select state, attempt, error ->> 'type' from notifyq.jobs where id = %s", expired) == [
        ("failed", 0, "expired")
    ]
    [(data, provenance)] = await ask("select data, provenance from notifyq.claim('dead')")
    assert (data, provenance["id"], provenance["attempts"], provenance["error"]["type"]) == (1, expired, 0, "expired")


async def test_a_scheduled_job_expires_and_a_released_one_too(ask, queue):
    await ask("select notifyq.send('q')")
    await ask("select notifyq.release(array(select id from notifyq.claim('q')))")
    await ask("select notifyq.send('q', delay => '1 hour')")
    await ask("update notifyq.job set expires_at = now()")
    assert await ask("select notifyq.expire()") == [(2,)]
    assert await states(ask) == ["failed", "failed"]


@pytest.mark.parametrize("delay", ["0", "1 hour"])
async def test_a_job_that_was_tried_once_does_not_expire(ask, queue, delay):
    [(job,)] = await ask("select notifyq.send('q')")
    await ask("select notifyq.fail(id, 'bad', retry_in => %s::interval) from notifyq.claim('q')", delay)
    await ask("update notifyq.job set expires_at = now()")
    assert await ask("select notifyq.expire()") == [(0,)]
    await ask("update notifyq.scheduled set due_at = now()")
    assert await ask("select id, attempt from notifyq.claim('q')") == [(job, 2)]


# what is out of range

TIMES = ("delay", "retry_delay", "retry_delay_max", "timeout", "expire_in")


@pytest.mark.parametrize(
    "options",
    [
        *({name: "300000 years"} for name in TIMES),
        *({name: "infinity"} for name in TIMES),
        {"due_at": "infinity"},
        {"due_at": "294000-01-01"},
        {"timeout": "0"},
        {"expire_in": "-1 s"},
        {"retry_delay": "-infinity"},
        {"retry_delay_max": "-1 s"},
        {"delay": "-101 years"},
        {"priority": -32769},
        {"retry_limit": 1001},
    ],
    ids=lambda options: "-".join(map(str, *options.items())),
)
@pytest.mark.parametrize("way", ["send", "send_many"])
async def test_an_option_out_of_its_range_is_refused_at_the_send(ask, queue, way, options):
    [(name, value)] = options.items()
    arguments = f"{name} => '{value}'" if way == "send" else f"'{json.dumps([{}, options])}'"
    with pytest.raises(psycopg.DatabaseError) as caught:
        await ask(f"select notifyq.{way}('q', {arguments})")
    # Before PostgreSQL 17 there are no infinite intervals: the server itself refuses the text.
    expected = {"NQ003", "22007"} if way == "send" and "infinity" in str(value) and name != "due_at" else {"NQ003"}
    assert caught.value.sqlstate in expected, caught.value
    assert await remembered(ask) == {}


@pytest.mark.parametrize(
    "options",
    [
        {"delay": 1e30},
        {"delay": "99999999999999 years"},
        {"delay": "99999999999999999999 days"},
        {"delay": "soon"},
        {"delay": True},
        {"due_at": "soon"},
        {"due_at": "999999-01-01"},
        {"due_at": "2026-13-45"},
        {"due_at": "2026-01-01 00:00:00 Nowhere/Land"},
        {"retry_limit": 99999999999},
        {"retry_limit": 1.5},
        {"retry_backoff": "maybe"},
        {"delay": 1, "due_at": "2026-01-01"},
    ],
    ids=lambda options: "-".join(f"{name} {value}" for name, value in options.items()),
)
async def test_an_option_that_cannot_be_read_is_refused_by_a_bulk_send(ask, queue, options):
    with pytest.raises(psycopg.DatabaseError) as caught:
        await ask("select notifyq.send_many('q', %s::jsonb)", json.dumps([{"data": 1}, options]))
    assert caught.value.sqlstate == "NQ003", caught.value
    assert await remembered(ask) == {}


@pytest.mark.parametrize(
    "options",
    [
        *({name: "300000 years"} for name in ("retry_delay", "retry_delay_max", "timeout", "expire_in", "retention")),
        *({name: "infinity"} for name in ("retry_delay", "retry_delay_max", "timeout", "expire_in", "retention")),
        *({name: 1e30} for name in ("retry_delay", "timeout", "retention")),
        *({name: "-1 s"} for name in ("retry_delay", "retry_delay_max", "timeout", "expire_in", "retention")),
        {"timeout": 0},
        {"timeout": None},
        {"retry_limit": 1001},
        {"priority": 32768},
        {"max_data_bytes": 0},
        {"bell": "sometimes"},
    ],
    ids=lambda options: "-".join(map(str, *options.items())),
)
async def test_a_queue_option_out_of_its_range_is_refused_by_create_and_update(ask, queue, options):
    before = await ask("select * from notifyq.queue")
    for name, function in (("p", "create_queue"), ("q", "update_queue")):
        with pytest.raises(psycopg.DatabaseError) as caught:
            await ask(f"select notifyq.{function}(%s, %s::jsonb)", name, json.dumps(options))
        assert caught.value.sqlstate == "NQ003", caught.value
    assert await ask("select * from notifyq.queue") == before


@pytest.mark.parametrize(
    ("call", "named"),
    [
        *((f"touch(1, {value})", "extend") for value in ("'178000000 years'", "'-1 s'", "null")),
        ("fail(1, 'bad', retry_in => '178000000 years')", "retry_in"),
        ("fail('{1}'::bigint[], '[{}]', retry_in => '{101 years}')", "retry_in"),
        ("snooze('{1}', '{178000000 years}')", "delays"),
        ("claim('q', lease => '178000000 years')", "lease"),
        ("claim('q', lease => '0')", "lease"),
        *((f"register('{RUNTIME}', '{{q}}', {value})", "lease") for value in ("'2 years'", "'0'", "null")),
        ("register(null, '{q}')", "runtime"),
        (f"register('{RUNTIME}', null)", "queues"),
        ("expire(-1)", "how_many"),
        ("purge(-1)", "how_many"),
        ("schedules_ahead(how_many => -1)", "how_many"),
        ("say_taken(null, '1')", "number"),
        ("say_taken(1, repeat('1', 8000))", "numbers"),
        *((f"declare_schedules('q', '{value}')", "schedules") for value in ("null", "{}", "[null]", "[[{}]]", "5")),
    ],
)
async def test_an_argument_out_of_its_range_is_named_and_changes_nothing(ask, queue, call, named):
    await ask("select notifyq.send('q')")
    await ask("select notifyq.send('q')")
    assert await ask("select id from notifyq.claim('q')") == [(1,)]
    before = await ask("select * from notifyq.jobs order by id")
    with pytest.raises(psycopg.DatabaseError, match=named) as caught:
        await ask(f"select notifyq.{call}")
    assert caught.value.sqlstate == "NQ003", caught.value
    assert await ask("select * from notifyq.jobs order by id") == before


@pytest.mark.parametrize("option", [{}, {"priority": 1}, {"id_key": "k"}], ids=["plain", "with options", "with a key"])
async def test_data_over_the_limit_refuses_the_whole_bulk_send(ask, queue, option):
    await ask("select notifyq.update_queue('q', '{\"max_data_bytes\": 10}')")
    jobs = [{"data": "x" * 8, **option}, {"data": "x" * 9}]
    with pytest.raises(
        psycopg.DatabaseError, match="data of 11 bytes is over the limit of 10 bytes of queue q"
    ) as caught:
        await ask("select notifyq.send_many('q', %s::jsonb)", json.dumps(jobs))
    assert caught.value.sqlstate == "NQ004"
    assert await remembered(ask) == {}
    assert len(await ask("select notifyq.send_many('q', %s::jsonb)", json.dumps(jobs[:1]))) == 1


# an id twice


@pytest.mark.parametrize(
    ("settle", "answer", "left"),
    [
        ("select notifyq.complete('{{{0},{0}}}'::bigint[], '[1, 2]')", "[{0}]", "completed"),
        ("select id from notifyq.fail('{{{0},{0}}}'::bigint[], '[{{}}, {{}}]')", "{0}", "ready"),
        (
            "select id from notifyq.fail('{{{0},{0}}}'::bigint[], '[{{}}, {{}}]', final => '{{true,true}}')",
            "{0}",
            "failed",
        ),
        ("select notifyq.snooze('{{{0},{0}}}', '{{0,0}}')", "[{0}]", "ready"),
        ("select notifyq.snooze('{{{0},{0}}}', '{{1 hour,1 hour}}')", "[{0}]", "scheduled"),
        ("select notifyq.release('{{{0},{0}}}')", "[{0}]", "ready"),
        ("select notifyq.discard('{{{0},{0}}}')", "[{0}]", "cancelled"),
        ("select notifyq.cancel('{{{0},{0}}}'::bigint[])", "[{0}]", "cancelled"),
    ],
    ids=["complete", "fail", "fail for good", "snooze to ready", "snooze to scheduled", "release", "discard", "cancel"],
)
async def test_an_id_named_twice_is_settled_once(ask, queue, settle, answer, left):
    [(job,)] = await ask("select notifyq.send('q')")
    await ask("select notifyq.claim('q')")
    assert [json.dumps(value) for (value,) in await ask(settle.format(job))] == [answer.format(job)]
    assert await states(ask) == [left]
    assert await ask("select count(*) from notifyq.attempt") == [(1 if "fail" in settle else 0,)]


@pytest.mark.parametrize(("state", "revive"), [("failed", "retry"), ("cancelled", "resume")])
async def test_an_id_named_twice_is_revived_and_deleted_once(ask, job_in, state, revive):
    job = job_in[state]
    assert await ask(f"select notifyq.{revive}(%s::bigint[])", [job, job]) == [([job],)]
    assert await ask("select count(*) from notifyq.ready where job = %s", job) == [(1,)]
    assert await ask("select notifyq.delete(%s::bigint[])", [job, job]) == [([job],)]


# delayed jobs


FETCHED = (
    "select seq_tup_read + idx_tup_fetch from pg_stat_xact_user_tables where relid = 'notifyq.scheduled'::regclass"
)


@pytest.mark.parametrize("due", [0, 1])
async def test_a_claim_reads_none_of_the_many_jobs_that_are_due_later(connection, ask, queue, due):
    await ask("select notifyq.send('q', delay => '1 hour') from generate_series(1, 2000)")
    await ask("update notifyq.scheduled set due_at = now() where job <= %s", due)
    async with connection.transaction():
        [(before,)] = await ask(FETCHED)
        assert len(await ask("select id from notifyq.claim('q', 5)")) == due
        [(after,)] = await ask(FETCHED)
    assert after - before <= 10


# dead letters


async def fail(ask, queue: str) -> int:
    [(job,)] = await ask("select id from notifyq.claim(%s)", queue)
    await ask("select notifyq.fail(%s, 'bad', %s, final => true)", job, f"In{queue}")
    return job


async def test_redriving_a_chain_restores_provenance_level_by_level(ask, dead):
    [(job,)] = await ask("select notifyq.send('q', '1', headers => '{\"h\": 1}', priority => 7)")
    await fail(ask, "q")
    letter = await fail(ask, "dead")
    letter_of_letter = (
        "select provenance -> 'id', provenance -> 'provenance' -> 'id' from notifyq.jobs where state = 'ready'"
    )
    assert await ask(letter_of_letter) == [(letter, job)]

    [(_, queue, again)] = await ask("select * from notifyq.redrive('deader')")
    assert queue == "dead"
    assert await ask(letter_of_letter) == [(job, None)]
    assert await ask("select provenance -> 'error' ->> 'type' from notifyq.job where id = %s", again) == [("Inq",)]

    [(gone, queue, last)] = await ask("select * from notifyq.redrive('dead')")
    assert (gone, queue) == (again, "q")
    assert await ask("select id, attempt, data, headers, priority, provenance from notifyq.claim('q')") == [
        (last, 1, 1, {"h": 1}, 7, None)
    ]


async def test_a_redriven_dead_letter_starts_anew_and_its_own_attempts_are_forgotten(ask, dead):
    await ask("select notifyq.send('q')")
    job = await fail(ask, "q")
    [(letter,)] = await ask("select id from notifyq.claim('dead')")
    await ask("select notifyq.fail(%s, 'bad', retry_in => '0')", letter)
    assert await ask("select job from notifyq.attempt order by job") == [(job,), (letter,)]
    [(_, _, again)] = await ask("select * from notifyq.redrive('dead')")
    assert await ask("select job from notifyq.attempt") == [(job,)]
    assert await ask("select id, attempt from notifyq.claim('q')") == [(again, 1)]


async def test_redrive_chooses_by_source_and_error_and_leaves_a_letter_whose_source_is_gone(ask, dead):
    await ask("select notifyq.create_queue('p', '{\"dead_letter\": \"dead\"}')")
    for name in ("q", "p"):
        await ask("select notifyq.send(%s)", name)
        await fail(ask, name)
    assert await ask("select queue from notifyq.redrive('dead', error_type => 'Other')") == []
    assert await ask("select queue from notifyq.redrive('dead', error_type => 'Inp', source => 'q')") == []
    assert await ask("select queue from notifyq.redrive('dead', error_type => 'Inp')") == [("p",)]
    await ask("select notifyq.delete_queue('q')")
    assert await ask("select queue from notifyq.redrive('dead')") == []
    assert await ask("select state from notifyq.jobs where queue = 'dead'") == [("ready",)]


async def test_a_preview_of_redrive_changes_and_locks_nothing(connection, other, ask, dead):
    await ask("select notifyq.send('q')")
    await fail(ask, "q")
    before = await ask("select * from notifyq.jobs order by id")
    async with connection.transaction():
        [(letter, queue, new_id)] = await ask("select * from notifyq.redrive('dead', preview => true)")
        assert (queue, new_id) == ("q", None)
        assert await ask("select pg_current_xact_id_if_assigned()") == [(None,)]
        assert await ask(
            "select distinct mode from pg_locks where pid = pg_backend_pid() and locktype = 'relation'"
        ) == [("AccessShareLock",)]
        assert await ask("select * from notifyq.jobs order by id") == before
        with trio.fail_after(20):
            cursor = await other.execute("select id from notifyq.redrive('dead')")
            assert await cursor.fetchall() == [(letter,)]


# deleting


async def test_a_job_is_deleted_in_every_state_with_all_that_is_remembered_of_it(ask, job_in):
    assert sorted(await states(ask)) == sorted(STATES)
    for job in job_in.values():
        assert await ask("select notifyq.delete(%s)", job) == [(True,)]
        assert await ask("select notifyq.delete(%s)", job) == [(False,)]
    assert await remembered(ask) == {}


@pytest.mark.parametrize(
    ("named", "meant"),
    [
        *((state, {state}) for state in STATES),
        ("waiting", {"ready", "scheduled"}),
        ("finished", {"completed", "failed", "cancelled"}),
        (None, set(STATES)),
    ],
)
async def test_delete_all_leaves_the_jobs_in_other_states_and_of_other_queues(ask, job_in, named, meant):
    await ask("select notifyq.create_queue('p')")
    await ask("select notifyq.send('p', id_key => 'p')")
    assert await ask("select notifyq.delete_all('q', %s)", named) == [(len(meant),)]
    left = sorted(set(STATES) - meant)
    assert sorted(await ask("select state from notifyq.jobs where queue = 'q'")) == [(state,) for state in left]
    assert [key for (key,) in await ask("select key from notifyq.id_key order by key")] == sorted([*left, "p"])
    assert await ask("select count(*) from notifyq.attempt") == [(1 if "failed" in left else 0,)]


async def test_a_final_failure_spends_no_retries(ask, queue):
    [(job,)] = await ask("select notifyq.send('q', retry_limit => 5)")
    await ask("select notifyq.claim('q')")
    assert await ask("select notifyq.fail(%s, 'bad', 'Bug', final => true)", job) == [("failed",)]
    assert await ask("select state, attempt, error ->> 'type' from notifyq.jobs") == [("failed", 1, "Bug")]


# queues


async def test_create_queue_tells_by_name_how_a_dead_letter_queue_differs(ask):
    await ask("select notifyq.create_queue(name) from unnest('{a,b}'::text[]) name")
    assert await ask("select notifyq.create_queue('q', '{\"dead_letter\": \"a\"}')") == [("created",)]
    assert await ask("select notifyq.create_queue('q', '{\"dead_letter\": \"a\"}')") == [("exists",)]
    assert await ask('select notifyq.create_queue(\'q\', \'{"dead_letter": "b", "retry_limit": 5}\')') == [
        ("differs: dead_letter is a, not b; retry_limit is 2, not 5",)
    ]
    assert await ask("select notifyq.create_queue('q', '{\"dead_letter\": null}')") == [
        ("differs: dead_letter is a, not none",)
    ]
    await ask("select notifyq.update_queue('q', '{\"dead_letter\": \"b\"}')")
    assert await ask("select notifyq.create_queue('q', '{\"dead_letter\": \"b\"}')") == [("exists",)]
    assert await ask("select retry_limit from notifyq.queue where name = 'q'") == [(2,)]


# runtimes


async def test_a_stopping_runtime_is_seen_as_such_claims_no_more_and_may_still_settle(ask, runtime):
    [(job,)] = await ask("select notifyq.send('q')")
    await ask(f"select notifyq.claim('q', 1, '{runtime}')")
    assert await ask("select state, active from notifyq.runtimes") == [("running", 1)]
    await ask(f"select notifyq.stop('{runtime}')")
    assert await ask("select state, active from notifyq.runtimes") == [("stopping", 1)]
    with pytest.raises(psycopg.DatabaseError, match="no live lease") as caught:
        await ask(f"select notifyq.claim('q', 1, '{runtime}')")
    assert caught.value.sqlstate == "NQ005"
    assert await ask(f"select renewed from notifyq.beat('{runtime}')") == [(True,)]
    assert await ask(f"select notifyq.complete('{{{job}}}', null, '{{1}}', '{runtime}')") == [([job],)]
    await ask("update notifyq.runtime set lease_until = now() - interval '1 second'")
    assert await ask("select state, active from notifyq.runtimes") == [("lost", 0)]


async def test_a_beat_tells_what_is_due_ready_cancelled_and_about_to_lapse(ask, runtime):
    await ask("select notifyq.create_queue(name) from unnest('{p,empty}'::text[]) name")
    numbers = [number for (number,) in await ask("select number from notifyq.queue order by number")]
    q, p, _ = numbers
    beat = f"select renewed, cancels, ready, due_in, lapse_in from notifyq.beat('{runtime}', %s)"
    assert await ask(beat, numbers) == [(True, [], [], {}, None)]

    [(job,)] = await ask("select notifyq.send('q')")
    await ask(f"select notifyq.claim('q', 1, '{runtime}')")
    await ask("select notifyq.cancel(%s)", job)
    await ask("select notifyq.send('q', delay => d) from unnest('{1 hour,2 hours}'::interval[]) d")
    await ask("select notifyq.send('p')")
    await ask("select notifyq.claim('p', lease => '10 minutes')")
    await ask("select notifyq.send('p')")
    [(renewed, cancels, ready, due_in, lapse_in)] = await ask(beat, numbers)
    assert (renewed, cancels, ready, list(due_in)) == (True, [job], [p], [str(q)])
    assert 3500 < due_in[str(q)] <= 3600
    assert 500 < lapse_in <= 600

    await ask("update notifyq.scheduled set due_at = now()")
    [(ready,)] = await ask(f"select ready from notifyq.beat('{runtime}', %s)", numbers)
    assert sorted(ready) == [q, p]
    assert await ask("select renewed, cancels from notifyq.beat(gen_random_uuid())") == [(False, [])]


async def test_a_beat_counts_the_lease_that_all_have_from_the_start_of_the_server(ask, runtime):
    await ask("select notifyq.register(gen_random_uuid(), '{q}', '1 year')")
    await ask(f"update notifyq.runtime set lease_until = now() - interval '1 hour' where id <> '{runtime}'")
    assert await ask("select * from notifyq.rescue()") == []
    [(lapse_in,)] = await ask(f"select lapse_in from notifyq.beat('{runtime}')")
    [(expected,)] = await ask(
        "select extract(epoch from pg_postmaster_start_time() + interval '1 year' - now())::float8"
    )
    assert lapse_in == pytest.approx(expected, abs=5)


# leaves

LEAVES = (
    "select inhrelid::regclass::text from pg_inherits"
    " where inhparent = 'notifyq.archive'::regclass and inhrelid::regclass::text ~ '[0-9]{8}$' order by 1"
)


async def test_however_many_days_ahead_are_asked_for_at_most_32_leaves_are_made(ask, queue):
    assert await ask("select notifyq.make_leaves(1000)") == [(32,)]
    assert len(await ask(LEAVES)) == 32
    assert await ask("select notifyq.make_leaves(1000)") == [(0,)]


async def test_drop_leaf_drops_one_leaf_a_call_with_its_keys_and_attempts(ask, queue):
    jobs = []
    for days_ago in (2, 1, 0):
        [(job,)] = await ask("select notifyq.send('q', id_key => %s)", str(days_ago))
        await ask("select notifyq.fail(id, 'bad', final => true) from notifyq.claim('q')")
        [(day,)] = await ask("select to_char((now() at time zone 'utc')::date - %s::int, 'YYYYMMDD')", days_ago)
        await ask(
            f"create table notifyq.archive_{day} partition of notifyq.archive"
            f" for values from ('{day}') to ('{day}'::date + 1)"
        )
        await ask(f"update notifyq.archive set leaves_on = '{day}' where id = {job}")
        jobs.append(job)
    await ask("select notifyq.make_leaves(0)")
    [(kept,)] = await ask("select notifyq.send('q', id_key => 'kept')")
    await ask("select notifyq.fail(id, 'bad', final => true) from notifyq.claim('q')")
    for left in (jobs[1:], jobs[2:], []):
        assert await ask("select notifyq.drop_leaf()") == [(True,)]
        expected = [(job,) for job in [*left, kept]]
        assert await ask("select id from notifyq.archive order by id") == expected
        assert await ask("select job from notifyq.attempt order by job") == expected
        assert await ask("select job from notifyq.id_key order by job") == expected
        assert len(await ask(LEAVES)) == len(left) + 1
    assert await ask("select notifyq.drop_leaf()") == [(False,)]
    assert await ask("select id from notifyq.archive") == [(kept,)]


# sending many


async def test_send_many_keeps_order_every_option_and_the_queues_defaults(ask, queue):
    await ask(
        'select notifyq.update_queue(\'q\', \'{"priority": 3, "timeout": 30, "expire_in": 300, "retry_delay_max": 9}\')'
    )
    jobs = [
        {"data": {"n": 1}},
        {
            "data": None,
            "priority": 9,
            "delay": 3600,
            "retry_limit": 7,
            "retry_delay": "2 s",
            "retry_delay_max": 60,
            "retry_backoff": False,
            "timeout": "1 minute",
            "expire_in": "2 minutes",
            "headers": {"h": 1},
            "id_key": "z",
        },
        {"id_key": "a", "due_at": "2000-01-01T00:00:00Z", "priority": None, "headers": None},
        {"data": [3], "id_key": "z"},
        {"data": 4},
    ]
    rows = await ask("select id, created from notifyq.send_many('q', %s::jsonb)", json.dumps(jobs))
    ids = [id_ for id_, _ in rows]
    assert [created for _, created in rows] == [True, True, True, False, True]
    assert ids[3] == ids[1]
    assert [ids[0], ids[1], ids[2], ids[4]] == sorted(set(ids))
    seconds = "extract(epoch from {})::float8"
    stored = await ask(
        f"select v.state, j.data, j.headers, j.priority, j.retry_limit, {seconds.format('j.retry_delay')},"
        f" {seconds.format('j.retry_delay_max')}, j.retry_backoff, {seconds.format('j.timeout')},"
        f" round({seconds.format('coalesce(v.due_at, j.sent_at) - j.sent_at')}),"
        f" round({seconds.format('j.expires_at - j.sent_at')}), j.id_key"
        " from notifyq.job j join notifyq.jobs v using (id) order by j.id"
    )
    plain = (3, 1, 0, 9, True, 30, 0, 300)
    assert stored == [
        ("ready", {"n": 1}, None, *plain, None),
        ("scheduled", None, {"h": 1}, 9, 7, 2, 60, False, 60, 3600, 3720, "z"),
        ("ready", None, None, *plain, "a"),
        ("ready", 4, None, *plain, None),
    ]
    assert [id_ for (id_,) in await ask("select id from notifyq.claim('q', 5)")] == [ids[0], ids[2], ids[4]]


# the bell


@pytest.fixture
async def heard(dsn, ask, queue):
    """What the queues of this test notified since it was last asked, to somebody who is free."""
    listener = await open_connection(dsn)
    await listener.execute(b"select notifyq.stand_free(array_agg(n), array_agg(false)) from generate_series(1, 9) n")
    payloads: list[str] = []
    listener.add_notify_handler(lambda notification: payloads.append(notification.payload))
    for (channel,) in await ask("select notifyq.channel(number) from generate_series(1, 9) number"):
        await listener.execute(f'listen "{channel}"'.encode())

    async def heard() -> list[str]:
        await listener.execute(f"notify \"{channel}\", 'end'".encode())
        with trio.fail_after(20):
            while "end" not in payloads:
                await listener.wait_input()
        rung = [payload for payload in payloads if payload != "end"]
        payloads.clear()
        return rung

    yield heard
    await listener.close()


async def test_a_thousand_jobs_in_one_statement_ring_once_for_the_first(ask, heard):
    jobs = "select jsonb_agg(jsonb_build_object('data', n)) from generate_series(1, 1000) n"
    ids = await ask(f"select id from notifyq.send_many('q', ({jobs}))")
    assert await heard() == [f"r:0:{ids[0][0]}"]


async def test_jobs_of_several_priorities_in_one_statement_ring_once_for_the_highest(ask, heard):
    jobs = '[{"priority": 0}, {"priority": 7}, {"priority": 3}, {"priority": 7}]'
    ids = await ask("select id from notifyq.send_many('q', %s::jsonb)", jobs)
    assert await heard() == [f"r:7:{ids[1][0]}"]


async def test_only_a_higher_priority_rings_again_in_a_transaction(connection, ask, heard):
    async with connection.transaction():
        ids = [(await ask("select notifyq.send('q', priority => %s)", n))[0][0] for n in (0, 7, 3, 7)]
        assert await heard() == []
    assert await heard() == [f"r:0:{ids[0]}", f"r:7:{ids[1]}"]
    await ask("select notifyq.send('q')")
    assert len(await heard()) == 1


async def test_only_an_earlier_due_time_rings_again_in_a_transaction(connection, ask, heard):
    async with connection.transaction():
        await ask("select notifyq.send('q', due_at => to_timestamp(d)) from unnest('{4000000000}'::int8[]) d")
        await ask("select notifyq.send('q', due_at => to_timestamp(d)) from unnest('{4000000009}'::int8[]) d")
        await ask("select notifyq.send('q', due_at => to_timestamp(d)) from unnest('{3999999999}'::int8[]) d")
        await ask("select notifyq.send('q')")
    assert [float(payload[2:]) for payload in (await heard())[:2]] == [4000000000, 3999999999]


async def test_one_statement_rings_each_queue_it_sends_to_but_those_without_a_bell(ask, heard):
    await ask("select notifyq.create_queue('p')")
    await ask("select notifyq.create_queue('quiet', '{\"bell\": \"never\"}')")
    ids = [id_ for (id_,) in await ask("select notifyq.send(name) from unnest('{q,p,quiet}'::text[]) name")]
    await ask("select notifyq.cancel(%s::bigint[])", ids)
    assert len(await heard()) == 2
    assert await ask("select notifyq.resume(%s::bigint[])", ids) == [(ids,)]
    places = await ask(
        "select t.number from notifyq.ready t join notifyq.queue q on q.number = t.queue where q.bell <> 'never'"
    )
    assert sorted(await heard()) == sorted(f"r:0:{number}" for (number,) in places)
    assert len(places) == 2

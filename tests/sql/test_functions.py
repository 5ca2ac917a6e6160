"""The SQL functions from psql's side: everything a client without Python can do, and what it may not."""

from __future__ import annotations

import json

import psycopg
import pytest
import trio

from notifyq._opening import open_connection


@pytest.fixture
async def queue(ask):
    await ask("select notifyq.create_queue('q', '{\"retry_limit\": 1, \"retry_delay\": 0}')")
    return "q"


async def test_a_job_is_sent_claimed_completed_and_failed_with_nothing_but_sql(ask, queue):
    [(first,)] = await ask("select notifyq.send('q', '{\"n\": 1}')")
    [(second,)] = await ask("select notifyq.send('q')")
    assert await ask("select id, attempt, data from notifyq.claim('q', 5)") == [(first, 1, {"n": 1}), (second, 1, None)]
    assert await ask("select notifyq.complete(%s, '{\"ok\": true}')", first) == [(True,)]
    assert await ask("select notifyq.complete(%s)", first) == [(False,)]
    assert await ask("select notifyq.fail(%s, 'bad')", second) == [("ready",)]
    assert await ask("select attempt from notifyq.claim('q')") == [(2,)]
    assert await ask("select notifyq.fail(%s, 'worse')", second) == [("failed",)]
    assert await ask("select state, output, error ->> 'message' from notifyq.jobs order by id") == [
        ("completed", {"ok": True}, None),
        ("failed", None, "worse"),
    ]
    assert await ask("select notifyq.retry(%s)", second) == [(True,)]
    assert await ask("select attempt from notifyq.claim('q')") == [(3,)]
    assert await ask("select notifyq.fail(%s, 'worst')", second) == [("failed",)]


async def test_what_is_due_at_one_moment_is_promoted_in_the_order_in_which_it_was_sent(ask, queue):
    jobs = [id for (id,) in await ask("select notifyq.send('q', delay => '1 hour') from generate_series(1, 4)")]
    for job in reversed(jobs):  # the first one's ticket is written last
        await ask("update notifyq.scheduled set due_at = '2020-01-01' where job = %s", job)
    assert await ask("select notifyq.promote(number, 2) from notifyq.queue") == [(2,)]
    assert await ask("select job from notifyq.ready order by number") == [(job,) for job in jobs[:2]]
    assert [id for (id,) in await ask("select id from notifyq.claim('q', 4)")] == jobs


async def test_an_id_key_makes_one_job_also_within_one_call(ask, queue):
    [(first, created)] = await ask("select * from notifyq.try_send('q', '1', id_key => 'k')")
    assert created
    assert await ask("select * from notifyq.try_send('q', '2', id_key => 'k')") == [(first, False)]
    await ask("select notifyq.complete(id) from notifyq.claim('q')")
    assert await ask("select * from notifyq.try_send('q', '3', id_key => 'k')") == [(first, False)]
    rows = await ask(
        """select * from notifyq.send_many('q', '[{"data": 1, "id_key": "a"}, {"data": 2}, {"data": 3, "id_key": "a"}]')"""
    )
    assert [created for _, created in rows] == [True, True, False]
    assert rows[0][0] == rows[2][0]
    await ask("select notifyq.delete(%s)", first)
    assert (await ask("select created from notifyq.try_send('q', '4', id_key => 'k')")) == [(True,)]


async def test_two_senders_of_one_id_key_make_one_job(dsn, ask, queue):
    other = await open_connection(dsn)
    async with trio.open_nursery() as nursery, other.transaction():
        [mine] = await (await other.execute("select id from notifyq.try_send('q', id_key => 'k')")).fetchall()
        theirs: list = []

        async def send_too() -> None:
            theirs.extend(await ask("select * from notifyq.try_send('q', id_key => 'k')"))

        nursery.start_soon(send_too)
        with trio.fail_after(20):
            while True:
                cursor = await other.execute("select count(*) from pg_stat_activity where wait_event_type = 'Lock'")
                if await cursor.fetchone() == (1,):
                    break
    await other.close()
    assert theirs == [(mine[0], False)]


async def test_send_many_keeps_order_options_and_defaults(ask, queue):
    rows = await ask("""select id from notifyq.send_many('q', '[{"data": "a"}, {"data": "b"}, {"data": "c"}]')""")
    assert rows == sorted(rows)
    jobs = '[{"data": 1, "priority": 7, "headers": {"t": 1}}, {"data": 2, "delay": 60}]'
    rows = await ask("select id from notifyq.send_many('q', %s::jsonb)", jobs)
    assert await ask(
        "select state, priority, retry_limit, headers from notifyq.jobs where id = any (%s) order by id",
        [r for (r,) in rows],
    ) == [
        ("ready", 7, 1, {"t": 1}),
        ("scheduled", 0, 1, None),
    ]


async def test_a_job_joins_the_senders_transaction_and_savepoints(connection, ask, queue):
    async with connection.transaction():
        await ask("select notifyq.send('q', '1')")
        async with connection.transaction(force_rollback=True):
            await ask("select notifyq.send('q', '2')")
        await ask("select notifyq.send('q', '3')")
    assert await ask("select data from notifyq.jobs order by id") == [(1,), (3,)]


async def test_a_thousand_jobs_in_one_transaction_ring_once_and_a_rollback_never(dsn, connection, ask, queue):
    listener = await open_connection(dsn)
    heard = []
    listener.add_notify_handler(lambda notification: heard.append(notification.payload))
    await listener.execute(b"select notifyq.stand_free(array_agg(number), array_agg(false)) from notifyq.queue")
    [(channel,)] = await ask("select notifyq.channel(number) from notifyq.queue")
    await listener.execute(f'listen "{channel}"'.encode())
    async with connection.transaction(force_rollback=True):
        await ask("select notifyq.send('q')")
    async with connection.transaction():
        for _ in range(10):
            await ask("select notifyq.send('q') from generate_series(1, 100)")
        async with connection.transaction(force_rollback=True):
            await ask("select notifyq.send('q')")
    await listener.execute(f"notify \"{channel}\", 'end'".encode())
    with trio.fail_after(20):
        while "end" not in heard:
            await listener.wait_input()
    await listener.close()
    assert len(heard) == 2
    assert heard[0].startswith("r:0:")


async def test_claims_step_over_each_other(dsn, connection, ask, queue):
    await ask("select notifyq.send('q') from generate_series(1, 4)")
    other = await open_connection(dsn)
    async with connection.transaction(), other.transaction():
        mine = await ask("select id from notifyq.claim('q', 2)")
        theirs = await (await other.execute("select id from notifyq.claim('q', 4)")).fetchall()
    await other.close()
    assert len(mine) == 2
    assert len(theirs) == 2
    assert not set(mine) & set(theirs)


async def test_a_claim_from_a_floor_misses_nothing_above_it(ask, queue):
    ids = [row[0] for row in await ask("select notifyq.send('q') from generate_series(1, 4)")]
    rows = await ask("select id from notifyq.claim('q', 10, null, null, '{0}', %s::bigint[])", [ids[2]])
    assert [row[0] for row in rows] == ids[2:]
    assert [row[0] for row in await ask("select id from notifyq.claim('q', 10)")] == ids[:2]


async def test_released_keeps_its_place_and_attempt_snoozed_its_attempt(ask, queue):
    first, second = (row[0] for row in await ask("select notifyq.send('q') from generate_series(1, 2)"))
    await ask("select notifyq.claim('q')")
    assert await ask("select notifyq.release(array[%s]::bigint[])", first) == [([first],)]
    assert await ask("select id, attempt from notifyq.claim('q')") == [(first, 1)]
    await ask("select notifyq.snooze(array[%s]::bigint[], '{0}'::interval[])", first)
    assert await ask("select id, attempt from notifyq.claim('q', 2)") == [(second, 1), (first, 1)]


async def test_a_retry_stands_behind_what_was_sent_meanwhile(ask, queue):
    [(first,), (second,)] = await ask("select notifyq.send('q') from generate_series(1, 2)")
    await ask("select notifyq.claim('q')")
    assert await ask("select notifyq.fail(%s, 'bad')", first) == [("ready",)]
    assert await ask("select id from notifyq.claim('q', 2)") == [(second,), (first,)]


async def test_a_claim_by_hand_past_its_lease_is_rescued_its_attempt_spent(ask, queue):
    [(job,)] = await ask("select notifyq.send('q')")
    await ask("select notifyq.claim('q', lease => '1 minute')")
    assert await ask("select * from notifyq.rescue()") == []
    await ask("update notifyq.active set deadline = now() - interval '1 second'")
    assert await ask("select * from notifyq.rescue()") == [(job, "ready")]
    assert await ask("select attempt from notifyq.claim('q')") == [(2,)]
    await ask("update notifyq.active set deadline = now() - interval '1 second'")
    assert await ask("select * from notifyq.rescue()") == [(job, "failed")]


RUNTIME = "11111111-1111-1111-1111-111111111111"


async def test_no_claim_and_no_settle_without_the_lease(connection, ask, queue):
    [(job,)] = await ask("select notifyq.send('q')")
    with pytest.raises(psycopg.DatabaseError, match="no live lease") as caught:
        await ask(f"select notifyq.claim('q', 1, '{RUNTIME}')")
    assert caught.value.sqlstate == "NQ005"
    await ask(f"select notifyq.register('{RUNTIME}', '{{q}}')")
    assert await ask(f"select id from notifyq.claim('q', 1, '{RUNTIME}')") == [(job,)]
    assert await ask("select notifyq.complete(%s)", job) == [(False,)]
    assert await ask(f"select notifyq.complete('{{{job}}}', null, '{{2}}', '{RUNTIME}')") == [([],)]
    assert await ask(f"select notifyq.complete('{{{job}}}', null, '{{1}}', '{RUNTIME}')") == [([job],)]


async def test_cancel_resume_and_delete_in_every_state(ask, queue):
    waiting, later, active = (
        row[0] for row in await ask("select notifyq.send('q', delay => d) from unnest('{0,60,0}'::interval[]) d")
    )
    assert await ask("select notifyq.cancel(%s::bigint[])", [waiting, later]) == [([later, waiting],)]
    assert await ask("select notifyq.resume(%s::bigint[])", [waiting, later]) == [([waiting, later],)]
    await ask("select notifyq.cancel(%s)", waiting)
    await ask("select notifyq.cancel(%s)", later)
    assert await ask("select id from notifyq.claim('q', 5)") == [(active,)]
    assert await ask("select notifyq.cancel(%s)", active) == [(True,)]
    assert await ask("select notifyq.cancel(%s)", active) == [(False,)]
    assert await ask("select notifyq.delete_all('q', 'finished')") == [(3,)]
    assert await ask("select count(*) from notifyq.jobs") == [(0,)]


async def test_expired_jobs_fail_by_name_and_reach_the_dead_letter_queue(ask):
    await ask("select notifyq.create_queue('dead')")
    await ask('select notifyq.create_queue(\'q\', \'{"dead_letter": "dead", "expire_in": 60}\')')
    [(job,)] = await ask("select notifyq.send('q', '1')")
    await ask("update notifyq.job set expires_at = now() - interval '1 second'")
    assert await ask("select notifyq.expire()") == [(1,)]
    assert await ask("select state, error ->> 'type' from notifyq.jobs where id = %s", job) == [("failed", "expired")]
    assert await ask("select data, provenance -> 'error' ->> 'type' from notifyq.jobs where queue = 'dead'") == [
        (1, "expired")
    ]


async def test_a_queue_that_keeps_nothing_keeps_nothing(ask):
    await ask('select notifyq.create_queue(\'q\', \'{"retention": 0, "retry_limit": 3, "retry_delay": 0}\')')
    await ask("select notifyq.send('q', id_key => 'k')")
    await ask("select notifyq.fail(id, 'bad') from notifyq.claim('q')")
    await ask("select notifyq.complete(id) from notifyq.claim('q')")
    for table in ("job", "archive", "attempt", "id_key", "ready", "active", "scheduled"):
        assert await ask(f"select count(*) from notifyq.{table}") == [(0,)], table


async def test_leaves_are_made_ahead_dropped_when_due_and_what_is_kept_is_purged(ask, queue):
    await ask("select notifyq.create_queue('long', '{\"retention\": \"90 days\"}')")
    assert (await ask("select notifyq.make_leaves()"))[0][0] == 4
    await ask("select notifyq.send(n) from unnest('{q,long}'::text[]) n")
    await ask("select notifyq.complete(c.id) from unnest('{q,long}'::text[]) n, notifyq.claim(n) c")
    assert await ask("select count(*) from notifyq.archive_default") == [(0,)]
    assert await ask("select count(*) from notifyq.archive_kept") == [(1,)]
    await ask("update notifyq.archive set leaves_on = leaves_on - 100 where leaves_on < 'infinity'")
    await ask("update notifyq.archive set finished_at = finished_at - interval '100 days'")
    assert await ask("select notifyq.purge()") == [(2,)]
    assert await ask("select count(*) from notifyq.archive") == [(0,)]


@pytest.mark.parametrize(
    ("statement", "state", "message"),
    [
        ("select notifyq.send('nowhere')", "NQ001", "no queue named 'nowhere'"),
        ("select notifyq.send(null)", "NQ001", "no queue named null"),
        ("select notifyq.create_queue('bad name')", "NQ002", "not a queue name"),
        ("select notifyq.create_queue('x''; drop table notifyq.job')", "NQ002", "not a queue name"),
        (
            "select notifyq.create_queue('p', '{\"visibility_timeout\": 3}')",
            "NQ003",
            "unknown option: visibility_timeout",
        ),
        ("select notifyq.create_queue('p', '{\"retry_limit\": \"many\"}')", "NQ003", "retry_limit"),
        ("select notifyq.create_queue('p', '{\"retry_limit\": -1}')", "NQ003", "out of its range"),
        ("select notifyq.create_queue('p', '{\"dead_letter\": \"nowhere\"}')", "NQ001", "nowhere"),
        ("select notifyq.send('q', priority => 40000)", "NQ003", "priority 40000"),
        ("select notifyq.send('q', timeout => '-1 s')", "NQ003", "above zero"),
        ("select notifyq.send('q', delay => '1 s', due_at => now())", "NQ003", "exclude each other"),
        (
            "select notifyq.send('q', to_jsonb(repeat('x', 2000000)))",
            "NQ004",
            "over the limit of 1048576 bytes of queue q",
        ),
        ("select notifyq.send('q', headers => '[1]')", "NQ003", "headers must be a JSON object, not array"),
        (
            "select notifyq.send_many('q', '[{\"headers\": \"x\"}]')",
            "NQ003",
            "headers must be a JSON object, not string",
        ),
        (
            'select notifyq.send_flow(\'[{"name": "a", "queue": "q", "headers": 1}]\')',
            "NQ003",
            "headers must be a JSON object, not number",
        ),
        ("select notifyq.send_many('q', '{}')", "NQ003", "array"),
        ("select notifyq.send_many('q', '[1]')", "NQ003", "each of the jobs must be a JSON object, not number"),
        ("select notifyq.send_many('q', '[{\"date\": 1}]')", "NQ003", "unknown option: date"),
        ('select notifyq.send_many(\'q\', \'[{"data": 1, "priority": "high"}]\')', "NQ003", "does not fit"),
        ("select notifyq.claim('q', 0)", "NQ003", "how_many"),
        ("select notifyq.complete('{1}'::bigint[], '{}')", "NQ003", "array"),
        ("select notifyq.fail('{1}'::bigint[], '[]')", "NQ003", "one element a job"),
        ("select notifyq.delete_all('q', 'sleeping')", "NQ003", "not a state"),
        ("select notifyq.redrive('nowhere')", "NQ001", "nowhere"),
    ],
)
async def test_bad_input_is_refused_by_name_and_changes_nothing(ask, queue, statement, state, message):
    with pytest.raises(psycopg.DatabaseError) as caught:
        await ask(statement)
    assert caught.value.sqlstate == state, caught.value
    assert message in str(caught.value)
    assert await ask("select count(*) from notifyq.jobs") == [(0,)]
    assert await ask("select name from notifyq.queue") == [("q",)]


async def test_a_claim_that_need_not_be_durable_spares_its_transaction_the_flush(connection, ask, queue):
    async with connection.transaction():
        await ask("select notifyq.claim('q'), notifyq.claim('q', durably => null)")
        assert await ask("show synchronous_commit") == [("on",)]
        await ask("select notifyq.claim('q', durably => false)")
        assert await ask("show synchronous_commit") == [("off",)]
    assert await ask("show synchronous_commit") == [("on",)]


async def test_the_same_duration_in_other_words_does_not_differ(ask):
    options = {"retention": "168 hours", "retry_delay": 60, "expire_in": None}
    assert await ask("select notifyq.create_queue('q', '{\"retry_delay\": \"1 minute\"}')") == [("created",)]
    assert await ask("select notifyq.create_queue('q', %s)", json.dumps(options)) == [("exists",)]
    options |= {"retention": 3600, "expire_in": 5}
    [(answer,)] = await ask("select notifyq.create_queue('q', %s)", json.dumps(options))
    assert answer == "differs: expire_in is none, not 00:00:05; retention is 7 days, not 01:00:00"


async def test_claim_refuses_other_isolation_levels_in_words(connection, ask, queue):
    await ask("set default_transaction_isolation = 'repeatable read'")
    with pytest.raises(psycopg.DatabaseError, match="READ COMMITTED transactions only, not REPEATABLE READ"):
        await ask("select notifyq.claim('q')")


async def test_a_role_with_execute_alone_sends_from_a_trigger(dsn, connection, ask, queue):
    role = f"producer_{connection.info.dbname[-12:]}"
    await connection.execute(f"create role {role}".encode())
    try:
        await connection.execute(f"grant usage on schema notifyq to {role}".encode())
        await connection.execute(f"grant create on schema public to {role}".encode())
        await connection.execute(f"set role {role}".encode())
        await connection.execute(
            "create table orders (id int);"
            "create function on_order() returns trigger language plpgsql as"
            " $$ begin perform notifyq.send('q', to_jsonb(new.id)); return new; end $$;"
            "create trigger t after insert on orders for each row execute function on_order()"
        )
        await connection.execute("insert into orders values (7)")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await ask("select * from notifyq.jobs")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await ask("select * from notifyq.claim('q')")
        await connection.execute("reset role")
        assert await ask("select data from notifyq.jobs") == [(7,)]
    finally:
        await connection.execute("reset role")
        await connection.execute(f"drop owned by {role}".encode())
        await connection.execute(f"drop role {role}".encode())


@pytest.mark.parametrize("attempt", [1, 2, 5, 80])
async def test_backoff_lies_within_its_documented_bounds(ask, attempt):
    rows = await ask(
        "select extract(epoch from notifyq.backoff('1 s', '1 hour', true, %s))::float8 from generate_series(1, 200)",
        attempt,
    )
    ceiling = min(3600, 2 ** (attempt - 1))
    delays = [delay for (delay,) in rows]
    assert ceiling / 2 <= min(delays)
    assert max(delays) <= ceiling
    assert max(delays) - min(delays) > ceiling / 4
    assert await ask("select notifyq.backoff('3 s', '1 s', false, %s) = '3 s'", attempt) == [(True,)]


async def test_one_completion_of_jobs_that_are_kept_and_jobs_that_are_not_forgets_of_these_alone(ask):
    jobs = []
    for name, retention in (("kept", 60), ("unkept", 0)):
        await ask(
            "select notifyq.create_queue(%s, jsonb_build_object('retention', %s::int, 'retry_delay', 0))",
            name,
            retention,
        )
        jobs += await ask("select notifyq.send(%s, id_key => 'once')", name)
        await ask(
            'select notifyq.fail(array_agg(id), \'[{"type": "E", "message": "m"}]\') from notifyq.claim(%s)', name
        )
        await ask("select notifyq.claim(%s)", name)
    assert await ask("select cardinality(notifyq.complete(%s::bigint[]))", [job for (job,) in jobs]) == [(2,)]
    [kept, _unkept] = jobs
    assert await ask("select id from notifyq.archive") == [kept]
    assert await ask("select job from notifyq.attempt") == [kept]
    assert await ask("select job from notifyq.id_key") == [kept]

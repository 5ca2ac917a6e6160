"""Two sessions that meet at one job, queue, leaf or runtime: what each finds, whichever way the first one ends."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import psycopg
import pytest
import trio

from notifyq import _schema
from notifyq._opening import open_connection

if TYPE_CHECKING:
    from notifyq._connection import TrioConnection

RUNTIME = "11111111-1111-1111-1111-111111111111"
CLAIM = "select id from notifyq.claim('q', 5)"
CLAIM_AS_RUNTIME = f"select id from notifyq.claim('q', 5, '{RUNTIME}')"
LAPSE = "update notifyq.runtime set lease = '1 ms', lease_until = clock_timestamp() - interval '1 second'"
OVERDUE = "update notifyq.active set deadline = clock_timestamp() - interval '1 second'"
DUE = "update notifyq.scheduled set due_at = clock_timestamp() - interval '1 second'"

either_end = pytest.mark.parametrize("commit", [True, False], ids=["committed", "undone"])


async def rows(connection: TrioConnection, statement: str, *parameters: object) -> list:
    cursor = await connection.execute(statement.encode(), parameters or None)
    while cursor.nextset():
        pass
    return await cursor.fetchall() if cursor.description else []


async def until_waiting(watcher: TrioConnection, waiter: TrioConnection) -> None:
    """Return once a session waits for a lock."""
    waits = "select 1 from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
    while not await rows(watcher, waits, waiter.info.backend_pid):
        await trio.sleep(0.005)


@pytest.fixture
def race(connection: TrioConnection, other: TrioConnection):
    async def race(first: str, second: str, *, commit: bool, waits: bool = True) -> tuple[list, list]:
        """Run the first in a transaction; once the second waits for it (or is through), end it. Give both answers."""
        answer: list = []
        failure: list[psycopg.Error] = []
        through = trio.Event()

        async def come_second() -> None:
            try:
                answer.extend(await rows(other, second))
            except psycopg.Error as error:
                failure.append(error)
            through.set()

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery, connection.transaction(force_rollback=not commit):
                mine = await rows(connection, first)
                nursery.start_soon(come_second)
                with trio.fail_after(20):
                    await (until_waiting(connection, other) if waits else through.wait())
        if failure:
            raise failure[0]
        return mine, answer

    return race


@pytest.fixture
async def queue(ask):
    await ask("select notifyq.create_queue('q', '{\"retry_limit\": 1, \"retry_delay\": 0}')")
    return "q"


@pytest.fixture
async def job(ask, queue):
    [(job,)] = await ask("select notifyq.send('q', id_key => 'k')")
    return job


@pytest.fixture
async def runtime(ask, queue):
    await ask(f"select notifyq.register('{RUNTIME}', '{{q}}')")


@pytest.fixture
def stands(ask):
    async def stands() -> list:
        """Where each job stands. Every live one must have exactly one ticket."""
        tickets = " union all ".join(f"select job from notifyq.{table}" for table in ("ready", "scheduled", "active"))
        assert await ask(f"{tickets} order by job") == await ask("select id from notifyq.job order by id")
        return await ask("select state, attempt from notifyq.jobs order by id")

    return stands


# one ticket, two takers


@either_end
async def test_cancel_waits_for_a_claim_by_hand_and_ends_the_job_either_way(ask, race, stands, job, commit):
    assert await race(CLAIM, f"select notifyq.cancel({job})", commit=commit) == ([(job,)], [(True,)])
    assert await stands() == [("cancelled", 1 if commit else 0)]
    assert await ask(f"select notifyq.complete({job})") == [(False,)]


@either_end
@pytest.mark.parametrize("first", ["priority => 5", "data => '3'", "delay => '1 hour'"])
async def test_an_edit_waits_for_another_and_edits_the_job_either_way(ask, race, stands, job, first, commit):
    edit = f"select notifyq.update_job({job}, {first})"
    assert await race(edit, f"select notifyq.update_job({job}, data => '2', priority => 7)", commit=commit) == (
        [(job,)],
        [(job,)],
    )
    assert await ask("select data, priority from notifyq.jobs") == [(2, 7)]
    assert await stands() == [("scheduled" if commit and "delay" in first else "ready", 0)]


@either_end
@pytest.mark.parametrize("first", ["priority => 5", "delay => '1 hour'"])
async def test_an_upsert_waits_for_an_edit_and_sends_no_second_job(ask, race, queue, first, commit):
    [(job,)] = await ask("select notifyq.send('q', '1', key => 'a')")
    edit = f"select notifyq.update_job({job}, {first})"
    answers = await race(edit, "select * from notifyq.upsert('q', '2', 'a')", commit=commit)
    assert answers == ([(job,)], [(job, False)])
    assert await ask("select id, data from notifyq.jobs") == [(job, 2)]


@either_end
async def test_an_edit_waits_for_a_claim_and_leaves_an_active_job_as_it_is(ask, race, job, commit):
    edit = f"select notifyq.update_job({job}, data => '2')"
    assert await race(CLAIM, edit, commit=commit) == ([(job,)], [(None if commit else job,)])
    assert await ask("select data from notifyq.jobs") == [(None if commit else 2,)]


@either_end
@pytest.mark.parametrize("way", ["subscribe('e', 'q')", "schedule('q', every => '1 hour')"])
async def test_what_has_no_key_waits_for_a_change_of_policy_and_is_refused_then(race, queue, way, commit):
    change = """select notifyq.update_queue('q', '{"policy": "ordered"}')"""
    if commit:
        with pytest.raises(psycopg.Error, match="ordered by key"):
            await race(change, f"select notifyq.{way}", commit=True)
    else:
        await race(change, f"select notifyq.{way}", commit=False)


@either_end
@pytest.mark.parametrize("way", ["subscribe('e', 'q')", "schedule('q', every => '1 hour')"])
async def test_a_change_of_policy_waits_for_what_has_no_key_and_is_refused_then(race, queue, way, commit):
    change = """select notifyq.update_queue('q', '{"policy": "ordered"}')"""
    if commit:
        with pytest.raises(psycopg.Error, match="schedules or subscriptions"):
            await race(f"select notifyq.{way}", change, commit=True)
    else:
        await race(f"select notifyq.{way}", change, commit=False)


@pytest.mark.parametrize("ended", [False, True])
async def test_two_flows_that_name_the_same_parents_in_opposite_order_are_both_sent(ask, dsn, connection, queue, ended):
    first, second = [job for _ in range(2) for (job,) in await ask("select notifyq.send('q')")]
    if ended:
        await ask("select notifyq.complete(id) from notifyq.claim('q', 2)")
    sessions = [await open_connection(dsn) for _ in range(2)]

    async def send(session: TrioConnection, *parents: int) -> None:
        jobs = [{"name": str(parent), "queue": "q", "after": [parent]} for parent in parents]
        await rows(session, f"select from notifyq.send_flow('{json.dumps(jobs)}')")

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery, connection.transaction():
            await rows(
                connection, f"select from notifyq.{'archive' if ended else 'job'} where id = {second} for update"
            )
            # Whoever comes first is given it first, and then wants what the other has by now, if that has anything.
            for session, parents in zip(sessions, [(second, first), (first, second)], strict=True):
                nursery.start_soon(send, session, *parents)
                await until_waiting(connection, session)
    assert await ask("select count(*) from notifyq.dependency") == [(4,)]
    for session in sessions:
        await session.close()


@either_end
async def test_cancel_waits_for_a_runtimes_claim_and_then_asks_the_runtime(ask, race, stands, job, runtime, commit):
    assert await race(CLAIM_AS_RUNTIME, f"select notifyq.cancel({job})", commit=commit) == ([(job,)], [(True,)])
    assert await stands() == [("active", 1) if commit else ("cancelled", 0)]
    assert await ask(f"select cancels from notifyq.beat('{RUNTIME}')") == [([job] if commit else [],)]


@either_end
async def test_delete_waits_for_a_claim_and_deletes_the_job_either_way(ask, race, stands, job, commit):
    assert await race(CLAIM, f"select notifyq.delete({job})", commit=commit) == ([(job,)], [(True,)])
    assert await stands() == []
    assert await ask(f"select notifyq.complete({job})") == [(False,)]
    assert await ask("select created from notifyq.try_send('q', id_key => 'k')") == [(True,)]


@either_end
@pytest.mark.parametrize("edit", ["data => '1'", "priority => 1", "data => '1', priority => 1", "due_at => now()"])
async def test_a_claim_that_began_before_an_edit_was_through_brings_the_job_as_it_is_then(
    ask, race, job, runtime, edit, commit
):
    editing = f"select notifyq.update_job({job}, {edit}) from (select from notifyq.runtime for update) r"
    claiming = f"select id, data, priority from notifyq.claim('q', 5, '{RUNTIME}')"
    _, claimed = await race(editing, claiming, commit=commit)
    assert claimed == [(job, 1 if "data" in edit and commit else None, 1 if "priority" in edit and commit else 0)]


@either_end
@pytest.mark.parametrize("taker", ["cancel", "delete"])
async def test_a_claim_steps_over_a_job_that_is_being_cancelled_or_deleted(ask, race, job, taker, commit):
    taken = await race(f"select notifyq.{taker}({job})", CLAIM, commit=commit, waits=False)
    assert taken == ([(True,)], [])
    assert await ask(CLAIM) == ([] if commit else [(job,)])


@either_end
@pytest.mark.parametrize("taker", ["cancel", "delete"])
@pytest.mark.parametrize(
    "move",
    [
        "notifyq.release(array[{job}]::bigint[])",
        "notifyq.snooze(array[{job}]::bigint[], '{{0}}'::interval[])",
        "notifyq.snooze(array[{job}]::bigint[], '{{1 hour}}'::interval[])",
        "notifyq.fail({job}, 'bad')",
    ],
    ids=["released", "snoozed to ready", "snoozed to scheduled", "failed"],
)
async def test_a_job_that_goes_back_to_wait_is_found_where_it_went(ask, race, stands, job, taker, move, commit):
    await ask(CLAIM)
    _, theirs = await race(f"select {move.format(job=job)}", f"select notifyq.{taker}({job})", commit=commit)
    assert theirs == [(True,)]
    assert [state for state, _ in await stands()] == (["cancelled"] if taker == "cancel" else [])


@either_end
@pytest.mark.parametrize("taker", ["cancel", "delete"])
async def test_a_job_that_is_being_promoted_is_found_where_it_went(ask, race, stands, queue, taker, commit):
    [(job,)] = await ask("select notifyq.send('q', delay => '1 hour')")
    await ask(DUE)
    promote = "select notifyq.promote(number) from notifyq.queue"
    assert await race(promote, f"select notifyq.{taker}({job})", commit=commit) == ([(1,)], [(True,)])
    assert [state for state, _ in await stands()] == (["cancelled"] if taker == "cancel" else [])


@either_end
async def test_a_job_that_is_being_retried_is_deleted_where_it_went(ask, race, stands, job, commit):
    await ask(CLAIM)
    await ask(f"select notifyq.fail({job}, 'bad', final => true)")
    retried = await race(f"select notifyq.retry({job})", f"select notifyq.delete({job})", commit=commit)
    assert retried == ([(True,)], [(True,)])
    assert await stands() == []


@either_end
@pytest.mark.parametrize(
    ("before", "move", "state", "left"),
    [
        ("select 1", CLAIM, "waiting", ("active", 1)),
        ("select 1", CLAIM, "ready", ("active", 1)),
        (
            f"select notifyq.snooze(array(select id from notifyq.claim('q')), array[interval '1 hour']); {DUE}",
            "select notifyq.promote(number) from notifyq.queue",
            "scheduled",
            ("ready", 0),
        ),
        (CLAIM, "select notifyq.complete({job})", "active", ("completed", 1)),
        (
            "select notifyq.fail(id, 'bad', final => true) from notifyq.claim('q')",
            "select notifyq.retry({job})",
            "failed",
            ("ready", 1),
        ),
    ],
    ids=["claim", "claim of ready", "promote", "complete", "retry"],
)
async def test_delete_all_of_one_state_leaves_a_job_that_has_just_left_it(
    ask, race, stands, job, before, move, state, left, commit
):
    await ask(before)
    _, deleted = await race(move.format(job=job), f"select notifyq.delete_all('q', '{state}')", commit=commit)
    assert deleted == [(0 if commit else 1,)]
    assert await stands() == ([left] if commit else [])


@either_end
async def test_a_job_whose_first_attempt_has_meanwhile_been_spent_does_not_expire(ask, race, stands, job, commit):
    spend = "select notifyq.fail(id, 'bad') from notifyq.claim('q')"
    expire = "update notifyq.job set expires_at = now(); select notifyq.expire()"
    assert await race(spend, expire, commit=commit) == ([("ready",)], [(0 if commit else 1,)])
    assert await stands() == [("ready", 1) if commit else ("failed", 0)]


# dead letters


@pytest.fixture
async def dead_letter(ask):
    await ask("select notifyq.create_queue('dead')")
    await ask("select notifyq.create_queue('q', '{\"dead_letter\": \"dead\"}')")
    [(job,)] = await ask("select notifyq.send('q')")
    await ask(CLAIM)
    await ask(f"select notifyq.fail({job}, 'bad', final => true)")
    [(letter,)] = await ask("select job from notifyq.ready")
    return letter


CLAIM_DEAD = "select id from notifyq.claim('dead', 5)"
REDRIVE = "select id from notifyq.redrive('dead')"


@either_end
async def test_redrive_steps_over_a_dead_letter_that_is_being_claimed(ask, race, stands, dead_letter, commit):
    assert await race(CLAIM_DEAD, REDRIVE, commit=commit, waits=False) == ([(dead_letter,)], [])
    assert await stands() == [("failed", 1), ("active", 1) if commit else ("ready", 0)]
    assert await ask(REDRIVE) == ([] if commit else [(dead_letter,)])


@either_end
async def test_a_claim_steps_over_a_dead_letter_that_is_being_redriven(ask, race, stands, dead_letter, commit):
    assert await race(REDRIVE, CLAIM_DEAD, commit=commit, waits=False) == ([(dead_letter,)], [])
    assert await ask("select queue from notifyq.jobs where state = 'ready'") == [("q" if commit else "dead",)]
    assert await ask(CLAIM_DEAD) == ([] if commit else [(dead_letter,)])
    assert len(await stands()) == 2


@either_end
async def test_two_redrives_send_a_dead_letter_back_once(ask, race, stands, dead_letter, commit):
    assert await race(REDRIVE, REDRIVE, commit=commit, waits=False) == ([(dead_letter,)], [])
    assert await ask(REDRIVE) == ([] if commit else [(dead_letter,)])
    assert await stands() == [("failed", 1), ("ready", 0)]


# active jobs


@either_end
async def test_a_job_that_completes_is_not_cancelled_by_a_request_made_meanwhile(
    ask, race, stands, job, runtime, commit
):
    await ask(CLAIM_AS_RUNTIME)
    complete = f"select notifyq.complete('{{{job}}}', null, '{{1}}', '{RUNTIME}')"
    assert await race(f"select notifyq.cancel({job})", complete, commit=commit) == ([(True,)], [([job],)])
    assert await stands() == [("completed", 1)]


@either_end
async def test_a_cancel_request_waits_for_a_completion_and_then_finds_nothing(ask, race, stands, job, runtime, commit):
    await ask(CLAIM_AS_RUNTIME)
    complete = f"select notifyq.complete('{{{job}}}', null, '{{1}}', '{RUNTIME}')"
    assert await race(complete, f"select notifyq.cancel({job})", commit=commit) == ([([job],)], [(not commit,)])
    assert await stands() == [("completed" if commit else "active", 1)]
    assert await ask(f"select cancels from notifyq.beat('{RUNTIME}')") == [([] if commit else [job],)]


@either_end
async def test_two_retries_of_a_failed_job_make_one_ticket(ask, race, stands, job, commit):
    await ask(CLAIM)
    await ask(f"select notifyq.fail({job}, 'bad', final => true)")
    retry = f"select notifyq.retry({job})"
    assert await race(retry, retry, commit=commit) == ([(True,)], [(not commit,)])
    assert await stands() == [("ready", 1)]


# the archive's leaves


@pytest.fixture
async def due_leaf(ask, job):
    """A failed job, in a leaf whose day has come."""
    await ask(CLAIM)
    await ask(f"select notifyq.fail({job}, 'bad', final => true)")
    [(today,)] = await ask("select to_char(now() at time zone 'utc', 'YYYYMMDD')")
    await ask(
        f"create table notifyq.archive_{today} partition of notifyq.archive"
        f" for values from ('{today}') to ('{today}'::date + 1)"
    )
    await ask("update notifyq.archive set leaves_on = (now() at time zone 'utc')::date")
    assert await ask(f"select id from notifyq.archive_{today}") == [(job,)]
    await ask("alter function notifyq.drop_leaf() set lock_timeout = '10s'")
    return today


REMEMBERED = "select (select count(*) from notifyq.id_key), (select count(*) from notifyq.attempt)"


@either_end
async def test_a_job_retried_while_its_leaf_is_dropped_keeps_its_key_and_attempts(
    ask, race, stands, job, due_leaf, commit
):
    retried = await race(f"select notifyq.retry({job})", "select notifyq.drop_leaf()", commit=commit)
    assert retried == ([(True,)], [(True,)])
    assert await stands() == ([("ready", 1)] if commit else [])
    assert await ask(REMEMBERED) == [(1, 1) if commit else (0, 0)]


@either_end
async def test_a_retry_waits_for_the_leaf_that_is_dropped_and_then_finds_nothing(
    ask, race, stands, job, due_leaf, commit
):
    dropped = await race("select notifyq.drop_leaf()", f"select notifyq.retry({job})", commit=commit)
    assert dropped == ([(True,)], [(not commit,)])
    assert await stands() == ([] if commit else [("ready", 1)])
    assert await ask(REMEMBERED) == [(0, 0) if commit else (1, 1)]


async def test_a_leaf_in_use_is_not_waited_for_but_left_for_the_next_time(ask, race, job, due_leaf):
    await ask("alter function notifyq.drop_leaf() set lock_timeout = '100ms'")
    retried = await race(f"select notifyq.retry({job})", "select notifyq.drop_leaf()", commit=True, waits=False)
    assert retried == ([(True,)], [(False,)])
    assert await ask(REMEMBERED) == [(1, 1)]
    assert await ask("select notifyq.drop_leaf()") == [(True,)]
    assert await ask(REMEMBERED) == [(1, 1)]


WHERE = "select tableoid::regclass::text ~ '_[0-9]{8}$' from notifyq.archive"


@either_end
async def test_leaves_are_not_made_while_an_upgrade_has_the_tables_and_nothing_fails(ask, race, queue, commit):
    lock = "lock table notifyq.queue in access exclusive mode"
    assert await race(lock, "select notifyq.make_leaves()", commit=commit, waits=False) == ([], [(0,)])
    assert (await ask("select notifyq.make_leaves()"))[0][0] > 0


@either_end
async def test_a_leaf_is_not_made_under_an_open_completion_and_no_row_is_lost(ask, race, stands, job, commit):
    await ask(CLAIM)
    made = await race(f"select notifyq.complete({job})", "select notifyq.make_leaves()", commit=commit, waits=False)
    assert made == ([(True,)], [(0,)])
    assert await stands() == [("completed" if commit else "active", 1)]
    assert await ask("select notifyq.make_leaves()") == [(3 if commit else 4,)]
    assert await ask(WHERE) == ([(False,)] if commit else [])


@either_end
async def test_leaves_ahead_are_made_under_an_open_completion_into_todays(ask, race, job, commit):
    await ask("select notifyq.make_leaves(0)")
    await ask(CLAIM)
    made = await race(f"select notifyq.complete({job})", "select notifyq.make_leaves()", commit=commit, waits=False)
    assert made == ([(True,)], [(3,)])
    assert await ask(WHERE) == ([(True,)] if commit else [])


@either_end
async def test_a_completion_waits_for_the_leaf_that_is_made_and_lands_in_it(ask, race, stands, job, commit):
    await ask(CLAIM)
    made = await race("select notifyq.make_leaves()", f"select notifyq.complete({job})", commit=commit)
    assert made == ([(4,)], [(True,)])
    assert await stands() == [("completed", 1)]
    assert await ask(WHERE) == [(commit,)]


# leases


@either_end
async def test_rescue_steps_over_a_runtime_whose_claim_is_in_flight(
    ask, connection, other, stands, job, runtime, commit
):
    with trio.fail_after(20):
        async with connection.transaction(force_rollback=not commit):
            assert await ask(CLAIM_AS_RUNTIME) == [(job,)]
            await rows(other, LAPSE)
            assert await rows(other, "select * from notifyq.rescue()") == []
            assert await rows(other, "select state from notifyq.runtimes") == [("lost",)]
    assert await stands() == [("active", 1) if commit else ("ready", 0)]
    assert await ask("select * from notifyq.rescue()") == ([(job, "ready")] if commit else [])
    assert await stands() == [("ready", 1 if commit else 0)]
    assert await ask("select count(*) from notifyq.runtime") == [(0,)]


@either_end
async def test_rescue_steps_over_a_runtime_that_is_beating(ask, race, stands, job, runtime, commit):
    await ask(CLAIM_AS_RUNTIME)
    await ask(LAPSE)
    beat = f"update notifyq.runtime set lease = '1 minute'; select renewed from notifyq.beat('{RUNTIME}')"
    assert await race(beat, "select * from notifyq.rescue()", commit=commit, waits=False) == ([(True,)], [])
    assert await stands() == [("active", 1)]
    assert await ask("select * from notifyq.rescue()") == ([] if commit else [(job, "ready")])


@either_end
async def test_a_beat_waits_for_the_rescue_and_learns_that_its_lease_is_lost(ask, race, stands, job, runtime, commit):
    await ask(CLAIM_AS_RUNTIME)
    await ask(LAPSE)
    rescued = await race(
        "select * from notifyq.rescue()", f"select renewed from notifyq.beat('{RUNTIME}')", commit=commit
    )
    assert rescued == ([(job, "ready")], [(not commit,)])
    assert await stands() == [("ready" if commit else "active", 1)]


@either_end
async def test_two_rescues_recover_each_job_once(ask, race, stands, job, runtime, commit):
    await ask(CLAIM_AS_RUNTIME)
    [(by_hand,)] = await ask("select notifyq.send('q')")
    await ask(CLAIM)
    await ask(LAPSE)
    await ask(f"{OVERDUE} where runtime is null")
    rescue, both = "select * from notifyq.rescue()", [(job, "ready"), (by_hand, "ready")]
    assert await race(rescue, rescue, commit=commit, waits=False) == (both, [])
    assert await ask(rescue) == ([] if commit else both)
    assert await stands() == [("ready", 1), ("ready", 1)]
    assert await ask("select job, type from notifyq.attempt order by job") == [(job, "lost"), (by_hand, "lost")]


@either_end
async def test_a_completion_waits_for_the_deregistering_of_its_runtime_and_is_refused(
    ask, race, stands, job, runtime, commit
):
    await ask(CLAIM_AS_RUNTIME)
    complete = f"select notifyq.complete('{{{job}}}', null, '{{1}}', '{RUNTIME}')"
    ended = await race(f"select * from notifyq.deregister('{RUNTIME}')", complete, commit=commit)
    assert ended == ([(job, "ready")], [([] if commit else [job],)])
    assert await stands() == [("ready" if commit else "completed", 1)]


@either_end
async def test_deregistering_waits_for_a_completion_and_leaves_the_job_completed(
    ask, race, stands, job, runtime, commit
):
    await ask(CLAIM_AS_RUNTIME)
    complete = f"select notifyq.complete('{{{job}}}', null, '{{1}}', '{RUNTIME}')"
    ended = await race(complete, f"select * from notifyq.deregister('{RUNTIME}')", commit=commit)
    assert ended == ([([job],)], [] if commit else [(job, "ready")])
    assert await ask("select type from notifyq.attempt") == ([] if commit else [("lost",)])
    assert await stands() == [("completed" if commit else "ready", 1)]
    assert await ask("select count(*) from notifyq.runtime") == [(0,)]


# queues and senders

TABLES = ("queue", "job", "ready", "scheduled", "active", "archive", "attempt", "id_key")


async def test_delete_queue_fails_with_a_lock_timeout_while_a_sender_is_open(ask, race, stands, queue):
    with pytest.raises(psycopg.errors.LockNotAvailable):
        await race("select notifyq.send('q')", "select notifyq.delete_queue('q')", commit=True, waits=False)
    assert await stands() == [("ready", 0)]


@either_end
async def test_delete_queue_waits_for_an_open_sender_and_deletes_what_it_sent(ask, race, job, commit):
    await ask("alter function notifyq.delete_queue(text) set lock_timeout = '10s'")
    send = 'select created from notifyq.send_many(\'q\', \'[{"id_key": "x"}, {"delay": 60}]\')'
    sent, deleted = await race(send, "select notifyq.delete_queue('q')", commit=commit)
    assert (sent, deleted) == ([(True,), (True,)], [(3 if commit else 1,)])
    assert [await ask(f"select count(*) from notifyq.{table}") for table in TABLES] == [[(0,)]] * len(TABLES)


@either_end
async def test_a_sender_waits_for_the_queue_that_is_deleted_and_is_refused_by_name(ask, race, stands, queue, commit):
    async def send_meanwhile() -> list:
        return (await race("select notifyq.delete_queue('q')", "select notifyq.send('q') > 0", commit=commit))[1]

    if commit:
        with pytest.raises(psycopg.DatabaseError, match="no queue named 'q'"):
            await send_meanwhile()
    else:
        assert await send_meanwhile() == [(True,)]
    assert await stands() == ([] if commit else [("ready", 0)])


@either_end
async def test_two_bulk_sends_with_the_same_keys_in_opposite_order_make_each_job_once(
    dsn, ask, connection, other, stands, queue, commit
):
    third = await open_connection(dsn)
    sent: dict[str, list] = {}

    async def send(session: TrioConnection, keys: str) -> None:
        jobs = "select jsonb_agg(jsonb_build_object('id_key', k)) from unnest(string_to_array(%s, null)) k"
        sent[keys] = await rows(session, f"select * from notifyq.send_many('q', ({jobs}))", keys)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery, third.transaction(force_rollback=not commit):
            await rows(third, "select notifyq.send('q', id_key => 'm')")
            nursery.start_soon(send, connection, "amz")
            await until_waiting(third, connection)
            nursery.start_soon(send, other, "zma")
            await until_waiting(third, other)
    await third.close()
    ids, again = [[id_ for id_, _ in sent[keys]] for keys in ("amz", "zma")]
    assert again == ids[::-1]
    assert [created for _, created in sent["amz"]] == [True, not commit, True]
    assert [created for _, created in sent["zma"]] == [False, False, False]
    assert await stands() == [("ready", 0)] * 3


@either_end
async def test_two_updates_of_a_queue_both_stick(ask, race, queue, commit):
    await race(
        "select notifyq.update_queue('q', '{\"retry_limit\": 5}')",
        "select notifyq.update_queue('q', '{\"priority\": 7}')",
        commit=commit,
    )
    assert await ask("select retry_limit, priority from notifyq.queue") == [(5 if commit else 1, 7)]


# due jobs


@either_end
@pytest.mark.parametrize("alone", [True, False])
async def test_two_promotions_move_a_due_job_once_and_the_alone_ones_do_not_share(
    ask, race, stands, queue, alone, commit
):
    await ask("select notifyq.send('q', delay => '1 hour') from generate_series(1, 2)")
    await ask(DUE)
    promote = f"select notifyq.promote(number, 1, alone => {alone}) from notifyq.queue"
    assert await race(promote, promote, commit=commit, waits=False) == ([(1,)], [(0 if alone else 1,)])
    assert await ask("select notifyq.promote(number) from notifyq.queue") == [(alone + (not commit),)]
    assert await stands() == [("ready", 0), ("ready", 0)]


@either_end
@pytest.mark.parametrize("claim", [CLAIM, CLAIM_AS_RUNTIME], ids=["by hand", "as runtime"])
async def test_a_claim_by_hand_in_an_open_transaction_holds_back_no_other_due_job(
    ask, race, stands, runtime, claim, commit
):
    ids = await ask("select notifyq.send('q', delay => '1 hour') from generate_series(1, 3)")
    await ask(DUE)
    mine, theirs = await race("select id from notifyq.claim('q')", claim, commit=commit, waits=False)
    assert sorted(mine + theirs) == ids
    assert len(mine) == 1
    assert await ask(CLAIM) == ([] if commit else mine)


# upgrades


@either_end
async def test_functions_are_replaced_under_a_transaction_that_has_sent_and_will_send(
    ask, connection, other, stands, queue, commit
):
    behaviour = [file for file in _schema.load("notifyq") if not file.is_migration]
    assert {file.name.split("/")[0] for file in behaviour} == {"functions", "views"}
    with trio.fail_after(10):
        async with connection.transaction(), other.transaction(force_rollback=not commit):
            await ask("select notifyq.send('q', delay => '1 hour')")
            for file in behaviour:
                await rows(other, file.text)
            await ask("select notifyq.send('q')")
    assert await stands() == [("scheduled", 0), ("ready", 0)]
    triggers = "select tgrelid::regclass::text from pg_trigger where tgname = 'bell' order by 1"
    assert await ask(triggers) == [("notifyq.ready",), ("notifyq.scheduled",)]


@pytest.mark.parametrize(
    "settles",
    [
        "complete(%s::bigint[], null, %s::int[], %s, %s::timestamptz[])",
        "fail(%s::bigint[], '[{}, {}]', %s::int[], %s, as_of => %s::timestamptz[])",
        "discard(%s::bigint[], %s::int[], %s, %s::timestamptz[])",
    ],
)
@pytest.mark.parametrize("moments", [1, 2], ids=["one moment for all", "one for each"])
async def test_what_ends_a_claim_that_was_forgotten_does_not_end_the_next_one_of_the_same_attempt(
    ask, settles, moments
):
    await ask("select notifyq.create_queue('q', '{\"retry_limit\": 0}')")
    jobs = [job for (job,) in await ask("select id from notifyq.send_many('q', '[{}, {}]')")]
    await ask(f"select notifyq.register('{RUNTIME}', '{{q}}')")
    await ask(CLAIM_AS_RUNTIME)
    [(as_of,)] = await ask("select clock_timestamp()")
    await ask("select notifyq.release(%s, null, %s)", jobs, RUNTIME)  # where a server that forgot the claim has them
    assert await ask(f"select id, attempt from notifyq.claim('q', 5, '{RUNTIME}')") == [(job, 1) for job in jobs]
    await ask(f"select notifyq.{settles}", jobs, [1, 1], RUNTIME, [as_of] * moments)
    assert await ask("select attempt from notifyq.active") == [(1,), (1,)]
    [(as_of,)] = await ask("select clock_timestamp()")
    await ask(f"select notifyq.{settles}", jobs, [1, 1], RUNTIME, [as_of] * moments)
    assert await ask("select attempt from notifyq.active") == []


@pytest.mark.parametrize("call", ["release(%s::bigint[], ", "snooze(%s::bigint[], '{0}', "])
async def test_what_gave_a_claim_back_does_not_end_the_next_one_of_the_same_attempt(ask, call):
    await ask("select notifyq.create_queue('q')")
    [(job,)] = await ask("select notifyq.send('q')")
    await ask(f"select notifyq.register('{RUNTIME}', '{{q}}')")
    gives_back = f"select notifyq.{call} %s::int[], %s, %s)"
    await ask(CLAIM_AS_RUNTIME)
    [(as_of,)] = await ask("select clock_timestamp()")
    mine = ([job], [1], RUNTIME, [as_of])
    assert await ask(gives_back, *mine) == [([job],)]
    assert await ask(f"select id, attempt from notifyq.claim('q', 5, '{RUNTIME}')") == [(job, 1)]
    assert await ask(gives_back, *mine) == [([],)]  # repeated, because its answer was lost
    assert await ask("select attempt from notifyq.active") == [(1,)]
    assert await ask(gives_back, [job], [1], RUNTIME, None) == [([job],)]  # whatever claim

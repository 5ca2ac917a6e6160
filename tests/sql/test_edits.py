"""Edits of jobs that wait, from SQL alone."""

from __future__ import annotations

import psycopg
import pytest


@pytest.fixture
async def ask(ask):
    await ask("select notifyq.create_queue('q', '{\"retry_delay\": 0}')")
    return ask


async def test_data_priority_and_time_of_a_waiting_job_are_edited(ask):
    [(job,)] = await ask("select notifyq.send('q', '1', delay => '1 hour')")
    assert await ask("select notifyq.update_job(%s, data => '2', priority => 7)", job) == [(job,)]
    assert await ask("select state, data, priority from notifyq.jobs") == [("scheduled", 2, 7)]
    assert await ask("select notifyq.update_job(%s, delay => '0')", job) == [(job,)]
    assert await ask("select state from notifyq.jobs") == [("ready",)]
    assert await ask("select id, data, priority from notifyq.claim('q')") == [(job, 2, 7)]


async def test_a_job_that_is_put_off_has_as_long_to_start_as_before(ask):
    [(job,)] = await ask("select notifyq.send('q', expire_in => '1 minute')")
    [(later,)] = await ask("select notifyq.send('q', delay => '1 hour', expire_in => '1 minute')")
    for each in (job, later):
        await ask("select notifyq.update_job(%s, delay => '2 hours')", each)
    expiry = "select round(extract(epoch from expires_at - now()) / 60)::int from notifyq.job order by id"
    assert await ask(expiry) == [(121,), (121,)]
    await ask("select notifyq.update_job(%s, delay => '0')", later)
    assert await ask(expiry) == [(121,), (1,)]


async def test_a_ready_job_can_be_put_off_and_moved_up(ask):
    [(a,)] = await ask("select notifyq.send('q')")
    [(b,)] = await ask("select notifyq.send('q')")
    [(c,)] = await ask("select notifyq.send('q')")
    assert await ask("select notifyq.update_job(%s, priority => 1)", c) == [(c,)]
    assert await ask("select notifyq.update_job(%s, delay => '1 hour')", a) == [(a,)]
    assert await ask("select id, state from notifyq.jobs order by id") == [(a, "scheduled"), (b, "ready"), (c, "ready")]
    assert await ask("select id from notifyq.claim('q', 5)") == [(c,), (b,)]
    assert await ask("select notifyq.update_job(%s, due_at => now() - interval '1 hour')", a) == [(a,)]
    assert await ask("select id from notifyq.claim('q', 5)") == [(a,)]


async def test_an_edited_job_is_still_found_by_everything_else(ask):
    [(job,)] = await ask("select notifyq.send('q')")
    await ask("select notifyq.update_job(%s, priority => 3)", job)
    assert await ask("select state, priority from notifyq.jobs") == [("ready", 3)]
    assert await ask("select notifyq.cancel(%s)", job) == [(True,)]
    assert await ask("select notifyq.resume(%s)", job) == [(True,)]
    await ask("select notifyq.update_job(%s, priority => -3)", job)
    assert await ask("select notifyq.delete(%s)", job) == [(True,)]
    assert await ask("select count(*) from notifyq.ready") == [(0,)]


async def test_a_retrying_job_is_edited_and_keeps_its_attempts(ask):
    [(job,)] = await ask("select notifyq.send('q', '1')")
    await ask("select notifyq.claim('q')")
    await ask("select notifyq.fail(%s, 'x', retry_in => '1 hour')", job)
    assert await ask("select notifyq.update_job(%s, data => '2', delay => '0')", job) == [(job,)]
    assert await ask("select id, attempt, data from notifyq.claim('q')") == [(job, 2, 2)]


async def test_active_and_finished_jobs_are_never_edited(ask):
    [(job,)] = await ask("select notifyq.send('q', '1')")
    await ask("select notifyq.claim('q')")
    assert await ask("select notifyq.update_job(%s, data => '2', delay => '1 hour')", job) == [(None,)]
    await ask("select notifyq.complete(%s)", job)
    assert await ask("select notifyq.update_job(%s, data => '2')", job) == [(None,)]
    assert await ask("select notifyq.update_job(987654321, data => '2')") == [(None,)]
    assert await ask("select data, state from notifyq.jobs") == [(1, "completed")]


async def test_a_job_is_found_by_its_key_or_id_key(ask):
    [(a,)] = await ask("select notifyq.send('q', '1', id_key => 'i')")
    [(b,)] = await ask("select notifyq.send('q', '1', key => 'k')")
    [(c,)] = await ask("select notifyq.send('q', '1', key => 'k', priority => 1)")
    assert await ask("select notifyq.update_job(queue => 'q', id_key => 'i', data => '2')") == [(a,)]
    assert await ask("select notifyq.update_job(queue => 'q', key => 'k', data => '3')") == [(c,)]
    await ask("select notifyq.claim('q')")
    assert await ask("select notifyq.update_job(queue => 'q', key => 'k', data => '4')") == [(b,)]
    assert await ask("select notifyq.update_job(queue => 'q', key => 'nobody', data => '4')") == [(None,)]
    assert await ask("select data from notifyq.jobs order by id") == [(2,), (4,), (3,)]


async def test_a_job_that_waits_for_its_key_or_a_parent_is_edited(ask):
    await ask("select notifyq.update_queue('q', '{\"policy\": \"singleton\"}')")
    [(a,), (b,), (c,)] = await ask(
        'select id from notifyq.send_many(\'q\', \'[{"key": "k"}, {"key": "k"}, {"key": "k"}]\')'
    )
    await ask("select notifyq.update_job(%s, priority => 5)", c)
    for expected in (c, a, b):
        assert await ask("select id from notifyq.claim('q')") == [(expected,)]
        await ask("select notifyq.complete(%s)", expected)
    [(_,), (child,)] = await ask(
        """select id from notifyq.send_flow('[{"name": "a", "queue": "q"}, {"name": "b", "queue": "q", "after": ["a"]}]')"""
    )
    await ask("select notifyq.update_job(%s, data => '5', delay => '0')", child)
    assert await ask("select state, data from notifyq.jobs where id = %s", child) == [("blocked", 5)]


async def test_upsert_edits_what_waits_and_sends_where_nothing_does(ask):
    [(job, created)] = await ask("select * from notifyq.upsert('q', '1', 'k', delay => '1 hour')")
    assert created
    assert await ask("select * from notifyq.upsert('q', '2', 'k')") == [(job, False)]
    assert await ask("select data, state from notifyq.jobs") == [(2, "scheduled")]
    assert await ask("select * from notifyq.upsert('q', key => 'k', delay => '0')") == [(job, False)]
    assert await ask("select data from notifyq.claim('q')") == [(2,)]
    [(second, created)] = await ask("select * from notifyq.upsert('q', '3', 'k')")
    assert created
    assert second != job


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("update_job(data => '1')", "name the job by its id alone"),
        ("update_job(1, 'q', key => 'k')", "name the job by its id alone"),
        ("update_job(1, id_key => 'k')", "name the job by its id alone"),
        ("update_job(queue => 'q', key => 'k', id_key => 'k')", "name the job by its id alone"),
        ("update_job(1, queue => 'q')", "name the job by its id alone"),
        ("update_job(queue => 'q')", "name the job by its id alone"),
        ("update_job(key => 'k')", "name the job by its id alone"),
        ("update_job(queue => 'nowhere', key => 'k')", "no queue named"),
        ("update_job(1, priority => 99999)", "priority 99999"),
        ("update_job(1, delay => '1 s', due_at => now())", "exclude each other"),
        ("update_job(1, delay => '101 years')", "100 years"),
        ("upsert('nowhere', '1', 'k')", "no queue named"),
        ("upsert('q')", "needs a key"),
    ],
)
async def test_edits_that_cannot_be_are_refused_in_words(ask, call, message):
    with pytest.raises(psycopg.Error, match=message) as caught:
        await ask(f"select notifyq.{call}")
    assert caught.value.sqlstate in ("NQ001", "NQ003")


async def test_data_over_the_queues_limit_is_refused_and_the_job_stays_as_it_was(ask):
    [(job,)] = await ask("select notifyq.send('q', '1')")
    await ask("select notifyq.update_queue('q', '{\"max_data_bytes\": 10}')")
    with pytest.raises(psycopg.Error, match="over the limit of 10 bytes"):
        await ask("select notifyq.update_job(%s, data => '\"12345678901\"', delay => '1 hour')", job)
    assert await ask("select state, data from notifyq.jobs") == [("ready", 1)]

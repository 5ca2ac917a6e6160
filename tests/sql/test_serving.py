"""From psql's side: pausing, patterns, claims of some priorities, and what the beat tells of them."""

from __future__ import annotations

import psycopg
import pytest

RUNTIME = "11111111-1111-1111-1111-111111111111"


@pytest.fixture
async def heard(ask, other):
    """What is notified on the control channel from now on."""
    [(channel,)] = await ask("select notifyq.channel(0)")
    await other.execute(f"listen {channel}")
    notes: list[str] = []
    other.on_notification(lambda _channel, payload: notes.append(payload))

    async def heard() -> list[str]:
        await other.execute("select 1")
        found = notes.copy()
        notes.clear()
        return found

    return heard


async def test_a_paused_queue_gives_nothing_takes_all_and_rings_when_it_is_resumed(ask, other):
    await ask("select notifyq.create_queue('q')")
    await ask(f"select notifyq.register('{RUNTIME}', '{{q}}')")
    await ask("select notifyq.send('q')")
    assert await ask("select notifyq.pause('q')") == [(True,)]
    assert await ask("select notifyq.pause('q')") == [(False,)]
    await ask("select notifyq.send('q', delay => '-1 second')")
    await ask("update notifyq.scheduled set due_at = now()")
    assert await ask("select id from notifyq.claim('q')") == []
    assert await ask(f"select id from notifyq.claim('q', 5, '{RUNTIME}')") == []
    [(number, channel)] = await ask("select number, notifyq.channel(number) from notifyq.queue")
    assert await ask("select notifyq.next_due(%s)", number) == [(None,)]
    assert await ask("select ready, due_in from notifyq.beat(%s, %s)", RUNTIME, [number]) == [([], {})]
    assert await ask("select paused, ready from notifyq.queue_stats") == [(True, 2)]
    await other.execute(f"listen {channel}")
    notes: list[str] = []
    other.on_notification(lambda _channel, payload: notes.append(payload))
    assert await ask("select notifyq.resume_queue('q')") == [(True,)]
    assert await ask("select notifyq.resume_queue('q')") == [(False,)]
    await other.execute("select 1")
    assert notes == ["look"]
    assert len(await ask("select id from notifyq.claim('q', 5)")) == 2


@pytest.mark.parametrize("function", ["pause", "resume_queue"])
async def test_pausing_nowhere_is_refused(ask, function):
    with pytest.raises(psycopg.DatabaseError, match="there is no queue named 'nowhere'") as caught:
        await ask(f"select notifyq.{function}('nowhere')")
    assert caught.value.sqlstate == "NQ001"
    with pytest.raises(psycopg.DatabaseError, match="there is no queue named null"):
        await ask(f"select notifyq.{function}(null)")


async def test_pausing_waits_for_no_send_and_no_claim_and_they_do_not_wait_for_it(ask, connection, other):
    await ask("select notifyq.create_queue('q')")
    await other.execute("set lock_timeout = '1s'")
    async with connection.transaction():
        await ask("select notifyq.send('q'), notifyq.send('q')")
        await ask("select id from notifyq.claim('q')")
        await other.execute("select notifyq.pause('q')")
    async with connection.transaction():
        await ask("select notifyq.resume_queue('q')")
        await other.execute("select notifyq.send('q', '1')")
        assert await (await other.execute("select id from notifyq.claim('q')")).fetchall() == []


async def test_every_change_of_the_queues_rings_the_control_channel_and_nothing_else_does(ask, heard):
    for statement, rings in (
        ("select notifyq.create_queue('q'), notifyq.create_queue('dead')", True),
        ("select notifyq.create_queue('q', '{\"retry_limit\": 9}')", False),
        ("select notifyq.update_queue('q', '{\"retry_limit\": 9}')", False),
        ("select notifyq.update_queue('q', '{\"dead_letter\": \"dead\"}')", True),
        ("select notifyq.update_queue('q', '{\"active_limit\": 9}')", True),
        ("select notifyq.update_queue('q', '{\"active_limit\": 8}')", False),
        ("select notifyq.send('q')", False),
        ("select notifyq.pause('q')", True),
        ("select notifyq.pause('q')", False),
        ("select notifyq.resume_queue('q')", True),
        ("select notifyq.resume_queue('q')", False),
        ("select notifyq.delete_queue('q')", True),
    ):
        await ask(statement)
        assert await heard() == ["queues"] * rings, statement


async def test_what_a_beat_tells_of_the_queues_changes_with_those_it_was_registered_for(ask):
    await ask(f"select notifyq.register('{RUNTIME}', '{{plain,tenant.*}}')")
    told: list[str | None] = []

    async def changes(statement: str) -> bool:
        await ask(statement)
        [(serves,)] = await ask("select serves from notifyq.beat(%s)", RUNTIME)
        told.append(serves)
        return len(told) > 1 and told[-1] != told[-2]

    assert not await changes("select 1")
    assert told == [None]
    assert not await changes("select notifyq.create_queue('other')")
    assert await changes("select notifyq.create_queue('plain')")
    assert await changes("select notifyq.create_queue('tenant.a')")
    assert await changes("select notifyq.pause('tenant.a')")
    assert not await changes("select notifyq.pause('other')")
    assert await changes("select notifyq.update_queue('tenant.a', '{\"key_limit\": 1}')")
    assert not await changes("select notifyq.update_queue('tenant.a', '{\"key_limit\": 2}')")
    assert await changes("select notifyq.update_queue('other', '{\"dead_letter\": \"tenant.a\"}')")
    assert await changes("select notifyq.update_queue('other', '{\"dead_letter\": \"plain\"}')")
    assert await changes("select notifyq.delete_queue('tenant.a')")
    await ask("select notifyq.delete_queue('other')")
    assert await changes("select notifyq.delete_queue('plain')")
    assert told[-1] is None
    assert await ask("select renewed, serves from notifyq.beat(gen_random_uuid())") == [(False, None)]


async def test_a_queue_that_several_names_and_patterns_mean_is_served_once(ask):
    await ask("select notifyq.create_queue(n) from unnest('{a.1,a.2,b}'::text[]) n")
    await ask("select notifyq.update_queue('b', '{\"dead_letter\": \"a.2\"}')")
    served = "select array_agg(name order by name) from notifyq.served(%s)"
    assert await ask(served, ["a.*", "*", "a.1"]) == [(["a.1", "b"],)]
    assert await ask(served, ["a.*", "a.2"]) == [(["a.1", "a.2"],)]
    assert await ask(served, ["a.%", "a._", "A.*"]) == [(None,)]
    assert await ask(served, []) == [(None,)]


@pytest.mark.parametrize(
    ("bounds", "claimed"),
    [
        ("min_priority => 5", [32767, 9, 5]),
        ("max_priority => 5", [5, 0, -1, -32768]),
        ("min_priority => 0, max_priority => 5", [5, 0]),
        ("min_priority => 6, max_priority => 8", []),
        ("min_priority => -100000, max_priority => 100000", [32767, 9, 5, 0, -1, -32768]),
        ("min_priority => null", [32767, 9, 5, 0, -1, -32768]),
    ],
)
async def test_a_claim_between_priorities(ask, bounds, claimed):
    await ask("select notifyq.create_queue('q')")
    for priority in (5, 32767, -1, 0, -32768, 9):
        await ask("select notifyq.send('q', priority => %s)", priority)
    rows = await ask(f"select priority from notifyq.claim('q', 10, {bounds})")
    assert [priority for (priority,) in rows] == claimed
    assert len(await ask("select id from notifyq.claim('q', 10)")) == 6 - len(claimed)


async def test_a_beat_counts_as_ready_what_a_worker_may_take(ask):
    await ask("select notifyq.create_queue(n) from unnest('{p,q}'::text[]) n")
    p, q = [number for (number,) in await ask("select number from notifyq.queue order by number")]
    await ask("select notifyq.send('p', priority => 5), notifyq.send('q', priority => 5)")
    await ask(f"select notifyq.register('{RUNTIME}', '{{p,q}}')")
    beat = f"select ready from notifyq.beat('{RUNTIME}', %s, %s::int[], %s::int[])"
    for lows, highs, ready in (
        (None, None, [p, q]),
        ([6, None], [None, None], [q]),
        ([5, None], [5, 4], [p]),
        ([None, None], [4, 4], []),
    ):
        [(found,)] = await ask(beat, [p, q], lows, highs)
        assert sorted(found) == ready

"""What claims and looks leave out where a snapshot that somebody holds open makes looking from the beginning dear."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from notifyq._opening import open_connection


@pytest.fixture
def queue(ask):
    async def queue(**options: Any) -> int:
        await ask("select notifyq.create_queue('q', %s)", json.dumps({"retry_delay": 0, **options}))
        return (await ask("select number from notifyq.queue"))[0][0]

    return queue


@pytest.fixture
async def claim(connection, store, ask):
    """What is claimed, and the due_floor of the next claim as seconds from now."""
    [(runtime,)] = await ask("select gen_random_uuid()")
    await ask("select notifyq.register(%s, '{q}')", runtime)

    async def claim(floors: dict[int, int] | None = None, due: float | None = None) -> tuple[list[int], float]:
        haul = await store.claim(connection, "q", 10, runtime, floors=floors, due_floor=due, durably=True)
        [(now,)] = await ask("select extract(epoch from clock_timestamp())::float8")
        return [job.id for job in haul.jobs], haul.due_floor - now

    return claim


async def make_due(ask: Any, seconds_ago: float) -> int:
    [(job,)] = await ask("select notifyq.send('q', delay => '100 s')")
    await ask(
        "update notifyq.scheduled set due_at = now() - make_interval(secs => %s) where job = %s", seconds_ago, job
    )
    return job


async def epoch(ask: Any, seconds_ago: float) -> float:
    [(moment,)] = await ask("select extract(epoch from now())::float8")
    return moment - seconds_ago


async def test_a_claim_from_a_floor_leaves_out_what_was_due_before_it(queue, claim, ask):
    await queue()
    late, early = await make_due(ask, 60), await make_due(ask, 10)
    due = await epoch(ask, 30)
    jobs, due_floor = await claim({0: 0}, due)
    assert jobs == [early]
    assert due_floor == pytest.approx(-10, abs=5)
    jobs, due_floor = await claim({0: 0}, due)
    assert jobs == []
    assert due_floor == pytest.approx(-1, abs=0.9)
    jobs, due_floor = await claim()
    assert jobs == [late]
    assert due_floor == pytest.approx(-60, abs=5)


async def test_a_floor_stays_below_what_is_due_next_and_a_second_back(queue, claim, ask):
    await queue()
    assert (await claim())[1] == pytest.approx(-1, abs=0.9)
    await ask("select notifyq.send('q', delay => '100 s')")
    assert (await claim())[1] == pytest.approx(-1, abs=0.9)
    assert (await claim({0: 0}, await epoch(ask, 0)))[1] == pytest.approx(-1, abs=0.9)


async def test_what_is_due_next_is_asked_for_from_a_floor(queue, ask):
    number = await queue()
    for seconds in (60, 10):
        await make_due(ask, seconds)
    floor = await epoch(ask, 30)
    due = "select extract(epoch from notifyq.next_due(%s, to_timestamp(%s)) - now())::float8"
    assert await ask(due, number, floor) == [(pytest.approx(-10, abs=5),)]
    due = "select extract(epoch from notifyq.next_due(%s) - now())::float8"
    assert await ask(due, number) == [(pytest.approx(-60, abs=5),)]


async def test_who_stands_free_with_a_floor_looks_only_at_what_was_due_since(queue, store, other, ask):
    number = await queue()
    await make_due(ask, 60)
    [stance] = (await store.stand_free(other, [number], [False], [await epoch(ask, 30)])).values()
    assert (stance.ready, stance.due) == (True, None)
    [stance] = (await store.stand_free(other, [number], [True], [None])).values()
    assert (stance.ready, stance.due) == (False, pytest.approx(await epoch(ask, 60), abs=5))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"key_limit": 1}, False),
        ({"fair": True}, False),
        ({"policy": "ordered"}, True),
        ({"key_limit": 1, "ageing": 60}, True),
        ({"ageing": 60}, True),
    ],
)
async def test_a_claim_with_rules_leaves_out_what_is_below_its_floor_unless_the_order_is_strict(
    queue, claim, ask, options, found
):
    await queue(**options)
    [(below,)] = await ask("select notifyq.send('q', key => 'a')")
    [(high,)] = await ask("select notifyq.send('q', key => 'b', priority => 5)")
    [(above,)] = await ask("select notifyq.send('q', key => 'c')")
    [(floor,)] = await ask("select number from notifyq.ready where job = %s", above)
    jobs, _ = await claim({0: floor, 5: 0})
    assert jobs == ([high, below, above] if found else [high, above])
    assert (await claim())[0] == ([] if found else [below])


@pytest.fixture
async def rung(dsn, ask):
    """What was rung since it was called the last time; the first time it begins to listen."""
    payloads: list[str] = []
    listener = await open_connection(dsn)
    listener.add_notify_handler(lambda notification: payloads.append(notification.payload))

    async def rung() -> set[str]:
        [(channel,)] = await ask("select notifyq.channel(number) from notifyq.queue")
        await listener.execute(f'listen "{channel}"'.encode())
        await listener.execute(f"notify \"{channel}\", 'end'".encode())
        with trio.fail_after(20):
            while "end" not in payloads:
                await listener.wait_input()
        told = {payload for payload in payloads if payload != "end"}
        payloads.clear()
        return told

    yield rung
    await listener.close()


async def test_what_goes_back_to_its_place_rings_if_somebody_stands_far(
    queue, store, claim, ask, other, connection, rung
):
    number = await queue(policy="singleton")

    async def rung_by_an_end() -> list[str]:
        await rung()
        jobs = [(await ask("select notifyq.send('q', key => 'k')"))[0][0] for _ in range(2)]
        assert (await claim())[0] == jobs[:1]
        for job in jobs:
            ended = "select notifyq.complete(array[a.job], runtime => a.runtime) from notifyq.active a where a.job = %s"
            assert await ask(ended, job) == [([job],)]
            assert (await claim())[0] in (jobs[1:], [])
        return [payload.replace(f":{jobs[1]}", ":second") for payload in await rung()]

    assert await rung_by_an_end() == []
    async with connection.transaction():  # somebody tests it at that moment
        await ask("select pg_advisory_xact_lock(notifyq.lock_class('far'), %s)", number % 64)
        assert await store.stand_far(other, [number], [True]) == {number: False}
    assert await rung_by_an_end() == []
    assert await store.stand_far(other, [number], [True]) == {number: True}
    assert "r:0:second" in await rung_by_an_end()
    await ask("select notifyq.update_queue('q', '{\"bell\": \"never\"}')")
    assert await rung_by_an_end() == []
    await ask("select notifyq.update_queue('q', '{\"bell\": \"quiet\"}')")
    assert await store.stand_far(other, [number], [False]) == {number: False}
    assert await rung_by_an_end() == []


@pytest.mark.parametrize(
    "back",
    [
        "select notifyq.release(array[{job}], array[1], null)",
        "select notifyq.rescue()",
        "select notifyq.edit({job}, null, 7, null, null)",
    ],
    ids=["released", "rescued", "edited"],
)
async def test_also_what_is_handed_back_rescued_or_edited(queue, store, ask, other, connection, rung, back):
    number = await queue()
    edited = "edit" in back
    back = back.format(job=(await ask("select notifyq.send('q')"))[0][0])

    async def rung_when_it_goes_back() -> set[str]:
        if not edited:
            await ask("select notifyq.claim('q')")
            await ask("update notifyq.active set deadline = now()")
        await rung()
        await connection.execute(back.encode())  # parsed and executed in one message: this is no long transaction
        assert await ask("select count(*) from notifyq.ready") == [(1,)]
        return await rung()

    assert await rung_when_it_goes_back() == set()
    assert await store.stand_far(other, [number], [True]) == {number: True}
    [(place,)] = await ask("select number from notifyq.ready")
    assert await rung_when_it_goes_back() == {f"r:{7 if edited else 0}:{place}"}


async def test_what_a_longer_transaction_writes_rings_for_each_priority_if_somebody_stands_far(
    queue, store, ask, other, connection, rung
):
    number = await queue()
    await rung()
    sends = [b"select notifyq.send('q', priority => %d)" % priority for priority in (0, 5, 2, 2, 9)]

    async def send_all() -> set[str]:
        for send in sends:
            await connection.execute(send)
        return {payload.rpartition(":")[0] for payload in await rung()}

    async def send_all_in_one() -> set[str]:
        async with connection.transaction():
            await connection.execute(b"select pg_sleep(0.002)")
            for send in sends:
                await connection.execute(send)
        return await rung()

    assert await send_all_in_one() == set()
    assert await store.stand_far(other, [number], [True]) == {number: True}
    assert await send_all() == set()
    [(last,)] = await ask("select max(id) from notifyq.job")
    assert await send_all_in_one() == {
        f"r:{priority}:{last + sent}" for sent, priority in enumerate((0, 5, 2, None, 9), 1) if priority is not None
    }
    async with connection.transaction():
        await connection.execute(b"select notifyq.send('q', priority => 5), pg_sleep(0.002)")
        await ask('select notifyq.send_many(\'q\', \'[{"priority": 9}, {"priority": 1}, {"priority": 5}]\')')
    assert {payload.rpartition(":")[0] for payload in await rung()} == {"r:5", "r:9", "r:1"}


async def test_also_what_it_puts_off(queue, store, other, connection, rung):
    number = await queue()
    await rung()

    async def send() -> set[str]:
        async with connection.transaction():
            await connection.execute(b"select pg_sleep(0.002)")
            await connection.execute(b"select notifyq.send('q', due_at => now() + '1 hour')")
        return {payload[:2] for payload in await rung()}

    assert await send() == set()
    assert await store.stand_far(other, [number], [True]) == {number: True}
    assert await send() == {"d:"}


@pytest.mark.parametrize("rules", ['{"key_limit": 2}', '{"ageing": 60}'])
async def test_new_rules_have_everybody_look_from_the_beginning(queue, ask, rung, rules):
    await queue()
    await rung()
    await ask("select notifyq.update_queue('q', %s)", rules)
    assert "look" in await rung()


async def test_a_beat_that_does_not_look_still_tells_of_cancel_requests(queue, connection, store, claim, ask):
    number = await queue()
    jobs = [(await ask("select notifyq.send('q')"))[0][0] for _ in range(2)]
    assert (await claim())[0] == jobs
    await ask("select notifyq.send('q'), notifyq.send('q', delay => '100 s')")
    [(runtime,)] = await ask("select id from notifyq.runtime")
    await ask("select notifyq.cancel(%s)", jobs[1])
    beat = await store.beat(connection, runtime, [number], look=False)
    assert (beat.renewed, beat.cancels, beat.ready, beat.due_in) == (True, [jobs[1]], None, {})
    beat = await store.beat(connection, runtime, [number])
    assert (beat.renewed, beat.cancels, beat.ready) == (True, [jobs[1]], [number])
    assert beat.due_in == {str(number): pytest.approx(100, abs=5)}

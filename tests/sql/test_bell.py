"""The quiet bell in SQL: when it rings, what a runtime that runs dry is told, and that nothing waits for anybody's lock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from notifyq._opening import open_connection
from notifyq._store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from notifyq._connection import TrioConnection


@pytest.fixture
async def queue(connection):
    """The number of queue q."""
    await connection.execute(b"select notifyq.create_queue('q', '{\"retry_delay\": 0}')")
    cursor = await connection.execute(b"select number from notifyq.queue")
    return (await cursor.fetchone())[0]


@pytest.fixture
async def heard(dsn, queue):
    """What the queue notified since it was last asked; whoever listens is not free."""
    listener = await open_connection(dsn)
    payloads: list[str] = []
    listener.add_notify_handler(lambda notification: payloads.append(notification.payload))
    channel = (await (await listener.execute(b"select notifyq.channel(%s)", (queue,))).fetchone())[0]
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


@pytest.fixture
def stand_free(other, queue, store):
    """Another session runs dry; a second time it stands free already."""
    held: list[bool] = []

    async def stand_free() -> Any:
        stance = (await store.stand_free(other, [queue], [bool(held)], [None]))[queue]
        held.append(stance.stands)
        return stance

    return stand_free


async def send(connection: TrioConnection, text: str = "select notifyq.send('q')") -> None:
    await connection.execute(text.encode())


async def send_and_take_back(connection: TrioConnection) -> None:
    await connection.execute(b"savepoint before")
    await send(connection)
    await connection.execute(b"rollback to before")


async def test_a_send_rings_only_while_somebody_is_free(connection, other, queue, heard, stand_free, store):
    await send(connection)
    assert await heard() == []
    stance = await stand_free()
    assert (stance.stands, stance.passed, stance.ready) == (True, True, True)
    await send(connection)
    assert len(await heard()) == 1
    await store.stand_busy(other, [queue])
    await send(connection)
    assert await heard() == []


async def test_who_dies_is_not_free_any_more(connection, other, heard, stand_free):
    await stand_free()
    pid = other.info.backend_pid
    await connection.execute(b"select pg_terminate_backend(%s)", (pid,))
    with trio.fail_after(20):
        while await (await connection.execute(b"select 1 from pg_locks where pid = %s", (pid,))).fetchone():
            pass
    await send(connection)
    assert await heard() == []


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
async def test_who_is_free_after_a_sender_began_hears_of_it_whatever_the_sender_sees(
    connection, heard, stand_free, level
):
    await connection.execute(f"begin isolation level {level}".encode())
    await connection.execute(b"select count(*) from notifyq.ready")  # takes its snapshot
    assert (await stand_free()).passed
    await send(connection)
    await connection.execute(b"commit")
    assert len(await heard()) == 1


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
async def test_who_runs_dry_while_a_sender_that_rings_nobody_is_under_way_is_told_to_look_again(
    connection, heard, stand_free, level
):
    await connection.execute(f"begin isolation level {level}".encode())
    await send(connection)
    stance = await stand_free()
    assert (stance.stands, stance.passed, stance.ready) == (True, False, False)
    await connection.execute(b"commit")
    assert await heard() == []
    stance = await stand_free()
    assert (stance.passed, stance.ready) == (True, True)


async def test_a_sender_that_goes_on_after_somebody_became_free_rings(connection, heard, stand_free):
    async with connection.transaction():
        await send(connection)
        assert not (await stand_free()).passed
        await send(connection)
    assert len(await heard()) == 1


async def test_what_a_savepoint_took_back_is_not_under_way(connection, heard, stand_free):
    async with connection.transaction():
        await send_and_take_back(connection)
        assert (await stand_free()).passed
        await send(connection)
    assert len(await heard()) == 1


async def test_a_ring_that_a_savepoint_took_back_rings_again(connection, heard, stand_free):
    await stand_free()
    async with connection.transaction():
        await send_and_take_back(connection)
        await send(connection)
    assert len(await heard()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "select notifyq.send_many('q', '[{}, {\"priority\": 5}]')",
        "select notifyq.send('q', delay => '1 hour')",
        "select notifyq.retry(array(select id from notifyq.archive))",
        "select notifyq.promote((select number from notifyq.queue))",
    ],
)
async def test_whatever_makes_a_job_wait_rings_only_while_somebody_is_free(
    connection, other, queue, heard, stand_free, store, text
):
    async def arrange() -> None:
        await connection.execute(b"select notifyq.send('q', retry_limit => 0) from generate_series(1, 2)")
        await connection.execute(b"select notifyq.fail(id, 'E', '') from notifyq.claim('q', 9)")
        await connection.execute(b"select notifyq.send('q', delay => '1 hour')")
        await connection.execute(b"update notifyq.scheduled set due_at = now()")

    await arrange()
    await send(connection, text)
    assert await heard() == []
    await connection.execute(b"select notifyq.delete_all('q')")
    await stand_free()
    await arrange()
    await heard()
    await send(connection, text)
    assert len(await heard()) >= 1


@pytest.mark.parametrize("purpose", ["free", "pending"])
async def test_a_stranger_that_holds_a_lock_of_the_bell_stops_nobody_and_makes_it_ring(
    connection, heard, stand_free, queue, dsn, purpose
):
    stranger = await open_connection(dsn)
    await stranger.execute(b"select pg_advisory_lock(notifyq.lock_class(%s), %s)", (purpose, queue % 64))
    with trio.fail_after(20):
        await send(connection)
        stance = await stand_free()
    assert len(await heard()) == 1
    assert not stance.passed
    await stranger.close()


@pytest.mark.parametrize(("bell", "rings"), [("always", 1), ("never", 0)])
async def test_a_queue_may_always_ring_or_never(connection, heard, stand_free, bell, rings):
    await connection.execute(b"select notifyq.update_queue('q', jsonb_build_object('bell', %s::text))", (bell,))
    if bell == "never":
        await stand_free()
    await send(connection)
    assert len(await heard()) == rings


async def test_tickets_that_others_hold_are_left_over(connection, other, dsn, queue):
    claims = Store("notifyq")
    runtime = "11111111-1111-1111-1111-111111111111"
    await connection.execute(f"select notifyq.register('{runtime}', '{{q}}')".encode())
    claim = claims.bind_claim("q", 9, runtime, durably=True)
    await connection.execute(b"select notifyq.send('q') from generate_series(1, 3)")
    async with other.transaction():
        await other.execute(
            b"select from notifyq.ready where number = (select min(number) from notifyq.ready) for update"
        )
        haul = await claims.run_claim(connection, claim)
        assert (len(haul.jobs), haul.left) == (2, True)
        haul = await claims.run_claim(connection, claim)
        assert (haul.jobs, haul.left) == ([], True)
    haul = await claims.run_claim(connection, claim)
    assert (len(haul.jobs), haul.left) == (1, False)
    haul = await claims.run_claim(connection, claim)
    assert (haul.jobs, haul.left) == ([], False)


@pytest.mark.parametrize("rule", ['{"active_limit": 1}', '{"key_limit": 1}', None])
async def test_what_may_not_start_is_not_left_over(connection, other, queue, rule):
    ask: Callable[..., Any] = connection.execute
    if rule is None:
        await ask(b"select notifyq.pause('q')")
    else:
        await ask(b"select notifyq.update_queue('q', %s::jsonb)", (rule,))
    await ask(b"select notifyq.send('q', key => 'a') from generate_series(1, 3)")
    claimed = await (
        await ask(b"select id, attempt, sent_at is null from notifyq.claim('q', 9, look => true)")
    ).fetchall()
    assert claimed[-1] == (None, None, False)


async def test_only_tickets_of_the_priorities_asked_for_are_left_over(connection, other, queue):
    await connection.execute(b"select notifyq.send('q', priority => 5)")
    look = "select id, attempt from notifyq.claim('q', 9, min_priority => {}, max_priority => {}, look => true)"
    cursor = await connection.execute(look.format(0, 4).encode())
    assert await cursor.fetchall() == [(None, 0)]
    await other.execute("begin")
    await other.execute("select from notifyq.ready for update")
    cursor = await connection.execute(look.format(5, 9).encode())
    assert await cursor.fetchall() == [(None, 1)]


async def test_what_a_process_has_enough_of_is_not_left_over(connection, queue, store):
    runtime = "11111111-1111-1111-1111-111111111111"
    await connection.execute(f"select notifyq.register('{runtime}', '{{q}}')".encode())
    await connection.execute(b"select notifyq.send('q', key => 'a') from generate_series(1, 3)")
    claim = store.bind_claim("q", 9, runtime, durably=True, key_limit=1, at_work={})
    haul = await store.run_claim(connection, claim)
    assert (len(haul.jobs), haul.left) == (1, None)

"""Events by SQL alone: a publish makes a job in each subscribed queue, or says why not."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
import trio


@pytest.fixture
async def queues(ask):
    await ask(
        "select notifyq.create_queue('mail', '{\"priority\": 3}'), notifyq.create_queue('audit', '{\"retry_limit\": 0}')"
    )
    await ask("select notifyq.subscribe('order.paid', 'mail'), notifyq.subscribe('order.paid', 'audit')")


async def test_each_subscribed_queue_gets_one_job_with_its_own_defaults(ask, queues):
    await ask("select notifyq.create_queue('other'), notifyq.subscribe('order.sent', 'other')")
    published = await ask("select * from notifyq.publish('order.paid', '{\"order\": 1}', headers => '{\"tenant\": 2}')")
    assert [(queue, created) for queue, _, created in published] == [("audit", True), ("mail", True)]
    assert await ask("select queue, data, headers, priority, retry_limit from notifyq.jobs order by queue") == [
        ("audit", {"order": 1}, {"event": "order.paid", "tenant": 2}, 0, 0),
        ("mail", {"order": 1}, {"event": "order.paid", "tenant": 2}, 3, 2),
    ]


async def test_a_queue_subscribes_once_and_unsubscribes(ask, queues):
    assert await ask("select notifyq.subscribe('order.paid', 'mail')") == [(False,)]
    assert await ask("select notifyq.unsubscribe('order.paid', 'mail')") == [(True,)]
    assert await ask("select notifyq.unsubscribe('order.paid', 'mail')") == [(False,)]
    assert await ask("select event, queue from notifyq.subscriptions") == [("order.paid", "audit")]
    assert [queue for queue, *_ in await ask("select * from notifyq.publish('order.paid')")] == ["audit"]


async def test_a_repeated_id_key_makes_jobs_only_where_there_is_none(ask, queues):
    publish = "select queue, created from notifyq.publish('order.paid', id_key => 'order 1')"
    assert await ask(publish) == [("audit", True), ("mail", True)]
    await ask("select notifyq.create_queue('new'), notifyq.subscribe('order.paid', 'new')")
    assert await ask(publish) == [("audit", False), ("mail", False), ("new", True)]


async def test_a_publish_is_all_or_nothing(ask, queues):
    await ask("select notifyq.update_queue('mail', '{\"max_data_bytes\": 2}')")
    with pytest.raises(psycopg.Error, match="over the limit of 2 bytes of queue mail"):
        await ask("select notifyq.publish('order.paid', '12345')")
    assert await ask("select count(*) from notifyq.job") == [(0,)]


@pytest.mark.parametrize(
    ("call", "state", "message"),
    [
        ("publish('order.lost')", "NQ003", "nobody has subscribed to event 'order.lost'"),
        ("publish('')", "NQ003", "not a name of an event: ''"),
        ("publish(null)", "NQ003", "not a name of an event: null"),
        ("publish('order paid')", "NQ003", "not a name of an event"),
        ("publish('order.paid', headers => '[]')", "NQ003", "headers must be a JSON object, not array"),
        ("subscribe('order.paid', 'nowhere')", "NQ001", "no queue named 'nowhere'"),
        ("subscribe('order.paid', null)", "NQ001", "no queue named null"),
        ("subscribe('order paid', 'mail')", "NQ003", "not a name of an event"),
        ("unsubscribe('order.paid', 'nowhere')", "NQ001", "no queue named 'nowhere'"),
        ("unsubscribe('', 'mail')", "NQ003", "not a name of an event"),
    ],
)
async def test_a_mistake_is_named(ask, queues, call, state, message):
    with pytest.raises(psycopg.Error) as caught:
        await ask(f"select notifyq.{call}")
    assert (caught.value.sqlstate, message in str(caught.value)) == (state, True), caught.value


async def test_a_publish_waits_for_the_deletion_of_a_queue_and_leaves_it_out(ask, connection, other, queues):
    published: list[Any] = []

    async def publish() -> None:
        cursor = await other.execute("select queue from notifyq.publish('order.paid')")
        published.extend(await cursor.fetchall())

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery, connection.transaction():
            await ask("select notifyq.delete_queue('mail')")
            nursery.start_soon(publish)
            waits = "select 1 from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
            while not await ask(waits, other.info.backend_pid):
                await trio.sleep(0.005)
    assert published == [("audit",)]

"""Patterns of queue names: which queues a runtime serves, from when on, and until when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

import notifyq
from notifyq import Connection, Job, Queue, events
from notifyq._listener import Listener
from notifyq._store import Store
from notifyq._worker import QueueWorker
from notifyq.events import JobCompleted, LeaseLost, ListenerDown, ListenerUp, ServerTrouble

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

HOUR = 3600.0
"""A poll interval, or a lease, at which only a notification can have told of anything."""


def pattern(name: str, ran: list[tuple[str, int]] | None = None, **options: Any) -> Queue[int, int]:
    queue = Queue(name, int, int)

    @queue.worker(**{"poll_interval": HOUR, **options})
    async def work(job: Job[int]) -> int:
        if ran is not None:
            ran.append((job.queue, job.data))
        return job.data

    return queue


async def until(holds: Callable[[], Awaitable[Any]], seconds: float = 10) -> Any:
    with trio.fail_after(seconds):
        while not (found := await holds()):
            await trio.sleep(0.005)
    return found


def lose(monkeypatch: pytest.MonkeyPatch, payload: str) -> None:
    """Let no runtime hear this."""
    heard = Listener._heard
    monkeypatch.setattr(
        Listener, "_heard", lambda self, channel, text: None if text == payload else heard(self, channel, text)
    )


@pytest.fixture
def rosters(monkeypatch):
    """The rosters of all runtimes, in the order of their start."""
    made: list[Any] = []
    init = notifyq._session.Roster.__init__

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(notifyq._session.Roster, "__init__", noted)
    return made


async def test_a_queue_whose_channel_could_not_be_listened_on_at_first_is_served_all_the_same(start, nq, monkeypatch):
    ran: list[tuple[str, int]] = []
    seen = await start(pattern("tenant.*", ran), lease=HOUR)
    hear = Listener._hear_all

    async def fail_once(self: Listener, connection: Any) -> None:
        monkeypatch.setattr(Listener, "_hear_all", hear)
        raise notifyq.ServerTrouble("canceling statement due to user request")

    monkeypatch.setattr(Listener, "_hear_all", fail_once)
    await nq.create_queue(Queue("tenant.a"))
    await seen.wait(ServerTrouble)
    with trio.fail_after(10):
        assert await nq.result(await nq.send(Queue("tenant.a", int, int), 1)) == 1
        await nq.delete_queue("tenant.a")
        await nq.create_queue(Queue("tenant.b"))
        assert await nq.result(await nq.send(Queue("tenant.b", int, int), 2)) == 2
    assert ran == [("tenant.a", 1), ("tenant.b", 2)]


async def test_it_serves_what_matches_and_what_is_made_later_at_once(start, nq):
    ran: list[tuple[str, int]] = []
    for name in ("tenant.a", "tenant.b", "tenants", "other"):
        await nq.create_queue(Queue(name))
        await nq.send(Queue(name, int), 1)
    seen = await start(pattern("tenant.*", ran), lease=HOUR)
    await seen.wait(JobCompleted, 2)
    await trio.testing.wait_all_tasks_blocked(0.05)
    await nq.create_queue(Queue("tenant.c", retry_limit=0))
    await nq.send(Queue("tenant.c", int), 2)
    await seen.wait(JobCompleted, 3, seconds=1)
    async with nq.transaction() as connection:  # the queue and its first job at once
        await connection.execute("select notifyq.create_queue('tenant.d'), notifyq.send('tenant.d', '3')")
    await seen.wait(JobCompleted, 4, seconds=1)
    await trio.testing.wait_all_tasks_blocked(0.1)
    for name in ("tenant.a", "tenant.c"):
        sent = await nq.send(Queue(name, int, int), 4)
        with trio.fail_after(1):
            assert await nq.result(sent) == 4
    assert sorted(ran) == [
        (f"tenant.{name}", n) for name, n in (("a", 1), ("a", 4), ("b", 1), ("c", 2), ("c", 4), ("d", 3))
    ]
    assert {event.queue for event in await seen.wait(JobCompleted, 6)} == {f"tenant.{letter}" for letter in "abcd"}
    [runtime] = await nq.runtimes()
    assert runtime["queues"] == ["tenant.*"]
    assert seen.of(ServerTrouble) == []


async def test_a_delayed_job_and_a_retry_of_a_matched_queue_are_on_time(start, nq):
    queue = Queue("tenant.*", int, int)

    @queue.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        if job.attempt == 1:
            raise ValueError
        return job.data

    one = Queue("tenant.a", int, retry_delay=0.2)
    await nq.create_queue(one)
    before = await nq.send(one, 1, delay=0.3)
    seen = await start(queue, lease=HOUR)
    after = await nq.send(one, 2, delay=0.3)
    await seen.wait(JobCompleted, 2, seconds=3)
    for sent in (before, after):
        record = await nq.get(sent)
        assert record.attempt == 2
        assert (record.claimed_at - record.sent_at).total_seconds() < 1.5


async def test_a_runtime_that_serves_nothing_yet_waits_for_it(start, nq, connection):
    seen = await start(pattern("*", transaction=False), lease=1)
    await connection.execute("select notifyq.create_queue('first'), notifyq.send('first', '1')")
    await seen.wait(JobCompleted, seconds=1)


async def test_a_queue_that_no_notification_told_of_is_served_with_the_next_beat(start, nq, monkeypatch):
    lose(monkeypatch, "queues")
    await nq.create_queue(Queue("tenant.a"))
    seen = await start(pattern("tenant.*"), lease=1)
    await trio.testing.wait_all_tasks_blocked(0.1)
    await nq.create_queue(Queue("tenant.b"))
    await nq.send(Queue("tenant.b", int), 1)
    await seen.wait(JobCompleted, seconds=2)


@pytest.mark.parametrize("heard", [True, False], ids=["told at once", "told by the beat"])
@pytest.mark.parametrize("name", ["tenant.*", "tenant.a"])
async def test_the_worker_of_a_deleted_queue_ends_quietly_and_begins_anew_with_it(
    start, nq, monkeypatch, rosters, heard, name
):
    if not heard:
        lose(monkeypatch, "queues")
    queue = pattern(name)
    one = Queue("tenant.a", int, int)
    await nq.create_queue(one)
    seen = await start(queue, lease=HOUR if heard else 1)
    [roster] = rosters
    await nq.send(one, 1)
    await seen.wait(JobCompleted)
    [worker] = roster.workers
    assert await until_deleted(nq, one) == 1
    await until_async(lambda: not roster.workers)
    assert worker.info.channel not in roster._listener._channels
    assert worker.info.channel not in roster._listener._listening
    await nq.create_queue(one)
    await nq.send(one, 2)
    await seen.wait(JobCompleted, 2, seconds=3)
    assert [worker.queue.name for worker in roster.workers] == ["tenant.a"]
    assert seen.of(ServerTrouble) == []


async def until_deleted(nq: notifyq.Client, queue: Queue[Any, Any]) -> int:
    """Delete a queue. It waits no longer than 1 s for claims' locks."""
    while True:
        try:
            return await nq.delete_queue(queue)
        except notifyq.ServerTrouble:
            await trio.sleep(0.01)


async def until_async(holds: Callable[[], Any]) -> None:
    async def look() -> Any:
        return holds()

    await until(look)


async def test_a_job_that_runs_when_its_queue_is_deleted_may_end(start, nq, rosters):
    running, gate = trio.Event(), trio.Event()
    queue = Queue("tenant.*", int, int)

    @queue.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        running.set()
        await gate.wait()
        return job.data

    one = Queue("tenant.a", int, int)
    await nq.create_queue(one)
    seen = await start(queue)
    [roster] = rosters
    await nq.send(one, 1)
    await running.wait()
    [old] = roster.workers
    await until_deleted(nq, one)
    await until_async(lambda: not roster._serving)
    await nq.create_queue(one)  # a new one, while the old one's worker is ending
    again = await nq.send(one, 2)
    gate.set()
    await seen.wait(LeaseLost)
    with trio.fail_after(5):
        assert await nq.result(again) == 2
    await until_async(lambda: old not in roster.workers)
    with trio.fail_after(5):
        assert await nq.result(await nq.send(one, 3)) == 3


async def test_a_claim_that_finds_its_queue_gone_says_nothing_and_looks(start, nq, monkeypatch, rosters):
    lose(monkeypatch, "queues")
    one = Queue("q", int, int)
    one.worker(poll_interval=0.02)(lambda job: job.data)
    seen = await start(one, lease=HOUR)
    await trio.testing.wait_all_tasks_blocked(0.01)
    await until_deleted(nq, one)
    await until_async(lambda: not rosters[0].workers)
    assert seen.of(ServerTrouble) == []


async def test_a_plain_declaration_goes_before_a_pattern_and_the_first_pattern_before_the_next(start, nq):
    ran: list[tuple[str, str]] = []

    def noting(name: str) -> Queue[int, int]:
        queue = Queue(name, int, int)

        @queue.worker(poll_interval=HOUR)
        async def work(job: Job[int]) -> int:
            ran.append((name, job.queue))
            return job.data

        return queue

    queues = [noting("a.*"), noting("a.x.*"), noting("*"), noting("a.plain")]
    for name in ("a.1", "a.x.1", "b"):
        await nq.create_queue(Queue(name))
    seen = await start(*queues)
    for name in ("a.1", "a.x.1", "b", "a.plain"):
        await nq.send(Queue(name, int), 1)
    await seen.wait(JobCompleted, 4)
    assert sorted(ran) == [("*", "b"), ("a.*", "a.1"), ("a.*", "a.x.1"), ("a.plain", "a.plain")]


async def test_a_pattern_leaves_out_the_dead_letter_queues_of_others(start, nq, rosters):
    ran: list[tuple[str, int]] = []
    dead = Queue("tenant.dead", int, int)
    await nq.create_queue(Queue("tenant.a", int, int, retry_limit=0, dead_letter=dead))
    await nq.send(Queue("tenant.a", int), 1)
    await nq.send(dead, 2)
    seen = await start(pattern("tenant.*", ran), lease=1)
    await seen.wait(JobCompleted)
    await nq.create_queue(Queue("tenant.b"))
    await until_async(lambda: {worker.queue.name for worker in rosters[0].workers} == {"tenant.a", "tenant.b"})
    await nq.update_queue(Queue("tenant.a", dead_letter=Queue("tenant.b")))
    await until_async(lambda: {worker.queue.name for worker in rosters[0].workers} == {"tenant.a", "tenant.dead"})
    await seen.wait(JobCompleted, 2)
    assert ran == [("tenant.a", 1), ("tenant.dead", 2)]


@pytest.mark.parametrize("also_new", [True, False], ids=["and a new queue", "in a known queue"])
async def test_what_was_missed_while_the_listener_was_down_is_found_when_it_is_up(start, nq, connection, also_new):
    one = Queue("tenant.a", int, int)
    await nq.create_queue(one)
    seen = await start(pattern("tenant.*"), lease=HOUR)
    await nq.send(one, 0)
    await seen.wait(JobCompleted)
    await trio.testing.wait_all_tasks_blocked(0.1)
    new = "perform notifyq.create_queue('tenant.b'), notifyq.send('tenant.b', '2');" if also_new else ""
    await connection.execute(
        f"""do $$ begin
            perform pg_terminate_backend(pid) from pg_stat_activity where application_name = 'notifyq listener';
            perform notifyq.send('tenant.a', '1'); {new}
        end $$""".encode()
    )
    await seen.wait(ListenerDown)
    await seen.wait(ListenerUp, 2)
    await seen.wait(JobCompleted, 3 if also_new else 2)


async def test_a_queue_that_comes_while_the_listener_is_coming_up_is_heard(start, nq, connection, monkeypatch, rosters):
    seen = await start(pattern("tenant.*"), lease=HOUR)
    notify = Store.notify

    async def meanwhile(self: Store, on: Connection, channel: str, payload: str) -> None:
        """What a connect proves itself with, after it has begun to listen."""
        await nq.create_queue(Queue("tenant.a"))
        rosters[0].look()
        await until_async(lambda: rosters[0].workers)
        await notify(self, on, channel, payload)

    monkeypatch.setattr(Store, "notify", meanwhile)
    terminate = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'notifyq listener'"
    await connection.execute(terminate.encode())
    await seen.wait(ListenerUp, 2)
    await trio.testing.wait_all_tasks_blocked(0.1)
    await nq.send(Queue("tenant.a", int), 1)
    await seen.wait(JobCompleted, seconds=1)


async def test_stopping_while_queues_are_made_ends(start, nq, connection):
    seen = await start(pattern("tenant.*"), grace=1)

    async def make() -> None:
        for number in range(200):
            await nq.create_queue(Queue(f"tenant.{number}"))
            await nq.send(Queue(f"tenant.{number}", int), number)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(make)
            await seen.wait(JobCompleted, 20)
            seen.runtime.stop()
            await seen.wait(events.RuntimeStopped)
    assert await nq.runtimes() == []
    assert sum(row["active"] for row in await nq.queue_stats()) == 0


async def test_a_thousand_queues_cost_few_claims_and_one_listening_connection(start, nq, connection, monkeypatch):
    claims: list[str] = []
    before_claim = QueueWorker._before_claim

    def counted(self: QueueWorker) -> int:
        claims.append(self.queue.name)
        return before_claim(self)

    monkeypatch.setattr(QueueWorker, "_before_claim", counted)
    await connection.execute("select notifyq.create_queue('tenant.' || n) from generate_series(1, 1000) n")
    await connection.execute("select notifyq.send('tenant.77', '77')")
    with trio.fail_after(20):
        seen = await start(pattern("tenant.*"), lease=HOUR)
    await seen.wait(JobCompleted)
    assert set(claims) == {"tenant.77"}
    claims.clear()
    await connection.execute("select notifyq.send('tenant.' || n, n::text::jsonb) from generate_series(1, 1000) n")
    await seen.wait(JobCompleted, 1001, seconds=20)
    assert len(set(claims)) == 1000
    await trio.testing.wait_all_tasks_blocked(0.2)
    claims.clear()
    listening = "from pg_stat_activity where application_name = 'notifyq listener' and datname = current_database()"
    cursor = await connection.execute(f"select pg_terminate_backend(pid) {listening}".encode())
    assert await cursor.fetchall() == [(True,)]  # the only one
    await seen.wait(ListenerUp, 2)
    await connection.execute("select notifyq.send('tenant.78', '78')")
    await seen.wait(JobCompleted, 1002, seconds=20)
    assert set(claims) == {"tenant.78"}


async def test_a_pattern_is_refused_where_one_queue_is_meant(nq):
    queue = Queue("tenant.*", int, int)
    meant = pytest.raises(notifyq.InvalidOption, match=r"'tenant\.\*' is a pattern, which only a runtime can serve")
    for call in (
        lambda: nq.send(queue, 1),
        lambda: nq.send_many(queue, [1]),
        lambda: nq.create_queue(queue),
        lambda: nq.update_queue(queue),
        lambda: nq.delete_queue(queue),
        lambda: nq.fetch(queue),
        lambda: nq.pause(queue),
        lambda: nq.redrive(queue),
    ):
        with meant:
            await call()
    with meant:
        queue.statement(1)
    with meant:
        Queue("q", dead_letter=queue)
    with pytest.raises(notifyq.InvalidOption, match=r"'tenant\.\*' is a pattern: give retry_limit to the queues"):
        Queue("tenant.*", int, retry_limit=3)
    with pytest.raises(notifyq.InvalidOption, match=r"'tenant\.\*' is a pattern: give schedules to the queues"):
        Queue("tenant.*", int, schedules=[notifyq.Schedule(every=60, data=1)])
    with pytest.raises(notifyq.InvalidOption, match=r"queue name 'tenant \*'"):
        Queue("tenant *")
    with pytest.raises(notifyq.InvalidOption, match=r"not a queue name: 'tenant\.\*'"):
        async with nq.connection() as connection:
            await nq._store.create_queue(connection, "tenant.*", "{}")
    with pytest.raises(notifyq.UnknownQueue):
        await nq.pause("tenant.*")


@pytest.mark.parametrize(
    ("name", "matched", "not_matched"),
    [
        ("*", ["a", "a.b"], []),
        ("a.*", ["a.", "a.b", "a.b.c"], ["a", "axb", "ba.b"]),
        ("*.x", [".x", "a.x"], ["x", "a.xb"]),
        ("a_*", ["a_b", "a_"], ["axb"]),
        ("a*b*c", ["abc", "a.b.c", "aabbcc"], ["acb", "ab"]),
    ],
)
async def test_python_and_sql_agree_on_what_matches(connection, name, matched, not_matched):
    for one in (*matched, *not_matched):
        await connection.execute("select notifyq.create_queue(%s)", (one,))
    found = await (await connection.execute("select name from notifyq.served(array[%s])", (name,))).fetchall()
    assert sorted(one for (one,) in found) == sorted(matched)
    assert [one for one in (*matched, *not_matched) if Queue(name).serves(one)] == matched

"""Paused queues: nothing starts, nothing is lost, and everybody knows within a second."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

import notifyq
from notifyq import Job, Queue
from notifyq._answers import Haul, Stance
from notifyq._claimer import Claimer
from notifyq._claimer_calls import ClaimerCalls
from notifyq._listener import Listener
from notifyq._worker import QueueWorker
from notifyq.events import Events, JobClaimed, JobCompleted, ListenerDown, ListenerUp, ServerTrouble
from notifyq.testing import run_waiting

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


HOUR = 3600.0
"""A poll interval, or a lease, at which only a notification can have told of anything."""


def echo(name: str = "q", **options: Any) -> Queue[int, int]:
    queue = Queue(name, int, int)

    @queue.worker(**{"poll_interval": HOUR, **options})
    async def work(job: Job[int]) -> int:
        return job.data

    return queue


async def until(holds: Callable[[], Awaitable[Any]], seconds: float = 10) -> Any:
    with trio.fail_after(seconds):
        while not (found := await holds()):
            await trio.sleep(0.005)
    return found


def lose(monkeypatch: pytest.MonkeyPatch, *payloads: str) -> None:
    """Let no runtime hear these."""
    heard = Listener._heard
    monkeypatch.setattr(
        Listener, "_heard", lambda self, channel, text: None if text in payloads else heard(self, channel, text)
    )


@pytest.fixture
def claims(monkeypatch):
    """The queues of all claims that runtimes made."""
    made: list[str] = []
    before_claim = QueueWorker._before_claim

    def counted(self: QueueWorker) -> int:
        made.append(self.queue.name)
        return before_claim(self)

    monkeypatch.setattr(QueueWorker, "_before_claim", counted)
    return made


async def idle(seconds: float = 0.2) -> None:
    """Wait until nothing in this process has moved for a while."""
    await trio.testing.wait_all_tasks_blocked(seconds)


@pytest.mark.parametrize("name", ["q", "*"])
async def test_a_paused_queue_starts_nothing_anywhere_and_goes_on_at_once_when_resumed(start, nq, claims, name):
    queue = echo()
    await nq.create_queue(queue)
    fleet = [await start(echo(name), lease=HOUR) for _ in range(2)]
    other = echo("other")
    fleet.append(await start(other, lease=HOUR))
    await idle()
    assert await nq.pause(queue) is True
    assert await nq.pause("q") is False
    await idle()
    claims.clear()
    await nq.send(queue, 1)
    await nq.send(queue, 2, delay=0.2)
    await nq.send_many(queue, range(3, 10))
    with trio.fail_after(2):
        assert await nq.result(await nq.send(other, 1)) == 1
    await idle(0.4)  # longer than the delay
    assert set(claims) == {"other"}  # what is sent, or becomes due, wakes nobody
    [row] = [row for row in await nq.queue_stats() if row["queue"] == "q"]
    assert (row["paused"], row["ready"], row["due"], row["active"]) == (True, 8, 1, 0)
    assert await nq.resume_queue(queue) is True
    assert await nq.resume_queue("q") is False
    with trio.fail_after(1):
        while sum(len(seen.of(JobCompleted)) for seen in fleet) < 10:
            await trio.sleep(0.005)
    assert [row["paused"] for row in await nq.queue_stats()] == [False, False]
    assert [event for seen in fleet for event in seen.of(ServerTrouble)] == []


async def test_what_has_not_started_is_handed_back_unspent_and_what_runs_ends(start, nq, monkeypatch, claim_ahead):
    claim_ahead(3)
    monkeypatch.setattr("notifyq._shelf.STALE_SECONDS", HOUR)
    queue = Queue("q", int, int)
    running, gate = trio.Event(), trio.Event()

    @queue.batch_worker(batch_size=4, poll_interval=HOUR)
    async def work(jobs: list[Job[int]]) -> list[int]:
        running.set()
        await gate.wait()
        return [job.data for job in jobs]

    seen = await start(queue, lease=HOUR)
    first = await nq.send(queue, 0)
    await running.wait()
    waiting = await nq.send_many(queue, [1, 2, 3])
    await seen.wait(JobClaimed, 4)
    await nq.pause(queue)

    async def handed_back() -> bool:
        records = [await nq.get(sent) for sent in waiting]
        return [(record.state, record.attempt) for record in records] == [("ready", 0)] * 3

    await until(handed_back, seconds=1)
    assert (await nq.get(first)).state == "active"
    gate.set()
    with trio.fail_after(2):
        assert await nq.result(first) == 0
    await idle()
    assert await handed_back()
    await nq.resume_queue(queue)
    with trio.fail_after(2):
        assert [await nq.result(sent) for sent in waiting] == [1, 2, 3]
    assert [(await nq.get(sent)).attempt for sent in waiting] == [1, 1, 1]


async def test_a_busy_queue_of_many_slots_stops_within_a_second(start, nq):
    queue = Queue("q", int, int)

    @queue.worker(poll_interval=HOUR, concurrency=20)
    async def work(job: Job[int]) -> int:
        await trio.sleep(0.005)
        return job.data

    await nq.create_queue(queue)
    sent = await nq.send_many(queue, range(3000))
    fleet = [await start(queue, lease=HOUR), await start(queue, lease=HOUR)]
    await fleet[0].wait(JobCompleted, 50)
    await fleet[1].wait(JobCompleted, 50)
    await nq.pause(queue)

    async def at_rest() -> bool:
        [row] = await nq.queue_stats()
        return row["active"] == 0 and row["ready"] > 0

    await until(at_rest, seconds=1)
    await idle()  # they have heard that the last ones are stored
    done = sum(len(seen.of(JobCompleted)) for seen in fleet)
    await idle()
    assert sum(len(seen.of(JobCompleted)) for seen in fleet) == done < 3000
    await nq.resume_queue(queue)
    with trio.fail_after(20):
        while sum(len(seen.of(JobCompleted)) for seen in fleet) < 3000:
            await trio.sleep(0.02)
    assert {record.attempt for record in await nq.jobs(limit=3000)} == {1}
    assert len(sent) == 3000


async def test_the_beat_tells_of_a_pause_and_its_end_when_no_notification_did(start, nq, monkeypatch, claim_ahead):
    claim_ahead(1)
    monkeypatch.setattr("notifyq._shelf.STALE_SECONDS", HOUR)
    lose(monkeypatch, "queues", "look")
    queue = Queue("q", int, int)
    running, gate = trio.Event(), trio.Event()

    @queue.batch_worker(batch_size=2)
    async def work(jobs: list[Job[int]]) -> list[int]:
        running.set()
        await gate.wait()
        return [job.data for job in jobs]

    seen = await start(queue, lease=1)
    await nq.send(queue, 0)
    await running.wait()
    waiting = await nq.send(queue, 1)
    await seen.wait(JobClaimed, 2)
    await nq.pause(queue)

    async def handed_back() -> bool:
        return (await nq.get(waiting)).state == "ready"

    await until(handed_back, seconds=2)
    gate.set()
    await seen.wait(JobCompleted)
    await nq.resume_queue(queue)
    await seen.wait(JobCompleted, 2, seconds=2)


async def test_a_runtime_that_never_heard_of_the_pause_looks_when_it_is_over(start, nq, monkeypatch, claims):
    lose(monkeypatch, "queues")
    queue = echo()
    seen = await start(queue, lease=HOUR)
    await idle()
    await nq.pause(queue)
    claims.clear()
    await nq.send(queue, 1)
    await nq.send(queue, 2, delay=0.1)
    await idle(0.5)
    assert 1 <= len(claims) <= 6  # each ring was looked into in vain, and perhaps the due time; one that spins makes 40
    assert seen.of(JobClaimed) == []
    await nq.resume_queue(queue)
    await seen.wait(JobCompleted, 2, seconds=1)


async def test_a_due_time_that_passes_in_an_unheard_pause_does_not_spin(start, nq, monkeypatch, claims):
    lose(monkeypatch, "queues")
    queue = echo()
    seen = await start(queue, lease=HOUR)
    await nq.send(queue, 1, delay=0.3)
    await idle(0.05)
    await nq.pause(queue)
    claims.clear()
    await idle(0.6)
    assert len(claims) <= 2  # one that spins makes 30
    await nq.resume_queue(queue)
    await seen.wait(JobCompleted, seconds=1)


async def test_a_runtime_that_starts_on_a_paused_queue_waits(start, nq, claims):
    queue = echo()
    await nq.create_queue(queue)
    await nq.pause(queue)
    await nq.send(queue, 1)
    seen = await start(queue, lease=HOUR)
    await idle()
    assert claims == []
    await nq.resume_queue(queue)
    await seen.wait(JobCompleted, seconds=1)


async def test_a_pause_that_ended_while_the_listener_was_down_is_over(start, nq, connection):
    queue = echo()
    seen = await start(queue, lease=HOUR)
    await idle()
    await nq.pause(queue)
    await nq.send(queue, 1)
    await idle()
    await connection.execute(
        """do $$ begin
            perform pg_terminate_backend(pid) from pg_stat_activity where application_name = 'notifyq listener';
            perform notifyq.resume_queue('q');
        end $$"""
    )
    await seen.wait(ListenerDown)
    await seen.wait(ListenerUp, 2)
    await seen.wait(JobCompleted, seconds=2)


async def test_stopping_in_a_pause_is_clean(start, nq):
    queue = echo()
    seen = await start(queue, lease=HOUR)
    await nq.pause(queue)
    await nq.send(queue, 1)
    await idle()
    seen.runtime.stop()
    await seen.wait(notifyq.events.RuntimeStopped, seconds=2)
    assert await nq.runtimes() == []


async def test_what_a_claim_brings_after_the_pause_was_told_is_handed_back():
    asked = trio.Event()
    gate = trio.Event()
    released: list[Any] = []

    async def claim(_how_many: int, _floors: Any, _due_floor: float | None) -> Haul:
        asked.set()
        await gate.wait()
        return Haul(["one", "two"] if not released else [])

    async def next_due(_due_floor: float | None) -> tuple[None, float]:
        return None, 0.0

    async def stand_free(_due_floor: float | None) -> Stance:
        return Stance(stands=True, passed=True, ready=True, due=None, clock=0.0)

    def claim_at_once(_how_many: int, _answered: Callable[[Haul | Exception], None]) -> bool:
        return False

    calls = ClaimerCalls(
        claim=claim,
        claim_at_once=claim_at_once,
        next_due=next_due,
        stand_free=stand_free,
        stand_busy=lambda: None,
        stand_far=lambda _: None,
        say_taken=lambda _: None,
        release=released.append,
        gone=lambda: None,
    )
    claimer = Claimer("q", calls, capacity=3, poll_interval=None, events=Events())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(claimer.run)
        await asked.wait()
        claimer.pause(True)
        gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert released == ["one", "two"]
        assert claimer.hands.shelf.take_back() == []
        nursery.cancel_scope.cancel()


async def test_by_hand_nothing_is_claimed_either_and_tests_leave_it_alone(nq, dsn):
    queue = echo()
    await nq.create_queue(queue)
    await nq.send(queue, 1)
    await nq.pause(queue)
    assert await nq.fetch(queue) == []
    with trio.fail_after(5):
        assert await run_waiting([queue, echo("*")], dsn=dsn) == {}
    await nq.resume_queue(queue)
    assert [job.data for job in await nq.fetch(queue)] == [1]


async def test_a_queue_that_does_not_exist_is_named(nq):
    for call in (nq.pause, nq.resume_queue):
        with pytest.raises(notifyq.UnknownQueue, match="'nowhere'"):
            await call("nowhere")

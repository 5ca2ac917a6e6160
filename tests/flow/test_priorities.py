"""Workers that take jobs of some priorities only: they miss none of them, and do not turn for the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

import notifyq
from notifyq import Job, Queue
from notifyq._worker import QueueWorker
from notifyq.events import JobCompleted

if TYPE_CHECKING:
    from notifyq._listener import Listener

HOUR = 3600.0
"""A poll interval, or a lease, at which only a notification can have told of anything."""


def dedicated(ran: list[int], **options: Any) -> Queue[int, int]:
    queue = Queue("q", int, int)

    @queue.worker(**{"poll_interval": HOUR, **options})
    async def work(job: Job[int]) -> int:
        ran.append(job.priority)
        return job.data

    return queue


@pytest.fixture
def claims(monkeypatch):
    """How many jobs each claim that runtimes made asked for."""
    made: list[str] = []
    before_claim = QueueWorker._before_claim

    def counted(self: QueueWorker) -> int:
        made.append(self.queue.name)
        return before_claim(self)

    monkeypatch.setattr(QueueWorker, "_before_claim", counted)
    return made


async def idle(seconds: float = 0.2) -> None:
    await trio.testing.wait_all_tasks_blocked(seconds)


@pytest.mark.parametrize("dear", [False, True], ids=["from the beginning", "from the floors"])
async def test_each_takes_its_own_and_together_all(start, nq, monkeypatch, dear):
    if dear:
        monkeypatch.setattr("notifyq._demand.CHEAP_LOOK", -1.0)
    high: list[int] = []
    middle: list[int] = []
    low: list[int] = []
    runtimes = [
        await start(dedicated(high, min_priority=5), lease=HOUR),
        await start(dedicated(middle, min_priority=0, max_priority=4), lease=HOUR),
        await start(dedicated(low, max_priority=-1), lease=HOUR),
    ]
    queue = Queue("q", int, int)
    await idle()
    for _ in range(3):
        for priority in (9, 5, 4, 0, -1, -32768, 32767):
            await nq.send(queue, 1, priority=priority)
    await nq.send_many(queue, [notifyq.NewJob(1, {"priority": priority}) for priority in (9, 4, -1)])
    async with nq.transaction() as connection:
        for priority in (6, 3, -2):
            await nq.send(queue, 1, priority=priority, connection=connection)
    for seen, jobs in zip(runtimes, (11, 8, 8), strict=True):
        await seen.wait(JobCompleted, jobs, seconds=3)
    assert sorted(set(high)) == [5, 6, 9, 32767]
    assert sorted(set(middle)) == [0, 3, 4]
    assert sorted(set(low)) == [-32768, -2, -1]
    assert len(high) + len(middle) + len(low) == 27


async def test_a_backlog_that_it_may_not_take_neither_holds_it_up_nor_turns_it(start, nq, claims):
    queue = Queue("q", int, int)
    await nq.create_queue(queue)
    await nq.send_many(queue, [notifyq.NewJob(1, {"priority": 9}) for _ in range(500)])
    await nq.send_many(queue, [notifyq.NewJob(1, {"priority": 1}) for _ in range(500)])
    await nq.send_many(queue, [notifyq.NewJob(1, {"priority": 5}) for _ in range(20)])
    ran: list[int] = []
    seen = await start(dedicated(ran, min_priority=5, max_priority=5, poll_interval=None), lease=1)
    await seen.wait(JobCompleted, 20)
    await idle(0.1)
    claims.clear()
    beats = 0
    with trio.fail_after(10):
        while beats < 3:  # each of them sees ready jobs, but none for this worker
            [runtime] = await nq.runtimes()
            beats += await beaten_since(nq, runtime["beat_at"])
    assert claims == []
    assert set(ran) == {5}
    assert [row["ready"] for row in await nq.queue_stats()] == [1000]


async def beaten_since(nq: notifyq.Client, moment: Any) -> int:
    while (await nq.runtimes())[0]["beat_at"] == moment:
        await trio.sleep(0.01)
    return 1


async def test_rings_for_lower_priorities_wake_it_not_at_all_and_for_higher_ones_briefly(start, nq, claims):
    queue = Queue("q", int, int)
    ran: list[int] = []
    seen = await start(dedicated(ran, min_priority=0, max_priority=5), lease=HOUR)
    await nq.send(queue, 1)
    await seen.wait(JobCompleted)
    await idle()
    claims.clear()
    for _ in range(5):
        await nq.send(queue, 1, priority=-1)
    await idle()
    assert claims == []
    await nq.send(queue, 1, priority=9)
    await idle()
    assert 1 <= len(claims) <= 2  # two where the floor is tried first
    assert ran == [0]


async def test_a_job_that_no_notification_told_of_is_found_by_the_beat(start, nq, monkeypatch):
    def deaf(self: Listener, channel: str, payload: str) -> None:
        if not payload.startswith("r:"):
            heard(self, channel, payload)

    heard = notifyq._runtime.Listener._heard
    monkeypatch.setattr(notifyq._runtime.Listener, "_heard", deaf)
    queue = Queue("q", int, int)
    seen = await start(dedicated([], min_priority=5, poll_interval=None), lease=1)
    await idle()
    await nq.send(queue, 1, priority=5)
    await seen.wait(JobCompleted, seconds=2)


async def test_a_delayed_job_is_promoted_by_whom_it_is_not_for(start, nq):
    queue = Queue("q", int, int)
    high: list[int] = []
    low: list[int] = []
    above = await start(dedicated(high, min_priority=1), lease=HOUR)
    below = await start(dedicated(low, max_priority=0), lease=HOUR)
    await idle()
    await nq.send(queue, 1, priority=5, delay=0.1)
    await nq.send(queue, 1, priority=0, delay=0.1)
    await above.wait(JobCompleted, seconds=1)
    await below.wait(JobCompleted, seconds=1)
    assert (high, low) == ([5], [0])


def test_bounds_are_checked():
    for options, message in (
        ({"min_priority": 3, "max_priority": 2}, "min_priority 3 is above max_priority 2"),
        ({"min_priority": 40000}, "min_priority must be an int from -32768 to 32767"),
        ({"max_priority": "high"}, "max_priority must be an int from -32768 to 32767"),
        ({"key_limit": 0}, "key_limit must be an int from 1 to 10000, not 0"),
        ({"key_limit": 1.5}, "key_limit must be an int from 1 to 10000, not 1.5"),
    ):
        with pytest.raises(notifyq.InvalidOption, match=message):
            dedicated([], **options)
    queue = Queue("q", int, int)

    @queue.batch_worker(batch_size=2, min_priority=1, key_limit=3)
    async def batch(jobs: list[Job[int]]) -> None: ...

    assert queue.worker_function is not None
    assert queue.worker_function.priorities == (1, 32767)
    assert queue.worker_function.key_limit == 3

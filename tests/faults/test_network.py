"""Networks that are cut, hang, or forget notifications: a proxy stands between notifyq and the server."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

import notifyq
from notifyq import Job, Queue, events
from tests.faults.chaos.proxy import Proxy
from tests.faults.test_cancelled import value

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


@pytest.fixture
async def proxy(dsn: str) -> AsyncIterator[Proxy]:
    proxy = Proxy(dsn)
    async with trio.open_nursery() as nursery:
        await nursery.start(proxy.run)
        yield proxy
        nursery.cancel_scope.cancel()


@pytest.fixture
async def serve(proxy: Proxy) -> AsyncIterator[Callable[..., Awaitable[list[events.Event]]]]:
    """Start a runtime of some queues that reaches the server through the proxy; gives its events."""
    async with trio.open_nursery() as nursery:

        async def serve(*queues: Queue[Any, Any], **options: Any) -> list[events.Event]:
            runtime = notifyq.Runtime(queues, dsn=proxy.dsn, **options)
            seen: list[events.Event] = []
            runtime.subscribe(seen.append)
            await nursery.start(runtime.run)
            return seen

        yield serve
        proxy.thaw()
        nursery.cancel_scope.cancel()


def of(seen: list[events.Event], kind: type[events.Event]) -> list[events.Event]:
    return [event for event in seen if isinstance(event, kind)]


async def warm(nq: notifyq.Client, queue: Queue[int, int]) -> None:
    """Have a runtime open all the connections it uses under load."""
    with trio.fail_after(10):
        for job in await nq.send_many(queue, range(100)):
            await nq.result(job)


def echo_queue(poll_interval: float | None = 3600) -> Queue[int, int]:
    queue = Queue("q", int, int)

    @queue.worker(poll_interval=poll_interval)
    async def work(job: Job[int]) -> int:
        return job.data

    return queue


async def test_a_cut_network_costs_a_runtime_seconds(proxy, serve, nq):
    queue = echo_queue()
    seen = await serve(queue, lease=3.0)
    for _ in range(3):
        await warm(nq, queue)
        proxy.cut()
        with trio.fail_after(15):
            assert await nq.result(await nq.send(queue, 1)) == 1
    assert of(seen, events.ListenerDown)


async def test_connections_that_hang_cost_a_runtime_seconds(proxy, serve, nq):
    queue = echo_queue()
    await serve(queue, lease=3.0)
    await warm(nq, queue)
    proxy.freeze()
    with trio.fail_after(15):
        assert await nq.result(await nq.send(queue, 1)) == 1


async def test_a_network_that_hangs_and_comes_back_costs_a_runtime_seconds(proxy, serve, nq):
    queue = echo_queue()
    seen = await serve(queue, lease=3.0)
    await warm(nq, queue)
    proxy.freeze(new=True)
    with trio.fail_after(10):
        while not of(seen, events.LeaseGivenUp):
            await trio.sleep(0.01)
    sent = await nq.send(queue, 1)
    proxy.thaw()
    with trio.fail_after(15):
        assert await nq.result(sent) == 1


async def test_what_a_runtime_runs_that_cannot_renew_ends_before_its_lease_does(proxy, serve, nq, connection):
    queue = Queue("q", int, int)
    begun, ended = trio.Event(), trio.Event()
    moments: list[datetime] = []

    @queue.worker
    async def work(job: Job[int]) -> int:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            moments.append(datetime.now(UTC))
            ended.set()
        return 0

    seen = await serve(queue, lease=6.0)  # a sixth of it is left for handlers to end in
    await nq.send(queue, 1)
    with trio.fail_after(20):
        await begun.wait()
        proxy.freeze(new=True)
        await ended.wait()
    assert of(seen, events.LeaseGivenUp)
    assert moments[0] < await value(connection, "select lease_until from notifyq.runtime")


async def freeze_under_load(
    proxy: Proxy, nq: notifyq.Client, queue: Queue[int, int], seen: list[events.Event]
) -> list[notifyq.Sent[int]]:
    """Freeze what is open while claims and completions are under way; gives what was sent."""
    sent: list[notifyq.Sent[int]] = []
    with trio.fail_after(20):
        while len(of(seen, events.JobCompleted)) < 500:
            sent.extend(await nq.send_many(queue, range(10)))
    proxy.freeze()
    return sent


async def test_connections_that_hang_under_load_cost_a_runtime_seconds(proxy, serve, nq):
    queue = echo_queue()
    seen = await serve(queue, lease=3.0)
    await freeze_under_load(proxy, nq, queue, seen)
    with trio.fail_after(15):
        assert await nq.result(await nq.send(queue, 1)) == 1


async def test_what_hung_is_done_again_and_what_comes_through_late_changes_nothing(proxy, serve, nq, monkeypatch):
    for module in ("_claimer", "_settler"):
        monkeypatch.setattr(f"notifyq.{module}.ANSWER_TIMEOUT", 0.5)
    # A claim that comes through late and is undone, since nobody is there for its answer, may have locked the new jobs
    # just when they were looked for: the next beat finds them.
    queue = echo_queue(poll_interval=None)
    seen = await serve(queue, lease=3.0)
    sent = await freeze_under_load(proxy, nq, queue, seen)
    with trio.fail_after(30):
        for job in sent:
            await nq.result(job)
        proxy.thaw()
        for job in await nq.send_many(queue, range(100)):
            await nq.result(job)
    [stats] = await nq.queue_stats()
    assert (stats["completed"], stats["active"], stats["ready"], stats["failed"]) == (len(sent) + 100, 0, 0, 0)


async def test_a_send_through_a_network_that_hangs_goes_through_when_it_is_back(proxy, nq):
    queue = Queue("q", int, int)
    await nq.create_queue(queue)
    sent: list[notifyq.Sent[int]] = []
    async with notifyq.connect(proxy.dsn) as client:
        assert await client.jobs() == []
        proxy.freeze()

        async def send() -> None:
            sent.append(await client.send(queue, 1))

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await trio.testing.wait_all_tasks_blocked(0.2)
                assert await nq.jobs() == []
                proxy.thaw()
    assert [job.id for job in await nq.jobs()] == [job.id for job in sent]


async def test_a_send_that_finds_no_connection_fails_in_bounded_time(proxy, nq):
    queue = Queue("q", int, int)
    await nq.create_queue(queue)
    async with notifyq.connect(proxy.dsn, connect_timeout=1.0) as client, client.connection():
        proxy.freeze(new=True)
        with trio.fail_after(5), pytest.raises(notifyq.ConnectionLost, match="1 s"):
            await client.send(queue, 1)
        proxy.thaw()
        with trio.fail_after(15):
            while not await nq.jobs():
                with contextlib.suppress(notifyq.ConnectionLost):
                    await client.send(queue, 1)


async def test_a_send_that_is_given_up_on_leaves_the_client_able_to_send(proxy, nq):
    queue = Queue("q", int, int)
    await nq.create_queue(queue)
    async with notifyq.connect(proxy.dsn) as client:
        assert await client.jobs() == []
        proxy.freeze()
        with trio.fail_after(10):
            with trio.move_on_after(0.5) as patience:
                await client.send(queue, 1)
            assert patience.cancelled_caught
            await client.send(queue, 2)
    assert [job.data for job in await nq.jobs()] == [2]


@pytest.mark.parametrize("how", ["deaf", "pooling"])
async def test_without_notifications_jobs_are_polled_for_and_it_is_said_once(proxy, serve, nq, monkeypatch, how):
    monkeypatch.setattr("notifyq._listener.CALL_TIMEOUT", 0.3)
    queue = Queue("q", int, int)

    @queue.worker
    async def work(job: Job[int]) -> int:
        return job.data

    setattr(proxy, how, True)
    seen = await serve(queue, lease=3.0)
    with trio.fail_after(20):
        for number in range(3):
            assert await nq.result(await nq.send(queue, number)) == number
        while proxy.dropped < 4:
            await trio.sleep(0.01)
        assert of(seen, events.ListenerUp) == []
        [down] = of(seen, events.ListenerDown)
        assert "notifications do not arrive" in down.reason
        setattr(proxy, how, False)
        while not of(seen, events.ListenerUp):
            await trio.sleep(0.01)
        with trio.fail_after(1):  # no beat is so soon
            assert await nq.result(await nq.send(queue, 3)) == 3
    assert len(of(seen, events.ListenerDown)) == 1


async def test_with_a_listening_connection_past_the_pooler_all_else_may_go_through_it(proxy, serve, dsn):
    proxy.deaf = True
    queue = Queue("q", int, int)

    @queue.worker
    async def work(job: Job[int]) -> int:
        return job.data

    seen = await serve(queue, listen_dsn=dsn)
    async with notifyq.connect(proxy.dsn, listen_dsn=dsn) as behind:
        with trio.fail_after(4):  # no beat is so soon
            for number in range(3):
                assert await behind.result(await behind.send(queue, number)) == number
    assert of(seen, events.ListenerDown) == []
    assert len(of(seen, events.ListenerUp)) == 1

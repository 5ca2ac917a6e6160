"""The main job end to end: send, wake, claim, run, complete, and every way an attempt can end."""

from __future__ import annotations

import threading
import time
from contextlib import asynccontextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trio.lowlevel

import notifyq
from notifyq import Job, Queue
from notifyq._executor import Executor
from notifyq.events import HandlerStuck, JobCancelled, JobClaimed, JobCompleted, JobFailed, JobSnoozed, LeaseLost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

HOUR = 3600.0
"""A poll interval at which only the bell and the due timer can have woken the worker."""


@attrs.frozen
class Reminder:
    message: str
    fail: bool = False


@attrs.frozen
class Echo:
    result: str


def echo_queue(**options: Any) -> Queue[Reminder, Echo]:
    queue = Queue("reminders", Reminder, Echo, **{"retry_delay": 0, "retry_limit": 2, **options})

    @queue.worker(poll_interval=HOUR)
    async def remind(job: Job[Reminder]) -> Echo:
        if job.data.fail:
            raise ValueError(f"asked to fail: {job.data.message}")
        return Echo(f"echo: {job.data.message}")

    return queue


async def test_output_comes_back_as_the_declared_type(start, nq):
    queue = echo_queue()
    await start(queue)
    with trio.fail_after(5):
        sent = await nq.send(queue, Reminder("tea"))
        assert await nq.result(sent) == Echo("echo: tea")
    record = await nq.get(sent)
    assert (record.state, record.attempt, record.output) == ("completed", 1, {"result": "echo: tea"})


async def test_retries_at_once_then_fails_with_every_error_kept(start, nq, connection):
    queue = echo_queue()
    seen = await start(queue)
    with trio.fail_after(5):
        sent = await nq.send(queue, Reminder("tea", fail=True))
        with pytest.raises(notifyq.JobFailed, match="ValueError: asked to fail: tea") as caught:
            await nq.result(sent)
    assert (caught.value.state, caught.value.type) == ("failed", "ValueError")
    assert [event.state for event in await seen.wait(JobFailed, 3)] == ["ready", "ready", "failed"]
    cursor = await connection.execute(
        "select attempt, type, message, traceback like '%%raise ValueError%%' from notifyq.attempt order by attempt"
    )
    assert await cursor.fetchall() == [(n, "ValueError", "asked to fail: tea", True) for n in (1, 2, 3)]


async def test_dead_letter_has_provenance_and_redrive_brings_it_back(start, nq):
    dead = Queue("dead", Reminder)
    queue = echo_queue(retry_limit=0, dead_letter=dead)
    seen = await start(queue)
    sent = await nq.send(queue, Reminder("tea", fail=True), headers={"tenant": "a"})
    await seen.wait(JobFailed)
    [letter] = await nq.jobs(queue=dead)
    assert letter.provenance is not None
    assert letter.provenance["queue"] == "reminders"
    assert letter.provenance["id"] == sent.id
    assert letter.provenance["attempts"] == 1
    assert letter.provenance["error"] == {"type": "ValueError", "message": "asked to fail: tea"}
    assert letter.headers == {"tenant": "a"}

    assert await nq.redrive(dead, preview=True) == [(letter.id, "reminders", None)]
    [(_, _, new_id)] = await nq.redrive(dead)
    await seen.wait(JobFailed, 2)
    assert (await nq.get(new_id)).state == "failed"


@pytest.mark.parametrize("delay", [0.3, timedelta(seconds=0.3), None])
async def test_delayed_job_starts_on_time_without_polling(start, nq, delay):
    queue = echo_queue()
    seen = await start(queue)
    due = datetime.now(UTC) + timedelta(seconds=0.3)
    sent = await nq.send(queue, Reminder("tea"), delay=due if delay is None else delay)
    await seen.wait(JobCompleted)
    record = await nq.get(sent)
    assert timedelta(0) <= record.claimed_at - record.sent_at - timedelta(seconds=0.25) < timedelta(seconds=0.5)


async def test_higher_priority_first_and_ties_in_send_order(start, nq):
    queue = Queue("q", int, int)
    order = []

    @queue.worker(concurrency=1)
    async def note(job: Job[int]) -> int:
        order.append(job.data)
        return job.data

    await nq.create_queue(queue)
    for data, priority in ((1, 0), (2, 5), (3, 0), (4, 5), (5, -1)):
        await nq.send(queue, data, priority=priority)
    seen = await start(queue)
    await seen.wait(JobCompleted, 5)
    assert order == [2, 4, 1, 3, 5]


async def test_sync_worker_runs_in_a_thread(start, nq):
    queue = Queue("q", int, str)

    @queue.worker
    def where(job: Job[int]) -> str:
        return threading.current_thread().name

    await start(queue)
    with trio.fail_after(5):
        name = await nq.result(await nq.send(queue, 1))
    assert name != threading.main_thread().name


async def test_slots_run_at_once_up_to_concurrency(start, nq):
    queue = Queue("q", int, int)
    running = most = 0
    gate = trio.Event()

    @queue.worker(concurrency=3, poll_interval=HOUR)
    async def wait(job: Job[int]) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await gate.wait()
        running -= 1
        return job.data

    seen = await start(queue)
    await nq.send_many(queue, range(7))
    await seen.wait(JobClaimed, 3)
    stats = await nq.queue_stats()
    assert (stats[0]["active"], stats[0]["ready"]) == (3, 4)
    gate.set()
    await seen.wait(JobCompleted, 7)
    assert most == 3


async def test_slots_whose_jobs_never_wait_let_all_else_run_after_a_turn_together(start, nq):
    queue = Queue("q", int)
    done = 0
    in_a_row = [0]

    @queue.worker(concurrency=20)
    async def never_waits(job: Job[int]) -> None:
        nonlocal done
        time.sleep(0.001)  # noqa: ASYNC251 - computes
        done += 1

    async def goes_round() -> None:
        while done < 300:
            before = done
            await trio.lowlevel.checkpoint()
            in_a_row.append(done - before)

    await nq.create_queue(queue)
    await nq.send_many(queue, range(300))
    await start(queue)
    with trio.fail_after(30):
        await goes_round()
    assert max(in_a_row) <= 2 * (5 + 20)  # a turn is 5 ms, and one job of each slot; this task runs once in each


async def test_what_cancels_one_call_of_a_slot_does_not_concern_its_next(start, nq):
    queue = Queue("q", str, str, retry_limit=0)
    hangs = trio.Event()
    ahead: list[float] = []

    @queue.worker(concurrency=1)
    async def work(job: Job[str]) -> str:
        match job.data:
            case "raise":
                raise ValueError
            case "block":
                time.sleep(0.1)  # noqa: ASYNC251 - and returns without having waited for anything
            case "wait":
                if job.timeout == 30:
                    hangs.set()
                await trio.sleep_forever()
            case "fine":
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
                ahead.append(job.deadline - trio.current_effective_deadline())
        return job.data

    seen = await start(queue)
    for kind, timeout in [("raise", 30), ("block", 0.05), ("wait", 0.05), ("wait", 30)]:
        sent, fine = await nq.send_many(
            queue, [notifyq.NewJob(kind, {"timeout": timeout}), notifyq.NewJob("fine", {"timeout": 30})]
        )
        if (kind, timeout) == ("wait", 30):
            with trio.fail_after(5):
                await hangs.wait()
            assert await nq.cancel(sent) == [sent.id]
        with trio.fail_after(5):
            assert await nq.result(fine) == "fine"
    assert [event.type for event in await seen.wait(JobFailed, 3)] == ["ValueError", "timeout", "timeout"]
    assert len(await seen.wait(JobCancelled)) == 1
    assert ahead == [0, 0, 0, 0]


async def test_a_slot_whose_call_was_given_up_before_it_waited_settles_its_next_job(start, nq, monkeypatch):
    queue = Queue("q", int, timeout=0.1, retry_limit=0)
    executors: list[Executor] = []
    run = Executor.run

    async def noted(self: Executor, **options: Any) -> None:
        executors.append(self)
        await run(self, **options)

    monkeypatch.setattr(Executor, "run", noted)

    @queue.worker(concurrency=1)
    async def work(job: Job[int]) -> None:
        if job.data == 0:
            time.sleep(1.3)  # noqa: ASYNC251 - blocks the loop
            # what a beat's answer does, if the scheduler comes to it before the deadlines are seen to
            executors[0].give_up_stuck()

    seen = await start(queue)
    await nq.send(queue, 0)
    await seen.wait(JobFailed)
    sent = await nq.send(queue, 1)
    await seen.wait(JobCompleted, seconds=5)
    assert (await nq.get(sent)).state == "completed"


async def test_calls_that_come_too_late_let_others_run(start, nq):
    queue = Queue("q", int, timeout=0.02, retry_limit=0)
    turn = 0
    at: list[int] = []
    done = trio.Event()

    @queue.worker(concurrency=1)
    async def work(job: Job[int]) -> None:
        if job.data:
            at.append(turn)
            time.sleep(0.03)  # noqa: ASYNC251 - computes, and has not waited when it returns
        if len(at) == 50:
            done.set()

    async def turns() -> None:
        nonlocal turn
        while not done.is_set():
            turn += 1
            await trio.lowlevel.checkpoint()

    await nq.create_queue(queue)
    await nq.send_many(queue, [0] * 3000 + [1] * 100)  # quick ones first: then many are claimed ahead
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns)  # before there is any call to count
        await start(queue)
        with trio.fail_after(30):
            await done.wait()
    counted = at[:50]  # while turns were taken
    assert max(counted.count(number) for number in set(counted)) <= 2


async def test_bad_data_does_not_pile_up_while_its_outcomes_cannot_be_written(start, nq, connection, other):
    queue = Queue("q", int, retry_limit=0)

    @queue.worker(concurrency=10)
    async def work(job: Job[int]) -> None:
        pass

    async def active() -> int:
        [count] = await (await connection.execute(b"select count(*) from notifyq.active")).fetchone()
        return int(count)

    await nq.create_queue(queue)
    await connection.execute(b"select notifyq.send('q', '\"bad\"') from generate_series(1, 20000)")
    async with other.transaction():
        await other.execute(b"lock table notifyq.attempt in exclusive mode")
        seen = await start(queue)
        before, now = -1, 0
        with trio.fail_after(30):
            while not now or now != before:
                await trio.sleep(0.5)
                before, now = now, await active()
        assert now < 10_000
    await seen.wait(JobFailed, 20_000, seconds=60)


async def test_key_limit_counts_each_job_of_a_batch_once(start, nq):
    queue = Queue("q", int)
    sizes: list[int] = []
    go, first, both = trio.Event(), trio.Event(), trio.Event()

    @queue.batch_worker(batch_size=3, concurrency=2, key_limit=6)
    async def work(jobs: list[Job[int]]) -> None:
        sizes.append(len(jobs))
        (first if len(sizes) == 1 else both).set()
        await go.wait()

    await nq.create_queue(queue)
    batch = [notifyq.NewJob(number, {"key": "a"}) for number in range(3)]
    await nq.send_many(queue, batch)
    seen = await start(queue)
    with trio.fail_after(10):
        await first.wait()
        await nq.send_many(queue, batch)
        await both.wait()
    go.set()
    await seen.wait(JobCompleted, 6)
    assert sizes == [3, 3]


async def test_single_sends_fill_the_free_slots_of_a_busy_worker(start, nq):
    queue = Queue("q", int, int)
    gate = trio.Event()

    @queue.worker(concurrency=5, poll_interval=HOUR)
    async def wait(job: Job[int]) -> int:
        await gate.wait()
        return job.data

    seen = await start(queue)
    for number in range(5):
        await nq.send(queue, number)
    await seen.wait(JobClaimed, 5)
    gate.set()
    await seen.wait(JobCompleted, 5)


async def test_batch_worker_settles_each_job_by_itself(start, nq):
    queue = Queue("q", int, str, retry_limit=0)

    @queue.batch_worker(batch_size=10)
    async def some(jobs: list[Job[int]]) -> dict[int, str | Exception]:
        by_data = {job.data: job.id for job in jobs}
        return {by_data[1]: "one", by_data[2]: ValueError("two"), by_data[3]: notifyq.Discard()}

    await nq.create_queue(queue)
    sent = await nq.send_many(queue, [1, 2, 3, 4])
    await start(queue)
    with trio.fail_after(5):
        assert await nq.result(sent[0]) == "one"
        for job, state, type_ in (
            (sent[1], "failed", "ValueError"),
            (sent[2], "cancelled", None),
            (sent[3], "failed", "not_settled"),
        ):
            with pytest.raises(notifyq.JobFailed) as caught:
                await nq.result(job)
            assert (caught.value.state, caught.value.type) == (state, type_)


@pytest.mark.parametrize(
    ("returned", "state"), [(None, "completed"), (["a", "b"], "completed"), (["a"], "failed"), ("ab", "failed")]
)
async def test_batch_worker_returns_none_or_as_many_outcomes_as_jobs(start, nq, returned, state):
    queue = Queue("q", int, str, retry_limit=0)

    @queue.batch_worker(batch_size=2)
    async def some(jobs: list[Job[int]]) -> Any:
        return returned

    await nq.create_queue(queue)
    sent = await nq.send_many(queue, [1, 2])
    seen = await start(queue)
    await seen.wait(JobCompleted if state == "completed" else JobFailed, 2)
    assert [(await nq.get(job)).state for job in sent] == [state, state]


async def test_snooze_spends_no_attempt_and_retry_spends_one(start, nq):
    queue = Queue("q", str, int, retry_limit=5)
    calls: list[tuple[str, int]] = []

    @queue.worker(poll_interval=HOUR)
    async def again(job: Job[str]) -> int:
        calls.append((job.data, job.attempt))
        if sum(data == job.data for data, _ in calls) < 3:
            raise notifyq.Snooze(0.01) if job.data == "snooze" else notifyq.Retry(0.01)
        return job.attempt

    seen = await start(queue)
    with trio.fail_after(5):
        assert await nq.result(await nq.send(queue, "snooze")) == 1
        assert await nq.result(await nq.send(queue, "retry")) == 3
    assert len(seen.of(JobSnoozed)) == 2
    assert len(seen.of(JobFailed)) == 2


@pytest.mark.parametrize("kind", ["async", "sync", "raising", "cancelled"])
async def test_context_variables_of_a_job_are_its_own(start, nq, kind):
    tenant: ContextVar[Any] = ContextVar("tenant")
    outer: ContextVar[str] = ContextVar("outer")
    outer.set("outside")
    queue = Queue("q", int, list)
    cancelled = trio.Event()

    async def layer(job: Job[int], call_next: Any) -> Any:
        before = [tenant.get(None), outer.get()]
        if job.data == 0:
            tenant.set([float("nan")])
            outer.set("inside")
        await call_next(job)
        return before

    async def work(job: Job[int]) -> list[Any]:
        if job.data == 0:
            assert outer.get() == "inside"
            if kind == "raising":
                raise ValueError
            if kind == "cancelled":
                cancelled.set()
                await trio.sleep_forever()
        return []

    def in_thread(job: Job[int]) -> list[Any]:
        assert (outer.get() == "inside") == (job.data == 0)
        return []

    queue.worker(concurrency=1, middleware=[layer])(in_thread if kind == "sync" else work)  # type: ignore[arg-type]
    await start(queue)
    with trio.fail_after(5):
        first = await nq.send(queue, 0, retry_limit=0)
        if kind == "cancelled":
            await cancelled.wait()
            await nq.cancel(first)
        for number in range(1, 4):
            assert await nq.result(await nq.send(queue, number)) == [None, "outside"]


async def test_a_signal_out_of_a_nursery_is_the_same_signal(start, nq):
    queue = Queue("q", str, str, retry_limit=1, retry_delay=0)
    signals = {"fail": notifyq.Fail("no"), "discard": notifyq.Discard(), "snooze": notifyq.Snooze(0.01)}

    @queue.worker
    async def raise_it(job: Job[str]) -> str:
        async with trio.open_nursery(), trio.open_nursery():
            if job.data in signals:
                raise signals.pop(job.data)
            if job.data == "error":
                raise KeyError("salt")
        return f"{job.data} {job.attempt}"

    seen = await start(queue)
    fail, discard, snooze, error = [await nq.send(queue, data) for data in ("fail", "discard", "snooze", "error")]
    with trio.fail_after(5):
        assert await nq.result(snooze) == "snooze 1"
        for job, state in ((fail, "failed"), (discard, "cancelled"), (error, "failed")):
            with pytest.raises(notifyq.JobFailed) as caught:
                await nq.result(job)
            assert caught.value.state == state
    kinds = [(event.job_id, event.type) for event in seen.of(JobFailed)]
    assert sorted(kinds) == [(fail.id, "Fail"), (error.id, "KeyError"), (error.id, "KeyError")]
    assert "Exceptions from Trio nursery" in (await nq.get(error)).error["traceback"]


async def test_a_batch_that_is_not_full_keeps_no_jobs_from_others_who_are_free(start, nq):
    gate = trio.Event()

    def queue_of() -> Queue[int, None]:
        queue = Queue("q", int, None)

        @queue.batch_worker(batch_size=10, poll_interval=HOUR)
        async def work(jobs: list[Job[int]]) -> None:
            if jobs[0].data == 0:
                await gate.wait()

        return queue

    busy = await start(queue_of())
    held = await nq.send(queue_of(), 0)
    await busy.wait(JobClaimed)
    await start(queue_of())
    with trio.fail_after(5):
        for number in range(1, 13):
            await nq.result(await nq.send(queue_of(), number))
        gate.set()
        await nq.result(held)
    assert [event.job_id for event in busy.of(JobClaimed)] == [held.id]


async def test_fail_is_final_and_discard_leaves_no_dead_letter(start, nq):
    dead = Queue("dead")
    queue = Queue("q", str, int, retry_limit=5, dead_letter=dead)

    @queue.worker
    async def end(job: Job[str]) -> int:
        raise notifyq.Fail("for good") if job.data == "fail" else notifyq.Discard()

    await start(queue)
    with trio.fail_after(5):
        for data, state in (("fail", "failed"), ("discard", "cancelled")):
            with pytest.raises(notifyq.JobFailed) as caught:
                await nq.result(await nq.send(queue, data))
            assert caught.value.state == state
    assert [record.data for record in await nq.jobs(queue=dead)] == ["fail"]


async def test_data_of_another_type_fails_for_good_and_the_worker_goes_on(start, nq):
    queue = echo_queue(retry_limit=5)
    await start(queue)
    with trio.fail_after(5):
        bad = await nq.send(Queue("reminders"), {"message": "tea", "fail": []} | {"message": None, "fail": {}})
        good = await nq.send(queue, Reminder("tea"))
        assert await nq.result(good) == Echo("echo: tea")
        untyped = await nq.send(Queue("reminders"), [1])
        with pytest.raises(notifyq.JobFailed) as caught:
            await nq.result(untyped)
    assert caught.value.type == "data_invalid"
    assert "$" in str(caught.value)
    assert (await nq.get(untyped)).attempt == 1
    assert bad.created


@pytest.mark.parametrize("output", ["nul \x00", float("nan"), "x" * 2_000_000, "\ud800", object()])
async def test_an_output_that_cannot_be_stored_fails_its_job_alone(start, nq, output):
    queue = Queue("q", int, retry_limit=3)

    @queue.worker(concurrency=10)
    async def give(job: Job[int]) -> Any:
        return output if job.data == 1 else "fine"

    await nq.create_queue(queue)
    sent = await nq.send_many(queue, [0, 1, 2])
    await start(queue)
    with trio.fail_after(5):
        assert await nq.result(sent[0]) == "fine"
        assert await nq.result(sent[2]) == "fine"
        with pytest.raises(notifyq.JobFailed) as caught:
            await nq.result(sent[1])
    assert caught.value.type == "output_invalid"


async def test_timeout_cancels_the_handler_and_fails_the_attempt(start, nq):
    queue = Queue("q", int, int, retry_limit=0, timeout=0.1)
    cancelled = trio.Event()

    @queue.worker
    async def slow(job: Job[int]) -> int:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    await start(queue)
    with trio.fail_after(5):
        with pytest.raises(notifyq.JobFailed, match=r"not done within 0\.1 s") as caught:
            await nq.result(await nq.send(queue, 1))
        await cancelled.wait()
    assert caught.value.type == "timeout"


async def test_a_handler_that_ignores_its_timeout_keeps_its_slot_and_its_late_result_is_refused(start, nq):
    queue = Queue("q", int, str, retry_limit=0, timeout=0.1)
    gate = threading.Event()

    @queue.worker(concurrency=1)
    def stubborn(job: Job[int]) -> str:
        if job.data == 1:
            gate.wait(20)
        return "late"

    seen = await start(queue, lease=1.0)
    with trio.fail_after(15):
        first = await nq.send(queue, 1)
        with pytest.raises(notifyq.JobFailed) as caught:
            await nq.result(first)
        assert caught.value.type == "timeout"
        await seen.wait(HandlerStuck)
        second = await nq.send(queue, 2)
        assert (await nq.get(second)).state == "ready"
        gate.set()
        assert await nq.result(second) == "late"
    assert (await nq.get(first)).state == "failed"


async def test_a_running_handler_is_cancelled_by_request(start, nq):
    queue = Queue("q", int, int)

    @queue.worker
    async def slow(job: Job[int]) -> int:
        await trio.sleep_forever()

    seen = await start(queue)
    sent = await nq.send(queue, 1)
    await seen.wait(JobClaimed)
    assert await nq.cancel(sent) == [sent.id]
    await seen.wait(JobCancelled, seconds=1)
    assert (await nq.get(sent)).state == "cancelled"
    assert await nq.resume(sent) == [sent.id]
    await seen.wait(JobClaimed, 2)


async def test_a_worker_reports_progress_extends_its_time_and_fans_out(start, nq):
    queue = Queue("q", int, int, timeout=0.5)
    more = Queue("more", int, int)
    look = trio.Event()

    @queue.worker
    async def work(job: Job[int]) -> int:
        await job.progress({"percent": 50})
        await job.touch(60)
        assert job.deadline > trio.current_time() + 50
        await job.client.send(more, job.data + 1)
        await look.wait()
        return job.data

    await nq.create_queue(more)
    seen = await start(queue)
    sent = await nq.send(queue, 1)
    await seen.wait(JobClaimed)
    with trio.fail_after(5):
        while not await nq.jobs(queue=more):
            await trio.lowlevel.checkpoint()
    record = await nq.get(sent)
    assert record.progress == {"percent": 50}
    assert record.deadline - record.claimed_at > timedelta(seconds=50)
    look.set()
    await seen.wait(JobCompleted)


async def test_middleware_wraps_in_declared_order(start, nq):
    queue = Queue("q", int, int)
    steps = []

    async def outer(job: Job[Any], call_next: Any) -> Any:
        steps.append("outer in")
        result = await call_next(job)
        steps.append("outer out")
        return result + 100

    @asynccontextmanager
    async def inner(job: Job[Any]) -> AsyncIterator[None]:
        steps.append("inner in")
        yield
        steps.append("inner out")

    @queue.worker(middleware=[inner])
    async def work(job: Job[int]) -> int:
        steps.append("work")
        return job.data

    await start(queue, middleware=[outer])
    with trio.fail_after(5):
        assert await nq.result(await nq.send(queue, 1)) == 101
    assert steps == ["outer in", "inner in", "work", "inner out", "outer out"]


async def test_a_handler_that_deletes_its_own_job_is_not_an_error(start, nq):
    queue = Queue("q", int, int)

    @queue.worker
    async def vanish(job: Job[int]) -> int:
        assert await job.client.delete(job.id) == [job.id]
        return 1

    seen = await start(queue)
    sent = [await nq.send(queue, 1), await nq.send(queue, 2)]
    await seen.wait(LeaseLost, 2)
    for job in sent:
        with pytest.raises(notifyq.JobNotFound):
            await nq.get(job)


async def test_headers_reach_the_worker(start, nq):
    queue = Queue("q", int)

    @queue.worker
    async def look(job: Job[int]) -> Any:
        return job.headers

    await start(queue)
    with trio.fail_after(5):
        sent = await nq.send(queue, 1, headers={"traceparent": "00-ab-cd-01", "tenant": "é"})
        assert await nq.result(sent) == {"traceparent": "00-ab-cd-01", "tenant": "é"}
        assert await nq.result(await nq.send(queue, 2)) == {}


async def test_a_handler_that_blocks_the_loop_is_named_before_the_lease_lapses(start, nq, caplog):
    queue = Queue("q", int, int)
    warned_in_time = False

    @queue.worker
    async def blocking(job: Job[int]) -> int:
        nonlocal warned_in_time
        deadline = time.monotonic() + 1.9
        while time.monotonic() < deadline and not warned_in_time:
            time.sleep(0.01)  # noqa: ASYNC251 - that is what it is about
            warned_in_time = "in blocking" in caplog.text
        return job.attempt

    seen = await start(queue, lease=2.0)
    with trio.fail_after(10):
        assert await nq.result(await nq.send(queue, 1)) == 1
    assert warned_in_time
    await seen.wait(HandlerStuck)

"""Handlers that do what nothing survives, and what a runtime must survive."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio

import notifyq
from notifyq import Job, Queue, Runtime, events
from notifyq._session import STOP_SECONDS
from tests.faults.test_cancelled import value

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from notifyq._connection import TrioConnection

HOUR = 3600.0


class Alien(BaseException):
    """Of nobody's family."""


FATAL: list[Callable[[], BaseException]] = [
    Alien,
    lambda: SystemExit(0),
    KeyboardInterrupt,
    GeneratorExit,
    lambda: BaseExceptionGroup("mixed", [ValueError("x"), Alien()]),
]
HOW = ["async", "sync", "batch", "transaction", "middleware"]


def dying(how: str, error: Callable[[], BaseException], **options: Any) -> Queue[int, Any]:
    """A queue whose worker raises this."""
    queue = Queue("dying", int, int, retry_delay=0, **options)

    async def die(job: Any, *_: Any) -> Any:
        raise error()

    def die_in_thread(job: Job[int]) -> int:
        raise error()

    async def work(job: Job[int]) -> int:
        return job.data

    if how == "batch":
        queue.batch_worker(batch_size=2)(die)
    elif how == "sync":
        queue.worker(die_in_thread)
    elif how == "middleware":
        queue.worker(middleware=[die_around])(work)
        die_around.error = error  # type: ignore[attr-defined]
    else:
        queue.worker(transaction=how == "transaction")(die)
    return queue


async def die_around(job: Any, call_next: Any) -> Any:
    raise die_around.error()  # type: ignore[attr-defined]


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in leaves(one)]
    return [error]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("error", FATAL, ids=[type(error()).__name__ for error in FATAL])
async def test_what_is_no_exception_ends_the_runtime_and_hands_all_jobs_back(dsn, nq, how, error):
    queue = dying(how, error, retry_limit=1)
    other = Queue("other", int, int, retry_limit=1)
    started = trio.Event()

    @other.worker(concurrency=1)
    async def wait(job: Job[int]) -> int:
        started.set()
        await trio.sleep_forever()
        return 0

    await nq.declare([queue, other])
    running, prefetched = await nq.send_many(other, [1, 2])
    runtime = Runtime([queue, other], dsn=dsn)

    async def run_until_it_dies() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(runtime.run)
            await started.wait()
            sent.append(await nq.send(queue, 1))

    sent: list[notifyq.Sent[int]] = []
    with trio.fail_after(STOP_SECONDS - 1), pytest.raises(BaseExceptionGroup) as raised:
        await run_until_it_dies()
    assert {type(one) for one in leaves(error())} <= {type(leaf) for leaf in leaves(raised.value)}
    assert not runtime.running
    assert await nq.runtimes() == []
    records = [await nq.get(job) for job in (*sent, running, prefetched)]
    assert [record.state for record in records] == ["ready"] * 3
    assert [record.attempt for record in records] == [1, 1, 0]
    assert [record.error and record.error["type"] for record in records] == [type(error()).__name__, "shutdown", None]


class Beside:
    """Jobs of every kind that are running when their runtime ends."""

    AGAIN = ("waits", "waits in a batch", "writes", "raises when it is cancelled")
    DONE = ("swallows it", "thread that ends in time")
    LOST = ("thread that never ends",)

    def __init__(self, retry_limit: int) -> None:
        self.queues = {
            kind: Queue(kind.replace(" ", "_"), int, int, retry_limit=retry_limit, retry_delay=60)
            for kind in self.AGAIN + self.DONE + self.LOST
        }
        self.cancelled, self.let_go = threading.Event(), threading.Event()
        self._running: set[str] = set()
        self._all_run = trio.Event()
        for kind, queue in self.queues.items():
            if "batch" in kind:
                queue.batch_worker(batch_size=2)(self._wait)
            elif "thread" in kind:
                queue.worker(self._wait_in_thread)
            elif kind == "writes":
                queue.worker(transaction=True)(self._write)
            else:
                queue.worker(self._wait)

    async def wait_for_all(self) -> None:
        await self._all_run.wait()

    def _runs(self, queue: str) -> str:
        self._running.add(queue.replace("_", " "))
        if len(self._running) == len(self.queues):
            self._all_run.set()
        return queue.replace("_", " ")

    async def _wait(self, jobs: Any) -> Any:
        job = jobs[0] if isinstance(jobs, list) else jobs
        kind = self._runs(job.queue)
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled.set()
            if kind.startswith("raises"):
                raise ValueError("cancelled") from None
            if kind.startswith("swallows"):
                return 1
            raise

    async def _write(self, job: Job[int], connection: TrioConnection) -> int:
        await connection.execute("insert into written values (1)")
        self._runs(job.queue)
        await trio.sleep_forever()
        return 1

    def _wait_in_thread(self, job: Job[int]) -> int:
        kind = trio.from_thread.run_sync(self._runs, job.queue)
        (self.cancelled if kind.endswith("in time") else self.let_go).wait(30)
        return 1


@pytest.mark.parametrize("retry_limit", [0, 1])
@pytest.mark.parametrize("end", ["a handler exits", "stop without grace"])
async def test_what_runs_beside_is_tried_again_alike_however_the_runtime_ends(
    dsn, nq, connection, monkeypatch, end, retry_limit
):
    monkeypatch.setattr("notifyq._session.STOP_SECONDS", 1.0)
    await connection.execute("create table written (n int not null)")
    beside = Beside(retry_limit)
    exiting = dying("async", lambda: SystemExit(0))
    runtime = Runtime([*beside.queues.values(), exiting], dsn=dsn, grace=0, pool_size=3)
    ended: BaseException | None = None
    try:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(runtime.run)
                sent = {kind: await nq.send(queue, 1) for kind, queue in beside.queues.items()}
                await beside.wait_for_all()
                if end == "a handler exits":
                    await nq.send(exiting, 1)
                else:
                    runtime.stop()
    except BaseExceptionGroup as error:
        ended = error
    finally:
        beside.let_go.set()
    assert (ended is not None) == (end == "a handler exits")
    found = {kind: await nq.get(job) for kind, job in sent.items()}
    again = ("ready", 1, "shutdown") if retry_limit else ("ready", 0, None)
    lost = ("ready" if retry_limit else "failed", 1, "lost")
    assert {
        kind: (record.state, record.attempt, record.error and record.error["type"]) for kind, record in found.items()
    } == {
        **dict.fromkeys(beside.AGAIN, again),
        **dict.fromkeys(beside.DONE, ("completed", 1, None)),
        **dict.fromkeys(beside.LOST, lost),
    }
    assert await value(connection, "select count(*) from written") == 0


APP = """
import sys
import notifyq

q = notifyq.Queue("q", int, int, retry_limit=1)

@q.worker
async def work(job):
    sys.exit(0)

runtime = notifyq.Runtime([q])
"""


async def test_run_ends_with_an_error_when_a_handler_exits_even_if_it_says_that_all_is_well(dsn, nq, tmp_path):
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    queue = Queue("q", int, int, retry_limit=1)
    await nq.create_queue(queue)
    sent = await nq.send(queue, 1)
    with trio.fail_after(20):
        ended = await trio.run_process(
            [sys.executable, "-m", "notifyq", "run", "app:runtime"],
            cwd=tmp_path,
            env={**os.environ, "DATABASE_URL": dsn},
            capture_stderr=True,
            check=False,
        )
    assert ended.returncode == 1
    assert b"in work\n    sys.exit(0)" in ended.stderr
    assert b"\nSystemExit\n" in ended.stderr
    assert (await nq.get(sent)).state in ("ready", "scheduled")


async def swallow(job: Job[int]) -> int:
    with trio.move_on_after(60):
        try:
            await trio.sleep_forever()
        except BaseException:
            return 1
    return 2


async def leak(job: Job[int]) -> int:
    trio.lowlevel.spawn_system_task(trio.sleep, 0.05)
    return job.data


async def leave_a_generator(job: Job[int]) -> int:
    async def numbers() -> AsyncGenerator[int, None]:
        yield 1
        yield 2

    left = numbers()
    kept.append(left)
    return await anext(left)


kept: list[AsyncGenerator[int, None]] = []


async def leave_a_cancelled_scope(job: Job[int]) -> int:
    left = trio.CancelScope()
    left.__enter__()
    left.cancel()
    return job.data


async def raise_a_mixed_group(job: Job[int]) -> int:
    raise ExceptionGroup("mixed", [ValueError("a"), ExceptionGroup("inner", [KeyError("b")])])


async def block(job: Job[int]) -> int:
    time.sleep(1.5)  # noqa: ASYNC251 - longer than the lease
    return job.data


@pytest.mark.parametrize(
    ("handler", "type_"),
    [
        (swallow, "timeout"),
        (leak, None),
        (leave_a_generator, None),
        (leave_a_cancelled_scope, None),
        (raise_a_mixed_group, "ExceptionGroup"),
        (block, None),
    ],
)
async def test_what_a_handler_leaves_swallows_or_blocks_ends_only_its_attempt(start, nq, handler, type_):
    queue = Queue("q", int, int, retry_limit=0 if type_ else 5, retry_delay=0, timeout=0.2 if type_ else 60)
    queue.worker(concurrency=1, poll_interval=HOUR)(handler)
    fine = Queue("fine", int, int)

    @fine.worker
    async def work(job: Job[int]) -> int:
        return job.data

    seen = await start(queue, fine, lease=1.0)
    sent = await nq.send(queue, 1)
    with trio.fail_after(20):
        if type_ is None:
            assert await nq.result(sent) == 1
        else:
            with pytest.raises(notifyq.JobFailed, match=type_):
                await nq.result(sent)
        assert await nq.result(await nq.send(fine, 2)) == 2
        if handler is block:
            assert "was blocked for" in (await seen.wait(events.HandlerStuck))[0].reason
        seen.runtime.stop()
        while seen.runtime.running:
            await trio.sleep(0.005)
    for left in kept:
        await left.aclose()
    kept.clear()
    gc.collect()

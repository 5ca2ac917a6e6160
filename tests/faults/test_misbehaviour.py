"""Handlers that do what nothing survives, and what a runtime must survive."""

from __future__ import annotations

import gc
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio

import notifyq
from notifyq import Job, Queue, Runtime, events
from notifyq._session import STOP_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

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
    assert [(await nq.get(job)).state for job in (*sent, running, prefetched)] == ["ready"] * 3
    assert (await nq.get(prefetched)).attempt == 0


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
    assert b"SystemExit: 0" in ended.stderr
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

"""Starting, stopping, pausing and closing, from many sides at once: each works or says why not, and nothing hangs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

import notifyq
from notifyq import Job, Queue, Runtime
from notifyq._results import POLL
from notifyq._store import Store
from tests.faults.test_cancelled import OTHERS, UNFINISHED, value, wait_none

if TYPE_CHECKING:
    from pathlib import Path

SIDES = 10
TURNS = 12


def served() -> Queue[int, int]:
    queue = Queue("q", int, int, retry_delay=0, retry_limit=1000)

    @queue.worker(concurrency=2)
    async def work(job: Job[int]) -> int:
        await trio.lowlevel.checkpoint()
        return job.data

    return queue


async def test_a_runtime_that_runs_refuses_to_run_again_and_goes_on(start, nq):
    queue = served()
    seen = await start(queue)
    with trio.fail_after(5), pytest.raises(RuntimeError, match="runs already"):
        await seen.runtime.run()
    with trio.fail_after(5):
        assert await nq.result(await nq.send(queue, 1)) == 1
    seen.runtime.stop()


async def test_a_runtime_that_does_not_run_cannot_be_stopped_and_then_runs(dsn, nq):
    queue = served()
    runtime = Runtime([queue], dsn=dsn)
    runtime.stop()
    assert not runtime.stopping
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(runtime.run)
            assert await nq.result(await nq.send(queue, 1)) == 1
            runtime.stop()


async def test_a_client_that_is_closed_while_calls_wait_says_so_to_each(dsn, nq):
    queue = served()
    await nq.create_queue(queue)
    told: list[str] = []

    async def told_that_it_is_closed(call: Any) -> None:
        with pytest.raises(notifyq.ClientClosed):
            await call()
        told.append("closed")

    async def hold(client: notifyq.Client, held: trio.Event, release: trio.Event) -> None:
        async with client.connection():
            held.set()
            await release.wait()

    with trio.fail_after(POLL - 1):
        async with trio.open_nursery() as nursery:
            held, release = trio.Event(), trio.Event()
            async with notifyq.connect(dsn, pool_size=1) as client:
                sent = await client.send(queue, 1)
                nursery.start_soon(told_that_it_is_closed, lambda: client.result(sent))
                while not client._results._listener.up:
                    await trio.sleep(0.005)
                await trio.testing.wait_all_tasks_blocked(0.1)  # it waits for the announcement
                nursery.start_soon(hold, client, held, release)
                await held.wait()
                nursery.start_soon(told_that_it_is_closed, lambda: client.send(queue, 2))
                nursery.start_soon(told_that_it_is_closed, lambda: client.get(sent))
                while client._pool.statistics().waiting < 2:
                    await trio.sleep(0.005)
            release.set()
    assert told == ["closed"] * 3


async def test_a_runtime_that_stops_while_it_registers_anew_is_not_registered_afterwards(
    dsn, nq, connection, monkeypatch
):
    queue = served()
    await nq.create_queue(queue)
    register = Store.register
    asked: list[int] = []
    asks_again, go_on = trio.Event(), trio.Event()

    async def register_late(*arguments: Any) -> None:
        asked.append(1)
        with trio.CancelScope(shield=True):  # it has been sent: that it is cancelled may come too late
            if len(asked) == 2:
                asks_again.set()
                await go_on.wait()
            await register(*arguments)

    monkeypatch.setattr(Store, "register", register_late)
    runtime = Runtime([queue], dsn=dsn, lease=1.0)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(runtime.run)
            await connection.execute("select notifyq.deregister(%s)", (runtime.id,))
            await asks_again.wait()
            runtime.stop()
            await trio.testing.wait_all_tasks_blocked(0.2)  # all that it does now without waiting for that
            go_on.set()
        assert await value(connection, "select count(*) from notifyq.runtime") == 0


class Side:
    """Does one thing after the other to a runtime that others do things to, too."""

    def __init__(self, runtimes: list[Runtime], dsn: str, seed: str) -> None:
        self._runtimes = runtimes
        self._dsn = dsn
        self._random = random.Random(seed)

    async def run(self) -> None:
        for _ in range(TURNS):
            runtime = self._random.choice(self._runtimes)
            await self._random.choice([self._run, self._cancel, self._stop, self._stop_from_a_thread, self._use])(
                runtime
            )

    async def _run(self, runtime: Runtime) -> None:
        """Until somebody stops it, or for a moment."""
        async with trio.open_nursery() as nursery:

            async def stop_soon() -> None:
                await trio.sleep(self._random.uniform(0, 0.3))
                runtime.stop()

            nursery.start_soon(stop_soon)
            try:
                await runtime.run()
            except RuntimeError as error:
                assert "runs already" in str(error)  # noqa: PT017 - or it runs

    async def _cancel(self, runtime: Runtime) -> None:
        with trio.move_on_after(self._random.uniform(0, 0.2)):
            await self._run(runtime)

    async def _stop(self, runtime: Runtime) -> None:
        runtime.stop()
        await trio.sleep(self._random.uniform(0, 0.02))

    async def _stop_from_a_thread(self, runtime: Runtime) -> None:
        await trio.to_thread.run_sync(lambda: trio.from_thread.run_sync(runtime.stop))

    async def _use(self, runtime: Runtime) -> None:
        """A client of its own, which may be closed in the middle of a call."""
        queue = runtime.queues[0]
        with trio.move_on_after(self._random.uniform(0, 0.3)):
            async with notifyq.connect(self._dsn, pool_size=1) as client:
                await client.send_many(queue, [1, 2, 3])
                await client.pause(queue)
                await client.resume_queue(queue)
                await client.result(await client.send(queue, 4))


async def test_whatever_is_started_and_stopped_from_ten_sides_ends_and_loses_no_job(dsn, connection):
    seed = os.environ.get("NOTIFYQ_SEED") or str(random.randrange(2**32))
    print(f"NOTIFYQ_SEED={seed}")
    queue = served()
    runtimes = [Runtime([queue], dsn=dsn, grace=1.0) for _ in range(3)]
    async with notifyq.connect(dsn) as client:
        await client.create_queue(queue)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(SIDES):
                nursery.start_soon(Side(runtimes, dsn, f"{seed}{number}").run)
        assert not any(runtime.running for runtime in runtimes)
        await wait_none(connection, OTHERS)
        await wait_none(connection, "select count(*) from notifyq.runtime")
        await wait_none(connection, "select count(*) from notifyq.active")
        async with notifyq.connect(dsn) as client, trio.open_nursery() as nursery:
            await client.resume_queue(queue)
            await nursery.start(runtimes[0].run)
            await wait_none(connection, UNFINISHED)
            runtimes[0].stop()
        await wait_none(connection, OTHERS)


APP = """
print("loading", flush=True)
import notifyq, trio
queue = notifyq.Queue("q", int, int, retry_delay=0, retry_limit=1000)

@queue.worker(concurrency=2)
async def work(job):
    await trio.sleep(0.01)
    return job.data

runtime = notifyq.Runtime([queue], grace=0.2)
"""
PROCESSES = 8
AT_ONCE = 4
EITHER = (signal.SIGTERM, signal.SIGINT)


class Signalled:
    """Runs ``notifyq run`` and sends it one signal, or two, at a moment between its start and its end."""

    def __init__(self, folder: Path, dsn: str, seed: str) -> None:
        self._random = random.Random(seed)
        self._log = folder / seed
        self._folder = folder
        self._environment = {**os.environ, "DATABASE_URL": dsn}

    async def run(self) -> None:
        signals = [self._random.choice(EITHER) for _ in range(self._random.randint(1, 2))]
        while_python_starts = self._random.random() < 0.1
        with self._log.open("wb") as log:
            async with trio.open_nursery() as nursery:
                command = [sys.executable, "-m", "notifyq", "run", "app:runtime"]
                options: dict[str, Any] = {"cwd": self._folder, "env": self._environment, "check": False}
                options |= {"stdout": subprocess.PIPE, "stderr": log}
                process = await nursery.start(partial(trio.run_process, command, **options))
                if not while_python_starts:
                    assert await process.stdout.receive_some()
                for number in signals:
                    await trio.sleep(self._random.choice((0, 0.01, 0.1, 0.5, 1)) * self._random.random())
                    process.send_signal(number)
                status = await process.wait()
        said = (signals, status, self._log.read_text(encoding="utf-8"))
        if not while_python_starts:  # which ends as it likes: nothing of ours is there yet
            assert status == 0, said
            assert "Traceback" not in said[2], said


async def test_signals_at_any_moment_end_a_process_cleanly_and_lose_no_job(dsn, nq, connection, tmp_path):
    seed = os.environ.get("NOTIFYQ_SEED") or str(random.randrange(2**32))
    print(f"NOTIFYQ_SEED={seed}")
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    queue = served()
    await nq.create_queue(queue)
    places = trio.CapacityLimiter(AT_ONCE)

    async def one(number: int) -> None:
        async with places:
            await nq.send_many(queue, range(50))
            await Signalled(tmp_path, dsn, f"{seed}-{number}").run()

    with trio.fail_after(100):
        async with trio.open_nursery() as nursery:
            for number in range(PROCESSES):
                nursery.start_soon(one, number)
        await wait_none(connection, "select count(*) from notifyq.runtime")
        await wait_none(connection, "select count(*) from notifyq.active")
        runtime = Runtime([queue], dsn=dsn)
        async with trio.open_nursery() as nursery:
            await nursery.start(runtime.run)
            await wait_none(connection, UNFINISHED)
            runtime.stop()

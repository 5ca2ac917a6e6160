"""``notifyq run`` as processes: a supervisor that dies, workers that cannot start, signals, and whose database it is."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import trio

import notifyq
from notifyq import Queue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

APP = """
import os, pathlib, sys, time
if pathlib.Path("broken").exists():
    print("broken", os.getpid(), flush=True)
    sys.exit(1)

import notifyq, trio

queue = notifyq.Queue("q", str, int)

@queue.worker(concurrency=2)
async def work(job):
    print(job.data, os.getpid(), flush=True)
    if job.data == "stubborn":
        with trio.CancelScope(shield=True):
            await trio.sleep(3600)
    if job.data == "slow":
        await trio.sleep(1)
    return os.getpid()

runtime = notifyq.Runtime([queue], lease=2, grace=10{options})
"""

LAUNCHER = """
import notifyq.__main__, notifyq._supervisor
notifyq._supervisor.HEALTHY_SECONDS = {healthy}
notifyq.__main__.main()
"""

Q = Queue("q", str, int)


class Process:
    """A command of ours, its output line by line."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._popen = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._popen.pid
        self.send_signal = self._popen.send_signal

    async def line(self) -> str:
        """The next line of its output."""
        assert self._popen.stdout is not None
        with trio.fail_after(20):
            return (await trio.to_thread.run_sync(self._popen.stdout.readline, abandon_on_cancel=True)).strip()

    async def logged(self, text: str) -> str:
        """The next line of its log that has this text."""
        assert self._popen.stderr is not None
        with trio.fail_after(20):
            while True:
                line = await trio.to_thread.run_sync(self._popen.stderr.readline, abandon_on_cancel=True)
                assert line, f"it ended without saying {text!r}"
                if text in line:
                    return line

    async def end(self) -> tuple[int, str]:
        with trio.fail_after(20):
            _, log = await trio.to_thread.run_sync(self._popen.communicate, abandon_on_cancel=True)
        return self._popen.returncode, log

    def kill(self) -> None:
        self._popen.kill()
        self._popen.communicate()


@pytest.fixture
async def run(dsn: str, tmp_path: Path) -> AsyncIterator[Callable[..., Process]]:
    """Start a command in a folder with the app; whatever still runs when the test ends is killed."""
    processes: list[Process] = []

    def run(*arguments: str, url: str = dsn, options: str = "", healthy: float | None = None) -> Process:
        (tmp_path / "app.py").write_text(APP.format(options=options), encoding="utf-8")
        (tmp_path / "launcher.py").write_text(LAUNCHER.format(healthy=healthy), encoding="utf-8")
        command = [sys.executable, *(["-m", "notifyq"] if healthy is None else ["launcher.py"]), *arguments]
        process = Process(command, tmp_path, {"DATABASE_URL": url})
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()


async def until(holds: Callable[[], Awaitable[Any]], seconds: float = 20) -> Any:
    """Look until something is so, and return what was found."""
    with trio.fail_after(seconds):
        while not (found := await holds()):
            await trio.sleep(0.01)
    return found


async def registered(nq: notifyq.Client, count: int) -> set[int]:
    """Wait until so many runtimes are registered; gives their process ids."""

    async def all_there() -> set[int]:
        pids = {row["pid"] for row in await nq.runtimes()}
        return pids if len(pids) == count else set()

    return await until(all_there)


def running(pid: int) -> bool:
    """Whether a process runs: one that nobody has waited for has ended all the same."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()


async def test_workers_stop_by_themselves_when_their_supervisor_is_killed(nq, run):
    await nq.create_queue(Q)
    supervisor = run("run", "app:runtime", "--processes", "2")
    pids = await registered(nq, 2)
    sent = await nq.send_many(Q, ["slow", "slow"])
    await supervisor.line()
    await supervisor.line()
    supervisor.send_signal(signal.SIGKILL)

    async def gone() -> bool:
        return not any(running(pid) for pid in pids)

    await until(gone)
    assert await nq.runtimes() == []
    records = [await nq.get(job) for job in sent]
    assert [(record.state, record.attempt) for record in records] == [("completed", 1)] * 2


async def test_a_replacement_that_fails_to_start_does_not_end_a_healthy_fleet(nq, run, tmp_path):
    await nq.create_queue(Q)
    supervisor = run("run", "app:runtime", "--processes", "2", healthy=0.1)
    first = await registered(nq, 2)
    (tmp_path / "broken").touch()
    killed = min(first)
    os.kill(killed, signal.SIGKILL)
    for _ in range(3):
        assert (await supervisor.line()).startswith("broken")
    [left] = first - {killed}
    with trio.fail_after(10):
        assert await nq.result(await nq.send(Q, "quick")) == left
    (tmp_path / "broken").unlink()

    async def replaced() -> bool:
        pids = {row["pid"] for row in await nq.runtimes()} - {killed}
        return len(pids) == 2 and left in pids

    await until(replaced)
    supervisor.send_signal(signal.SIGTERM)
    code, log = await supervisor.end()
    assert code == 0, log
    assert "status 1 after" in log
    assert {row["pid"] for row in await nq.runtimes()} <= {killed}  # whose lease may not have lapsed yet


async def test_a_replacement_that_the_system_has_no_room_for_is_tried_again(nq, run):
    await nq.create_queue(Q)
    supervisor = run("run", "app:runtime", "--processes", "2", healthy=0.1)
    first = await registered(nq, 2)
    soft, hard = resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE, (3, hard))  # it has these; a pipe is one more
    killed = min(first)
    os.kill(killed, signal.SIGKILL)
    await supervisor.logged("cannot start a worker process: [Errno 24]")
    resource.prlimit(supervisor.pid, resource.RLIMIT_NOFILE, (soft, hard))

    async def replaced() -> bool:
        return len({row["pid"] for row in await nq.runtimes()} - {killed}) == 2

    await until(replaced)
    supervisor.send_signal(signal.SIGTERM)
    code, log = await supervisor.end()
    assert code == 0, log


async def test_a_fleet_that_never_was_healthy_ends_with_the_code_of_the_one_that_failed(run, tmp_path):
    (tmp_path / "broken").touch()
    supervisor = run("run", "app:runtime", "--processes", "2")
    code, log = await supervisor.end()
    assert code == 1, log


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("names", ["nothing", "another database and schema"])
async def test_run_serves_the_database_and_schema_that_it_was_given(nq, dsn, empty_dsn, run, processes, names):
    async with notifyq.connect(empty_dsn, schema="other") as other:
        await other.create_queue(Q)
        options = "" if names == "nothing" else f", dsn={dsn!r}, listen_dsn={dsn!r}, schema='notifyq'"
        given = ("--dsn", empty_dsn, "--schema", "other")
        process = run(*given, "run", "app:runtime", "--processes", processes, options=options)
        sent = await other.send(Q, "quick")
        with trio.fail_after(10):
            assert await other.result(sent) in await registered(other, int(processes))
        assert await nq.runtimes() == []
        await listening(other, int(processes) + 1)  # the client does, too
        process.send_signal(signal.SIGTERM)
        code, log = await process.end()
        assert code == 0, log
        assert await other.runtimes() == []


@pytest.mark.parametrize("processes", ["1", "2"])
async def test_without_options_run_serves_the_database_that_the_runtime_names(nq, dsn, empty_dsn, run, processes):
    await nq.create_queue(Q)
    run("run", "app:runtime", "--processes", processes, url=empty_dsn, options=f", dsn={dsn!r}")
    await registered(nq, int(processes))


@pytest.mark.parametrize("processes", ["1", "2"])
async def test_run_listens_where_it_is_told_to(nq, dsn, empty_dsn, run, processes):
    given = ("run", "app:runtime", "--listen-dsn", dsn, "--processes", processes)
    run(*given, url=dsn, options=f", listen_dsn={empty_dsn!r}")
    await registered(nq, int(processes))
    await listening(nq, int(processes))


async def listening(nq: notifyq.Client, how_many: int) -> None:
    """Return once so many sessions listen to notifications in this database."""
    sessions = (
        "select from pg_stat_activity where datname = current_database() and application_name = 'notifyq listener'"
    )
    with trio.fail_after(10):
        async with nq.connection() as connection:
            while len(await connection.fetch(sessions)) != how_many:
                await trio.sleep(0.02)


async def test_a_bad_listen_dsn_is_named_and_not_quoted(run):
    process = run("run", "app:runtime", "--listen-dsn", "postgresql://me:p@ss@host/db")
    code, log = await process.end()
    assert code != 0
    assert "listen_dsn: the DSN is not one" in log
    assert "p@ss" not in log


async def test_a_password_given_to_run_is_not_on_the_command_lines_of_its_processes(nq, dsn, run):
    given = psycopg.conninfo.make_conninfo(dsn, password="secret")
    process = run("run", "app:runtime", "--processes", "2", url=given)
    pids = await registered(nq, 2)
    for pid in (process.pid, *pids):
        assert "secret" not in command_line(pid)


async def test_a_third_signal_ends_a_process_at_once(nq, run):
    await nq.create_queue(Q)
    process = run("run", "app:runtime")
    await nq.send(Q, "stubborn")
    assert (await process.line()).startswith("stubborn")
    process.send_signal(signal.SIGTERM)
    await process.logged("finishing what runs")
    process.send_signal(signal.SIGINT)
    await process.logged("stopping at once")
    process.send_signal(signal.SIGTERM)
    with trio.fail_after(1):
        code, log = await process.end()
    assert code == 1
    assert "third signal" in log

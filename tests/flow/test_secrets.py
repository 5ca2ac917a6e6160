"""Passwords and what is in jobs: nowhere but where they belong. On a server that asks for a password."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psycopg
import pytest
import trio

import notifyq
from notifyq import Job, Queue, events, testing
from notifyq._connect import resolve_dsn
from notifyq.bench._parts import Role

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

PASSWORD = "Schl0ss-Tuer/und@Riegel"
WORD = "Tuer"
"""Of the password, as it stands in the DSN, however it is escaped there."""

DATA = "Kontonummer-4711"

APP = """
import attrs
import notifyq

@attrs.frozen
class Account:
    number: int

typed = notifyq.Queue("typed", Account, retry_limit=0)
loose = notifyq.Queue("loose", str, retry_limit=1, retry_delay=0, dead_letter=notifyq.Queue("dead"))
written = notifyq.Queue("written", str, retry_limit=0)
batch = notifyq.Queue("batch", str, retry_limit=0)
blocking = notifyq.Queue("blocking", str, retry_limit=0)

@typed.worker
async def never(job): ...

@loose.worker
async def loud(job):
    raise ValueError("cannot book " + job.data)

@written.worker(transaction=True)
async def write(job, connection):
    await connection.execute("insert into booked values (%s)", (job.data,))

@batch.batch_worker(batch_size=10)
async def together(jobs):
    raise KeyError(*[job.data for job in jobs])

@blocking.worker
def block(job):
    return {job.data: float("nan")}

def broken(event):
    raise LookupError(repr(event))

runtime = notifyq.Runtime([typed, loose, written, batch, blocking])
runtime.subscribe(broken, notifyq.events.JobFailed)
"""


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """The DSN of a server that asks its role for a password."""
    with testing.embedded_server("fsync=off", "password_encryption=scram-sha-256") as admin:
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(f"create role keeper login createdb password '{PASSWORD}'".encode())
            [(hba,)] = connection.execute("show hba_file").fetchall()
            [(port, sockets)] = connection.execute(
                "select current_setting('port'), current_setting('unix_socket_directories')"
            ).fetchall()
            rules = Path(hba).read_text(encoding="utf-8")
            Path(hba).write_text(
                f"local all keeper scram-sha-256\nhost all keeper all scram-sha-256\n{rules}", encoding="utf-8"
            )
            connection.execute("select pg_reload_conf()")
            connection.execute("select pg_sleep(0.1) from pg_stat_activity limit 1")
        host = psycopg.conninfo.conninfo_to_dict(admin).get("host") or sockets
        yield f"postgresql://keeper:{quote(PASSWORD, safe='')}@/postgres?host={quote(str(host), safe='')}&port={port}"


@pytest.fixture
async def dsn(guarded: str) -> AsyncIterator[str]:
    """A database on it of this test's own, as a URI with the password in it."""
    async with testing.fresh_database(guarded) as own:
        yield guarded.replace("/postgres?", f"/{psycopg.conninfo.conninfo_to_dict(own)['dbname']}?")


def run(*arguments: str, dsn: str, cwd: Path, **popen: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "DATABASE_URL": dsn, "PYTHONTRACEMALLOC": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,
    )


async def output(process: subprocess.Popen[str]) -> str:
    return (await trio.to_thread.run_sync(lambda: process.communicate(timeout=60)))[0]


def test_the_server_does_ask_for_the_password(guarded):
    with psycopg.connect(guarded) as connection:
        assert connection.execute("select current_user").fetchall() == [("keeper",)]
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(guarded.replace(WORD, "Tor"))


@pytest.mark.parametrize("trouble", ["wrong password", "server down", "no such database"])
@pytest.mark.parametrize(
    "command", [["queues"], ["migrate"], ["run", "app:runtime"], ["bench", "enqueue", "--jobs", "100"]]
)
async def test_no_command_says_the_password_when_it_cannot_connect(guarded, tmp_path, command, trouble):
    (tmp_path / "app.py").write_text(APP.replace("blocking])", "blocking], connect_timeout=0.2)"), encoding="utf-8")
    bad, words = {
        "wrong password": (guarded.replace("Schl0ss", "Burg"), "password authentication failed"),
        "server down": (guarded.replace("&port=", "&port=1"), "No such file or directory"),
        "no such database": (guarded.replace("/postgres?", "/none?"), 'database "none" does not exist'),
    }[trouble]
    said = await output(run("-m", "notifyq", *command, dsn=bad, cwd=tmp_path))
    assert words in said
    assert WORD not in said


@pytest.mark.parametrize(
    "bad",
    [
        "postgresql://keeper:Tuer/Riegel@127.0.0.1/postgres",
        "postgresql://keeper:12/Tuer@127.0.0.1/postgres",
        "postgresql://keeper:Riegel@Tuer@127.0.0.1/postgres",
        "postgresql://keeper:Tuer%Riegel@127.0.0.1/postgres",
        "host=127.0.0.1 user=keeper password=Schloss Tuer",
        "host=127.0.0.1 user=keeper password='Tuer",
        "keeper:Tuer@127.0.0.1",
    ],
)
async def test_a_dsn_that_is_cut_in_the_password_is_refused_without_a_part_of_it(bad, tmp_path):
    with pytest.raises(notifyq.InvalidOption, match="the DSN is not one") as caught:
        resolve_dsn(bad)
    assert WORD not in "".join(traceback.format_exception(caught.value))
    for command in (["queues"], ["bench", "enqueue", "--jobs", "100"]):
        said = await output(run("-m", "notifyq", *command, dsn=bad, cwd=tmp_path))
        assert "the DSN is not one" in said
        assert WORD not in said


async def test_no_log_and_no_repr_has_the_password_through_a_life_with_broken_connections(dsn, caplog):
    caplog.set_level(logging.DEBUG)
    queue = Queue("q", int, int)

    @queue.worker
    async def work(job: Job[int]) -> int:
        return job.data

    runtime = notifyq.Runtime([queue], dsn=dsn, listen_dsn=dsn)
    seen: list[events.Event] = []
    downs = trio.Event()

    def look(event: events.Event) -> None:
        seen.append(event)
        if isinstance(event, events.ListenerDown):
            downs.set()

    runtime.subscribe(look)
    async with trio.open_nursery() as nursery, notifyq.connect(dsn) as nq:
        client = await nursery.start(runtime.run)
        with trio.fail_after(30):
            assert await nq.result(await nq.send(queue, 1)) == 1
            with psycopg.connect(dsn, autocommit=True) as connection:
                connection.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity"
                    " where pid <> pg_backend_pid() and datname = current_database()"
                )
            await downs.wait()
            said = ""
            while True:  # a connection that was killed while it rested says so to who gets it next
                try:
                    assert await nq.result(await client.send(queue, 2)) == 2
                    break
                except notifyq.ConnectionLost as error:
                    said += "".join(traceback.format_exception(error))
            assert WORD not in said
        shown = 0
        for each in gc.get_objects():
            if str(type(each).__module__).split(".")[0] in ("notifyq", "psycopg", "psycopg_pool"):
                shown += 1
                assert WORD not in repr(each), type(each)
        assert shown > 100
        runtime.stop()
    assert WORD not in caplog.text
    assert WORD not in repr(seen)


async def test_what_is_in_jobs_is_logged_at_debug_only(dsn, tmp_path):
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create table booked (account text primary key)")
        connection.execute("insert into booked values (%s)", (DATA,))
    lines: dict[str, str] = {}
    for flags in ((), ("-v",)):
        process = run("-m", "notifyq", "run", "app:runtime", *flags, dsn=dsn, cwd=tmp_path)
        try:
            async with notifyq.connect(dsn) as nq:
                with trio.fail_after(30):
                    while not await nq.runtimes():
                        await trio.sleep(0.02)
                    sent = [
                        await nq.send(Queue("typed"), {"number": DATA}),
                        await nq.send(Queue("typed"), DATA),
                        *[await nq.send(Queue(name), DATA) for name in ("loose", "written", "batch", "blocking")],
                    ]
                    for each in sent:
                        with pytest.raises(notifyq.JobFailed):
                            await nq.result(each)
                    if not flags:  # the message is where it belongs
                        assert DATA in (await nq.get(sent[2])).error["message"]
                    while not process.poll() and await nq.runtimes():
                        process.send_signal(signal.SIGTERM)
                        await trio.sleep(0.1)
        finally:
            process.terminate()
            lines[" ".join(flags)] = await output(process)
    assert lines[""].count(" failed, now failed: ") == 6
    assert "loose job 3 attempt 1 failed, now ready: ValueError" in lines[""]
    assert "a subscriber failed on JobFailed: LookupError" in lines[""]
    assert DATA not in lines[""]
    assert "ValueError: cannot book " + DATA in lines["-v"]
    assert WORD not in lines[""] + lines["-v"]


ENDING = """
import sys
import notifyq

class Booked(BaseException):
    pass

exits = notifyq.Queue("exits", str, retry_limit=0)
raises = notifyq.Queue("raises", str, retry_limit=0)
groups = notifyq.Queue("groups", str, retry_limit=0)

@exits.worker
async def leave(job):
    sys.exit(job.data)

@raises.worker
def book(job):
    error = Booked("cannot book " + job.data)
    error.add_note(job.data)
    raise error from ValueError(job.data)

@groups.batch_worker(batch_size=2)
async def book_all(jobs):
    raise BaseExceptionGroup(jobs[0].data, [Booked(job.data) for job in jobs])

runtime = notifyq.Runtime([exits, raises, groups])
"""


@pytest.mark.parametrize("flags", [(), ("-v",), ("--processes", "2")])
@pytest.mark.parametrize(
    ("queue", "type_"), [("exits", "SystemExit"), ("raises", "app.Booked"), ("groups", "app.Booked")]
)
async def test_what_ends_a_runtime_is_told_with_what_is_in_its_job_at_debug_only(dsn, tmp_path, queue, type_, flags):
    (tmp_path / "app.py").write_text(ENDING, encoding="utf-8")
    process = run("-m", "notifyq", "run", "app:runtime", *flags, dsn=dsn, cwd=tmp_path)
    try:
        async with notifyq.connect(dsn) as nq:
            await nq.create_queue(Queue(queue, str, retry_limit=0))
            sent = await nq.send(Queue(queue, str), DATA)
            with trio.fail_after(30), pytest.raises(notifyq.JobFailed, match=DATA):
                await nq.result(sent)
        said = await output(process)
    finally:
        process.kill()
    assert process.returncode == 1
    assert f"\n{type_}" in said if "-v" not in flags else f"{type_}: " in said
    assert (DATA in said) == ("-v" in flags)


async def test_a_refused_settle_says_no_row(dsn, caplog):
    """One that is refused for a reason that may pass: without the server's details, which hold the row."""
    caplog.set_level(logging.INFO)
    queue = Queue("q", str, str)

    @queue.worker
    async def work(job: Job[str]) -> str:
        return job.data

    runtime = notifyq.Runtime([queue], dsn=dsn)
    troubles: list[events.ServerTrouble] = []
    refused = trio.Event()

    def note(event: events.Event) -> None:
        assert isinstance(event, events.ServerTrouble)
        troubles.append(event)
        refused.set()

    runtime.subscribe(note, events.ServerTrouble)
    async with trio.open_nursery() as nursery, notifyq.connect(dsn) as nq:
        await nursery.start(runtime.run)
        with trio.fail_after(30), psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(
                "create function refuse() returns trigger language plpgsql as $$ begin"
                " raise exception 'not now' using errcode = 'P0001', detail = new.output::text; end $$;"
                "create trigger refuse before insert on notifyq.archive for each row execute function refuse()"
            )
            sent = await nq.send(queue, DATA)
            await refused.wait()
            connection.execute("drop trigger refuse on notifyq.archive")
            assert await nq.result(sent) == DATA
        runtime.stop()
    assert [trouble.reason for trouble in troubles] == ["not now"]
    assert DATA not in caplog.text


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs a /proc")
def test_no_process_of_the_bench_has_the_password_on_its_command_line(dsn_of_bench):
    with Role("idle", dsn_of_bench, 1) as role:
        [process] = [value for value in vars(role).values() if isinstance(value, subprocess.Popen)]
        assert WORD not in Path(f"/proc/{process.pid}/cmdline").read_text(encoding="utf-8")


@pytest.fixture
def dsn_of_bench(guarded: str) -> Iterator[str]:
    from notifyq.bench._databases import own_database

    with own_database(guarded) as dsn:
        yield dsn


async def test_the_bench_writes_no_password(guarded, tmp_path):
    process = run(
        *("-m", "notifyq.bench", "enqueue", "latency", "--jobs", "100", "--repeat", "1", "--warm-up", "0"),
        *("--json", "figures.json", "--dsn", guarded),
        dsn="",
        cwd=tmp_path,
    )
    said = await output(process)
    figures = (tmp_path / "figures.json").read_text(encoding="utf-8")
    assert "enqueue" in json.loads(figures)["workloads"], said
    for text in (said, figures):
        assert WORD not in text
        assert "keeper" not in text

"""The installed structure is the reviewed one, however it was installed, and re-applying disturbs nobody."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from notifyq import Job, Queue, SchemaMismatch, _schema, events
from notifyq._opening import open_connection
from tests.faults.chaos.servers import binaries

if TYPE_CHECKING:
    from collections.abc import Callable

    from notifyq._connection import TrioConnection

EXPECTED = Path(__file__).with_name("schema.expected.txt")

STRUCTURE = """
select string_agg(line, e'\\n' order by line collate "C") from (
    select format('table %s.%s %s%s%s', c.relname, a.attname, format_type(a.atttypid, a.atttypmod),
        case when a.attnotnull then ' not null' else '' end,
        coalesce(' default ' || pg_get_expr(d.adbin, d.adrelid), '')) as line
    from pg_class c
    join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
    where c.relnamespace = 'notifyq'::regnamespace and c.relkind in ('r', 'p') and c.relname !~ '_[0-9]{8}$'
    union all
    select format('constraint on %s: %s', conrelid::regclass, pg_get_constraintdef(oid))
    from pg_constraint
    where connamespace = 'notifyq'::regnamespace and contype <> 'n' and conrelid::regclass::text !~ '_[0-9]{8}$'
    union all
    select indexdef from pg_indexes where schemaname = 'notifyq' and tablename !~ '_[0-9]{8}$'
    union all
    select pg_get_triggerdef(t.oid) from pg_trigger t
    join pg_class c on c.oid = t.tgrelid
    where c.relnamespace = 'notifyq'::regnamespace and not t.tgisinternal
    union all
    select format('view %s.%s %s', c.relname, a.attname, format_type(a.atttypid, a.atttypmod))
    from pg_class c
    join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
    where c.relnamespace = 'notifyq'::regnamespace and c.relkind = 'v'
    union all
    select format('function %s(%s) returns %s%s%s', proname, pg_get_function_arguments(oid), pg_get_function_result(oid),
        case when prosecdef then ' security definer' else '' end,
        case when has_function_privilege('public', oid, 'execute') then ' public' else '' end)
    from pg_proc where pronamespace = 'notifyq'::regnamespace
) s
"""


async def structure(connection: TrioConnection) -> str:
    [(text,)] = await (await connection.execute(STRUCTURE.encode())).fetchall()
    return text + "\n"


async def test_a_fresh_installation_is_the_reviewed_structure(connection):
    found = await structure(connection)
    if os.environ.get("NOTIFYQ_WRITE_EXPECTED"):
        EXPECTED.write_text(found, encoding="utf-8")
    assert found == EXPECTED.read_text(encoding="utf-8")


async def test_the_files_run_by_hand_make_the_same(empty_dsn):
    connection = await open_connection(empty_dsn)
    await connection.execute("create schema notifyq")
    for file in _schema.load("notifyq"):
        await connection.execute(file.text.encode())
    assert await structure(connection) == EXPECTED.read_text(encoding="utf-8")
    for use in (_schema.apply, _schema.check):  # nothing says which version's they were
        with pytest.raises(SchemaMismatch, match=r"made by hand from the files.*run what `notifyq migrate --plan`"):
            await use(connection, "notifyq")
    await connection.close()


async def test_an_upgrade_under_load_loses_no_job_and_fails_nobody(start, nq, connection):
    queue = Queue("q", int, int)

    @queue.worker(concurrency=5)
    async def work(job: Job[int]) -> int:
        return job.data

    seen = await start(queue)
    sent = []

    async def send() -> None:
        while len(sent) < 300:
            sent.append(await nq.send(queue, len(sent), delay=0.01 if len(sent) % 3 == 0 else 0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        for _ in range(5):
            # what a release with changed functions finds
            await connection.execute("update notifyq.installed set hash = 'old' where file like 'functions/%'")
            with trio.fail_after(20):
                assert "functions/10_send.sql" in await _schema.apply(connection, "notifyq")
    await seen.wait(events.JobCompleted, 300, seconds=20)
    assert seen.of(events.ServerTrouble) == []


# a release that changes the structure

CHANGE = """
alter table notifyq.archive add constraint change_{0} check (true) not valid;
alter table notifyq.active add constraint change_{0} check (true) not valid;
alter table notifyq.ready add constraint change_{0} check (true) not valid;
create index change_{0} on notifyq.job (sent_at);
alter table notifyq.job add constraint change_{0} check (true) not valid;
alter table notifyq.queue add constraint change_{0} check (true) not valid;
"""
"""Takes the tables in the order that is the opposite of a job's way through them."""


@pytest.fixture
def release(monkeypatch) -> Callable[[], str]:
    files = _schema.load("notifyq")

    def release() -> str:
        """From now on there is another migration. Gives its name."""
        number = sum(file.is_migration for file in files) + 1
        name = f"migrations/{number:04}_change.sql"
        files.insert(number - 1, _schema.SqlFile(name, CHANGE.format(number), f"hash of {number}"))
        monkeypatch.setattr(_schema, "load", lambda _: list(files))
        return name

    return release


async def test_a_change_of_structure_under_load_loses_no_job_and_fails_nobody(start, nq, connection, release):
    plain, ordered = Queue("plain", int, int), Queue("ordered", int, int, policy="ordered")

    @plain.worker(concurrency=5)
    @ordered.worker(concurrency=5)
    async def work(job: Job[int]) -> int:
        return job.data

    seen = [await start(plain, ordered), await start(plain, ordered)]
    sent = []
    upgraded = trio.Event()

    async def send() -> None:
        while not upgraded.is_set():
            sent.append(await nq.send(plain, 1, delay=0.01 if len(sent) % 3 == 0 else 0))
            sent.append(await nq.send(ordered, 1, key=str(len(sent) % 5)))
            sent.extend(await nq.send_many(plain, range(5)))
            await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(send)
        for _ in range(6):
            name = release()
            with trio.fail_after(20):
                assert name in await _schema.apply(connection, "notifyq")
            await seen[0].wait(events.JobCompleted, len(seen[0].of(events.JobCompleted)) + 20)  # work goes on
        upgraded.set()
    with trio.fail_after(20):
        for job in sent:
            await nq.result(job)
    assert [event for each in seen for event in each.of(events.ServerTrouble)] == []


async def test_a_change_of_structure_waits_for_an_open_transaction_and_holds_nobody_up(nq, connection, other, release):
    queue = Queue("q", int, int)
    await nq.create_queue(queue)
    name = release()
    ran = []

    async def upgrade() -> None:
        ran.extend(await _schema.apply(connection, "notifyq"))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery, other.transaction():
            await other.execute("select notifyq.send('q')")
            nursery.start_soon(upgrade)
            waits = "select 1 from pg_stat_activity where pid = %s and wait_event = 'relation'"
            async with nq.connection() as watcher:
                while await (await watcher.execute(waits, (connection.info.backend_pid,))).fetchone() is None:
                    await trio.sleep(0.005)
            with trio.fail_after(5):
                await nq.send(queue, 1)
            assert ran == []
    assert name in ran
    assert len(await nq.jobs(queue=queue)) == 2


async def dump(dsn: str) -> list[str]:
    process = await trio.run_process([binaries() / "pg_dump", "--schema-only", "-d", dsn], capture_stdout=True)
    # but for the key, which is another one each time
    return [
        line for line in process.stdout.decode().splitlines() if not line.startswith(("\\restrict", "\\unrestrict"))
    ]


@pytest.mark.parametrize("how", ["by the library", "by hand"])
async def test_an_upgraded_installation_is_a_fresh_one(dsn, empty_dsn, connection, release, how):
    name = release()
    if how == "by hand":
        await connection.execute((await _schema.printed_plan(connection, "notifyq", {})).encode())
    else:
        await _schema.apply(connection, "notifyq")
    fresh = await open_connection(empty_dsn)
    assert name in await _schema.apply(fresh, "notifyq")
    await fresh.close()
    upgraded = await dump(dsn)
    assert "change_2" in "".join(upgraded)
    assert upgraded == await dump(empty_dsn)

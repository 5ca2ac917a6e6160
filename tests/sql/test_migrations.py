"""The installed structure is the reviewed one, however it was installed, and re-applying disturbs nobody."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from notifyq import Job, Queue, _schema, events
from notifyq._opening import open_connection

if TYPE_CHECKING:
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

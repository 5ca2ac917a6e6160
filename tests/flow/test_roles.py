"""An installation whose owner is no superuser, with a role each for those who send, work and operate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import attrs
import psycopg
import pytest
import trio

import notifyq
from notifyq import Job, Queue, _schema, events
from notifyq._opening import open_connection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

APP = """
import attrs
import notifyq


@attrs.frozen
class Order:
    number: int


@attrs.frozen
class Receipt:
    number: int
    tries: int


orders = notifyq.Queue("orders", Order, Receipt, retry_limit=1, retry_delay=0, dead_letter=notifyq.Queue("dead"))
ticks = notifyq.Queue("ticks", schedules=[notifyq.Schedule(every=0.1)])


@orders.worker
async def fulfil(job):
    if job.attempt == 1 or job.data.number < 0:
        raise ValueError("not yet")
    return Receipt(job.data.number, job.attempt)


@ticks.worker
async def tick(job):
    return job.fired_for.isoformat()


runtime = notifyq.Runtime([orders, ticks])
"""


@attrs.frozen
class Place:
    """A database in which nobody may anything that was not granted, and the names of its roles."""

    admin: str
    """The superuser's DSN."""
    ending: str

    def role(self, kind: str) -> str:
        return f"{kind}_{self.ending}"

    def dsn(self, kind: str) -> str:
        """Of who logs in as a member of this kind of role, or of the owner."""
        return psycopg.conninfo.make_conninfo(self.admin, user=f"login_{kind}_{self.ending}")


KINDS = ("owner", *_schema.KINDS)


@pytest.fixture
async def place(empty_dsn: str) -> AsyncIterator[Place]:
    """Without the schema's tables: its owner has made nothing yet, and may create neither schemas nor roles."""
    place = Place(empty_dsn, psycopg.conninfo.conninfo_to_dict(empty_dsn)["dbname"][-12:])
    connection = await open_connection(empty_dsn)
    roles = [place.role(kind) for kind in KINDS] + [f"login_{kind}_{place.ending}" for kind in KINDS]
    for kind in KINDS:
        role = place.role(kind)
        await connection.execute(f"create role {role}; create role login_{role} login in role {role}".encode())
    await connection.execute(
        f"revoke all on database notifyq_test_{place.ending} from public;"
        f"grant connect on database notifyq_test_{place.ending} to {', '.join(roles)};"
        "revoke all on schema public from public;"
        f"create schema notifyq authorization {place.role('owner')}".encode()
    )
    try:
        yield place
    finally:
        for role in reversed(roles):
            await connection.execute(f"drop owned by {role} cascade; drop role {role}".encode())
        await connection.close()


async def command(place: Place, kind: str, *arguments: str, cwd: Path) -> tuple[int, str, str]:
    """Run the command line as a kind of role."""
    done = await trio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-m", "notifyq", *arguments],
            cwd=cwd,
            env={**os.environ, "DATABASE_URL": place.dsn(kind), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def start_worker(place: Place, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "notifyq", "run", "app:runtime"],
        cwd=cwd,
        env={**os.environ, "DATABASE_URL": place.dsn("worker")},
        stderr=subprocess.PIPE,
        text=True,
    )


async def install(place: Place) -> None:
    connection = await open_connection(place.dsn("owner"))
    await _schema.apply(connection, "notifyq")
    await _schema.grant_roles(connection, "notifyq", {kind: place.role(kind) for kind in _schema.KINDS})
    await connection.close()


async def test_each_role_does_its_part_and_no_more(place, tmp_path):
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    named = [word for kind in _schema.KINDS for word in (f"--{kind}-role", place.role(kind))]
    code, out, err = await command(place, "owner", "migrate", *named, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].endswith("files applied")
    assert out.splitlines()[1:] == [f"{kind}: {place.role(kind)}" for kind in _schema.KINDS]
    assert await command(place, "owner", "migrate", cwd=tmp_path) == (0, "nothing to do", "")

    code, out, err = await command(place, "operator", "queues", "declare", "app:runtime", "--json", cwd=tmp_path)
    assert {row["queue"]: row["done"] for row in json.loads(out)} == {
        "dead": "created",
        "orders": "created",
        "ticks": "created",
    }

    # As it stands in the file, with migrate=True: there is nothing to do, and no right to do it.
    worker = start_worker(place, tmp_path)
    try:
        with trio.fail_after(30):
            async with (
                notifyq.connect(place.dsn("producer")) as producer,
                notifyq.connect(place.dsn("operator")) as operator,
            ):
                good = await producer.send(Queue("orders"), {"number": 7})
                with psycopg.connect(place.dsn("producer"), autocommit=True) as plain:
                    [(bad,)] = plain.execute("select notifyq.send('orders', '{\"number\": -1}')").fetchall()
                assert await operator.result(good.id) == {"number": 7, "tries": 2}
                with pytest.raises(notifyq.JobFailed, match="not yet"):
                    await operator.result(bad)
                while not await operator.jobs(queue="ticks", state="completed"):
                    await trio.sleep(0.02)
                for call in (
                    producer.jobs(),
                    producer.get(good),
                    producer.cancel(good),
                    producer.create_queue(Queue("mine")),
                ):
                    with pytest.raises(notifyq.MissingPrivilege, match="permission denied"):
                        await call
    finally:
        worker.send_signal(signal.SIGTERM)
        log = worker.communicate(timeout=30)[1]
    assert worker.returncode == 0, log
    assert log.count("which this role may not change: permission denied for function create_queue") == 1
    assert "permission denied" not in log.replace("permission denied for function create_queue", "")

    async def operate(*arguments: str) -> str:
        code, out, err = await command(place, "operator", *arguments, cwd=tmp_path)
        assert (code, err) == (0, ""), arguments
        return out

    await operate("schedules", "remove", "ticks")
    assert json.loads(await operate("show", str(bad), "--json"))["state"] == "failed"
    assert await operate("retry", str(bad)) == f"retrying: {bad}"
    assert await operate("cancel", str(bad)) == f"cancelled: {bad}"
    assert await operate("resume", str(bad)) == f"resumed: {bad}"
    assert await operate("edit", str(bad), "--priority", "4") == "edited"
    assert await operate("delete", str(bad)) == f"deleted: {bad}"
    [dead] = json.loads(await operate("redrive", "dead", "--json"))
    assert dead["queue"] == "orders"
    await operate("queues", "pause", "orders")
    await operate("queues", "resume", "orders")
    await operate("queues", "set", "orders", "retry_limit=3")
    await operate("schedules", "add", "ticks", "--every", "60")
    await operate("subscribe", "paid", "ticks")
    await operate("publish", "paid", "1")
    await operate("unsubscribe", "paid", "ticks")
    await operate("send", "ticks", "1")
    for look in ("queues", "jobs", "runtimes", "schedules", "subscriptions"):
        await operate(look)
    await operate("queues", "keys")
    code, _, err = await command(place, "operator", "uninstall", "--yes", cwd=tmp_path)
    assert (code, err) == (1, "notifyq: must be owner of schema notifyq")


async def test_roles_that_are_not_there_are_created_by_who_may_or_named(place, tmp_path):
    connection = await open_connection(place.admin)
    created = [f"new_{kind}_{place.ending}" for kind in _schema.KINDS]
    named = [word for kind, role in zip(_schema.KINDS, created, strict=True) for word in (f"--{kind}-role", role)]
    code, _, err = await command(place, "owner", "migrate", *named, cwd=tmp_path)
    assert code == 1
    assert f"there is no role {created[0]}, and {place.role('owner')} may not create roles" in err
    assert f"create role {created[0]} nologin;" in err
    await connection.execute(f"alter role login_owner_{place.ending} createrole".encode())
    assert (await command(place, "owner", "migrate", *named, cwd=tmp_path))[0] == 0
    try:
        cursor = await connection.execute("select role, kind from notifyq.granted order by kind")
        granted = [(f"new_{kind}_{place.ending}", kind) for kind in sorted(_schema.KINDS)]
        assert await cursor.fetchall() == granted
        cursor = await connection.execute("select rolcanlogin from pg_roles where rolname = any (%s)", (created,))
        assert await cursor.fetchall() == [(False,)] * 3
        assert await (await connection.execute("select * from notifyq.missing_rights()")).fetchall() == []
    finally:
        for role in created:
            await connection.execute(f"drop owned by {role}; drop role {role}".encode())
        await connection.close()


async def test_the_plan_for_a_dba_makes_the_roles_too(place, tmp_path):
    code, plan, _ = await command(
        place, "owner", "migrate", "--plan", "--worker-role", place.role("worker"), cwd=tmp_path
    )
    assert code == 0
    connection = await open_connection(place.dsn("owner"))
    await connection.execute(plan.encode())
    assert await _schema.apply(connection, "notifyq") == []
    cursor = await connection.execute("select role, kind from notifyq.granted")
    assert await cursor.fetchall() == [(place.role("worker"), "worker")]
    await connection.close()
    code, plan, _ = await command(place, "owner", "migrate", "--plan", "--roles", cwd=tmp_path)
    assert [line for line in plan.splitlines() if line.startswith("select")] == [
        f"select \"notifyq\".\"grant_role\"('{kind}', 'notifyq_{kind}');" for kind in _schema.KINDS
    ]
    assert await command(place, "owner", "migrate", "--plan", cwd=tmp_path) == (0, "-- nothing to do", "")


async def test_a_worker_with_migrate_false_needs_its_queues_made(place, caplog):
    await install(place)
    queue = Queue("typed", int, list[int], retry_limit=1, retry_delay=0)

    @queue.worker
    async def work(job: Job[int]) -> list[int]:
        await job.progress({"at": 1})
        if job.attempt == 1:
            raise notifyq.Snooze(0.01) if job.data == 0 else ValueError
        return [job.data, job.attempt]

    runtime = notifyq.Runtime([queue], dsn=place.dsn("worker"), migrate=False)
    with pytest.raises(notifyq.UnknownQueue, match="there is no queue named 'typed'"):
        await runtime.run()
    async with notifyq.connect(place.dsn("operator"), migrate=False) as operator:
        assert await operator.declare([queue]) == {"typed": "created"}
        assert await operator.declare([queue]) == {"typed": "exists"}
        seen: list[events.Event] = []
        runtime.subscribe(seen.append, events.ServerTrouble, events.ListenerDown)
        async with trio.open_nursery() as nursery:
            client = await nursery.start(runtime.run)
            with trio.fail_after(20):
                sent = await client.send(queue, 5)  # a worker's handlers may send
                assert await operator.result(sent) == [5, 2]
                with pytest.raises(notifyq.MissingPrivilege):
                    await client.get(sent)
            runtime.stop()
    assert seen == []
    assert not [message for message in caplog.messages if "permission" in message or "may not" in message]


async def test_who_may_not_upgrade_is_told_who_may(place):
    await install(place)
    owner = await open_connection(place.dsn("owner"))
    await owner.execute("update notifyq.installed set hash = 'old' where file like 'functions/%'")
    with pytest.raises(notifyq.MissingPrivilege, match=r"upgraded, and this role may not: .* Run `notifyq migrate`"):
        async with notifyq.connect(place.dsn("worker")):
            pass
    async with notifyq.connect(place.dsn("owner")):
        pass
    await owner.close()
    async with notifyq.connect(place.dsn("worker")):
        pass


async def test_what_a_superuser_upgrades_stays_its_owners(place):
    await install(place)
    admin = await open_connection(place.admin)
    await admin.execute("update notifyq.installed set hash = 'old' where file like 'functions/%'")
    await admin.execute("drop function notifyq.claim")
    await admin.execute("delete from notifyq.granted")
    await _schema.apply(admin, "notifyq")
    role = f"fresh_{place.ending}"
    await _schema.grant_roles(admin, "notifyq", {"worker": role})
    try:
        cursor = await admin.execute(
            "select distinct pg_get_userbyid(proowner) from pg_proc where pronamespace = 'notifyq'::regnamespace"
        )
        assert await cursor.fetchall() == [(place.role("owner"),)]
        assert await (await admin.execute("select role from notifyq.granted")).fetchall() == [(role,)]
    finally:
        await admin.execute(f"drop owned by {role}; drop role {role}".encode())
        await admin.close()

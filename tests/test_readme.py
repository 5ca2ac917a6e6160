"""The README's code runs."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import trio

import notifyq

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


async def test_the_python_examples_run(dsn, monkeypatch, capsys):
    monkeypatch.setenv("DATABASE_URL", dsn)
    declare, statement, flow, schedules = blocks("python")
    names: dict[str, object] = {"__name__": "app"}
    exec(declare, names)
    runtime = names["runtime"]
    assert isinstance(runtime, notifyq.Runtime)
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        with trio.fail_after(10):
            await names["main"]()  # type: ignore[operator]
        runtime.stop()
    assert "Echo(result='echo: tea')" in capsys.readouterr().out
    with psycopg.connect(dsn) as connection:
        exec(statement, {**names, "connection": connection})
        assert connection.execute("select count(*) from notifyq.scheduled").fetchone() == (1,)

    exec(flow, names)
    async with notifyq.connect(dsn) as nq:
        await names["import_all"](nq, ["one", "two"])  # type: ignore[operator]
        states = {job.queue: job.state for job in await nq.jobs() if job.queue in ("load", "report")}
        assert states == {"load": "ready", "report": "blocked"}
    exec(schedules, names)
    assert capsys.readouterr().out.count("datetime.datetime(") == 3


async def test_the_sql_example_runs(dsn, connection):
    await connection.execute("select notifyq.create_queue('reminders')")
    send, claim, complete, look = [line for line in blocks("sql")[0].split(";") if line.strip()]
    await connection.execute(send.replace(", delay => '1 minute'", "").encode())
    assert len(await (await connection.execute(claim.encode())).fetchall()) == 1
    assert await (await connection.execute(complete.split("--")[-1].split("\n", 1)[-1].encode())).fetchall() == [
        (True,)
    ]
    [(_, queue, state, *_)] = await (await connection.execute(look.encode())).fetchall()
    assert (queue, state) == ("reminders", "completed")


async def test_a_consumer_by_the_sql_page_works(ask, connection, other):
    page = (Path(__file__).parent.parent / "sql" / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
    statements = [line.split(";")[0] for line in block.splitlines()]
    await ask("select notifyq.create_queue('reminders', '{\"retry_delay\": 0}')")
    [(number, channel)] = await ask(statements.pop(0))
    assert number == 1
    heard: list[str] = []
    connection.on_notification(lambda channel, _: heard.append(channel))
    await connection.execute(psycopg.sql.SQL("listen {}").format(psycopg.sql.Identifier(channel)))
    [(_, stands, passed, *_)] = await ask(statements.pop(0))
    assert (stands, passed) == (True, True)
    await other.execute("select notifyq.send('reminders', '{}') from generate_series(1, 3)")
    with trio.fail_after(5):
        while not heard:
            await connection.wait_input()
    assert heard == [channel]
    found = [await ask(statement) for statement in statements]
    assert found == [[(1, 1, {}), (2, 1, {}), (3, 1, {})], [(True,)], [("ready",)], [(True,)], [([3],)]]


def test_every_make_target_it_names_exists():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)  ", README):
        assert f"\n{target}:" in makefile

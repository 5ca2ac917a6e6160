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


def test_every_make_target_it_names_exists():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)  ", README):
        assert f"\n{target}:" in makefile

"""The command line, as processes: what it prints and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import trio

from notifyq import Flow, Queue
from notifyq.testing import embedded_server

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def notifyq(dsn, tmp_path):
    """Run a command; returns its exit code, its output and its errors."""

    async def run(
        *arguments: str, cwd: Path = tmp_path, url: str = dsn, stdin: str | None = None
    ) -> tuple[int, str, str]:
        done = await trio.to_thread.run_sync(
            lambda: subprocess.run(
                [sys.executable, "-m", "notifyq", *arguments],
                cwd=cwd,
                env={**os.environ, "DATABASE_URL": url, "COLUMNS": "200"},
                input=stdin,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        )
        return done.returncode, done.stdout.strip(), done.stderr.strip()

    return run


async def test_a_job_from_send_to_delete(notifyq, nq):
    await nq.create_queue(Queue("q", retry_limit=0, dead_letter=Queue("dead")))
    code, out, _ = await notifyq("send", "q", '{"n": 1}', "--json", "--priority", "3", "--id-key", "k")
    sent = json.loads(out)
    assert (code, sent["created"]) == (0, True)
    assert json.loads((await notifyq("send", "q", "-", "--json", "--id-key", "k", stdin="1"))[1]) == {
        "id": sent["id"],
        "created": False,
    }
    job = str(sent["id"])
    record = json.loads((await notifyq("show", job, "--json"))[1])
    assert (record["state"], record["data"], record["priority"]) == ("ready", {"n": 1}, 3)
    assert "ready" in (await notifyq("show", job))[1]
    assert (await notifyq("cancel", job))[:2] == (0, f"cancelled: {job}")
    assert (await notifyq("cancel", job, "999999"))[:2] == (
        1,
        f"cancelled: none; not: {job} (cancelled), 999999 (no such job)",
    )
    assert (await notifyq("resume", job))[0] == 0
    [fetched] = await nq.fetch(Queue("q"))
    assert await nq.fail(fetched, "broken")
    [row] = json.loads((await notifyq("jobs", "--state", "failed", "--json"))[1])
    assert row["error"]["message"] == "broken"
    assert "broken" in (await notifyq("jobs", "--queue", "q"))[1]
    [redriven] = json.loads((await notifyq("redrive", "dead", "--dry-run", "--json"))[1])
    assert redriven["new_id"] is None
    assert "redriven" not in (await notifyq("redrive", "dead", "--dry-run"))[1]
    [redriven] = json.loads((await notifyq("redrive", "dead", "--json"))[1])
    assert redriven["queue"] == "q"
    assert (await notifyq("redrive", "dead"))[:2] == (0, "no dead letters")
    assert (await notifyq("retry", job))[:2] == (0, f"retrying: {job}")
    stats = {row["queue"]: row for row in json.loads((await notifyq("queues", "--json"))[1])}
    assert stats["q"]["ready"] == 2
    assert "dead" in (await notifyq("queues"))[1]
    assert (await notifyq("delete", job))[0] == 0
    assert (await notifyq("runtimes"))[:2] == (0, "no runtimes")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("send", "nowhere", "1"), 1, "there is no queue named 'nowhere'"),
        (("send", "bad name", "1"), 1, "queue name 'bad name'"),
        (("send", "q", "{bad"), 1, "'{bad' is not JSON"),
        (("send", "q", "-"), 1, "'' from stdin is not JSON"),
        (("show", "999999"), 1, "no job 999999"),
        (("run", "nonsense"), 2, "is not MODULE:RUNTIME"),
        (("run", "no_such_module:runtime"), 1, "there is no module 'no_such_module'"),
        (("run", "json:runtime"), 1, "module 'json' has no Runtime named 'runtime'"),
        (("--schema", "No", "queues"), 1, "lower-case letters"),
        (("--schema", "elsewhere", "queues"), 1, "schema 'elsewhere' is not installed: run `notifyq migrate`"),
        (("queues", "--schema", "elsewhere"), 1, "schema 'elsewhere' is not installed: run `notifyq migrate`"),
        (("queues", "pause", "--schema", "elsewhere", "q"), 1, "schema 'elsewhere' is not installed"),
        (("queues", "pause", "--schema", "No", "q"), 1, "lower-case letters"),
        (("runtimes", "--dsn", "not a dsn"), 1, "the DSN is not one"),
        (("--dsn", "not a dsn", "queues"), 1, "the DSN is not one"),
        (("--dsn", "host=/nowhere connect_timeout=1", "migrate"), 1, "connection"),
        (("jobs", "--state", "sleeping"), 2, "sleeping"),
        (("jobs", "--queue", "nowhere"), 1, "there is no queue named 'nowhere'"),
    ],
)
async def test_a_mistake_is_one_readable_line_and_an_exit_code(notifyq, arguments, code, message):
    ended, _, err = await notifyq(*arguments, stdin="")
    assert (ended, message in err) == (code, True), err
    assert "Traceback" not in err
    if code == 1:
        assert len(err.splitlines()) == 1


async def test_what_cannot_be_written_read_or_changed_is_said_in_a_line(notifyq, nq, connection, tmp_path):
    await nq.create_queue(Queue("q"))
    (tmp_path / "file").touch()
    assert (await notifyq("new", "file/app"))[2] == "notifyq: file/app cannot be written to: Not a directory"
    assert "is not JSON" in (await notifyq("send", "q", "-", stdin="[" * 100_000))[2]
    assert "give --json after add" in (await notifyq("schedules", "--json", "add", "q", "--every", "60"))[2]
    sent = await nq.send(Queue("q"), {"a": 1})
    assert (await notifyq("edit", str(sent.id), "--data", "null"))[:2] == (0, "edited")
    assert (await nq.get(sent)).data is None
    await connection.execute("select notifyq.send('q', '1e5000')")
    code, _, err = await notifyq("jobs")
    assert (code, len(err.splitlines()), "data cannot be read" in err) == (1, 1, True), err


async def test_an_option_after_the_command_counts_more_than_the_one_before_it_and_than_the_environment(notifyq, dsn):
    assert (await notifyq("--dsn", "not a dsn", "queues", "--dsn", dsn, url="nor this"))[0] == 0
    assert (await notifyq("--schema", "elsewhere", "queues", "--schema", "notifyq"))[0] == 0
    assert (
        "no queue named 'q'"
        in (await notifyq("queues", "--schema", "elsewhere", "pause", "q", "--schema", "notifyq"))[2]
    )


@pytest.mark.parametrize(
    ("text", "last", "lines"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'", 4),
        ("def find(): raise KeyError('salt')\nfind()", "KeyError: 'salt'", 6),
        ("runtime = (1", "SyntaxError: '(' was never closed", 3),
    ],
)
async def test_what_is_wrong_in_a_module_is_said_from_its_own_lines_on(notifyq, tmp_path, text, last, lines):
    (tmp_path / "broken.py").write_text(text)
    code, out, err = await notifyq("run", "broken:runtime")
    assert (code, out) == (1, "")
    said = [line for line in err.splitlines() if set(line.strip()) - {"^", "~"}]  # those differ between versions
    assert (said[-1], len(said)) == (last, lines), err
    assert "click" not in err


async def test_run_ends_with_one_line_when_the_server_cannot_be_reached(notifyq, tmp_path):
    (tmp_path / "app.py").write_text(
        "import notifyq\n"
        "q = notifyq.Queue('q')\n"
        "@q.worker\n"
        "async def work(job): pass\n"
        "runtime = notifyq.Runtime([q], connect_timeout=1)\n"
    )
    code, _, err = await notifyq("run", "app:runtime", url="host=/nowhere dbname=x")
    assert code == 1
    assert "cannot reach the server within 1 s" in err
    assert "Traceback" not in err


async def test_migrate_plan_and_uninstall(notifyq, empty_dsn):
    assert "run `notifyq migrate`" in (await notifyq("queues", url=empty_dsn))[2]
    plan = (await notifyq("migrate", "--plan", url=empty_dsn))[1]
    assert plan.startswith("begin;")
    assert "create schema" in plan
    assert (await notifyq("migrate", url=empty_dsn))[0] == 0
    assert (await notifyq("migrate", url=empty_dsn))[1] == "nothing to do"
    assert (await notifyq("migrate", "--plan", url=empty_dsn))[1] == "-- nothing to do"
    assert (await notifyq("--schema", "jobs2", "migrate", url=empty_dsn))[0] == 0
    assert (await notifyq("uninstall", url=empty_dsn, stdin="n\n"))[0] == 1
    assert (await notifyq("queues", url=empty_dsn))[0] == 0
    assert (await notifyq("uninstall", "--yes", url=empty_dsn))[0] == 0
    assert "was not installed by notifyq" in (await notifyq("uninstall", "--yes", url=empty_dsn))[2]
    assert (await notifyq("--schema", "jobs2", "queues", url=empty_dsn))[0] == 0


async def test_the_example_project_passes_its_own_test(notifyq, server, tmp_path):
    project = tmp_path / "project"
    assert (await notifyq("new", str(project)))[0] == 0
    assert "not an empty folder" in (await notifyq("new", str(project)))[2]
    done = await trio.to_thread.run_sync(
        lambda: subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "-c",
                os.devnull,
                "--rootdir",
                str(project),
                str(project),
            ],
            cwd=project,
            env={**os.environ, "DATABASE_URL": server, "PYTHONPATH": str(project)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    )
    assert done.returncode == 0, done.stdout + done.stderr


async def test_the_examples_trigger_sends_a_job(notifyq, nq, connection, tmp_path):
    project = tmp_path / "project"
    await notifyq("new", str(project))
    await nq.create_queue(Queue("orders"))
    await connection.execute((project / "orders.sql").read_bytes())
    await connection.execute("insert into orders (item) values ('tea')")
    [record] = await nq.jobs(queue="orders")
    assert record.data == {"id": 1, "item": "tea"}


def test_the_embedded_server_leaves_nothing_behind():
    import psycopg

    with embedded_server() as dsn, psycopg.connect(dsn) as connection:
        [pid] = connection.execute("select pg_backend_pid()").fetchone()
    assert not os.path.exists(f"/proc/{pid}")


async def test_keys_edits_and_flows(notifyq, nq):
    queue = Queue("q", retry_limit=0, policy="singleton")
    await nq.create_queue(queue)
    first = json.loads((await notifyq("send", "q", "1", "--key", "k", "--json"))[1])["id"]
    second = json.loads((await notifyq("send", "q", "2", "--key", "k", "--json"))[1])["id"]
    [active] = await nq.fetch(queue, 1)
    assert active.id == first
    assert await nq.fetch(queue, 1) == []
    keys = json.loads((await notifyq("queues", "keys", "--json"))[1])
    assert keys == [{"queue": "q", "key": "k", "blocked": 1, "held_by": [first]}]
    assert str(first) in (await notifyq("queues", "keys"))[1]
    assert str(second) in (await notifyq("jobs", "--state", "blocked"))[1]
    assert (await notifyq("edit", str(second), "--data", "3", "--priority", "4"))[:2] == (0, "edited")
    assert (await notifyq("edit", str(first), "--data", "3"))[:2] == (1, "it does not wait")
    assert "is not JSON" in (await notifyq("edit", str(second), "--data", "{"))[2]
    code, _, message = await notifyq("edit", str(second))
    assert (code, "give --data, --priority or --delay" in message) == (2, True)
    record = await nq.get(second)
    assert (record.data, record.priority) == (3, 4)
    flow = Flow()
    a, b = flow.add(queue, 1, name="first"), flow.add(queue, 2, name="second")
    end = flow.add(queue, 3, name="end", after=[a, b])
    sent = await nq.send_flow(flow)
    shown = (await notifyq("show", str(sent[b].id)))[1]
    tree = shown[shown.index("flow of 3 jobs") :].splitlines()
    assert [line.strip("│├└─ ").split("  ")[0] for line in tree[1:]] == ["first", "end", "second", "end"]
    assert "(see below)" in tree[2]
    record = json.loads((await notifyq("show", str(sent[end].id), "--json"))[1])
    assert [(job["name"], job["state"], job["after"]) for job in record["flow_jobs"]] == [
        ("first", "ready", []),
        ("second", "ready", []),
        ("end", "blocked", [sent[a].id, sent[b].id]),
    ]
    throttled = await notifyq("send", "q", "1", "--key", "t", "--throttle", "0")
    assert throttled[0] == 1
    assert "throttle must be from 0.001" in throttled[2]

"""What grows with the backlog, and what an idle runtime costs.

``python benchmarks/growth.py --json FILE``: claims of 50 with 10,000 and with 1,000,000 jobs waiting, in turn; sends, claims
and completions by key with so many blocked behind keys that are held; the memory
of a runtime with 1,000,000 waiting; statements and connections of a runtime with ten empty queues in a minute.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psycopg
import trio

from notifyq import Queue, __version__, connect, testing

SMALL, LARGE = 10_000, 1_000_000
CLAIMS, BATCH = 40, 50

RUNTIME = """
import logging, sys, trio
logging.disable(logging.WARNING)
from notifyq import Queue, Runtime
queues = [Queue(name) for name in sys.argv[2:]]
for queue in queues:
    @queue.worker
    async def work(job):
        await trio.sleep_forever()
async def main():
    runtime = Runtime(queues, dsn=sys.argv[1], grace=0)
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        print("ready", flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        runtime.stop()
trio.run(main)
"""

FILL = (
    "select count(*) from generate_series(1, %s) n,"
    " lateral notifyq.send_many('q', (select jsonb_agg('{\"data\": 1}'::jsonb) from generate_series(1, 10000))) s"
)
HELD_KEYS = 100
FILL_HELD = (
    "select count(*) from generate_series(1, %s) n, lateral notifyq.send_many('keyed', (select jsonb_agg("
    f"jsonb_build_object('key', 'held' || mod(k, {HELD_KEYS}))) from generate_series(1, 10000) k)) s"
)
CLAIM_HELD = "select id from notifyq.claim('keyed', 1000, lease => '1 day')"
SEND_KEYED = (
    "select count(*) from notifyq.send_many('keyed', (select jsonb_agg(jsonb_build_object('key', 'k' || mod(k, 25)))"
    " from generate_series(1, 50) k))"
)
RUNTIME_ID = "00000000-0000-0000-0000-000000000001"
CLAIM_KEYED = f"select array_agg(id order by id) from notifyq.claim('keyed', 50, '{RUNTIME_ID}')"
REGISTER = f"select notifyq.register('{RUNTIME_ID}', '{{q}}', '1 day')"
CLAIM = f"select array_agg(id) from notifyq.claim('q', %s, '{RUNTIME_ID}')"
COMPLETE = f"select notifyq.complete(%s::bigint[], null, null, '{RUNTIME_ID}')"
COUNTS = (
    "select (select xact_commit + xact_rollback from pg_stat_database where datname = %s),"
    " (select count(*) from pg_stat_activity where datname = %s)"
)


def claims(small: psycopg.Connection, large: psycopg.Connection) -> dict[str, float]:
    """Milliseconds of a claim at either size, in turn, the jobs completed in between."""
    seconds: dict[str, list[float]] = {"small": [], "large": []}
    for connection in (small, large):
        connection.execute(REGISTER)
    for turn in range(CLAIMS + 5):
        for name, connection in (("small", small), ("large", large)):
            started = time.perf_counter()
            [jobs] = connection.execute(CLAIM, (BATCH,)).fetchone()
            if turn >= 5:
                seconds[name].append(time.perf_counter() - started)
            connection.execute(COMPLETE, (jobs,))
    figures = {name: statistics.median(found) * 1000 for name, found in seconds.items()}
    return {
        "claim_ms_10k": figures["small"],
        "claim_ms_1m": figures["large"],
        "claim_ratio": figures["large"] / figures["small"],
    }


def keyed(small: psycopg.Connection, large: psycopg.Connection) -> dict[str, float]:
    """Milliseconds of a claim and of a completion of jobs of 25 free keys, at either number of blocked jobs, in turn."""
    seconds: dict[str, list[float]] = {f"{what}_{size}": [] for what in ("claim", "complete") for size in ("10k", "1m")}
    for turn in range(CLAIMS + 5):
        for size, connection in (("10k", small), ("1m", large)):
            connection.execute(SEND_KEYED)
            for _ in range(2):  # the second half was blocked by the first
                started = time.perf_counter()
                [jobs] = connection.execute(CLAIM_KEYED).fetchone()
                claimed = time.perf_counter()
                connection.execute(COMPLETE, (jobs,))
                if turn >= 5:
                    seconds[f"claim_{size}"].append(claimed - started)
                    seconds[f"complete_{size}"].append(time.perf_counter() - claimed)
    figures = {f"{name}_ms": statistics.median(found) * 1000 for name, found in seconds.items()}
    return figures | {
        "claim_ratio": figures["claim_1m_ms"] / figures["claim_10k_ms"],
        "complete_ratio": figures["complete_1m_ms"] / figures["complete_10k_ms"],
    }


def start_runtime(stack: ExitStack, dsn: str, queues: list[str]) -> subprocess.Popen:
    """Start a runtime as a process of its own; it ends with the stack."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUNTIME, dsn, *queues], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stack.callback(process.wait)
    stack.callback(process.stdin.close)
    process.stdout.readline()
    return process


def memory(dsn: str) -> float:
    """Most MiB resident of a runtime with the large backlog, its slots full, in ten seconds."""
    with ExitStack() as stack:
        process = start_runtime(stack, dsn, ["q"])
        time.sleep(10)
        [line] = [text for text in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in text]
        return int(line.split()[1]) / 1024


def idle(server: str) -> dict[str, float]:
    """Statements a second, connections and CPU of a runtime with ten empty queues, over a minute.

    Counted as transactions of its database, from another one; the server must not run autovacuum, which has some, too.
    """
    with ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(server, autocommit=True))
        connection.execute("create database idle")
        process = start_runtime(stack, testing.with_database(server, "idle"), [f"q{number}" for number in range(10)])
        time.sleep(
            30
        )  # the first round of maintenance is over, and counted: a server counts with a delay of up to 10 s
        before, cpu = connection.execute(COUNTS, ("idle", "idle")).fetchone()[0], cpu_seconds(process.pid)
        time.sleep(60)
        after, connections = connection.execute(COUNTS, ("idle", "idle")).fetchone()
        return {
            "statements_per_second": (after - before) / 60,
            "connections": connections,
            "cpu_seconds_per_minute": cpu_seconds(process.pid) - cpu,
        }


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def measure(server: str) -> dict[str, object]:
    """All of it."""
    async with (
        testing.fresh_database(server) as small,
        testing.fresh_database(server) as large,
    ):
        for dsn, batches in ((small, SMALL // 10_000), (large, LARGE // 10_000)):
            async with connect(dsn) as nq:
                await nq.create_queue(Queue("q"))
                await nq.create_queue(Queue("keyed", policy="singleton"))
            with psycopg.connect(dsn, autocommit=True) as connection:
                connection.execute(FILL, (batches,))
                connection.execute(FILL_HELD, (batches,))
                while connection.execute(CLAIM_HELD).fetchall():
                    pass
                connection.execute("vacuum analyze")

        def run() -> dict[str, object]:
            with psycopg.connect(small, autocommit=True) as one, psycopg.connect(large, autocommit=True) as other:
                backlog = claims(one, other)
                blocked = keyed(one, other)
            return {"backlog": backlog, "blocked": blocked, "memory": {"resident_mib_1m": memory(large)}}

        return await trio.to_thread.run_sync(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with testing.embedded_server() as server:
        with psycopg.connect(server) as connection:
            version = connection.execute("show server_version").fetchone()[0]
        report = {
            "command": "python benchmarks/growth.py",
            "notifyq": __version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, 2 cores, shared",
            "server_version": version,
            **trio.run(measure, server),
        }
    with testing.embedded_server("autovacuum=off") as server:
        report["idle"] = idle(server)
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

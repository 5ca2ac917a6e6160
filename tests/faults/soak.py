"""Producers, three worker processes, failing jobs, and SIGTERM or kill -9 for a random worker every few seconds.

Ends with every acknowledged send accounted for, and no two jobs of one singleton key having run at once (each writes
down when it began and ended, in the transaction that completes it). ``python tests/faults/soak.py --minutes 10 --seed 1``;
the test suite runs a short form. The ledger of what was sent is this process's own, outside the database.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import trio

import notifyq
from notifyq import Queue, testing

APP = """
import random
import notifyq, trio

soak = notifyq.Queue("soak", int, int, retry_limit=3, retry_delay=0.05, timeout=5, dead_letter="soak/dead")

@soak.worker(concurrency=20)
async def work(job):
    dice = random.random()
    if dice < 0.2:
        raise ValueError("bad luck")
    if dice < 0.25:
        raise notifyq.Snooze(0.05)
    await trio.sleep(random.expovariate(100))
    return job.data

alone = notifyq.Queue("soak/alone", int, retry_limit=20, retry_delay=0.05, timeout=5)

@alone.worker(concurrency=5, transaction=True)
async def write_down(job, connection):
    await connection.execute("insert into span values (%s, %s, clock_timestamp())", [job.id, job.key])
    await trio.sleep(random.expovariate(200))
    if random.random() < 0.1:
        raise ValueError("bad luck")
    await connection.execute("update span set ended_at = clock_timestamp() where job = %s", [job.id])

runtime = notifyq.Runtime([soak, alone], lease=2, grace=1, migrate=False)
"""

SOAK = Queue(
    "soak", int, int, retry_limit=3, retry_delay=0.05, timeout=5, retention=None, dead_letter=Queue("soak/dead", int)
)
ALONE = Queue("soak/alone", int, policy="singleton", retry_limit=20, retry_delay=0.05, timeout=5, retention=None)
WAITING = ("ready", "active", "scheduled", "blocked")


class Workers:
    """The worker processes, and what is done to them."""

    def __init__(self, dsn: str, folder: Path, dice: random.Random) -> None:
        (folder / "soak_app.py").write_text(APP, encoding="utf-8")
        self._folder = folder
        self._environment = {**os.environ, "DATABASE_URL": dsn}
        self._dice = dice
        self._log = (folder / "log").open("wb")
        self.processes = [self._start() for _ in range(3)]
        self.done: Counter[str] = Counter()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "notifyq", "run", "soak_app:runtime"],
            cwd=self._folder,
            env=self._environment,
            stderr=self._log,
        )

    async def harass(self, every: float) -> None:
        while True:
            await trio.sleep(self._dice.uniform(0.5, 1.5) * every)
            index = self._dice.randrange(3)
            process = self.processes[index]
            number = self._dice.choice([signal.SIGTERM, signal.SIGKILL])
            process.send_signal(number)
            status = await trio.to_thread.run_sync(process.wait)
            # SIGTERM ends a process cleanly, or at once if it is still importing
            expected = (0, -signal.SIGTERM) if number == signal.SIGTERM else (-signal.SIGKILL,)
            assert status in expected, f"{status}, having logged: {(self._folder / 'log').read_text()[-3000:]}"
            self.done[signal.Signals(number).name] += 1
            self.processes[index] = self._start()

    def stop(self) -> list[int]:
        for process in self.processes:
            process.terminate()
        codes = [process.wait(30) for process in self.processes]
        self._log.close()
        return codes


async def produce(nq: notifyq.Client, ledger: dict[int, int], dice: random.Random) -> None:
    """Send one by one and in bulk, some with delays; each id that was returned is in the ledger."""
    while True:
        start = len(ledger)
        if dice.random() < 0.5:
            sent = [await nq.send(SOAK, start, delay=dice.choice([0, 0, 0.2]), priority=dice.randrange(3))]
        else:
            sent = await nq.send_many(SOAK, range(start, start + dice.randrange(2, 100)))
        ledger.update((job.id, start + index) for index, job in enumerate(sent))
        await trio.sleep(dice.expovariate(20))


async def produce_keyed(nq: notifyq.Client, ledger: dict[int, int], dice: random.Random) -> None:
    """Send jobs of a few keys, one by one and in bulk."""
    while True:
        jobs = [notifyq.NewJob(0, {"key": f"k{dice.randrange(20)}"}) for _ in range(dice.randrange(1, 10))]
        if len(jobs) == 1:
            ledger[(await nq.send(ALONE, 0, key=jobs[0].options["key"])).id] = 0
        else:
            ledger.update((job.id, 0) for job in await nq.send_many(ALONE, jobs))
        await trio.sleep(dice.expovariate(10))


async def soak(server: str, seconds: float, seed: int, every: float) -> dict[str, object]:
    """Run it, and check the ledger against the database."""
    dice = random.Random(seed)
    ledger: dict[int, int] = {}
    keyed: dict[int, int] = {}
    with tempfile.TemporaryDirectory(prefix="notifyq-soak-") as folder:
        async with testing.fresh_database(server) as dsn, notifyq.connect(dsn) as nq:
            await nq.create_queue(SOAK)
            await nq.create_queue(ALONE)
            async with nq.connection() as connection:
                await connection.execute(
                    "create table span (job bigint primary key, key text, began_at timestamptz, ended_at timestamptz)"
                )
            workers = Workers(dsn, Path(folder), dice)
            try:
                with trio.move_on_after(seconds):
                    async with trio.open_nursery() as nursery:
                        for _ in range(3):
                            nursery.start_soon(produce, nq, ledger, random.Random(dice.random()))
                        nursery.start_soon(produce_keyed, nq, keyed, random.Random(dice.random()))
                        nursery.start_soon(workers.harass, every)
                with trio.fail_after(60):
                    while any(row[state] for row in await stats(nq) for state in WAITING):
                        await trio.sleep(0.1)
            finally:
                with trio.CancelScope(shield=True):
                    codes = await trio.to_thread.run_sync(workers.stop)
            async with nq.connection() as connection:
                cursor = await connection.execute(
                    "select id, state, attempt, data = output from notifyq.jobs where queue = 'soak'"
                )
                found = {job: (state, attempt, same) for job, state, attempt, same in await cursor.fetchall()}
                cursor = await connection.execute("select count(*) from notifyq.jobs where queue = 'soak/dead'")
                [(dead,)] = await cursor.fetchall()
                cursor = await connection.execute("select id, state from notifyq.jobs where queue = 'soak/alone'")
                alone = dict(await cursor.fetchall())
                cursor = await connection.execute("select job from span")
                written = {job for (job,) in await cursor.fetchall()}
                cursor = await connection.execute(
                    "select a.job, b.job from span a join span b on b.key = a.key and b.job <> a.job"
                    " and b.began_at between a.began_at and a.ended_at"
                )
                overlaps = await cursor.fetchall()
                cursor = await connection.execute("select count(*) from notifyq.key")
                [(keys_left,)] = await cursor.fetchall()
    states = Counter(state for state, _, _ in found.values())
    assert set(codes) <= {0, -signal.SIGTERM}, codes  # the signal may come while one is still importing
    assert not (ledger.keys() - found.keys()), "jobs vanished"
    # a send whose answer was cut off by the end may have made a job that is not in the ledger
    assert len(found.keys() - ledger.keys()) <= 300
    assert set(states) <= {"completed", "failed"}, states
    assert all(same for state, _, same in found.values() if state == "completed"), "wrong outputs"
    assert all(attempt == 4 for state, attempt, _ in found.values() if state == "failed")
    assert dead == states["failed"]
    assert not (keyed.keys() - alone.keys()), "keyed jobs vanished"
    assert overlaps == [], "two jobs of one key ran at once"
    assert written == {job for job, state in alone.items() if state == "completed"}, "written and completed differ"
    assert set(alone.values()) <= {"completed", "failed"}
    assert keys_left == 0, "a key is held by nobody"
    return {
        "sent": len(ledger),
        "keyed": len(keyed),
        "states": dict(states),
        "signals": dict(workers.done),
        "seed": seed,
    }


async def stats(nq: notifyq.Client) -> list[dict[str, object]]:
    return [row for row in await nq.queue_stats() if row["queue"] in ("soak", "soak/alone")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with testing.embedded_server() as server:
        print(trio.run(soak, server, arguments.minutes * 60, arguments.seed, 3.0))


if __name__ == "__main__":
    main()

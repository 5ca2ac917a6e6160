"""The short form of ``make chaos``, and proof that it notices what it is there for."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import psycopg
import pytest
import trio

import notifyq
from notifyq import events
from tests.faults.chaos.__main__ import ROOT, pages
from tests.faults.chaos.catalogue import FAULTS
from tests.faults.chaos.cell import Outcome, Scene, run_cell
from tests.faults.chaos.faults import Fault
from tests.faults.chaos.ledger import Incident, Ledger, Pen, Run, Send
from tests.faults.chaos.results import markdown
from tests.faults.chaos.servers import Server, binary_version, make_template
from tests.faults.chaos.verdict import Found, judge, recoveries

if TYPE_CHECKING:
    from collections.abc import Iterator

SEED = 1
SHORT = ("kill", "stop", "terminate-backend", "restart-immediate")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Not pytest's: the server has a user of its own, who has to reach it."""
    folder = Path(mkdtemp(prefix="notifyq-chaos-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def template(folder: Path) -> Path:
    return make_template(folder)


async def run(fault: Fault, folder: Path, template: Path) -> Outcome:
    with trio.fail_after(120):
        return await run_cell(fault, seconds=6, seed=SEED, folder=folder / fault.name, template=template, rate=2000)


@pytest.mark.parametrize("name", SHORT)
async def test_no_job_is_lost(name, folder, template):
    [fault] = [fault for fault in FAULTS if fault.name == name]
    outcome = await run(fault, folder, template)
    assert outcome.verdict.good, f"{outcome.verdict}\n{outcome.log[-3000:]}"
    assert outcome.verdict.sent > 1000
    assert outcome.incidents > 0


@pytest.mark.skipif(binary_version() < 17, reason="the size of the NOTIFY queue can be set from PostgreSQL 17 on")
async def test_a_full_notify_queue_costs_no_job_and_is_got_over(folder, template):
    queue = notifyq.Queue("q", int, int, retry_delay=0.01, retry_backoff=False, bell="always")
    attempted, full = trio.Event(), trio.Event()

    @queue.worker
    async def work(job: notifyq.Job[int]) -> int:
        attempted.set()
        if job.attempt == 1:
            await full.wait()
            raise ValueError("once")
        return job.attempt

    server = Server.copied(template, folder / "full", {"max_notify_queue_pages": "64"})
    try:
        await server.start()
        runtime = notifyq.Runtime([queue], dsn=server.dsn, lease=1.0)
        troubled = trio.Event()
        runtime.subscribe(lambda event: troubled.set(), events.ServerTrouble)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nq = await nursery.start(runtime.run)
                sent = await nq.send(queue, 1)
                await attempted.wait()
                with psycopg.connect(server.dsn) as idle, psycopg.connect(server.dsn, autocommit=True) as filler:
                    idle.execute("listen x")
                    idle.commit()
                    idle.execute("select 1")
                    with contextlib.suppress(psycopg.errors.ProgramLimitExceeded):
                        for _ in range(1000):
                            filler.execute("select pg_notify('x', repeat('x', 7900))")
                    full.set()
                    await troubled.wait()
                    with pytest.raises(notifyq.ServerTrouble, match="NOTIFY queue"):
                        await nq.send(queue, 2)
                assert await nq.result(sent) == 2
                assert [job.data for job in await nq.jobs()] == [1]  # of the send that was refused there is none
                runtime.stop()
    finally:
        server.kill()


async def test_a_transaction_that_has_sent_can_be_prepared_where_the_bell_never_rings(folder, template):
    silent, done = notifyq.Queue("silent", bell="never"), trio.Event()
    silent.worker(lambda job: job.id)
    server = Server.copied(template, folder / "prepared", {"max_prepared_transactions": "1"})
    try:
        await server.start()
        runtime = notifyq.Runtime([silent], dsn=server.dsn, lease=1.0)
        runtime.subscribe(lambda event: done.set(), events.JobCompleted)
        async with notifyq.connect(server.dsn) as nq:
            await nq.declare([silent, notifyq.Queue("loud", bell="always")])
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            connection.execute("begin")
            connection.execute("select notifyq.send('loud')")
            with pytest.raises(psycopg.errors.FeatureNotSupported, match="NOTIFY"):
                connection.execute("prepare transaction 'loud'")
            connection.execute("begin")
            connection.execute("select notifyq.send('silent')")
            connection.execute("prepare transaction 'silent'")
            jobs = "select queue, state from notifyq.jobs"
            assert connection.execute(jobs).fetchall() == []
            async with trio.open_nursery() as nursery:
                await nursery.start(runtime.run)
                connection.execute("commit prepared 'silent'")
                assert connection.execute(jobs).fetchall() == [("silent", "ready")]
                with trio.fail_after(20):  # nothing rings: the next beat, which is the poll, finds it
                    await done.wait()
                runtime.stop()
    finally:
        server.kill()


class Tampering(Fault):
    """Everything that must not be, once."""

    name = "tampering"
    drain = 4.0
    patience = 1.0

    async def inflict(self, scene: Scene) -> None:
        """All of it is done at the end."""

    async def mend(self, scene: Scene) -> None:
        ledger = scene.ledger
        ended = [run for run in ledger.runs if run.ended is not None and run.job in ledger.sends]
        self.deleted, self.twice, self.unrun = (run.job for run in ended[:3])
        await scene.query("delete from notifyq.archive where id = %s", self.deleted)
        pen = Pen(str(scene.folder / "effects-999"))
        pen.ended(pen.began(self.twice, 1))
        ledger.runs.remove(ended[2])
        ledger.sent([(10**12, Send("bulk", 0.0))])
        [(self.stuck,)] = await scene.query("select notifyq.send('bulk', '1', delay => '1 hour')")
        await scene.query("delete from notifyq.scheduled where job = %s", self.stuck)
        self.connection = await trio.to_thread.run_sync(psycopg.connect, scene.direct_dsn)
        (scene.folder / "forgotten").touch()

    def leave(self, folder: Path) -> None:
        self.connection.close()


async def test_what_must_not_be_is_noticed(folder, template):
    fault = Tampering()
    verdict = (await run(fault, folder, template)).verdict
    assert sorted(verdict.lost) == sorted([fault.deleted, fault.unrun, 10**12])
    assert verdict.unexplained == [fault.twice]
    assert fault.stuck in verdict.stuck
    told = "\n".join(verdict.complaints)
    assert "1 connections are left" in told
    assert "files are left: forgotten" in told
    assert not verdict.good


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path)
    ledger.sent([(1, Send("bulk", 0.0))])
    yield ledger
    ledger.close()


COMPLETED = {1: Found("bulk", "completed", 2, 100, None)}


@pytest.mark.parametrize(
    ("incident", "explained"),
    [
        (None, False),
        (Incident("kill", 105.0, 105.0, process="1"), True),
        (Incident("kill", 105.0, 105.0, process="3"), False),
        (Incident("crash", 105.0, 105.5), True),
        (Incident("crash", 60.0, 61.0), False),  # before it was claimed
        (Incident("crash", 140.0, 140.1), False),  # when its completion was stored long since
    ],
)
def test_a_second_run_is_explained_by_what_was_done_to_the_first(ledger, incident, explained):
    ledger.runs += [Run(1, 1, "1", 100.0, 101.0), Run(1, 2, "2", 150.0, 151.0)]
    if incident is not None:
        ledger.note(incident)
    verdict = judge(ledger, COMPLETED)
    assert verdict.good is explained
    assert (verdict.explained, verdict.unexplained) == (
        (Counter([incident.kind]), []) if explained else (Counter(), [1])
    )


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (Found("bulk", "failed", 1, 100, "ValueError"), "failed without a reason"),
        (Found("bulk", "failed", 101, 100, None), "failed without a reason"),
        (Found("bulk", "cancelled", 1, 100, None), "cancelled by nobody"),
        (Found("luck", "failed", 4, 3, "ValueError"), "without a dead letter"),
    ],
)
def test_a_state_that_does_not_say_why_is_noticed(ledger, found, told):
    verdict = judge(ledger, {1: found})
    assert [complaint for complaint in verdict.complaints if told in complaint]


def test_what_starts_too_early_or_is_not_known_is_noticed(ledger):
    ledger.sent([(2, Send("bulk", 100.0, delay=1.0)), (3, Send("step", 100.0, after=(1,)))])
    ledger.runs += [Run(job, 1, "1", 100.5, 100.6) for job in (1, 2, 3, 4)]
    ledger.id_keys["k"] = {1, 2}
    completed = Found("bulk", "completed", 1, 100, None)
    told = "\n".join(judge(ledger, {1: completed, 2: completed, 3: completed, 5: completed}).complaints)
    assert "1 jobs started before they were due: 2" in told
    assert "1 jobs started before the jobs that they come after had ended: 3" in told
    assert "1 jobs ran and are not in the database: 4" in told
    assert "1 jobs that nobody sent (at most 0 may be): 5" in told
    assert "2 jobs were made for the id_key k: 1, 2" in told


@pytest.mark.parametrize(("attempt", "good"), [(1, True), (3, False)])
def test_a_stopped_process_may_begin_with_what_it_had_claimed(ledger, attempt, good):
    ledger.runs += [Run(1, 2, "2", 103.0, 103.1), Run(1, attempt, "1", 104.1, 104.2)]
    ledger.note(Incident("stop", 100.0, 104.0, process="1"))
    assert judge(ledger, COMPLETED).good is good


def test_recovery_is_counted_from_the_blow_to_the_next_start(ledger):
    ledger.sent([(2, Send("bulk", 102.5))])
    ledger.runs += [
        Run(1, 1, "1", 100.0),
        Run(9, 1, "2", 103.0, 103.1),
        Run(2, 1, "2", 104.0, 104.1),
        Run(1, 2, "2", 105.0, 105.1),
    ]
    for waits_for in ("affected", "sent", "any", None):
        ledger.note(Incident("blow", 102.0, 102.5, process="1", waits_for=waits_for))
    assert recoveries(ledger) == [3.0, 2.0, 0.5]


def test_the_table_sums_up_and_says_what_was_not_tried():
    one = {"fault": "kill", "times": 3, "jobs": 1000, "lost": 1, "stuck": 1, "longest_recovery_seconds": 1.234}
    twice = {"duplicated_explained": 5, "duplicated_unexplained": 2}
    entries = [one | twice, one | twice | {"fault": "stop", "longest_recovery_seconds": None}]
    table = markdown(
        [*entries, {"fault": "disk-full", "not_tried": "no tmpfs"}, {"fault": "mixed", "broke_off": "X()"}]
    )
    assert "| kill | 3 | 1,000 | 2 | 5 | 2 | 1.23 |" in table
    assert "| stop | 3 | 1,000 | 2 | 5 | 2 |  |" in table
    assert "| all | 6 | 2,000 | 4 | 10 | 4 | |" in table
    assert "Not tried: disk-full, no tmpfs." in table
    assert "Broke off: mixed, X()." in table


def test_the_pages_have_the_newest_figures_and_say_what_every_fault_does():
    newest = max((ROOT / "benchmarks" / "results").glob("*-faults.json"))
    for page, text in pages(newest).items():
        assert page.read_text(encoding="utf-8") == text

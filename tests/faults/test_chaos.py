"""The short form of ``make chaos``, and proof that it notices what it is there for."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections import Counter
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import psycopg
import pytest
import trio

import notifyq
from notifyq import events
from notifyq._opening import open_connection
from tests.faults.chaos.__main__ import ROOT, lengths, pages
from tests.faults.chaos.catalogue import FAULTS
from tests.faults.chaos.cell import Outcome, Scene, run_cell
from tests.faults.chaos.faults import Fault
from tests.faults.chaos.ledger import Incident, Ledger, Pen, Run, Send
from tests.faults.chaos.results import markdown
from tests.faults.chaos.servers import Server, binary_version, make_template
from tests.faults.chaos.sessions import lock_purposes
from tests.faults.chaos.verdict import Found, Verdict, judge, recoveries, unexcused_restarts
from tests.faults.chaos.workers import HOW_MANY, Restart, Workers

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


BUSY = 2.0
"""How many times its goal a recovery may take here: other tests, or another build, may have the machine's other core."""


async def run(fault: Fault, folder: Path, template: Path) -> Outcome:
    with trio.fail_after(120):
        return await run_cell(fault, seconds=6, seed=SEED, folder=folder / fault.name, template=template, rate=2000)


@pytest.mark.parametrize("name", SHORT)
async def test_no_job_is_lost(name, folder, template, monkeypatch):
    [fault] = [fault for fault in FAULTS if fault.name == name]
    if fault.goal is not None:
        monkeypatch.setattr(fault, "goal", BUSY * fault.goal)
    outcome = await run(fault, folder, template)
    assert outcome.verdict.good, f"{outcome.verdict}\n{outcome.log[-3000:]}"
    assert outcome.verdict.sent > 1000
    assert outcome.incidents.total() > 0


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


async def test_both_ends_of_a_connection_are_to_notice_that_the_other_one_is_silent(folder, template):
    server = Server.copied(template, folder / "silent")
    try:
        await server.start()
        async with await open_connection(server.dsn) as connection:
            asked = await connection.execute("select name, setting from pg_settings where name like 'tcp_%'")
            theirs = dict(await asked.fetchall())
            with socket.socket(fileno=os.dup(connection.fileno())) as own:
                assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
                ours = [own.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
    finally:
        server.kill()
    assert theirs == {
        "tcp_keepalives_idle": "5",
        "tcp_keepalives_interval": "3",
        "tcp_keepalives_count": "3",
        "tcp_user_timeout": "10000",
    }
    assert ours == [5, 2, 3, 10_000]


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


def test_an_alien_holds_every_class_of_locks_that_we_take():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "sql").rglob("*.sql")]
    calls = [call for text in texts for call in re.findall(r"notifyq\.lock_class\s*\(([^)]*)\)", text)]
    calls.remove("purpose text")  # its definition
    assert {call.strip().strip("'") for call in calls} == set(lock_purposes())
    assert {"far", "free", "interest", "pending", "promote", "settling"} <= set(lock_purposes())


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
        (scene.server.data / "base" / "pgsql_tmp").mkdir(exist_ok=True)
        (scene.server.data / "base" / "pgsql_tmp" / "pgsql_tmp1.0").touch()
        environment = {"PATH": os.environ["PATH"], "TMPDIR": str(scene.folder)}
        self.process = subprocess.Popen(["sleep", "600"], env=environment)  # noqa: ASYNC220 - as for a worker

    def leave(self, folder: Path) -> None:
        self.connection.close()


async def test_what_must_not_be_is_noticed(folder, template):
    fault = Tampering()
    try:
        verdict = (await run(fault, folder, template)).verdict
    finally:
        fault.process.kill()
        fault.process.wait()
    assert sorted(verdict.lost) == sorted([fault.deleted, fault.unrun, 10**12])
    assert verdict.unexplained == [fault.twice]
    assert fault.stuck in verdict.stuck
    told = "\n".join(verdict.complaints)
    assert "1 connections are left" in told
    assert "files are left: forgotten" in told
    assert "temporary files of the server are left: pgsql_tmp1.0" in told
    assert "1 processes are left: sleep 600" in told
    assert not verdict.good


BROKE = "notifyq: the connection to the server broke: it was"
WRAPPED = """
case $CHAOS_LEDGER in
    *-1) {}; exit {};;
    *) exec sleep 600;;
esac
"""


async def until_gone(workers: Workers) -> None:
    with trio.fail_after(20):
        while workers.all[0].process.poll() is None:
            await trio.sleep(0.01)


@pytest.mark.parametrize("code", [1, 2])
@pytest.mark.parametrize(
    "words",
    [
        BROKE,
        "notifyq: cannot reach the server within 10 s: it was",
        "notifyq: a queue's option is wrong",
        "INFO notifyq: runtime 1 serves bulk\n" + BROKE,
        BROKE + "\nTraceback (most recent call last):",
        "",
    ],
)
async def test_only_a_worker_whose_connection_broke_while_it_started_is_started_again(tmp_path, nursery, words, code):
    restarted = code == 1 and words.startswith("notifyq: ") and "\n" not in words and "option" not in words
    script = WRAPPED.format("; ".join(f'echo "{line}" >&2' for line in words.splitlines()) or "true", code)
    workers = Workers(tmp_path, {}, ("sh", "-c", script))
    workers.start()
    try:
        nursery.start_soon(workers.keep_up)
        await until_gone(workers)
        await trio.sleep(1)
        assert [worker.name for worker in workers.all] == (["4", "2", "3"] if restarted else ["1", "2", "3"])
        assert [worker.process.poll() for worker in workers.all] == [None if restarted else code, None, None]
        await workers.stop()
        assert [(one.name, one.words) for one in workers.restarts] == ([("1", words)] if restarted else [])
        assert workers.bad_ends == ([] if restarted else [f"worker 1 ended with {code}"])
        assert workers.log() == (f"{words}\n" if words else "")
    finally:
        workers.kill()


async def test_a_worker_that_could_not_start_before_it_was_to_be_ended_is_started_again_once(tmp_path, nursery):
    workers = Workers(tmp_path, {}, ("sh", "-c", WRAPPED.format(f'echo "{BROKE}" >&2', 1)))
    workers.start()
    try:
        await until_gone(workers)
        await workers.end(workers.all[0], signal.SIGKILL)
        nursery.start_soon(workers.keep_up)
        await trio.sleep(1)
        assert [worker.name for worker in workers.all] == ["4", "2", "3"]
        await workers.stop()
        assert (len(workers.all), len(workers.restarts), workers.bad_ends) == (HOW_MANY, 1, [])
    finally:
        workers.kill()


@pytest.mark.parametrize(
    ("incident", "excused"),
    [
        (None, False),
        (Incident("crash", 9.0, 9.5), True),
        (Incident("crash", 10.5, 12.0), True),
        (Incident("crash", 7.0, 8.5), False),
        (Incident("crash", 12.0, 12.5), False),
        (Incident("kill", 10.0, 11.0, process="1"), False),
        (Incident("clock", 10.0, 11.0, excuses=False), False),
    ],
)
def test_a_start_that_failed_while_nothing_was_broken_is_a_complaint(incident, excused):
    complaints = [*unexcused_restarts([Restart("4", 10.0, 11.0, BROKE)], [incident] if incident else [])]
    assert len(complaints) == (not excused)


def test_in_ten_minutes_a_transaction_is_left_open_for_three():
    seconds = dict(zip((fault.name for fault in FAULTS), lengths(FAULTS, 600), strict=True))
    assert seconds["open-transaction"] >= 180
    assert sum(seconds.values()) == pytest.approx(600)
    assert len({*seconds.values()}) == 2
    assert len({*lengths(FAULTS, 60)}) == 1
    assert lengths([fault for fault in FAULTS if fault.least], 60) == [60]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path)
    ledger.sent([(1, Send("bulk", 0.0))])
    yield ledger
    ledger.close()


def test_what_was_done_and_to_whom_is_in_a_file(ledger, tmp_path):
    ledger.note(Incident("terminated all", 2.0, 2.5))
    ledger.note(Incident("stop", 1.0, 5.0, process="3"))
    lines = (tmp_path / "incidents").read_text(encoding="utf-8").splitlines()
    assert lines == ["2.000000 2.500000 - terminated all", "1.000000 5.000000 3 stop"]


COMPLETED = {1: Found("bulk", "completed", 2, 100, None)}


@pytest.mark.parametrize(
    ("incident", "explained"),
    [
        (None, False),
        (Incident("kill", 102.0, 102.0, process="1"), True),
        (Incident("kill", 102.0, 102.0, process="3"), False),
        (Incident("terminated all", 102.0, 102.0), True),
        (Incident("terminated all", 97.0, 97.5), False),  # before it was claimed
        (Incident("crash", 102.0, 103.5), True),
        (Incident("crash", 97.0, 97.5), True),  # its claim may have been forgotten
        *((Incident(kind, 89.0, 90.0, process="1"), False) for kind in ("kill", "stop")),
        *((Incident(kind, 111.0, 112.0, process="1"), False) for kind in ("kill", "stop")),
        *((Incident(kind, 89.0, 90.0), False) for kind in ("crash", "network cut", "terminated all")),
        *((Incident(kind, 111.0, 112.0), False) for kind in ("crash", "network cut", "terminated all")),
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
    ledger.sent([(2, Send("bulk", 102.2)), (3, Send("bulk", 102.7))])
    ledger.runs += [
        Run(1, 1, "1", 100.0),
        Run(9, 1, "1", 100.0, broke_off=101.0),
        Run(9, 2, "2", 102.6, 102.7),  # neither cut off nor sent after the blow
        Run(2, 1, "2", 103.0, 103.1),
        Run(3, 1, "2", 104.0, 104.1),
        Run(1, 2, "2", 105.0, 105.1),
    ]
    for waits_for in ("affected", "sent", "next", None):
        ledger.note(Incident("blow", 102.0, 102.5, process="1", waits_for=waits_for, job=1))
    verdict = Verdict()
    assert recoveries(verdict, ledger) == [3.0, 1.0, 1.5]
    assert verdict.good


@pytest.mark.parametrize(
    ("runs", "waited"),
    [
        ([Run(1, 1, "1", 100.0, 104.1), Run(1, 2, "1", 104.2, 104.3)], 2.2),
        ([Run(1, 1, "1", 100.0, broke_off=104.1), Run(1, 2, "1", 104.2)], 2.2),
        ([Run(1, 1, "1", 100.0, 104.1)], 2.1),
    ],
    ids=["anew", "broken off and anew", "to its end"],
)
def test_a_stopped_worker_that_nobody_took_over_from_goes_on_itself(ledger, runs, waited):
    ledger.runs += runs
    ledger.note(Incident("stop", 102.0, 104.0, process="1", waits_for="affected", job=1))
    verdict = Verdict()
    assert recoveries(verdict, ledger) == [pytest.approx(waited)]
    assert verdict.good


@pytest.mark.parametrize("waits_for", ["affected", "sent", "next"])
def test_what_is_not_got_over_is_a_complaint(ledger, waits_for):
    ledger.sent([(2, Send("bulk", 99.0))])
    ledger.runs += [Run(1, 1, "1", 100.0, broke_off=103.0), Run(2, 1, "2", 105.0, 105.1)]
    ledger.note(Incident("blow", 102.0, 102.5, process="1", waits_for=waits_for, job=1))
    verdict = Verdict()
    assert recoveries(verdict, ledger) == []
    assert [complaint for complaint in verdict.complaints if "blow" in complaint]


@pytest.mark.parametrize(("goal", "complaints"), [(None, 0), (3.0, 0), (2.9, 1)])
def test_a_goal_that_is_missed_is_a_complaint(ledger, goal, complaints):
    ledger.sent([(1, Send("bulk", 102.1))])
    ledger.runs.append(Run(1, 1, "1", 105.0, 105.1))
    ledger.note(Incident("blow", 102.0, 102.0, waits_for="sent"))
    verdict = Verdict()
    assert recoveries(verdict, ledger, goal) == [3.0]
    assert len(verdict.complaints) == complaints


def test_a_goal_that_nothing_was_held_against_is_a_complaint(ledger):
    verdict = Verdict()
    assert recoveries(verdict, ledger, 2.0) == []
    assert not verdict.good


@pytest.mark.parametrize("how", ["ended", "broke_off"])
def test_a_handler_that_ends_before_its_process_is_hit_is_not_waited_for(ledger, how):
    run = Run(1, 1, "1", 100.0)
    setattr(run, how, 102.1)
    ledger.runs.append(run)
    ledger.note(Incident("kill", 102.0, 102.5, process="1", waits_for="affected", job=1))
    verdict = Verdict()
    assert recoveries(verdict, ledger) == []
    assert verdict.good


def test_only_a_handler_that_neither_did_its_work_nor_raised_was_cut_off(ledger):
    pen = Pen(str(ledger.folder / "effects-1"))
    with pen.run(1, 1):
        pass
    with contextlib.suppress(ValueError), pen.run(2, 1):
        raise ValueError
    pen.began(3, 1)
    ledger.read()
    assert [(run.ended is None, run.over is None) for run in ledger.runs] == [
        (False, False),
        (True, False),
        (True, True),
    ]


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

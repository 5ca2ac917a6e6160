"""The benchmark: short real runs of each workload, the names of what they find, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from notifyq import Queue, bench
from notifyq.bench import __main__ as command
from notifyq.bench._computing import COMPUTING
from notifyq.bench._one_line import run as run_command
from notifyq.bench._options import ALL, PLOTTED, doubts
from notifyq.bench._parts import CannotMeasure, Settings
from notifyq.bench._plots import is_installed
from notifyq.bench._report import write
from notifyq.bench._scaling import scaling
from notifyq.bench._sustained import last_over_first

if TYPE_CHECKING:
    from pathlib import Path

TINY = {
    "enqueue": ("--jobs=1000",),
    "drain": ("--jobs=1000", "--not-kept"),
    "latency": ("--jobs=200",),
    "keys": ("--jobs=200",),
    "flows": (),
    "scaling": ("--processes=2",),
    "senders": ("--senders=3", "--seconds=1"),
    "sustained": ("--seconds=1",),
    "pinned": ("--seconds=3",),
    "idle": ("--seconds=1", "--queues=3"),
    "backlog": ("--backlog=20000", "--seconds=1"),
    "queues": ("--queues=3",),
}

LIMIT = {"limit_jobs_per_second", "fraction_of_limit"}

FIGURES = {
    "enqueue": {"jobs_per_second"} | LIMIT,
    "drain": {"jobs_per_second", "processes", "kept"} | LIMIT,
    "latency": {"p50_ms", "p95_ms", "p99_ms", "max_ms", "limit_p50_ms", "p50_over_limit"},
    "keys": {f"{rule}_{number}_jobs_per_second" for rule in ("singleton", "key_limit_5") for number in (1, 100, 10_000)}
    | {"freed_p50_ms", "plain_p50_ms", "freed_over_plain"}
    | {f"limit_{number}_jobs_per_second" for number in (1, 100, 10_000)},
    "flows": {f"{of}{what}_jobs_per_second" for of in ("", "limit_") for what in ("sent", "run")},
    "scaling": {
        "jobs_per_second",
        "one_process_jobs_per_second",
        "over_one_process",
        "processes",
        "limit_over_one_process",
    }
    | LIMIT,
    "senders": {
        "sends_per_second",
        "no_notify_sends_per_second",
        "always_sends_per_second",
        "over_always",
        "fraction_of_no_notify",
        "limit_sends_per_second",
        "fraction_of_limit",
        "senders",
        "client_cores",
    },
    "sustained": {"jobs_per_second", "p50_ms", "p99_ms"} | LIMIT,
    "pinned": {
        f"{of}{figure}" for of in ("", "control_", "limit_") for figure in ("jobs_per_second", "last_over_first")
    },
    "idle": {
        "statements_per_second",
        "connections",
        "cpu_fraction",
        "limit_statements_per_second",
        "limit_connections",
        "queues",
        "counted",
    },
    "backlog": {
        "jobs",
        "claim_ratio",
        "claim_100_ratio",
        "claim_ms",
        "claim_ratio_kept",
        "claim_100_ratio_kept",
        "complete_ratio_kept",
        "blocked_claim_ratio",
        "blocked_complete_ratio",
        "limit_claim_ratio",
        "limit_claim_ms",
        "runtime_mib",
    },
    "queues": {
        "queues",
        "claim_ratio",
        "claim_ms",
        "limit_claim_ratio",
        "limit_claim_ms",
        "pickup_p50_ms",
        "one_pickup_p50_ms",
        "pickup_ratio",
    },
}

SAMPLES = {
    "latency": {"samples_ms", "limit_samples_ms"},
    "sustained": {"throughput", "throughput_at", "samples_ms"},
    "pinned": {"throughput", "control_throughput", "limit_throughput", "throughput_at"},
}


def run(server: str, *arguments: str) -> str:
    """Run the benchmark as a process on a server; returns what it printed."""
    done = run_it(server, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_it(server: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "notifyq.bench", "--dsn", server, *arguments],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture
def refusal(capsys, monkeypatch):
    monkeypatch.delenv("DATABASE_URL", raising=False)

    def refusal(*arguments: str) -> str:
        """The one line that it says, and ends."""
        with pytest.raises(SystemExit) as ended:
            run_command(command.main, "notifyq.bench", arguments)
        assert ended.value.code in (1, 2)
        [line] = capsys.readouterr().err.splitlines()
        return line

    return refusal


def test_every_workload_is_tried_here():
    assert set(TINY) == set(FIGURES) == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_a_workload_finds_what_its_names_say(server, tmp_path, name):
    file = tmp_path / "figures.json"
    pictures = ("--plot", str(tmp_path / "pictures")) if name in PLOTTED and is_installed() else ()
    printed = run(server, name, *TINY[name], "--repeat=1", "--warm-up=0", "--json", str(file), *pictures)
    report = json.loads(file.read_text())
    found = report["workloads"][name]
    assert set(found) == FIGURES[name] | {"runs"}
    [one] = found["runs"]
    assert set(one) == FIGURES[name] | SAMPLES.get(name, set())
    for figure in FIGURES[name]:
        assert figure in printed
        if isinstance(found[figure], float):
            assert math.isfinite(found[figure])
            assert found[figure] > 0 or figure.endswith("statements_per_second") or figure == "cpu_fraction"
    for samples in SAMPLES.get(name, ()):
        assert len(one[samples]) >= 12
    assert report["settings"]["each"][name]["warm_up"] == 0
    if pictures:
        drawn = {path.name for path in (tmp_path / "pictures").iterdir() if path.stat().st_size > 1000}
        assert drawn == {f"{name}.png", f"{name}.svg"}


@pytest.mark.parametrize(("name", "figure"), [(name, figure) for name, found in FIGURES.items() for figure in found])
def test_every_figure_is_documented(name, figure):
    documented: dict[str, list[str]] = {}
    for line in (bench.__doc__ or "").splitlines():
        if line.startswith("| ``"):
            first, *others = re.findall("``([^`]+)``", line.split("|")[1])
            workload, _, first = first.partition(".")
            documented.setdefault(workload, []).extend(other.rpartition(".")[2] for other in (first, *others))
    patterns = [re.escape(known).replace("N", r"[0-9]+").replace("…", ".+") for known in documented[name]]
    assert any(re.fullmatch(pattern, figure) for pattern in patterns)


def test_warm_ups_do_not_count_and_the_median_does(server, tmp_path):
    file = tmp_path / "figures.json"
    run(server, "enqueue", "--jobs=100", "--repeat=2", "--warm-up=1", "--json", str(file))
    found = json.loads(file.read_text())["workloads"]["enqueue"]
    one, other = (one["jobs_per_second"] for one in found["runs"])
    assert found["jobs_per_second"] == pytest.approx((one + other) / 2, abs=0.001)


async def test_what_is_on_the_server_is_not_touched(server, dsn, nq):
    await nq.create_queue(Queue("bench.drain", int))
    await nq.send(Queue("bench.drain", int), 1)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create table bare (kept int)")
        connection.execute("insert into bare values (1)")
        run(dsn, "enqueue", "drain", "--jobs=100", "--repeat=1", "--warm-up=0")
        assert connection.execute("select kept from bare").fetchall() == [(1,)]
        left = connection.execute("select datname from pg_database where datname like 'notifyq_bench_%'").fetchall()
        assert left == []
    [job] = await nq.jobs(queue="bench.drain")
    assert job.state == "ready"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("nonsense",), "'nonsense' is not one of 'enqueue', 'drain'"),
        (("enqueue", "--repeat=0"), "0 is not in the range x>=1"),
        (("enqueue", "--warm-up=-1"), "-1 is not in the range x>=0"),
        (
            ("enqueue", "drain", "--seconds=5"),
            "--seconds is for senders, sustained, pinned, idle, backlog, not for enqueue, drain",
        ),
        (("idle", "--senders=5"), "--senders is for senders, not for idle"),
        (("--backlog=100000",), "--backlog is for backlog, not for enqueue, drain, latency"),
        (("enqueue", "--not-kept"), "--kept and --not-kept are for drain, flows, not for enqueue"),
        (("keys", "--plot=."), "--plot is for latency, sustained, pinned, not for keys"),
        (("enqueue", "--jobs=100", "--processes=200"), "--jobs 100 is too few for --processes 200"),
        (("enqueue", "--json=no/such/file"), "--json: there is no folder no/such"),
        (("enqueue", "--dsn=nonsense"), "the DSN is not one"),
        (("enqueue", "--dsn=host=127.0.0.1 port=1"), "the server said: connection failed"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(refusal, arguments, why):
    assert why in refusal(*arguments)


@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_help_is_had_by_either_name(capsys, asked):
    with pytest.raises(SystemExit):
        run_command(command.main, "notifyq.bench", [asked])
    assert "Measure WORKLOADS" in capsys.readouterr().out


def test_pictures_without_matplotlib_are_refused(refusal, monkeypatch):
    monkeypatch.setattr(command, "is_installed", lambda: False)
    assert refusal("latency", "--plot=pictures") == "bench: --plot needs matplotlib: pip install 'notifyq[bench]'"


def test_more_senders_than_the_server_takes_are_refused_before_anything_is_made_or_doubted(refusal, server):
    with psycopg.connect(server):  # others are at work there
        line = refusal("senders", "--senders=100000", "--repeat=1", "--dsn", server)
    assert line.startswith("bench: --senders 100000: the server has max_connections of ")


async def test_what_makes_figures_doubtful_is_said_and_they_are_taken(server, connection):
    done = run_it(server, "enqueue", "drain", "--jobs=100", "--not-kept", "--repeat=1", "--warm-up=0")
    assert done.returncode == 0
    kept, repeat, others = (line for line in done.stderr.splitlines() if line.startswith("bench: "))
    assert kept == "bench: --kept and --not-kept are for drain, flows: it changes nothing of enqueue"
    assert repeat == "bench: --repeat 1: the median of so few runs says little, 3 or more show their spread"
    assert others.endswith("other sessions on this server: what they do is in the figures")


def test_nothing_is_doubtful_of_what_was_asked_of_all():
    assert doubts(list(ALL), {"processes": 2, "senders": 5, "repeat": 3}) == []


def test_the_last_of_a_run_is_compared_with_its_first():
    """A sixth of it, or a minute of one that is longer than that."""
    assert last_over_first([10.0, 10.0, *[0.0] * 8, 5.0, 5.0], 2.0) == 0.5
    assert last_over_first([10.0] * 60 + [0.0] * 480 + [5.0] * 60, 600.0) == 0.5
    with pytest.raises(CannotMeasure, match="nothing was completed in the first part of 2 s: give --seconds more"):
        last_over_first([0.0, 0.0, *[5.0] * 10], 2.0)


async def test_workers_that_end_before_their_jobs_are_noticed(dsn, nq, monkeypatch):
    monkeypatch.setattr("notifyq.bench._scaling.APP", "no_such_module:runtime")
    await nq.create_queue(COMPUTING)
    with pytest.raises(CannotMeasure, match="notifyq run ended with 1 before the jobs did"):
        scaling(Settings(dsn, jobs=1, processes=2, concurrency=1, batch=1, kept=True), lambda _: None)


def test_samples_are_written_on_one_line(tmp_path: Path):
    report: dict[str, Any] = {"samples": [1.5, -2, 3e-05], "names": ["a", "b"], "none": [], "runs": [{"a": [1]}]}
    write(report, tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert '"samples": [1.5, -2, 3e-05]' in text
    assert json.loads(text) == report

"""The comparison with peers: what needs neither a peer nor a server; none is installed here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import click
import pytest

from benchmarks.compare import _install
from benchmarks.compare.__main__ import alone, available, check, chosen, plan
from benchmarks.compare._cell import Options
from benchmarks.compare._peers import PEERS
from benchmarks.compare._readme import BEGIN, END, put_into
from benchmarks.compare._results import Results, newest, unfinished_or_new
from benchmarks.compare._table import FIGURES, TABLES, markdown, notes, tables
from benchmarks.compare._verbs import VERBS
from benchmarks.compare.peers.role import Meter, now

if TYPE_CHECKING:
    from pathlib import Path

VERSIONS = {"pgqueuer": {"pgqueuer": "1.6"}, "graphile-worker": {"graphile-worker": "0.18"}}


def cells(verb: str, *figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured cells of pgqueuer, default, a repeat for each."""
    planned = plan({"pgqueuer": VERSIONS["pgqueuer"]}, [verb], len(figures), Options(), "18.0", "default")
    return [{**cell, "figures": one} for cell, one in zip(planned, figures, strict=True)]


def test_names_choose_peers_and_verbs_and_a_wrong_one_is_refused():
    assert chosen(("drain", "pgqueuer", "pickup")) == (["pgqueuer"], ["pickup", "drain"])
    assert chosen(()) == (list(PEERS), list(VERBS))
    with pytest.raises(click.UsageError, match=r"no peer or verb 'celery': there are notifyq, .*pinned"):
        chosen(("drain", "celery"))


def test_the_command_refuses_in_one_line():
    command = [sys.executable, "-m", "benchmarks.compare", "celery"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("compare: no peer or verb 'celery'")


@pytest.mark.parametrize(
    ("names", "settings", "repeats", "message"),
    [
        (["pgqueuer"], "tund", 5, "--settings tund: no row of pgqueuer begins so: there are default, tuned"),
        (
            ["limit", "notifyq"],
            "tuned",
            5,
            "--settings tuned: no row of limit, notifyq begins so: none of them has rows",
        ),
        (["pgqueuer"], "", 4, "--readme with --repeats 4: too few for a table, it takes 5 or more"),
    ],
)
def test_what_would_measure_nothing_or_publish_too_little_is_refused(
    names: list[str], settings: str, repeats: int, message: str
):
    with pytest.raises(click.UsageError, match=message):
        check(names, settings, repeats, readme=True)
    check(["pgqueuer"], "tuned", 1, readme=False)
    check(["notifyq"], "", 5, readme=True)


def test_only_one_comparison_runs_at_a_time(tmp_path: Path):
    with alone(tmp_path), pytest.raises(click.ClickException, match="another comparison"), alone(tmp_path):
        pass


def test_peers_take_turns():
    planned = plan(VERSIONS, ["pickup", "drain"], 2, Options(), "18.0", "default")
    assert [(cell["repeat"], cell["verb"], cell["peer"]) for cell in planned] == [
        (repeat, verb, peer) for repeat in (1, 2) for verb in ("pickup", "drain") for peer in VERSIONS
    ]


def test_settings_choose_rows_of_peers_and_notifyq_stands_beside_them_with_all_of_its():
    versions = {"notifyq": {}, "limit": {}, **VERSIONS}
    planned = plan(versions, ["pickup", "drain"], 1, Options(), "18.0", "tuned")
    found = [(cell["verb"], cell["peer"], cell["row"]) for cell in planned]
    own = [("notifyq", row) for row in PEERS["notifyq"].rows]
    peers = [(peer, row) for peer in VERSIONS for row in PEERS[peer].rows if row.startswith("tuned")]
    assert found == [
        *[("pickup", *one) for one in [*own, ("limit", "by hand"), *peers]],
        *[("drain", *one) for one in [*own, *peers]],
    ]


def test_every_verb_has_columns_a_table_and_its_options():
    assert set(FIGURES) == set(VERBS) == {verb for verbs in TABLES.values() for verb in verbs}
    assert all(Options().of(verb) for verb in VERBS)


def test_every_peer_says_what_it_leaves_out_and_has_its_adapter():
    for peer in PEERS.values():
        assert peer.notes
        assert peer.rows
        assert json.dumps({name: row.settings for name, row in peer.rows.items()})
        assert not peer.adapter or (_install.ADAPTERS / peer.adapter).exists()
        assert peer.kind in ("own", "bare") or peer.pages


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path):
    file = tmp_path / "new" / "results.json"
    planned = plan(VERSIONS, ["pickup"], 2, Options(), "18.0")
    results = Results(file)
    assert results.missing(planned) == planned
    results.add({**planned[0], "figures": {"p50_ms": 1.0}})
    results.add({**planned[1], "error": "no answer"})
    again = Results(file)
    assert again.missing(planned) == planned[1:]
    again.add({**planned[1], "figures": {"p50_ms": 2.0}})
    assert [cell.get("error") for cell in Results(file).cells] == [None, None]
    assert Results(file).about == {"schema": 1}


def test_a_stopped_run_goes_on_on_another_day_and_a_whole_one_does_not(tmp_path: Path):
    planned = plan(VERSIONS, ["pickup"], 1, Options(), "18.0")
    old = Results(tmp_path / "2020-02-29-compare.json")
    for cell in planned[:-1]:
        old.add({**cell, "figures": {"p50_ms": 1.0}})
    assert unfinished_or_new(tmp_path, planned).path == old.path
    old.add({**planned[-1], "figures": {"p50_ms": 1.0}})
    new = unfinished_or_new(tmp_path, planned)
    assert new.path.parent == tmp_path
    assert new.path.name > old.path.name
    assert new.missing(planned) == planned
    assert unfinished_or_new(tmp_path, plan(VERSIONS, ["drain"], 1, Options(), "18.0")).path == new.path


def test_another_version_is_measured_again_and_other_options_of_other_verbs_do_not_matter(tmp_path: Path):
    results = Results(tmp_path / "results.json")
    for cell in plan(VERSIONS, ["pickup"], 1, Options(), "18.0"):
        results.add({**cell, "figures": {"p50_ms": 1.0}})
    assert results.missing(plan(VERSIONS, ["pickup"], 1, Options(jobs=7), "18.0")) == []
    later = plan(VERSIONS | {"pgqueuer": {"pgqueuer": "1.7"}}, ["pickup"], 1, Options(), "18.0")
    assert {cell["peer"] for cell in results.missing(later)} == {"pgqueuer"}


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path):
    for text in ("", "[]", '{"workloads": {}}'):
        file = tmp_path / "results.json"
        file.write_text(text)
        with pytest.raises(click.UsageError, match="does not hold results of a comparison"):
            Results(file)


def test_figures_of_another_version_do_not_mix():
    old = cells("pickup", {"p50_ms": 9.0}, {"p50_ms": 9.0})
    new = [{**cell, "versions": {"pgqueuer": "2.0"}} for cell in cells("pickup", {"p50_ms": 1.0})]
    other = cells("sends", {"by_1_per_second": 1.0})
    assert newest([*old, *new, *other]) == [*new, *other]


def test_a_table_has_the_median_the_spread_and_what_is_kept():
    found = cells("pickup", *({"p50_ms": one, "p99_ms": 10 * one} for one in (3.0, 1.25, 200.0)))
    (table,) = tables(found)
    assert table.heads == ["peer, settings", "keeps of a job", "jobs a call", "pickup p50, ms", "p99, ms"]
    assert table.rows == [["pgqueuer, default", "outcome", "1", "3 (1.25 to 200)", "30"]]


def test_a_table_marks_what_was_stopped_and_what_failed():
    stopped = {"jobs_per_second": 0.5, "wal_bytes_per_job": 1e4, "commits_per_job": 4.0, "left": 7}
    (table,) = tables(cells("drain", stopped))
    assert table.rows[0][3:] == ["0.500 ²", "10,000 ²", "4 ²"]
    failed = [{**cell, "error": "no answer"} for cell in cells("drain", {})]
    for cell in failed:
        del cell["figures"]
    assert tables(failed)[0].rows[0][3:] == ["failed", "failed", "failed"]


def test_tables_stand_between_the_marks_of_the_readme():
    found = cells("idle", {"transactions_per_second": 1.5, "connections": 2})
    text = put_into(f"before\n{BEGIN}\nold\n{END}\nafter\n", found, "results/one.json", ["results/one.svg"])
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"![results/one.svg](results/one.svg)\n\n{END}\nafter\n")
    assert "old" not in text
    assert "](results/one.json): medians, and lowest to highest.\nRun: idle 1x, with seconds 30." in text
    assert markdown(found) in text
    assert "| pgqueuer, default | outcome | 1 | 1.50 | 2 |" in text
    with pytest.raises(click.ClickException, match="needs one line"):
        put_into("nothing", found, "one.json", [])


def test_the_tables_say_when_what_and_how_often():
    found = [
        {**cell, "at": f"2026-02-0{number}T10:11:12Z"}
        for number, cell in enumerate([*cells("pickup", {"p50_ms": 1.0}, {"p50_ms": 2.0}), *cells("drain", {})], 1)
    ]
    found[0] |= {"peer": "notifyq", "commit": "abc1234"}
    text = put_into(f"{BEGIN}\n{END}", found, "one.json", [])
    assert "measured from 2026-02-01 10:11 to 2026-02-03 10:11 (UTC), notifyq of commit abc1234: medians" in text
    assert "Run: pickup 1x, with pickups 300; drain 1x, with jobs 50,000, limit 60." in text
    found += cells("pickup", {"p50_ms": 2.0}, {"p50_ms": 2.0})
    assert "pickup 1 to 3x, with" in put_into(f"{BEGIN}\n{END}", found, "one.json", [])


def test_settings_and_pages_stand_below_the_tables():
    (line,) = notes(cells("idle", {"connections": 1}))
    assert line.startswith("pgqueuer (pgqueuer 1.6): ")
    assert "[Performance Tuning](" in line
    assert '`{"autovac": false, "run": {}, "loop": "uvloop"}`' in line


def test_a_peer_that_cannot_be_installed_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: old\nERROR: no such package\n")

    monkeypatch.setattr(_install, "ROOT", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(subprocess, "run", fail)
    assert available(["notifyq", "pgqueuer", "pg-boss", "limit"]) == ["notifyq", "limit"]
    assert [line for line in capsys.readouterr().err.splitlines() if "left out" in line] == [
        "compare: left out: pgqueuer can't be installed: ERROR: no such package",
        "compare: left out: pg-boss needs node and npm on the PATH",
    ]


def test_a_meter_tells_what_ran_and_how_soon():
    meter = Meter()
    assert meter.report() == {"ran": 0}
    for wait in range(1, 101):
        sent = now() - wait * 1_000_000
        assert meter.handled(sent) == sent
    report = meter.report()
    assert report["p50_ms"] == pytest.approx(50_000, abs=100)
    assert report["p99_ms"] == pytest.approx(99_000, abs=100)
    assert meter.forget()["ran"] == 100
    assert meter.ran() == {"ran": 0, "first": None}

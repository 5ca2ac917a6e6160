"""The workloads of a steady state: how much is completed as long as it lasts, also while a snapshot is held open."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psycopg

from ._parts import CannotMeasure, Found, Role, Settings, Tell, clear, part_of
from ._sql import SAMPLED_PICKUPS, TAKE_SNAPSHOT
from ._steady import CHUNK

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["pinned", "sustained"]

WINDOWS = {"plain": 2500, "bare": 2500, "mixed": 12_000}
"""Jobs that wait, are active, or are not yet known to be completed, at any time. A fifth of mixed ones wait a second."""

WARM_UP = 5.0
"""Seconds, or a tenth of what is measured, before anything counts."""

SLICES = 12
"""At least so many slices: a sixth of a run is more than one. Otherwise a slice is a second."""

SAMPLES = 2000
"""Pickups of a run that are kept for its histogram."""


def sustained(settings: Settings, tell: Tell) -> Found:
    """Jobs/s durably completed by one process in a steady state, and send to handler start in it.

    The limit: bare inserts of as many rows with a NOTIFY, deletes of as many into another table, for a third of the time.
    """
    began: list[int] = []
    rates = _steady(
        settings,
        "plain",
        settings.seconds,
        part_of(tell, 0, 0.75),
        lambda: began.append(time.monotonic_ns()),
    )
    with psycopg.connect(settings.dsn) as connection:
        pickups = [row[0] for row in connection.execute(SAMPLED_PICKUPS, (began[0],)).fetchall()]
    clear(settings.dsn)
    limit = _steady(settings, "bare", settings.seconds / 3, part_of(tell, 0.75, 1))
    clear(settings.dsn)
    percentiles = statistics.quantiles(pickups, n=100, method="inclusive")
    rate = statistics.mean(rates)
    return {
        "jobs_per_second": rate,
        "p50_ms": percentiles[49],
        "p99_ms": percentiles[98],
        "limit_jobs_per_second": statistics.mean(limit),
        "fraction_of_limit": rate / statistics.mean(limit),
        "throughput": rates,
        "throughput_at": _middles(rates, settings.seconds),
        "samples_ms": pickups[:: len(pickups) // SAMPLES + 1],
    }


def pinned(settings: Settings, tell: Tell) -> Found:
    """A steady state of plain, failing, delayed and keyed jobs with a snapshot held open; before, the same without one.

    What is deleted while a snapshot is open cannot be vacuumed. The limit: a bare table under a snapshot, used by hand.
    """
    curves: dict[str, list[float]] = {}
    for number, (name, kind, held) in enumerate(
        (("control_", "mixed", False), ("", "mixed", True), ("limit_", "bare", True))
    ):
        with ExitStack() as stack:

            def hold(stack: ExitStack = stack) -> None:
                snapshot = stack.enter_context(psycopg.connect(settings.dsn))
                snapshot.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
                snapshot.execute(TAKE_SNAPSHOT)

            part = part_of(tell, number / 3, (number + 1) / 3)
            curves[name] = _steady(settings, kind, settings.seconds, part, hold if held else None)
        clear(settings.dsn)
    found: Found = {}
    for name, rates in curves.items():
        found[f"{name}last_over_first"] = last_over_first(rates, settings.seconds)
        found[f"{name}jobs_per_second"] = statistics.mean(rates)
    for name, rates in curves.items():
        found[f"{name}throughput"] = rates
    return found | {"throughput_at": _middles(curves[""], settings.seconds)}


def last_over_first(rates: list[float], seconds: float) -> float:
    """The last sixth of a run, or its last minute if that is less, over the first. Raises ``CannotMeasure``."""
    count = max(1, round(len(rates) * min(1 / 6, 60 / seconds)))
    if not any(rates[:count]):
        raise CannotMeasure(f"nothing was completed in the first part of {seconds:g} s: give --seconds more")
    return statistics.mean(rates[-count:]) / statistics.mean(rates[:count])


def _steady(
    settings: Settings,
    kind: str,
    seconds: float,
    tell: Tell,
    at_begin: Callable[[], object] | None = None,
) -> list[float]:
    """Jobs/s completed in each slice of time by one process, a few thousand waiting, after a warm-up."""
    slices = max(SLICES, round(seconds))
    counts = [0] * slices
    warm_up = min(WARM_UP, seconds / 10)
    with ExitStack() as stack:
        worker = stack.enter_context(
            Role("bare-steady-work" if kind == "bare" else "steady-work", settings.dsn, settings.concurrency)
        )
        if kind == "bare":
            stack.callback(worker.kill)
        producer = stack.enter_context(Role("steady-produce", settings.dsn, kind))
        stack.callback(producer.kill)  # it would send what it has leave for
        for _ in range(WINDOWS[kind] // CHUNK):
            producer.go()
        begin = time.monotonic() + warm_up
        while time.monotonic() < begin:
            worker.hear()
            producer.go()
        if at_begin is not None:
            at_begin()
        begin = told = time.monotonic()
        while (passed := time.monotonic() - begin) < seconds:
            completed = worker.hear()["completed"]
            producer.go()
            at = int((time.monotonic() - begin) / seconds * slices)
            if at < slices:
                counts[at] += completed
            if time.monotonic() > told + 0.25:
                told = time.monotonic()
                tell(passed / seconds)
    return [count * slices / seconds for count in counts]


def _middles(rates: list[float], seconds: float) -> list[float]:
    """The moment of each slice, in seconds since the first."""
    return [(number + 0.5) * seconds / len(rates) for number in range(len(rates))]

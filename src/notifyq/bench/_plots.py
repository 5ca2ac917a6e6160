"""Pictures of a report: pickups as a histogram, throughput by time. Needs matplotlib, which is an extra."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["draw", "is_installed"]

FORMATS = ("png", "svg")

BINS = 60

TAIL = 0.99
"""The part of the samples that a histogram shows: the axis would be made for a single stray one otherwise."""


def is_installed() -> bool:
    """Whether pictures can be drawn."""
    return find_spec("matplotlib") is not None


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what the workloads of a report have samples for, one file for each and format; returns the files."""
    figure_class = import_module("matplotlib.figure").Figure
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for name, found in report["workloads"].items():
        if name not in PICTURES:
            continue
        figure = figure_class(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        PICTURES[name](axes, found["runs"])
        axes.set_title(f"{name}: notifyq {report['notifyq']}, PostgreSQL {report['server_version']}")
        axes.grid(alpha=0.3)
        axes.legend()
        for suffix in FORMATS:
            files.append(folder / f"{name}.{suffix}")
            figure.savefig(files[-1])
    return files


def _latency(axes: Any, runs: list[dict[str, Any]]) -> None:
    """Pickups of all runs together, beside those of the limit."""
    series = {
        label: sorted(sample for run in runs for sample in run[key])
        for label, key in (("notifyq", "samples_ms"), ("by hand", "limit_samples_ms"))
    }
    most = max(samples[int(len(samples) * TAIL) - 1] for samples in series.values())
    for label, samples in series.items():
        axes.hist(samples, bins=BINS, range=(0, most), alpha=0.6, label=f"{label}, {len(samples)} sends")
    axes.set_xlabel(f"ms from send to the worker's first line (to the {TAIL:.0%} quantile)")
    axes.set_ylabel("sends")


def _sustained(axes: Any, runs: list[dict[str, Any]]) -> None:
    """Each run's throughput by time."""
    for number, run in enumerate(runs, 1):
        axes.plot(run["throughput_at"], run["throughput"], label=f"run {number}")
    _by_time(axes)


def _pinned(axes: Any, runs: list[dict[str, Any]]) -> None:
    """The three curves of each run; a colour for what was measured, its runs the paler the earlier they were."""
    lines = (
        ("throughput", "snapshot held open"),
        ("control_throughput", "no snapshot"),
        ("limit_throughput", "by hand on a bare table, snapshot held open"),
    )
    for number, run in enumerate(runs, 1):
        for colour, (key, label) in enumerate(lines):
            axes.plot(
                run["throughput_at"],
                run[key],
                color=f"C{colour}",
                alpha=number / len(runs),
                label=label if number == len(runs) else None,
            )
    _by_time(axes)


def _by_time(axes: Any) -> None:
    axes.set_xlabel("s")
    axes.set_ylabel("jobs/s completed")
    axes.set_ylim(bottom=0)


PICTURES: dict[str, Callable[[Any, list[dict[str, Any]]], None]] = {
    "latency": _latency,
    "sustained": _sustained,
    "pinned": _pinned,
}

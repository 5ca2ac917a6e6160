"""The workloads, and which options mean something to which of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from ._backlog import backlog
from ._idle import idle
from ._queues import queues
from ._rules import flows, keys
from ._scaling import scaling
from ._senders import senders
from ._sustained import pinned, sustained
from ._workloads import drain, enqueue, latency

if TYPE_CHECKING:
    from ._parts import Workload

__all__ = ["ALL", "MAIN", "PLOTTED", "Kind", "check", "doubts"]


@attrs.frozen
class Kind:
    """A workload and how it is run when nothing is said."""

    run: Workload
    uses: tuple[str, ...]
    """The options that it reads."""
    seconds: float = 0.0
    queues: int = 0
    repeat: int = 3
    warm_up: int = 1


ALL = {
    "enqueue": Kind(enqueue, ("jobs", "processes", "concurrency", "batch")),
    "drain": Kind(drain, ("jobs", "processes", "concurrency", "kept")),
    "latency": Kind(latency, ("jobs",)),
    "keys": Kind(keys, ("jobs", "processes", "concurrency")),
    "flows": Kind(flows, ("processes", "concurrency", "kept")),
    "scaling": Kind(scaling, ("processes",)),
    "senders": Kind(senders, ("senders", "seconds", "processes", "concurrency"), seconds=24.0),
    "sustained": Kind(sustained, ("seconds", "concurrency"), seconds=30.0, repeat=1, warm_up=0),
    "pinned": Kind(pinned, ("seconds", "concurrency"), seconds=60.0, repeat=1, warm_up=0),
    "idle": Kind(idle, ("seconds", "queues"), seconds=60.0, queues=10, repeat=1, warm_up=0),
    "backlog": Kind(backlog, ("backlog", "seconds"), seconds=5.0, repeat=1, warm_up=0),
    "queues": Kind(queues, ("queues",), queues=1000, repeat=1, warm_up=0),
}

MAIN = ("enqueue", "drain", "latency")
"""What is measured if nothing is named."""

FEW = 3
"""With fewer runs there is no median to speak of."""

PLOTTED = ("latency", "sustained", "pinned")
"""Those that have something to plot."""


def check(names: list[str], given: dict[str, Any]) -> str | None:
    """What is wrong with the options given on the command line for these workloads, in one line; None: nothing."""
    for option, readers in _read(given).items():
        if not set(readers) & set(names):
            return f"{_flag(option)} for {', '.join(readers)}, not for {', '.join(names)}"
    jobs, processes = given.get("jobs"), given.get("processes", 1)
    if jobs is not None and processes > jobs and "enqueue" in names:
        return f"--jobs {jobs} is too few for --processes {processes}: each sends at least one"
    file = given.get("json_file")
    if file is not None and not file.parent.is_dir():
        return f"--json: there is no folder {file.parent}"
    return None


def doubts(names: list[str], given: dict[str, Any]) -> list[str]:
    """What of the given options does not do what one could think, a line each."""
    found = []
    if names != list(ALL):
        for option, readers in _read(given).items():
            if others := [name for name in names if name not in readers]:
                found.append(f"{_flag(option)} for {', '.join(readers)}: it changes nothing of {', '.join(others)}")
    if (repeat := given.get("repeat")) is not None and repeat < FEW:
        found.append(f"--repeat {repeat}: the median of so few runs says little, {FEW} or more show their spread")
    return found


def _read(given: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The options that were given and that only some workloads read, and these."""
    readers = {
        option: PLOTTED if option == "plot" else tuple(name for name, kind in ALL.items() if option in kind.uses)
        for option, value in given.items()
        if value is not None
    }
    return {option: names for option, names in readers.items() if names}


def _flag(option: str) -> str:
    return "--kept and --not-kept are" if option == "kept" else f"--{option} is"

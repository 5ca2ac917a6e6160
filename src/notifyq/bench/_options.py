"""The workloads, and which options mean something to which of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from ._backlog import backlog
from ._idle import idle
from ._queues import queues
from ._rules import flows, keys
from ._senders import senders
from ._sustained import pinned, sustained
from ._workloads import drain, enqueue, latency

if TYPE_CHECKING:
    from ._parts import Workload

__all__ = ["ALL", "MAIN", "PLOTTED", "Kind", "check"]


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
    "senders": Kind(senders, ("senders", "seconds", "processes", "concurrency"), seconds=24.0),
    "sustained": Kind(sustained, ("seconds", "concurrency"), seconds=30.0, repeat=1, warm_up=0),
    "pinned": Kind(pinned, ("seconds", "concurrency"), seconds=60.0, repeat=1, warm_up=0),
    "idle": Kind(idle, ("seconds", "queues"), seconds=60.0, queues=10, repeat=1, warm_up=0),
    "backlog": Kind(backlog, ("backlog", "seconds"), seconds=5.0, repeat=1, warm_up=0),
    "queues": Kind(queues, ("queues",), queues=1000, repeat=1, warm_up=0),
}

MAIN = ("enqueue", "drain", "latency")
"""What is measured if nothing is named."""

PLOTTED = ("latency", "sustained", "pinned")
"""Those that have something to plot."""


def check(names: list[str], given: dict[str, Any]) -> str | None:
    """What is wrong with the options given on the command line for these workloads, in one line; None: nothing."""
    for option, value in given.items():
        readers = PLOTTED if option == "plot" else tuple(name for name, kind in ALL.items() if option in kind.uses)
        if value is not None and readers and not set(readers) & set(names):
            flag = "--kept and --not-kept are" if option == "kept" else f"--{option} is"
            return f"{flag} for {', '.join(readers)}, not for {', '.join(names)}"
    jobs, processes = given.get("jobs"), given.get("processes", 1)
    if jobs is not None and processes > jobs and "enqueue" in names:
        return f"--jobs {jobs} is too few for --processes {processes}: each sends at least one"
    file = given.get("json_file")
    if file is not None and not file.parent.is_dir():
        return f"--json: there is no folder {file.parent}"
    return None

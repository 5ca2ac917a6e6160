"""One process of a peer: takes commands and answers in lines of JSON. Imports nothing but the standard library.

Commands, one JSON object a line on stdin, each answered by one line on stdout once it is carried out:

- ``install``: make the schema, and whatever queue needs to exist. ``ready``: nothing, but to answer.
- ``start``: work on every queue. ``ran``: how many calls of the handler began, and when the first did.
- ``pickups``: how many, with percentiles of the time from send to the first line of the handler. ``forget``: begin anew,
  and answer as ``ran`` does.
- ``open``: connect as a producer. ``paced``: so many sends one by one, ``gap`` seconds apart on average.
  ``fill``: so many jobs in calls of ``chunk``. ``singly``: sends one by one by so many tasks, for so many seconds.

The data of a job is the moment it was sent, in microseconds of the clock that all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

QUEUE = "compare"


def now() -> int:
    """Microseconds of the machine's monotonic clock."""
    return time.monotonic_ns() // 1000


class Meter:
    """What the handler of a worker process saw."""

    def __init__(self) -> None:
        self.pickups: list[int] = []
        self.first: int | None = None

    def handled(self, sent: int) -> int:
        """The whole of a job: note when it began, and return something to keep."""
        at = now()
        if self.first is None:
            self.first = at
        self.pickups.append(at - sent)
        return sent

    def ran(self) -> dict[str, Any]:
        """How much has been run."""
        return {"ran": len(self.pickups), "first": self.first}

    def report(self) -> dict[str, Any]:
        """How quickly."""
        self.ran()
        found = sorted(self.pickups)
        return {"ran": len(found)} | {
            f"p{p}_ms": found[math.ceil(len(found) * p / 100) - 1] / 1000 for p in (50, 99) if found
        }

    def forget(self) -> dict[str, Any]:
        """Begin anew, and say how much is forgotten."""
        told = self.ran()
        self.pickups, self.first = [], None
        return told


class Peer:
    """What an adapter does; takes the DSN, the settings of the row, and the names of the queues."""

    meter: Meter = Meter()

    def __init__(self, dsn: str, settings: dict[str, Any], queues: list[str]) -> None:
        self.dsn, self.settings, self.queues = dsn, settings, queues

    async def install(self) -> None:
        """Make the schema and the queues."""
        raise NotImplementedError

    async def open(self) -> None:
        """Connect as a producer."""
        raise NotImplementedError

    async def start(self) -> None:
        """Work on every queue, until the process is killed."""
        raise NotImplementedError

    async def send(self, data: int) -> None:
        """Send one job."""
        raise NotImplementedError

    async def send_many(self, data: list[int]) -> None:
        """Send many in the quickest call there is."""
        raise NotImplementedError

    # asyncio's; an adapter of another library has its own
    async def sleep(self, seconds: float) -> None:
        """Sleep."""
        await asyncio.sleep(seconds)

    async def together(self, function: Callable[[], Awaitable[None]], tasks: int) -> None:
        """Run so many at once."""
        await asyncio.gather(*(function() for _ in range(tasks)))

    async def line(self) -> str:
        """The next line of stdin."""
        return await asyncio.to_thread(sys.stdin.readline)


def say(**line: Any) -> None:
    """Answer."""
    print(json.dumps(line), flush=True)


async def _paced(peer: Peer, jobs: int, gap: float) -> None:
    for _ in range(jobs):
        await peer.sleep(random.uniform(0.5, 1.5) * gap)
        await peer.send(now())


async def _fill(peer: Peer, jobs: int, chunk: int) -> None:
    for begin in range(0, jobs, chunk):
        await peer.send_many([now()] * min(chunk, jobs - begin))


async def _singly(peer: Peer, seconds: float, tasks: int) -> dict[str, Any]:
    sent, started = 0, time.perf_counter()

    async def sender() -> None:
        nonlocal sent
        while time.perf_counter() - started < seconds:
            await peer.send(now())
            sent += 1

    await peer.together(sender, tasks)
    return {"seconds": time.perf_counter() - started, "sent": sent}


async def carry_out(peer: Peer, do: str, **options: Any) -> dict[str, Any]:
    """Do one command and give its answer."""
    match do:
        case "ready":
            pass
        case "ran":
            return peer.meter.ran()
        case "pickups":
            return peer.meter.report()
        case "forget":
            return peer.meter.forget()
        case "paced":
            await _paced(peer, **options)
        case "fill":
            await _fill(peer, **options)
        case "singly":
            return await _singly(peer, **options)
        case _:  # install, open, start
            await getattr(peer, do)()
    return {"done": True}


async def serve(peer: Peer) -> None:
    """Answer commands until stdin is closed."""
    while line := await peer.line():
        try:
            say(**await carry_out(peer, **json.loads(line)))
        except Exception as error:
            say(error=f"{type(error).__name__}: {error}")


def specification() -> dict[str, Any]:
    """What the parent tells of the cell: ``dsn``, ``settings``, ``queues``."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    return spec


def main(make: type[Peer]) -> None:
    """Run the process. ``loop`` of the settings may be ``uvloop``."""
    spec = specification()

    async def run() -> None:
        await serve(make(**spec))

    if spec["settings"].get("loop") == "uvloop":
        import uvloop

        uvloop.run(run())
    else:
        asyncio.run(run())

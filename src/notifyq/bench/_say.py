"""How a process of the benchmark talks with the one that started it: lines of JSON out, lines in."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from notifyq import Runtime

__all__ = ["say", "serve", "wait_for_go"]


def say(**line: Any) -> None:
    """Tell the parent something."""
    print(json.dumps(line), flush=True)


async def wait_for_go() -> bool:
    """Wait until the parent writes a line; False when it has closed stdin."""
    return bool(await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True))


async def serve(runtime: Runtime) -> None:
    """Run a runtime until the parent closes stdin."""
    async with trio.open_nursery() as nursery:
        await nursery.start(runtime.run)
        say(ready=True)
        await wait_for_go()
        runtime.stop()

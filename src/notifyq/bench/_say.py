"""How a process of the benchmark talks with the one that started it: lines of JSON out, lines in."""

from __future__ import annotations

import json
import sys
from typing import Any

import trio

__all__ = ["say", "wait_for_go"]


def say(**line: Any) -> None:
    """Tell the parent something."""
    print(json.dumps(line), flush=True)


async def wait_for_go() -> bool:
    """Wait until the parent writes a line; False when it has closed stdin."""
    return bool(await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True))

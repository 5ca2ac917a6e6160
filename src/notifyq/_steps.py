"""Waits in trio for what psycopg's protocol generators say they wait for."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import psycopg
import trio
from psycopg.waiting import Ready, Wait

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = ["Step"]


class Step:
    """A protocol generator under way: it can be left while it waits and be picked up again."""

    def __init__(self, gen: Generator[Any, Any, Any], fd: int) -> None:
        self._gen = gen
        self._fd = fd
        self._want: Wait | None = None

    def abandon(self) -> None:
        """End the generator here: its clean-up uses the connection, which is closed, and would complain elsewhere."""
        with contextlib.suppress(psycopg.Error, RuntimeError):
            self._gen.close()

    async def finish(self) -> Any:
        try:
            if self._want is None:
                self._want = next(self._gen)
            while True:
                ready = await _wait_ready(self._fd, self._want)
                self._want = self._gen.send(ready)
        except StopIteration as end:
            return end.value


async def _wait_ready(fd: int, want: Wait) -> Ready:
    if want == Wait.R:
        await trio.lowlevel.wait_readable(fd)
        return Ready.R
    if want == Wait.W:
        await trio.lowlevel.wait_writable(fd)
        return Ready.W
    # Read or write, whichever comes first: waiting for one alone can wait for ever when both
    # sides' buffers are full.
    first: list[Ready] = []

    async def race(wait: Callable[[int], Any], ready: Ready) -> None:
        await wait(fd)
        first.append(ready)
        nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(race, trio.lowlevel.wait_readable, Ready.R)
            nursery.start_soon(race, trio.lowlevel.wait_writable, Ready.W)
    except BaseExceptionGroup:
        await trio.lowlevel.checkpoint_if_cancelled()  # raises Cancelled itself, as the other waits do
        raise
    return Ready.RW if len(first) == 2 else first[0]

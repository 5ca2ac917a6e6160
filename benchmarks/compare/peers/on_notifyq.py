"""notifyq itself, on trio."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import role
import trio

from notifyq import Job, Queue, Runtime, connect

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class NotifyqPeer(role.Peer):
    """The client and the runtime."""

    def __init__(self, nursery: trio.Nursery, stack: AsyncExitStack, **spec: Any) -> None:
        super().__init__(**spec)
        self.nursery, self.stack = nursery, stack
        options = self.settings.get("queue", {})
        self.declared = [Queue(name, int, int, **options) for name in self.queues]

    async def install(self) -> None:
        async with connect(self.dsn) as nq:
            for queue in self.declared:
                await nq.create_queue(queue)

    async def open(self) -> None:
        self.nq = await self.stack.enter_async_context(connect(self.dsn, migrate=False))
        await self.nq.queue_stats()  # it connects when it is first used

    async def send(self, data: int) -> None:
        await self.nq.send(self.declared[0], data)

    async def send_many(self, data: list[int]) -> None:
        await self.nq.send_many(self.declared[0], data)

    async def start(self) -> None:
        async def handled(job: Job[int]) -> int:
            return self.meter.handled(job.data)

        for queue in self.declared:
            queue.worker(**self.settings.get("worker", {}))(handled)
        await self.nursery.start(Runtime(self.declared, dsn=self.dsn, migrate=False).run)

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)

    async def together(self, function: Callable[[], Awaitable[None]], tasks: int) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(function)

    async def line(self) -> str:
        return await trio.to_thread.run_sync(sys.stdin.readline)


async def main() -> None:
    """Serve within a nursery."""
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        await role.serve(NotifyqPeer(nursery, stack, **role.specification()))
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)

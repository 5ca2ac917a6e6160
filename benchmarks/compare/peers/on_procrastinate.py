"""procrastinate, by its psycopg connector: https://procrastinate.readthedocs.io"""

from __future__ import annotations

import asyncio
from typing import Any

import procrastinate
import role


class ProcrastinatePeer(role.Peer):
    """An app with one task."""

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        connector = procrastinate.PsycopgConnector(conninfo=self.dsn, **self.settings["pool"])
        self.app = procrastinate.App(connector=connector)

        @self.app.task(queue=role.QUEUE, name="handled")
        async def handled(sent: int) -> int:
            return self.meter.handled(sent)

        self.task = handled

    async def install(self) -> None:
        async with self.app.open_async():
            await self.app.schema_manager.apply_schema_async()

    async def open(self) -> None:
        await self.app.open_async()

    async def send(self, data: int) -> None:
        await self.task.defer_async(sent=data)

    async def send_many(self, data: list[int]) -> None:
        await self.task.batch_defer_async(*({"sent": one} for one in data))

    async def start(self) -> None:
        await self.app.open_async()
        options = {"queues": self.queues, "install_signal_handlers": False, **self.settings["worker"]}
        self.running = asyncio.create_task(self.app.run_worker_async(**options))


if __name__ == "__main__":
    role.main(ProcrastinatePeer)

"""pgqueuer, by its asyncpg drivers: https://pgqueuer.readthedocs.io"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import asyncpg
import role
from pgqueuer import PgQueuer
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver, AsyncpgPoolDriver
from pgqueuer.adapters.persistence.queries import Queries

if TYPE_CHECKING:
    from pgqueuer.domain.models import Job


class PgQueuerPeer(role.Peer):
    """Queries send; the entry points of a PgQueuer work."""

    async def _driver(self) -> Any:
        return AsyncpgDriver(await asyncpg.connect(self.dsn))

    async def install(self) -> None:
        queries = Queries(await self._driver())
        await queries.install()
        if self.settings["autovac"]:
            await queries.optimize_autovacuum()

    async def open(self) -> None:
        size = self.settings.get("producer_pool")
        pool = size and AsyncpgPoolDriver(await asyncpg.create_pool(self.dsn, min_size=size, max_size=size))
        self.sender = Queries(pool or await self._driver())

    async def send(self, data: int) -> None:
        await self.sender.enqueue(role.QUEUE, b"%d" % data)

    async def send_many(self, data: list[int]) -> None:
        await self.sender.enqueue([role.QUEUE] * len(data), [b"%d" % one for one in data], [0] * len(data))

    async def start(self) -> None:
        worker = PgQueuer(await self._driver())

        async def handled(job: Job) -> None:
            self.meter.handled(int(job.payload or 0))

        for queue in self.queues:
            worker.entrypoint(queue)(handled)
        self.running = asyncio.create_task(worker.run(**self.settings["run"]))


if __name__ == "__main__":
    role.main(PgQueuerPeer)

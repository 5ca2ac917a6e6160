"""awa, by its Python bindings: https://github.com/hardbyte/awa"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import awa
import role


@dataclass
class Sent:
    """The data of a job."""

    at: int


class AwaPeer(role.Peer):
    """An AsyncClient, which sends and works."""

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        options, served = self.settings["client"], len(self.queues)
        if (
            served > 1
        ):  # each holds a connection to listen and one for each claimer: with its default of 10, start() hangs
            options = {"max_connections": served * (1 + self.settings["queue"].get("claimers", 0)) + 10}
        self.client = awa.AsyncClient(self.dsn, **options)

    async def install(self) -> None:
        await self.client.migrate()
        await self.client.install_queue_storage()  # the first worker would do it, but a producer may be first here

    async def open(self) -> None:
        pass  # it connects when it is first used

    async def send(self, data: int) -> None:
        await self.client.insert(Sent(data), queue=role.QUEUE)

    async def send_many(self, data: list[int]) -> None:
        await self.client.enqueue_many_copy([Sent(one) for one in data], queue=role.QUEUE)

    async def start(self) -> None:
        @self.client.task(Sent, queue=role.QUEUE)
        async def handled(job: awa.Job[Sent]) -> None:
            self.meter.handled(job.args.at)

        await self.client.start([{"name": queue, **self.settings["queue"]} for queue in self.queues])


if __name__ == "__main__":
    role.main(AwaPeer)

"""chancy, with its process executor (the default) or its asyncio executor: https://tkte.ch/chancy"""

from __future__ import annotations

import logging
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import role
from chancy import Chancy, Job, Queue, Worker

LOG = "COMPARE_CHANCY_LOG"
"""Environment variable: the file in which processes of the executor note what they have run."""

ENTRY = struct.Struct("<qq")


class LogMeter(role.Meter):
    """Reads what other processes have run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.file = path.open("rb")

    def ran(self) -> dict[str, Any]:
        for at, sent in ENTRY.iter_unpack(self.file.read()):
            self.first = at if self.first is None else min(at, self.first)
            self.pickups.append(at - sent)
        return super().ran()


async def run(sent: int) -> int:
    """The job, in the worker's own process."""
    return role.Peer.meter.handled(sent)


def run_elsewhere(sent: int) -> int:
    """The job, in a process of the executor: one short append, which is never torn."""
    with Path(os.environ[LOG]).open("ab", buffering=0) as file:
        file.write(ENTRY.pack(role.now(), sent))
    return sent


class ChancyPeer(role.Peer):
    """A Chancy, and its Worker."""

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        quiet = {"log": logging.getLogger("quiet")} if self.settings.get("quiet") else {}  # it logs every job
        self.chancy = Chancy(self.dsn, **self.settings["pool"], **quiet)
        self.here = "executor" in self.settings["queue"]
        self.function = f"on_chancy.{'run' if self.here else 'run_elsewhere'}"

    async def install(self) -> None:
        async with self.chancy as chancy:
            await chancy.migrate()
            for queue in self.queues:
                await chancy.declare(Queue(queue, **self.settings["queue"]))

    async def open(self) -> None:
        await self.chancy.__aenter__()

    def _job(self, data: int) -> Job:
        return Job(func=self.function, queue=role.QUEUE, kwargs={"sent": data})

    async def send(self, data: int) -> None:
        await self.chancy.push(self._job(data))

    async def send_many(self, data: list[int]) -> None:
        async for _ in self.chancy.push_many([self._job(one) for one in data]):
            pass

    async def start(self) -> None:
        if not self.here:
            log = Path(tempfile.gettempdir()) / "ran"  # a folder of this process
            log.touch()
            os.environ[LOG] = str(log)
            self.meter = LogMeter(log)
        await self.open()
        worker = Worker(self.chancy, register_signal_handlers=False)
        if "send_outgoing_interval" in self.settings:
            worker.send_outgoing_interval = self.settings["send_outgoing_interval"]
        await worker.start()
        self.worker = worker


if __name__ == "__main__":
    role.main(ChancyPeer)

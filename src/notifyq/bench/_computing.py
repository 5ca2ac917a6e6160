"""What ``notifyq run`` runs in the scaling workload: jobs that only compute."""

from __future__ import annotations

import time

from notifyq import Job, Queue, Runtime

__all__ = ["COMPUTING", "SECONDS", "compute", "runtime"]

COMPUTING: Queue[int, None] = Queue("bench.scaling", int, None)

SECONDS = 0.001
"""Of processor time that a job takes."""


def compute() -> None:
    """Keep a processor busy for as long as a job takes."""
    until = time.thread_time() + SECONDS
    while time.thread_time() < until:
        pass


@COMPUTING.worker
async def work(_: Job[int]) -> None:
    compute()


runtime = Runtime([COMPUTING], migrate=False)

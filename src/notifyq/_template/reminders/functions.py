"""The worker functions: what a job does. They know nothing of queues or databases."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

import notifyq

log = logging.getLogger("reminders")


@attrs.frozen
class Reminder:
    message: str
    fail: bool = False


@attrs.frozen
class Echo:
    result: str


async def remind(job: notifyq.Job[Reminder]) -> Echo:
    await trio.sleep(1)
    if job.data.fail:
        raise ValueError(f"asked to fail: {job.data.message}")
    return Echo(f"echo: {job.data.message}")


def confirm_order(job: notifyq.Job[dict[str, Any]]) -> str:
    """A plain function runs in a thread, so it may block."""
    return f"order {job.data['id']} for {job.data['item']} confirmed"


@asynccontextmanager
async def log_job(job: notifyq.Job[Any]) -> AsyncIterator[None]:
    """Middleware: around every job of a queue that names it."""
    log.info("job %d starts, attempt %d", job.id, job.attempt)
    try:
        yield
    finally:
        log.info("job %d ended", job.id)

"""The runtime server: python -m reminders.start, with DATABASE_URL set."""

import logging

import notifyq
import trio

from .wiring import missed, runtime


async def create_queues() -> None:
    """Queues with a worker are created by the runtime; this one has none."""
    async with notifyq.connect() as nq:
        await nq.create_queue(missed)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    trio.run(create_queues)
    notifyq.run(runtime)


if __name__ == "__main__":
    main()

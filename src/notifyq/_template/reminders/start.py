"""The runtime server: python -m reminders.start, with DATABASE_URL set."""

import logging

import notifyq

from .wiring import runtime


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    notifyq.run(runtime)


if __name__ == "__main__":
    main()

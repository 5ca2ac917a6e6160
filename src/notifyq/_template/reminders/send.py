"""Sends two reminders and waits for what becomes of them: python -m reminders.send, while the runtime runs."""

import trio

import notifyq

from .functions import Reminder
from .wiring import reminders


async def main() -> None:
    async with notifyq.connect() as nq:
        good = await nq.send(reminders, Reminder("tea is ready"))
        bad = await nq.send(reminders, Reminder("nobody home", fail=True), retry_limit=0)
        print(await nq.result(good))
        try:
            await nq.result(bad)
        except notifyq.JobFailed as error:
            print(error)


if __name__ == "__main__":
    trio.run(main)

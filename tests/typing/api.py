"""Checked by mypy, never run: what is inferred from a queue's declaration."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, assert_type

import attrs

import notifyq
from notifyq import Job, Queue, Schedule, ScheduleRecord, Sent


@attrs.frozen
class Reminder:
    message: str


@attrs.frozen
class Echo:
    result: str


reminders = Queue("reminders", Reminder, Echo, retry_limit=3)
assert_type(reminders, Queue[Reminder, Echo])
assert_type(Queue("plain"), Queue[Any, Any])
assert_type(Queue("input", int), Queue[int, Any])
assert_type(Queue("nothing back", int, None), Queue[int, None])


@reminders.worker
async def remind(job: Job[Reminder]) -> Echo:
    assert_type(job.data, Reminder)
    return Echo(job.data.message)


@Queue("sync", Reminder, Echo).worker(concurrency=2)
def remind_in_thread(job: Job[Reminder]) -> Echo:
    return Echo(job.data.message)


@Queue("transaction", Reminder, Echo).worker(transaction=True, concurrency=2, min_priority=5)
async def remind_in_transaction(job: Job[Reminder], connection: notifyq.Connection) -> Echo:
    assert_type(job.data, Reminder)
    cursor = await connection.execute("select 1")
    assert_type(await cursor.fetchone(), tuple[Any, ...] | None)
    return Echo(job.data.message)


@Queue("transaction", Reminder, Echo).worker(transaction=True)  # type: ignore[arg-type]
async def without_connection(job: Job[Reminder]) -> Echo:
    return Echo("")


@Queue("transaction", Reminder, Echo).worker(transaction=True)  # type: ignore[arg-type]
async def wrong_output_in_transaction(job: Job[Reminder], connection: notifyq.Connection) -> int:
    return 1


@Queue("transaction", Reminder, Echo).worker(concurrency=2)  # type: ignore[arg-type]
async def unexpected_connection(job: Job[Reminder], connection: notifyq.Connection) -> Echo:
    return Echo("")


@reminders.worker  # type: ignore[arg-type]
async def wrong_output(job: Job[Reminder]) -> int:
    return 1


@reminders.worker  # type: ignore[arg-type]
async def wrong_input(job: Job[int]) -> Echo:
    return Echo("")


@Queue("batch", int, str).batch_worker(batch_size=10)
async def batch(jobs: list[Job[int]]) -> list[str | Exception]:
    return [str(job.data) for job in jobs]


@Queue("fired", schedules=[Schedule(every=60)]).worker
async def fired(job: Job[Any]) -> None:
    assert_type(job.fired_for, datetime | None)


async def client() -> None:
    async with notifyq.connect() as nq:
        sent = await nq.send(reminders, Reminder("tea"), delay=5, priority=1)
        assert_type(sent, Sent[Echo])
        assert_type(await nq.result(sent), Echo)
        assert_type(await nq.result(1), Any)
        assert_type(await nq.send_many(reminders, [Reminder("a")]), list[Sent[Echo]])
        assert_type(await nq.fetch(reminders), list[Job[Reminder]])
        daily = Schedule("0 3 * * *", timezone="Europe/Berlin", data=Reminder("tea"), missed="skip")
        assert_type(await nq.schedule(reminders, daily), str)
        assert_type(await nq.schedules(), list[ScheduleRecord])
        assert_type(daily.next_firings(2), list[datetime])
        assert_type(await nq.publish("order.paid", Reminder("tea"), id_key="k"), dict[str, int])
        Schedule(every=timedelta(hours=1), missed="all")  # type: ignore[arg-type]
        await nq.send(reminders, Echo("no"))  # type: ignore[misc]
        await nq.send(reminders, Reminder("tea"), dealy=5)  # type: ignore[call-arg]
        assert_type(reminders.statement(Reminder("tea")), tuple[str, tuple[Any, ...]])

"""Runtimes that fire schedules, and the client's and the command line's side of schedules and events."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

import notifyq
from notifyq import InvalidData, InvalidOption, Job, Queue, Schedule, ScheduleRecord, UnknownQueue
from notifyq._store_schedules import Schedules
from notifyq.events import JobCompleted, RuntimeStopped, ScheduleBroken, ScheduleFired, ScheduleMissed, ServerTrouble

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

HOUR = 3600.0
"""A poll interval, or a lease, at which only a timer or the bell can have been at work."""

EVERY = timedelta(milliseconds=100)


async def until(holds: Callable[[], Awaitable[Any]], seconds: float = 10) -> Any:
    """Look until something is so, and return what was found."""
    with trio.fail_after(seconds):
        while not (found := await holds()):
            await trio.sleep(0.005)
    return found


def working(name: str = "q", *schedules: Schedule) -> tuple[Queue[Any, Any], list[Job[Any]]]:
    """A queue with a worker, and the jobs that it has run."""
    queue: Queue[Any, Any] = Queue(name, schedules=schedules)
    done: list[Job[Any]] = []

    @queue.worker(poll_interval=HOUR)
    async def work(job: Job[Any]) -> None:
        done.append(job)

    return queue, done


# firing


async def test_each_firing_makes_one_job_however_many_runtimes_there_are(start, ask):
    queue, done = working("q", Schedule(every=EVERY))
    first = await start(queue)
    second = await start(queue)
    third = await start(working("other")[0])  # fires what it does not work on, too
    await first.wait(JobCompleted, 5)
    await second.wait(JobCompleted, 5)
    await until(lambda: _has(done, 30))
    for seen in (first, second, third):
        seen.runtime.stop()
    for seen in (first, second, third):
        await seen.wait(RuntimeStopped)
    rows = await ask("select headers ->> 'fired_for', sent_at from notifyq.jobs where queue = 'q' order by id")
    moments = sorted(datetime.fromisoformat(text) for text, _ in rows)
    assert {later - earlier for earlier, later in itertools.pairwise(moments)} == {EVERY}
    fired = [event for seen in (first, second, third) for event in seen.of(ScheduleFired)]
    assert len(moments) >= 30
    assert {event.fired_for for event in fired} <= set(moments)  # the end of a runtime may come before its last event
    assert len({event.job_id for event in fired}) == len({event.fired_for for event in fired}) == len(fired) >= 30


async def _has(found: list[Any], count: int) -> bool:
    return len(found) >= count


async def test_a_firing_is_on_time_with_the_poll_set_to_an_hour(start, ask):
    queue, done = working(
        "q", Schedule("* * * * * *", data="tick"), Schedule(every=0.7, name="interval", missed="skip")
    )
    seen = await start(queue)
    await until(lambda: _has(done, 7))
    late = [(job.sent_at - job.fired_for).total_seconds() for job in done if job.fired_for]
    assert len(late) == len(done)
    assert [seconds for seconds in late if not 0 <= seconds < 0.1] == []
    assert {(job.headers["schedule"], job.data) for job in done} == {("default", "tick"), ("interval", None)}
    assert {job.fired_for.microsecond for job in done if job.data == "tick" and job.fired_for} == {0}
    assert seen.of(ServerTrouble) == []


async def test_a_schedule_made_in_sql_is_worked_out_by_a_runtime_and_fires(start, nq, ask):
    queue, done = working()
    await start(queue, lease=HOUR)  # no beat
    await ask("select notifyq.schedule('q', '* * * * * *', timezone => 'Asia/Kathmandu', data => '1')")
    await until(lambda: _has(done, 2))
    assert await ask("select notifyq.schedule('q', '0 0 29 2 *', timezone => 'Europe/Berlin')") == [("changed",)]
    [record] = await until(lambda: _planned(nq))
    assert record.next_at == datetime(2028, 2, 28, 23, tzinfo=UTC) or record.next_at.year > 2028
    count = len(done)
    assert await nq.unschedule(queue)
    await nq.send(queue, "after")
    await until(lambda: _has(done, count + 1))
    assert await nq.schedules() == []


async def _planned(nq: notifyq.Client) -> list[ScheduleRecord]:
    records = await nq.schedules()
    return records if records and all(record.next_at for record in records) else []


async def test_a_change_that_no_notification_told_of_is_found_by_the_beat(start, ask):
    queue, done = working()
    await start(queue, lease=1.0)
    await ask(
        "insert into notifyq.schedule (queue, name, every, timezone, missed, next_at)"
        " select number, 'quiet', '100 ms', 'UTC', 'once', notifyq.next_multiple('100 ms', now()) from notifyq.queue"
    )
    await until(lambda: _has(done, 2))


async def test_a_schedule_that_has_changed_unheard_is_looked_for_when_it_is_due(start, ask):
    queue, done = working("q", Schedule(every=EVERY))
    await start(queue, lease=HOUR)
    await until(lambda: _has(done, 2))
    await ask("update notifyq.schedule set number = default, data = '1'")
    await until(lambda: _has([job for job in done if job.data == 1], 2))


async def test_firing_goes_on_after_the_connections_broke_without_a_job_twice(start, ask, connection):
    queue, done = working("q", Schedule(every=EVERY))
    await start(queue)
    for _ in range(3):
        count = len(done)
        await until(lambda count=count: _has(done, count + 3))
        await ask(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
    moments = [text for (text,) in await ask("select headers ->> 'fired_for' from notifyq.jobs")]
    assert len(set(moments)) == len(moments)


async def test_more_schedules_than_are_known_at_a_time_fire_in_turn(start, nq, monkeypatch):
    monkeypatch.setattr("notifyq._scheduler.HOW_MANY", 3)
    queue, done = working(
        "q", *(Schedule("* * * * * *", name=f"n{n}", data=n) for n in range(8)), Schedule(every=0.3, name="e")
    )
    await start(queue)
    await until(lambda: _has(done, 40))
    firings = [(job.headers["schedule"], job.fired_for) for job in done]
    assert len(set(firings)) == len(firings)
    assert {name for name, _ in firings} == {*(f"n{n}" for n in range(8)), "e"}


@pytest.mark.parametrize("others", [(), (Schedule(every=7200, name="one"),)], ids=["removed", "changed"])
async def test_of_programs_that_declare_other_schedules_the_last_one_wins_and_says_so(start, nq, ask, caplog, others):
    first, _ = working("q", Schedule(every=3600, name="one"))
    await start(first)
    await nq.declare([first])
    assert "schedule" not in caplog.text
    second, _ = working("q", *others)
    await nq.declare([second])
    assert "schedule one of queue q is changed or removed" in caplog.text
    assert [every.total_seconds() for (every,) in await ask("select every from notifyq.schedules")] == [7200] * len(
        others
    )


# what goes wrong


async def test_a_broken_schedule_is_reported_once_and_the_others_fire(start, nq, ask):
    queue, done = working()
    await nq.create_queue(queue)
    for name in ("zone", "rule", "never", "good"):
        await nq.schedule(queue, Schedule(every=0.1, name=name))
    broken = "update notifyq.schedule set every = null, next_at = null, timezone = %s, cron = %s where name = %s"
    await ask(broken, "Mars/Olympus", "0 3 * * *", "zone")
    await ask(broken, "UTC", "nonsense", "rule")
    await ask(broken, "UTC", "0 0 31 2 *", "never")
    seen = await start(queue, lease=1.0)
    await until(lambda: _has(done, 12))
    assert {job.headers["schedule"] for job in done} == {"good"}
    assert sorted(event.schedule for event in seen.of(ScheduleBroken)) == ["never", "rule", "zone"]
    errors = dict(await ask("select name, error from notifyq.schedules"))
    assert "Mars/Olympus" in errors["zone"]
    assert "not a cron rule" in errors["rule"]
    assert "never fires" in errors["never"]
    assert errors["good"] is None
    assert seen.of(ServerTrouble) == []
    # changing it mends it
    assert await nq.schedule(queue, Schedule(every=0.1, name="zone")) == "changed"
    await until(lambda: _fired(done, "zone"))
    assert len(seen.of(ScheduleBroken)) == 3
    assert dict(await ask("select name, error from notifyq.schedules"))["zone"] is None


async def _fired(done: list[Job[Any]], name: str) -> bool:
    return any(job.headers["schedule"] == name for job in done)


async def test_a_job_that_its_queue_refuses_holds_up_no_other_schedule(start, nq, ask, monkeypatch):
    queue, done = working()
    await nq.create_queue(queue)
    await nq.schedule(queue, Schedule(every=0.1, name="large", data="x" * 100))
    await nq.schedule(queue, Schedule(every=0.1, name="small", data="x"))
    await ask("select notifyq.update_queue('q', '{\"max_data_bytes\": 50}')")
    seen = await start(queue)
    await until(lambda: _has(done, 5))
    assert {job.headers["schedule"] for job in done} == {"small"}
    assert ["over the limit of 50" in event.reason for event in seen.of(ScheduleBroken)] == [True]
    # another reason is said at once, the same one now and then
    await ask("select notifyq.update_queue('q', '{\"max_data_bytes\": 40}')")
    assert "over the limit of 40" in (await seen.wait(ScheduleBroken, 2))[-1].reason
    monkeypatch.setattr("notifyq._scheduler.SAY_AGAIN", 0.1)
    await seen.wait(ScheduleBroken, 4)


async def test_a_schedule_that_somebody_has_locked_holds_up_no_other(start, ask, connection, monkeypatch):
    calls: list[int] = []
    fire = Schedules.fire

    async def counted(self: Schedules, connection: Any, steps: Any) -> Any:
        calls.append(len(steps))
        return await fire(self, connection, steps)

    monkeypatch.setattr(Schedules, "fire", counted)
    queue, done = working("q", Schedule(every=0.1, name="locked"), Schedule(every=0.1, name="free"))
    await start(queue)
    await until(lambda: _fired(done, "locked"))
    async with connection.transaction(force_rollback=True):
        await ask("select notifyq.schedule('q', every => '1 hour', name => 'locked')")
        count = len(done)
        calls.clear()
        await until(lambda: _has(done, count + 5))
        assert len(calls) < 30  # five firings, and the locked one tried every now and then
        assert {job.headers["schedule"] for job in done[count + 1 :]} == {"free"}
    count = len(done)
    await until(lambda: _fired(done[count:], "locked"))


async def test_trouble_with_one_firing_holds_up_no_other_and_is_said_once(start, nq, ask):
    """A trigger of the user's own that refuses one queue's jobs in its own way."""
    queue, done = working("q", Schedule(every=0.1))
    await nq.create_queue(Queue("troubled"))
    await ask(
        "create function refuse() returns trigger language plpgsql as"
        " $$begin if new.queue = (select number from notifyq.queue where name = 'troubled') then"
        " raise exception 'no disk' using errcode = '53100'; end if; return new; end$$"
    )
    await ask("create trigger refuse before insert on notifyq.job for each row execute function refuse()")
    await ask("select notifyq.schedule('troubled', every => '100 ms')")
    seen = await start(queue)
    await until(lambda: _has(done, 25))
    [trouble] = seen.of(ServerTrouble)
    moments = [job.fired_for for job in done if job.fired_for]
    assert {later - earlier for earlier, later in itertools.pairwise(moments)} == {EVERY}
    assert "default of queue troubled" in trouble.reason
    await ask("drop trigger refuse on notifyq.job")
    await until(lambda: ask("select id from notifyq.jobs where queue = 'troubled'"))


# after downtime


@pytest.mark.parametrize(("missed", "expected"), [("skip", []), ("once", ["made up"])])
async def test_after_downtime_nothing_or_one_job_makes_up_for_what_was_missed(start, nq, ask, missed, expected):
    queue, done = working()
    await nq.create_queue(queue)
    # a rule whose last firing was a while ago, whenever this runs
    month = datetime.now(UTC).month
    rule = f"30 3 15 {(month + 5) % 12 + 1} *"
    await nq.schedule(queue, Schedule(rule, timezone="Europe/Berlin", data="made up", missed=missed))
    await ask(
        "update notifyq.schedule set next_at = null, changed_at = now() - interval '5 years'"
    )  # no runtime since then
    seen = await start(queue)
    [event] = await seen.wait(ScheduleMissed)
    await nq.send(queue, "last")
    await until(lambda: _has(done, len(expected) + 1))
    assert [job.data for job in done] == [*expected, "last"]
    [record] = await nq.schedules()
    assert record.next_at is not None
    assert record.next_at > datetime.now(UTC)
    if expected:
        assert done[0].fired_for == event.fired_for == record.fired_for
        assert record.next_at - event.fired_for < timedelta(days=367)
    else:
        assert (event.fired_for, record.fired_for, record.job) == (None, None, None)


APP = """
import notifyq

queue = notifyq.Queue("q")


@queue.worker(poll_interval=3600)
async def work(job):
    pass


runtime = notifyq.Runtime([queue], lease=3600)
"""


async def test_a_process_asleep_over_several_firings_makes_no_job_for_each_when_it_wakes(dsn, nq, ask, tmp_path):
    await nq.create_queue(Queue("q"))
    for missed in ("skip", "once"):
        await nq.schedule(Queue("q"), Schedule(every=0.5, name=missed, missed=missed))
    firings = "select headers ->> 'schedule', (headers ->> 'fired_for')::timestamptz from notifyq.jobs order by 2"

    async def fired(after: datetime, count: int) -> bool:
        moments = [moment for _, moment in await ask(firings) if moment > after]
        return len(moments) >= 2 * count

    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "notifyq", "run", "app:runtime"],
        cwd=tmp_path,
        env={**os.environ, "DATABASE_URL": dsn},
        stderr=subprocess.DEVNULL,
    )
    try:
        await until(lambda: fired(datetime(2020, 1, 1, tzinfo=UTC), 2), 20)
        process.send_signal(signal.SIGSTOP)
        [(slept_at,)] = await ask("select clock_timestamp()")
        await ask("select pg_sleep(4)")  # eight firings
        [(woke_at,)] = await ask("select clock_timestamp()")
        process.send_signal(signal.SIGCONT)
        await until(lambda: fired(woke_at, 2))
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        await process.wait()
    for name in ("skip", "once"):
        moments = [moment for schedule, moment in await ask(firings) if schedule == name]
        assert len(set(moments)) == len(moments)
        asleep = [moment for moment in moments if slept_at < moment < woke_at]
        # those of its last second are only late, and stand for the others
        assert [moment for moment in asleep if woke_at - moment > timedelta(seconds=1)] == []
        assert max(moments) > woke_at


# declared with the queue


async def test_a_runtime_makes_the_databases_schedules_those_declared(start, nq):
    first, _ = working(
        "q",
        Schedule("0 3 * * *", name="a", timezone="Europe/Berlin", data={"n": 1}, headers={"h": 1}),
        Schedule(every=HOUR),
    )
    (await start(first)).runtime.stop()
    await nq.schedule(first, Schedule(every=HOUR, name="by-hand"))
    stood = {record.name: record for record in await until(lambda: _planned(nq))}
    assert {name: record.declared for name, record in stood.items()} == {"a": True, "default": True, "by-hand": False}
    assert (stood["a"].data, stood["a"].headers, stood["a"].timezone) == ({"n": 1}, {"h": 1}, "Europe/Berlin")
    # the same again changes nothing; then one is changed, one removed, one added
    (await start(working("q", *first.schedules)[0])).runtime.stop()
    assert {record.name: record for record in await nq.schedules()} == stood
    (await start(working("q", Schedule("0 4 * * *", name="a"), Schedule(every=60, name="new"))[0])).runtime.stop()
    records = {record.name: record for record in await nq.schedules()}
    assert records.keys() == {"a", "new", "by-hand"}
    assert (records["a"].cron, records["a"].timezone, records["a"].data) == ("0 4 * * *", "UTC", None)
    assert records["by-hand"] == stood["by-hand"]
    (await start(working("q")[0])).runtime.stop()
    assert [record.name for record in await nq.schedules()] == ["by-hand"]


async def test_a_runtime_that_declares_nothing_leaves_schedules_alone(start, nq):
    queue, _ = working("q", Schedule(every=HOUR))
    (await start(queue)).runtime.stop()
    (await start(working("q")[0], migrate=False)).runtime.stop()
    assert [record.name for record in await nq.schedules()] == ["default"]


# the client


@attrs.frozen
class Report:
    kind: str


async def test_a_client_makes_looks_at_and_removes_schedules(nq):
    reports = Queue("reports", Report)
    await nq.create_queue(reports)
    rule = Schedule(
        "0 9 * * MON", timezone="Europe/Berlin", data=Report("weekly"), headers={"tenant": 1}, missed="skip"
    )
    assert await nq.schedule(reports, rule) == "created"
    assert await nq.schedule(reports, rule) == "unchanged"
    async with nq.transaction() as connection:
        await nq.schedule(
            reports, Schedule(every=timedelta(minutes=5), name="often", data=Report("x")), connection=connection
        )
        assert len(await nq.schedules()) == 1
    weekly, often = await nq.schedules(queue=reports)
    assert (weekly.cron, weekly.data, weekly.headers, weekly.missed, weekly.declared) == (
        "0 9 * * MON",
        {"kind": "weekly"},
        {"tenant": 1},
        "skip",
        False,
    )
    assert [firing.isoformat()[10:16] for firing in weekly.next_firings(2)] == ["T09:00", "T09:00"]
    assert weekly.next_firings(3) == rule.next_firings(3)
    assert often.every == timedelta(minutes=5)
    assert often.next_at is not None
    assert often.next_firings(2)[0] == often.next_at
    overdue = attrs.evolve(often, next_at=often.next_at - timedelta(days=2))
    assert overdue.next_firings(2) == often.next_firings(2)
    assert [record.name for record in await nq.schedules(name="often")] == ["often"]
    assert await nq.unschedule("reports", "often")
    assert not await nq.unschedule(reports, "often")


async def test_a_schedule_by_hand_is_typed_and_fetched(nq, ask):
    reports = Queue("reports", Report)
    await nq.create_queue(reports)
    await nq.schedule(reports, Schedule(every=0.1, data=Report("x")))
    [(number, next_at)] = await ask(
        "update notifyq.schedule set next_at = next_at - interval '1 second' returning number, next_at"
    )
    await ask("select notifyq.fire(%s, %s, %s, %s)", number, next_at, next_at, next_at + timedelta(hours=1))
    [job] = await nq.fetch(reports)
    assert (job.data, job.fired_for) == (Report("x"), next_at)
    await nq.send(reports, Report("y"))
    [job] = await nq.fetch(reports)
    assert job.fired_for is None


async def test_what_a_client_gets_wrong_about_schedules_is_named(nq):
    queue = Queue("q", int)
    await nq.create_queue(queue)
    good = Schedule(every=1, data=1)
    for call, error, message in (
        (lambda: nq.schedule("q", good), InvalidOption, "declaration"),
        (lambda: nq.schedule(queue, "0 3 * * *"), InvalidOption, "give a Schedule"),
        (lambda: nq.schedule(queue, Schedule(every=1)), InvalidData, "expected int"),
        (lambda: nq.schedule(Queue("nowhere"), good), UnknownQueue, "nowhere"),
        (lambda: nq.unschedule("nowhere"), UnknownQueue, "nowhere"),
        (lambda: nq.unschedule(queue, 5), InvalidOption, "name"),
        (lambda: nq.schedules(name="\x00"), InvalidOption, "name"),
        (lambda: nq.schedules(queue=5), InvalidOption, "declaration"),
    ):
        with pytest.raises(error, match=message):
            await call()
    assert await nq.schedules() == []


async def test_a_published_event_is_a_job_of_each_subscribed_queue_when_the_transaction_commits(start, nq):
    mail, mailed = working("mail")
    audit = Queue("audit", Report)
    await nq.create_queue(audit)
    await start(mail)
    assert await nq.subscribe("order.paid", mail)
    assert await nq.subscribe("order.paid", "audit")
    assert not await nq.subscribe("order.paid", audit)
    async with nq.connection() as connection, connection.transaction(force_rollback=True):
        assert len(await nq.publish("order.paid", Report("undone"), connection=connection)) == 2
    published = await nq.publish("order.paid", Report("kept"), headers={"tenant": 1}, id_key="o1")
    assert published.keys() == {"mail", "audit"}
    await until(lambda: _has(mailed, 1))
    assert (mailed[0].id, mailed[0].data, mailed[0].headers) == (
        published["mail"],
        {"kind": "kept"},
        {"event": "order.paid", "tenant": 1},
    )
    [job] = await nq.fetch(audit)
    assert job.data == Report("kept")
    assert await nq.publish("order.paid", Report("again"), id_key="o1") == published
    assert sorted((row["event"], row["queue"]) for row in await nq.subscriptions()) == [
        ("order.paid", "audit"),
        ("order.paid", "mail"),
    ]
    assert await nq.unsubscribe("order.paid", audit)
    assert not await nq.unsubscribe("order.paid", "audit")
    assert list(await nq.publish("order.paid")) == ["mail"]


async def test_what_a_client_gets_wrong_about_events_is_named(nq):
    await nq.create_queue(Queue("q", max_data_bytes=10))
    await nq.subscribe("e", "q")
    for call, error, message in (
        (lambda: nq.publish("lost"), InvalidOption, "nobody has subscribed to event 'lost'. Subscribe a queue first"),
        (lambda: nq.publish("bad name"), InvalidOption, "event name"),
        (lambda: nq.publish(5), InvalidOption, "event name"),
        (lambda: nq.publish("e", float("nan")), InvalidData, "not JSON"),
        (lambda: nq.publish("e", object()), InvalidData, "not JSON"),
        (lambda: nq.publish("e", "x" * 20), InvalidData, "over the limit"),
        (lambda: nq.publish("e", headers=[1]), InvalidOption, "headers must be a dict"),
        (lambda: nq.publish("e", id_key=5), InvalidOption, "id_key"),
        (lambda: nq.subscribe("bad name", "q"), InvalidOption, "event name"),
        (lambda: nq.subscribe("e", "nowhere"), UnknownQueue, "nowhere"),
        (lambda: nq.unsubscribe("", "q"), InvalidOption, "event name"),
        (lambda: nq.unsubscribe("e", "nowhere"), UnknownQueue, "nowhere"),
    ):
        with pytest.raises(error, match=message):
            await call()
    assert await nq.jobs() == []


# the command line


@pytest.fixture
def notifyq_command(dsn, tmp_path):
    async def run(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
        done = await trio.to_thread.run_sync(
            lambda: subprocess.run(
                [sys.executable, "-m", "notifyq", *arguments],
                cwd=tmp_path,
                env={**os.environ, "DATABASE_URL": dsn, "COLUMNS": "250"},
                input=stdin,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        )
        return done.returncode, done.stdout.strip(), done.stderr.strip()

    return run


async def test_schedules_from_the_command_line(notifyq_command, nq, ask):
    await nq.create_queue(Queue("q"))
    assert (await notifyq_command("schedules"))[:2] == (0, "no schedules")
    code, out, _ = await notifyq_command(
        "schedules", "add", "q", "--cron", "30 3 * * *", "--timezone", "Europe/Berlin", "--data", "-", stdin='{"n": 1}'
    )
    assert (code, out.startswith("schedule default of q created; next: 20")) == (0, True), out
    added = json.loads(
        (await notifyq_command("schedules", "add", "q", "--every", "60", "--name", "e", "--missed", "skip", "--json"))[
            1
        ]
    )
    assert (added["done"], len(added["next_firings"])) == ("created", 3)
    await ask(
        "insert into notifyq.schedule (queue, name, cron, timezone, missed)"
        " select number, 'odd', '?', 'UTC', 'once' from notifyq.queue"
    )
    code, out, _ = await notifyq_command("schedules")
    assert code == 0
    for shown in ("30 3 * * *", "every 0:01:00", "Europe/Berlin", "T03:30:00", "not a cron rule"):
        assert shown in out
    listed = {row["name"]: row for row in json.loads((await notifyq_command("schedules", "--json"))[1])}
    assert (listed["default"]["data"], listed["e"]["missed"], listed["e"]["every"]) == ({"n": 1}, "skip", 60.0)
    assert (len(listed["default"]["next_firings"]), listed["odd"]["next_firings"]) == (3, [])
    firings = json.loads((await notifyq_command("schedules", "preview", "q", "--count", "4", "--json"))[1])
    assert [row["fires"][10:19] for row in firings] == ["T03:30:00"] * 4
    assert "-02-29T" in (await notifyq_command("schedules", "preview", "--cron", "0 0 29 2 *", "--count", "2"))[1]
    assert (await notifyq_command("schedules", "remove", "q"))[:2] == (0, "schedule default of q removed")
    assert (await notifyq_command("schedules", "remove", "q"))[:2] == (1, "schedule default of q does not exist")


async def test_events_from_the_command_line(notifyq_command, nq):
    await nq.create_queue(Queue("q"))
    assert (await notifyq_command("subscribe", "paid", "q"))[:2] == (0, "q gets a job for each paid")
    assert "paid" in (await notifyq_command("subscriptions"))[1]
    published = json.loads((await notifyq_command("publish", "paid", '{"n": 1}', "--id-key", "k", "--json"))[1])
    assert (await nq.get(published["jobs"]["q"])).data == {"n": 1}
    assert (await notifyq_command("publish", "paid", "-", stdin="2"))[1].startswith("q: job ")
    assert (await notifyq_command("unsubscribe", "paid", "q"))[:2] == (0, "q gets no more jobs for paid")
    assert (await notifyq_command("unsubscribe", "paid", "q"))[0] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("schedules", "add", "q", "--cron", "nonsense"), 1, "not a cron rule"),
        (("schedules", "add", "q"), 2, "give --cron or --every"),
        (("schedules", "preview"), 2, "give --cron or --every"),
        (("schedules", "add", "q", "--cron", "0 0 31 2 *"), 1, "'0 0 31 2 *' never fires"),
        (("schedules", "add", "q", "--cron", "0 3 * * *", "--timezone", "Mars/Olympus"), 1, "no time zone named"),
        (("schedules", "add", "q", "--every", "0"), 1, "from 0.1 seconds"),
        (("schedules", "add", "q", "--every", "1", "--cron", "* * * * *"), 2, "give --cron or --every"),
        (("schedules", "add", "q", "--every", "1", "--data", "{bad"), 1, "is not JSON"),
        (("schedules", "add", "q", "--every", "1", "--missed", "all"), 2, "all"),
        (("schedules", "add", "nowhere", "--every", "1"), 1, "no queue named 'nowhere'"),
        (("schedules", "remove", "nowhere"), 1, "no queue named 'nowhere'"),
        (("schedules", "preview", "q"), 1, "no schedule 'default' of queue 'q'"),
        (("schedules", "preview", "q", "--every", "5"), 2, "not both"),
        (("publish", "lost"), 1, "nobody has subscribed"),
        (("publish", "lost", "{bad"), 1, "is not JSON"),
        (("subscribe", "e", "nowhere"), 1, "no queue named 'nowhere'"),
    ],
)
async def test_a_mistake_is_one_readable_line_and_an_exit_code(notifyq_command, nq, arguments, code, message):
    await nq.create_queue(Queue("q"))
    ended, _, err = await notifyq_command(*arguments)
    assert (ended, message in err) == (code, True), err
    assert "Traceback" not in err
    if code == 1:
        assert len(err.splitlines()) == 1

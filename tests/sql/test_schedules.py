"""Schedules by SQL alone: what is refused, who fires, and two sessions that meet at one schedule."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from notifyq import InvalidOption, connect, testing
from notifyq._cron import read_rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from notifyq._connection import TrioConnection

either_end = pytest.mark.parametrize("commit", [True, False], ids=["committed", "undone"])


async def rows(connection: TrioConnection, statement: str, *parameters: Any) -> list:
    cursor = await connection.execute(statement.encode(), parameters or None)
    return await cursor.fetchall() if cursor.description else []


async def until_waiting(watcher: TrioConnection, waiter: TrioConnection) -> None:
    """Return once a session waits for a lock."""
    waits = "select 1 from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
    while not await rows(watcher, waits, waiter.info.backend_pid):
        await trio.sleep(0.005)


@pytest.fixture
async def queue(ask):
    await ask("select notifyq.create_queue('q', '{\"retry_limit\": 7}')")
    return "q"


@pytest.fixture
async def due(ask, queue):
    """A schedule whose firing is due: its number and that moment."""
    await ask("select notifyq.schedule('q', '0 * * * *', data => '5', headers => '{\"tenant\": 1}')")
    moment = datetime(2025, 3, 30, 1, 0, 0, 123_456, tzinfo=UTC)
    await ask("update notifyq.schedule set next_at = %s", moment)
    [(number,)] = await ask("select number from notifyq.schedule")
    return number, moment


DECLARE = "select notifyq.declare_schedules('q', %s)"
FIRE = "select done, job, error from notifyq.fire(%s, %s, %s, %s)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("'q', '0 3 * * *', timezone => 'Mars/Olympus'", "no time zone named 'Mars/Olympus'"),
        ("'q', '0 3 * * *', timezone => 'europe/berlin'", "no time zone named"),
        ("'q', '0 3 * * *', timezone => 'CEST'", "no time zone named"),
        ("'q', '0 3 * * *', timezone => null", "no time zone named null"),
        ("'q', ''", "not a cron rule: ''"),
        ("'q', 'nonsense'", "not a cron rule"),
        ("'q', '* * * *'", "not a cron rule"),
        ("'q', '60 * * * *'", "its minute is not one: 60"),
        ("'q', '* * * foo *'", "its month is not one: FOO"),
        ("'q', '* * L * 8'", "its weekday is not one: 8"),
        ("'q', '* * * * 1,,2'", "its weekday is not one: 1,,2"),
        ("'q', '5-1 * * * *'", "its minute is not one: 5-1"),
        ("'q', '*/0 * * * *'", "its minute is not one"),
        ("'q', '99999999999 * * * *'", "its minute is not one"),
        ("'q', '0 0 31 2 *'", "'0 0 31 2 *' never fires"),
        ("'q', '0 0 30,31 feb *'", "never fires"),
        ("'q', '0 0 31 4,6,9,11 *'", "never fires"),
        ("'q', '0 0 */20 * 1L'", "never fires"),
        ("'q', repeat('0 ', 200)", "not a cron rule"),
        ("'q', every => '0'", "from 0.1 seconds to 366 days, not 00:00:00"),
        ("'q', every => '-1 second'", "from 0.1 seconds"),
        ("'q', every => '99 milliseconds'", "from 0.1 seconds"),
        ("'q', every => '367 days'", "366 days"),
        ("'q', every => '1 month'", "months differ"),
        ("'q', every => '1 hour', timezone => 'Europe/Berlin'", "no time zone"),
        ("'q', '0 3 * * *', every => '1 hour'", "either cron or every"),
        ("'q'", "either cron or every"),
        ("'q', every => '1 hour', name => 'bad name'", "not a name of a schedule: 'bad name'"),
        ("'q', every => '1 hour', name => ''", "not a name"),
        ("'q', every => '1 hour', name => null", "not a name of a schedule: null"),
        ("'q', every => '1 hour', missed => 'all'", "'skip' or 'once', not 'all'"),
        ("'q', every => '1 hour', missed => null", "'skip' or 'once', not null"),
        ("'q', every => '1 hour', headers => '[]'", "headers must be a JSON object, not array"),
    ],
)
async def test_what_could_not_fire_is_refused_and_the_fix_named(ask, queue, call, message):
    with pytest.raises(psycopg.Error) as caught:
        await ask(f"select notifyq.schedule({call})")
    assert (caught.value.sqlstate, message in str(caught.value)) == ("NQ003", True), caught.value
    assert await ask("select count(*) from notifyq.schedule") == [(0,)]


async def test_an_unknown_option_of_a_declared_schedule_is_named(ask, queue):
    with pytest.raises(psycopg.Error, match="unknown option: timezon") as caught:
        await ask(DECLARE, '[{"name": "a", "every": 60, "timezon": "Europe/Berlin"}]')
    assert caught.value.sqlstate == "NQ003"
    assert await ask("select count(*) from notifyq.schedule") == [(0,)]


async def test_an_unknown_queue_and_data_that_is_too_large_are_refused(ask, queue):
    for call in (
        "schedule('nowhere', every => '1 hour')",
        "unschedule('nowhere')",
        "declare_schedules('nowhere', '[{}]')",
    ):
        with pytest.raises(psycopg.Error, match="no queue named 'nowhere'") as caught:
            await ask(f"select notifyq.{call}")
        assert caught.value.sqlstate == "NQ001"
    await ask("select notifyq.update_queue('q', '{\"max_data_bytes\": 3}')")
    with pytest.raises(psycopg.Error, match="over the limit") as caught:
        await ask("select notifyq.schedule('q', every => '1 hour', data => '12345')")
    assert caught.value.sqlstate == "NQ004"


@pytest.fixture(scope="module")
def sql(server: str, template: str) -> Iterator[Callable[..., list]]:
    """Ask one database many times, as Hypothesis does."""
    name = f"{template}_rules"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"create database {name} template {template}".encode())
        with psycopg.connect(testing.with_database(server, name), autocommit=True) as own:
            yield lambda statement, *parameters: own.execute(statement.encode(), parameters).fetchall()
        connection.execute(f"drop database {name}".encode())


_WORDS = {
    3: (0, 59, []),
    4: (0, 23, []),
    5: (1, 31, []),
    6: (1, 12, ["JAN", "feb", "Dec"]),
    7: (0, 7, ["SUN", "mon", "SAT"]),
}


@st.composite
def fields(draw: st.DrawFn, which: int) -> str:
    """A field of a cron rule, mostly a right one."""
    lowest, highest, names = _WORDS[which]
    value = st.one_of(
        st.integers(lowest, highest).map(str), st.integers(0, 70).map(str), st.sampled_from([*names, "07"])
    )
    plain = st.one_of(
        value,
        st.just("*"),
        st.tuples(value, value).map("-".join),
        st.sampled_from(["L", "LW", "5L", "MON#2", "1#6", "?", "", "-", "/"]),
    )
    stepped = st.tuples(plain, st.sampled_from(["/2", "/7", "/20", "/0", "/x", "/"])).map("".join)
    return ",".join(draw(st.lists(st.one_of(plain, plain, stepped), min_size=1, max_size=3)))


@settings(max_examples=500, deadline=None)
@given(st.tuples(fields(3), fields(4), fields(5), fields(6), fields(7)), st.booleans())
def test_sql_and_python_take_the_same_rules(sql, parts, plain_time):
    rule = " ".join(("0", "0", *parts[2:]) if plain_time else parts)
    try:
        read_rule(rule, None)
        expected = ""
    except InvalidOption as error:
        expected = "never fires" if "never fires" in str(error) else "not a cron rule"
    found, state = "", "NQ003"
    try:
        sql("select notifyq.check_cron(%s)", rule)
    except psycopg.Error as error:
        found, state = str(error), error.sqlstate
    assert state == "NQ003"
    assert bool(found) == bool(expected), (rule, expected, found)
    assert expected in found


@given(st.floats(0.1, 366 * 86_400.0), st.datetimes(datetime(1971, 1, 1), datetime(2099, 1, 1)))
@settings(max_examples=200, deadline=None)
def test_sql_and_python_find_the_same_slots_of_an_interval(sql, every, moment):
    moment = moment.replace(tzinfo=UTC)
    interval = timedelta(microseconds=round(every * 1e6))
    [(found,)] = sql("select notifyq.next_multiple(%s, %s)", interval, moment)
    assert found == read_rule(None, every).next_after(moment)


async def test_a_schedule_is_made_changed_and_removed(ask, queue):
    make = "select notifyq.schedule('q', every => '1 hour', name => 'n', data => '{}')".format
    assert await ask(make(1)) == [("created",)]
    [(first, next_at)] = await ask("select number, next_at from notifyq.schedule")
    assert next_at.minute == next_at.second == next_at.microsecond == 0
    assert await ask(make(1)) == [("unchanged",)]
    assert await ask("select number from notifyq.schedule") == [(first,)]
    await ask("update notifyq.schedule set next_at = '2025-01-01', error = 'old'")
    assert await ask(make(2)) == [("changed",)]
    [(second, next_at, error)] = await ask("select number, next_at, error from notifyq.schedule")
    assert (second > first, next_at.year, error) == (True, 2025, None)  # the same rule: the same next firing
    assert await ask("select notifyq.schedule('q', '0 3 * * *', name => 'n', timezone => 'Europe/Berlin')") == [
        ("changed",)
    ]
    assert await ask("select cron, every, timezone, next_at, data, missed, declared from notifyq.schedules") == [
        ("0 3 * * *", None, "Europe/Berlin", None, None, "once", False)
    ]
    assert await ask("select notifyq.unschedule('q')") == [(False,)]
    assert await ask("select notifyq.unschedule('q', 'n')") == [(True,)]
    assert await ask("select count(*) from notifyq.schedule") == [(0,)]


async def test_each_change_rings_the_control_channel_and_another_look_does_not(ask, queue, connection, other):
    heard: list[str] = []
    other.on_notification(lambda _, payload: heard.append(payload))
    [(channel,)] = await ask("select notifyq.channel(0)")
    await rows(other, f'listen "{channel}"')
    await ask("select notifyq.schedule('q', every => '1 hour')")
    await ask("select notifyq.schedule('q', every => '1 hour')")
    await ask("select notifyq.schedule('q', every => '2 hours')")
    await ask("select notifyq.unschedule('q')")
    await ask("select notifyq.unschedule('q')")
    declared = '[{"every": 3600, "name": "d"}]'
    await ask("select notifyq.declare_schedules('q', %s)", declared)
    await ask("select notifyq.declare_schedules('q', %s)", declared)
    await ask("select notifyq.declare_schedules('q', '[]')")
    await ask("select notifyq.declare_schedules('q', '[]')")
    await ask("select pg_notify(%s, 'end')", channel)
    with trio.fail_after(20):
        while "end" not in heard:
            await other.wait_input()
    assert heard == ["schedule"] * 5 + ["end"]


async def test_what_is_declared_replaces_what_was_declared_and_leaves_the_rest(ask, queue):
    stands = "select name, declared, every::text, cron, data from notifyq.schedules order by name"
    await ask("select notifyq.schedule('q', every => '1 hour', name => 'by-hand')")
    await ask(DECLARE, '[{"name": "a", "every": 60, "data": 1}, {"name": "b", "cron": "0 3 * * *"}]')
    assert await ask(stands) == [
        ("a", True, "00:01:00", None, 1),
        ("b", True, None, "0 3 * * *", None),
        ("by-hand", False, "01:00:00", None, None),
    ]
    await ask(DECLARE, '[{"name": "b", "cron": "0 4 * * *"}, {"name": "by-hand", "every": 0.5}]')
    assert await ask(stands) == [
        ("b", True, None, "0 4 * * *", None),
        ("by-hand", True, "00:00:00.5", None, None),
    ]
    await ask("select notifyq.schedule('q', every => '1 hour', name => 'by-hand')")
    await ask("select notifyq.declare_schedules('q', '[]')")
    assert [name for name, *_ in await ask(stands)] == ["by-hand"]
    with pytest.raises(psycopg.Error, match="never fires"):
        await ask(DECLARE, '[{"name": "b", "cron": "0 0 31 2 *"}]')


async def test_a_firing_sends_the_job_with_its_queues_defaults_and_says_what_it_is_for(ask, due):
    number, moment = due
    following = moment + timedelta(hours=1)
    [(done, job, error)] = await ask(FIRE, number, moment, moment, following)
    assert (done, error) == ("fired", None)
    assert await ask("select id, data, headers, retry_limit from notifyq.jobs") == [
        (job, 5, {"tenant": 1, "schedule": "default", "fired_for": "2025-03-30T01:00:00.123456Z"}, 7)
    ]
    assert await ask("select next_at, fired_for, job from notifyq.schedules") == [(following, moment, job)]
    # whoever knew only the firing before is too late, and so is who repeats it
    assert await ask(FIRE, number, moment, moment, following) == [("beaten", None, None)]
    assert await ask(FIRE, number, None, None, following) == [("beaten", None, None)]
    assert await ask(FIRE, number + 1, moment, moment, following) == [("changed", None, None)]
    assert await ask("select count(*) from notifyq.job") == [(1,)]


async def test_a_firing_is_never_before_its_time_by_the_servers_clock(ask, due):
    number, _ = due
    [(soon,)] = await ask(
        "update notifyq.schedule set next_at = clock_timestamp() + interval '1 minute' returning next_at"
    )
    assert await ask(FIRE, number, soon, soon, soon + timedelta(hours=1)) == [("early", None, None)]
    assert await ask("select next_at from notifyq.schedule") == [(soon,)]


async def test_no_job_is_older_than_the_time_it_was_fired_for(ask, due):
    number, _ = due
    await ask("begin")  # sent_at will be now
    [(soon,)] = await ask("update notifyq.schedule set next_at = clock_timestamp() returning next_at")
    assert await ask(FIRE, number, soon, soon, soon + timedelta(hours=1)) == [("early", None, None)]
    await ask("commit")
    [(done, job, _)] = await ask(FIRE, number, soon, soon, soon + timedelta(hours=1))
    assert done == "fired"
    assert await ask("select sent_at >= %s from notifyq.job where id = %s", soon, job) == [(True,)]


@pytest.mark.parametrize("then_at", [None, datetime(2025, 1, 1, tzinfo=UTC)])
async def test_a_next_firing_that_does_not_come_after_is_refused(ask, due, then_at):
    number, moment = due
    with pytest.raises(psycopg.Error, match="must come after") as caught:
        await ask(FIRE, number, moment, moment, then_at)
    assert caught.value.sqlstate == "NQ003"
    assert await ask("select count(*) from notifyq.job") == [(0,)]


async def test_a_firing_that_the_policy_lets_make_no_job_is_skipped(ask, due):
    number, moment = due
    following = moment + timedelta(hours=1)
    await ask("select notifyq.update_queue('q', '{\"policy\": \"exclusive\"}')")
    [(standing,)] = await ask("select notifyq.send('q')")
    assert await ask(FIRE, number, moment, moment, following) == [("skipped", None, None)]
    assert await ask("select error, next_at, job from notifyq.schedules") == [(None, following, None)]
    await ask("select notifyq.complete(id) from notifyq.claim('q')")
    [(done, job, _)] = await ask(FIRE, number, following, following, following + timedelta(hours=1))
    assert (done, job > standing) == ("fired", True)


async def test_a_job_that_its_queue_refuses_is_reported_and_the_next_firing_is_tried(ask, due):
    number, moment = due
    following = moment + timedelta(hours=1)
    await ask("select notifyq.update_queue('q', '{\"max_data_bytes\": 1}')")
    await ask("update notifyq.schedule set data = '55'")
    [(done, job, error)] = await ask(FIRE, number, moment, moment, following)
    assert (done, job) == ("refused", None)
    assert "over the limit" in error
    assert await ask("select error, next_at, job from notifyq.schedules") == [(error, following, None)]
    await ask("select notifyq.update_queue('q', '{\"max_data_bytes\": 9}')")
    [(done, job, _)] = await ask(FIRE, number, following, following, following + timedelta(hours=1))
    assert done == "fired"
    assert await ask("select error, job from notifyq.schedules") == [(None, job)]


async def test_an_error_is_kept_once(ask, due):
    number, _ = due
    assert await ask("select notifyq.keep_schedule_error(%s, 'no such zone')", number) == [(True,)]
    assert await ask("select notifyq.keep_schedule_error(%s, 'no such zone')", number) == [(False,)]
    assert await ask("select error from notifyq.schedules") == [("no such zone",)]


async def test_deleting_a_queue_removes_its_schedules_and_subscriptions(ask, due):
    await ask("select notifyq.subscribe('paid', 'q')")
    await ask("select notifyq.delete_queue('q')")
    assert await ask("select (select count(*) from notifyq.schedule), (select count(*) from notifyq.subscription)") == [
        (0, 0)
    ]


async def test_time_passes_for_schedules_in_tests(ask, dsn, due):
    _, moment = due
    async with connect(dsn) as nq:
        await testing.age_jobs(nq, timedelta(hours=5))
    assert await ask("select next_at from notifyq.schedule") == [(moment - timedelta(hours=5),)]


# two sessions at one schedule


@either_end
async def test_of_two_that_fire_one_sends_and_the_other_does_not_wait(ask, connection, other, due, commit):
    number, moment = due
    step = (number, moment, moment, moment + timedelta(hours=1))
    with trio.fail_after(20):
        async with connection.transaction(force_rollback=not commit):
            assert (await ask(FIRE, *step))[0][0] == "fired"
            assert await rows(other, FIRE, *step) == [("busy", None, None)]
        [(done, *_)] = await rows(other, FIRE, *step)
    assert done == ("beaten" if commit else "fired")
    assert await ask("select count(*) from notifyq.job") == [(1,)]


async def second(connection: TrioConnection, other: TrioConnection, statement: str, first: str, *, commit: bool) -> Any:
    """Run the first in a transaction; once the second waits for it, end it. Give what the second said."""
    said: list[Any] = []

    async def come_second() -> None:
        try:
            said.append(await rows(other, statement))
        except psycopg.Error as error:
            said.append(error.sqlstate)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery, connection.transaction(force_rollback=not commit):
            await rows(connection, first)
            nursery.start_soon(come_second)
            await until_waiting(connection, other)
    return said[0]


@either_end
async def test_a_change_waits_for_a_firing_and_holds_for_the_next(ask, connection, other, due, commit):
    number, moment = due
    fire = f"select notifyq.fire({number}, '{moment}', '{moment}', '{moment + timedelta(hours=1)}')"
    change = "select notifyq.schedule('q', every => '1 hour')"
    assert await second(connection, other, change, fire, commit=commit) == [("changed",)]
    assert await ask("select every is not null, fired_for is not null from notifyq.schedule") == [(True, commit)]
    assert await ask(FIRE, number, moment, moment, moment + timedelta(hours=1)) == [("changed", None, None)]
    assert await ask("select count(*) from notifyq.job") == [(int(commit),)]


@either_end
async def test_a_schedule_made_twice_at_once_is_one(ask, connection, other, queue, commit):
    make = "select notifyq.schedule('q', every => '1 hour')"
    assert await second(connection, other, make, make, commit=commit) == [("unchanged" if commit else "created",)]
    assert await ask("select count(*) from notifyq.schedule") == [(1,)]


@either_end
async def test_a_schedule_removed_while_it_is_set_is_made_again(ask, connection, other, due, commit):
    make = "select notifyq.schedule('q', every => '1 hour')"
    said = await second(connection, other, make, "select notifyq.unschedule('q')", commit=commit)
    assert said == [("created" if commit else "changed",)]


@either_end
async def test_a_queue_is_deleted_after_a_firing_under_way(ask, connection, other, due, commit):
    number, moment = due
    fire = f"select notifyq.fire({number}, '{moment}', '{moment}', '{moment + timedelta(hours=1)}')"
    said = await second(connection, other, "select notifyq.delete_queue('q')", fire, commit=commit)
    assert said == [(int(commit),)]
    assert await ask("select count(*) from notifyq.schedule") == [(0,)]
    assert await ask("select count(*) from notifyq.job") == [(0,)]


async def test_a_firing_waits_for_its_queues_deletion_and_finds_it_gone(ask, connection, other, due):
    number, moment = due
    fire = f"select done from notifyq.fire({number}, '{moment}', '{moment}', '{moment + timedelta(hours=1)}')"
    said = await second(connection, other, fire, "select notifyq.delete_queue('q')", commit=True)
    assert said == [("changed",)]


@either_end
async def test_of_two_that_declare_at_once_the_last_one_holds(ask, connection, other, queue, commit):
    one, two = (
        f"""select notifyq.declare_schedules('q', '[{{"name": "{name}", "every": 60}}]')""" for name in ("one", "two")
    )
    await second(connection, other, two, one, commit=commit)
    assert await ask("select name from notifyq.schedule") == [("two",)]


# rights


async def test_a_producer_may_publish_and_not_schedule(ask, connection, queue):
    role = f"producer_{connection.info.dbname[-12:]}"
    await ask(f"create role {role}")
    try:
        await ask(f"grant usage on schema notifyq to {role}")
        await ask("select notifyq.subscribe('paid', 'q')")
        await ask(f"set role {role}")
        assert len(await ask("select * from notifyq.publish('paid', '1')")) == 1
        for call in (
            "schedule('q', every => '1 hour')",
            "unschedule('q')",
            "declare_schedules('q', '[]')",
            "schedules_ahead()",
            "fire(1, null, null, now())",
            "subscribe('paid', 'q')",
            "unsubscribe('paid', 'q')",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                await ask(f"select notifyq.{call}")
    finally:
        await ask("reset role")
        await ask(f"drop owned by {role}")
        await ask(f"drop role {role}")

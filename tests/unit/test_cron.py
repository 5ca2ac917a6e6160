"""When schedules fire: daylight saving in several zones, leap days, nonsense, and what is made up for after a pause."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from notifyq import InvalidData, InvalidOption, Queue, Schedule
from notifyq._cron import LATE, OVERTAKEN, Step, decide, read_rule
from notifyq._models import fired_for
from notifyq._scheduler import ServerClock

ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",
    "Africa/Cairo",
    "America/Santiago",
    "Asia/Kathmandu",
]
RULES = [
    "30 2 * * *",
    "0 0 * * *",
    "*/20 * * * *",
    "15 1,2,3 * * 0",
    "0-59 0-23 * * *",
    "0 30 1 * * *",
    "*/7 */9 * * * *",
    "30 * * * *",
    "0 */3 * * *",
]


def local(text: str, zone: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone))


def fires(cron: str, zone: str, after: str, count: int) -> list[str]:
    """The next firings, as that zone's clocks show them."""
    found = Schedule(cron, timezone=zone).next_firings(count, after=local(after, zone))
    return [moment.isoformat() for moment in found]


@pytest.mark.parametrize(
    ("cron", "zone", "after", "expected"),
    [
        # clocks go forward: a daily time in the gap fires at its end, once
        ("30 2 * * *", "Europe/Berlin", "2025-03-29 12:00", ["2025-03-30T03:00:00+02:00", "2025-03-31T02:30:00+02:00"]),
        (
            "30 2 * * *",
            "America/New_York",
            "2025-03-08 12:00",
            ["2025-03-09T03:00:00-04:00", "2025-03-10T02:30:00-04:00"],
        ),
        # clocks go back: the first of two equal times, once
        ("30 2 * * *", "Europe/Berlin", "2025-10-25 12:00", ["2025-10-26T02:30:00+02:00", "2025-10-27T02:30:00+01:00"]),
        (
            "30 1 * * *",
            "America/New_York",
            "2025-11-01 12:00",
            ["2025-11-02T01:30:00-04:00", "2025-11-03T01:30:00-05:00"],
        ),
        # each hour goes by the clock that there is
        (
            "30 * * * *",
            "Europe/Berlin",
            "2025-03-30 01:00",
            ["2025-03-30T01:30:00+01:00", "2025-03-30T03:30:00+02:00"],
        ),
        (
            "30 * * * *",
            "Europe/Berlin",
            "2025-10-26 02:00",
            ["2025-10-26T02:30:00+02:00", "2025-10-26T02:30:00+01:00", "2025-10-26T03:30:00+01:00"],
        ),
        # with seconds, so does each: not in a gap, and at both of two equal times
        ("0 30 2 * * *", "Europe/Berlin", "2025-03-29 12:00", ["2025-03-31T02:30:00+02:00"]),
        (
            "0 30 1 * * *",
            "America/New_York",
            "2025-11-01 12:00",
            ["2025-11-02T01:30:00-04:00", "2025-11-02T01:30:00-05:00", "2025-11-03T01:30:00-05:00"],
        ),
        # leap days
        (
            "0 12 29 2 *",
            "Europe/Berlin",
            "2025-01-01 00:00",
            ["2028-02-29T12:00:00+01:00", "2032-02-29T12:00:00+01:00"],
        ),
        ("0 0 29 2 *", "America/New_York", "2096-03-01 00:00", ["2104-02-29T00:00:00-05:00"]),
        # seconds, the last day of a month, the second Tuesday, names
        ("*/20 * * * * *", "UTC", "2025-01-01 23:59:30", ["2025-01-01T23:59:40+00:00", "2025-01-02T00:00:00+00:00"]),
        ("0 0 L * *", "UTC", "2025-02-01 00:00", ["2025-02-28T00:00:00+00:00", "2025-03-31T00:00:00+00:00"]),
        ("0 9 * * TUE#2", "UTC", "2025-01-01 00:00", ["2025-01-14T09:00:00+00:00"]),
        ("0 9 * jan mon-fri", "UTC", "2025-01-03 12:00", ["2025-01-06T09:00:00+00:00"]),
    ],
)
def test_a_rule_fires_when_debians_cron_would(cron, zone, after, expected):
    assert fires(cron, zone, after, len(expected)) == expected


def test_in_the_second_of_two_equal_hours_the_first_ones_firings_are_over():
    zone = "Europe/Berlin"
    second = local("2025-10-26 02:10", zone).replace(fold=1)
    rule = read_rule("30 2 * * *", None, zone)
    assert rule.next_after(second) == local("2025-10-27 02:30", zone)


@given(
    st.sampled_from(RULES),
    st.sampled_from(ZONES),
    st.datetimes(datetime(2024, 1, 1), datetime(2026, 12, 31)),
)
def test_firings_rise_and_do_not_depend_on_where_one_began(cron, zone, start):
    rule = read_rule(cron, None, zone)
    moment = start.replace(tzinfo=UTC)
    found = []
    for _ in range(6):
        found.append(rule.next_after(found[-1] if found else moment))
    assert moment < found[0]
    assert found == sorted(set(found))
    assert all(rule.next_after(later - timedelta(microseconds=1)) == later for later in found)


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Australia/Lord_Howe", "Africa/Cairo", "America/Santiago"])
@pytest.mark.parametrize("cron", RULES)
def test_every_firing_of_a_year_is_found_from_the_one_before(cron, zone):
    rule = read_rule(cron, None, zone)
    if "*/7" in cron or cron.startswith(("0-59", "*/20")):  # many a day: around the changes only
        starts = [
            datetime(2025, month, day, tzinfo=UTC)
            for month, day in ((3, 29), (4, 5), (4, 24), (9, 6), (10, 4), (10, 25), (10, 30))
        ]
        length = timedelta(days=1.5)
    else:
        starts, length = [datetime(2025, 1, 1, tzinfo=UTC)], timedelta(days=366)
    for start in starts:
        at = start
        while (following := rule.next_after(at)) < start + length:
            assert following > at
            assert following - at <= timedelta(days=8)
            at = following


@given(st.floats(0.1, 366 * 86_400.0), st.datetimes(datetime(1971, 1, 1), datetime(2100, 1, 1)))
def test_intervals_fire_at_their_multiples_whoever_begins_when(every, start):
    rule = read_rule(None, every)
    moment = start.replace(tzinfo=UTC)
    first = rule.next_after(moment)
    step = timedelta(microseconds=round(every * 1e6))
    assert moment < first <= moment + step
    assert rule.next_after(first) == first + step
    assert (first - datetime(1970, 1, 1, tzinfo=UTC)) % step == timedelta(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cron": ""}, "not a cron rule"),
        ({"cron": "nonsense"}, "not a cron rule"),
        ({"cron": "* * * *"}, "five fields"),
        ({"cron": "60 * * * *"}, "Bad minute"),
        ({"cron": "0 0 * * 5L/2"}, "Bad day-of-week"),
        ({"cron": "0 0 ² * *"}, "not a cron rule"),
        ({"cron": "0 " * 200}, "not a cron rule"),
        ({"cron": 5}, "not a cron rule"),
        ({"cron": "9" * 150 + " * * * *"}, "not a cron rule"),
        ({"cron": "0 0 31 2 *"}, r"cron rule '0 0 31 2 \*' never fires: look at its day, month and weekday"),
        ({"cron": "5 0 0 30,31 feb *"}, "never fires"),
        ({"cron": "0 0 32 2 *"}, "not a cron rule.*Bad day-of-month"),
        ({"cron": "0 0 31 13 *"}, "not a cron rule.*Bad month"),
        ({"cron": "0 0 */20 * 1L"}, "never fires"),
        ({"cron": "0 3 * * *", "timezone": "Mars/Olympus"}, "no time zone named 'Mars/Olympus'"),
        ({"cron": "0 3 * * *", "timezone": ""}, "no time zone"),
        ({"cron": "0 3 * * *", "timezone": "Europe"}, "no time zone"),
        ({"cron": "0 3 * * *", "timezone": "../../etc/passwd"}, "no time zone"),
        ({"cron": "0 3 * * *", "timezone": 2}, "no time zone"),
        ({"cron": "0 3 * * *", "timezone": "\x00"}, "no time zone"),
        ({"every": 0}, "from 0.1 seconds to 366 days"),
        ({"every": -1}, "from 0.1 seconds"),
        ({"every": 0.099}, "from 0.1 seconds"),
        ({"every": timedelta(days=367)}, "366 days"),
        ({"every": float("nan")}, "every must be"),
        ({"every": float("inf")}, "every must be"),
        ({"every": True}, "every must be"),
        ({"every": "1 hour"}, "every must be"),
        ({"every": 60, "timezone": "Europe/Berlin"}, "no time zone: leave"),
        ({"cron": "0 3 * * *", "every": 60}, "either cron or every"),
        ({}, "either cron or every"),
        ({"every": 1, "name": "bad name"}, "letters, digits"),
        ({"every": 1, "name": ""}, "letters, digits"),
        ({"every": 1, "name": None}, "letters, digits"),
        ({"every": 1, "missed": "all"}, "'skip' or 'once'"),
        ({"every": 1, "missed": None}, "'skip' or 'once'"),
        ({"every": 1, "headers": [1]}, "headers must be a dict"),
    ],
)
def test_a_schedule_that_cannot_fire_is_refused_when_it_is_made(arguments, message):
    with pytest.raises(InvalidOption, match=message):
        Schedule(**arguments)


def test_what_is_declared_with_a_queue_is_checked_there():
    hourly = Schedule("0 * * * *", data=1)
    assert Queue("q", int, schedules=[hourly]).schedules == (hourly,)
    with pytest.raises(InvalidOption, match="two schedules are named 'default'"):
        Queue("q", int, schedules=[hourly, Schedule(every=1, data=2)])
    with pytest.raises(InvalidData, match=r"schedule .default.*expected int, not NoneType"):
        Queue("q", int, schedules=[Schedule(every=1)])
    for wrong in (hourly, "0 * * * *", 5, ["0 * * * *"]):
        with pytest.raises(InvalidOption, match="must be"):
            Queue("q", int, schedules=wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidData, match="headers"):
        Schedule(every=1, headers={"n": float("nan")})


def test_a_zone_is_given_by_name_or_as_one():
    assert Schedule("0 3 * * *", timezone=ZoneInfo("Europe/Berlin")) == Schedule("0 3 * * *", timezone="Europe/Berlin")


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "5", 10_001])
def test_a_preview_of_no_firings_is_refused(wrong):
    with pytest.raises(InvalidOption, match="count"):
        Schedule(every=1).next_firings(wrong)


def test_a_preview_after_a_naive_moment_is_refused():
    with pytest.raises(InvalidOption, match="aware"):
        Schedule(every=1).next_firings(1, after=datetime(2025, 1, 1))


# after a pause

HOURLY = read_rule("0 * * * *", None, "Europe/Berlin")
SECONDLY = read_rule(None, 1.0)
NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)


def after(**late: float) -> datetime:
    return NOON + timedelta(**late)


@pytest.mark.parametrize("missed", ["skip", "once"])
def test_a_firing_that_is_late_by_moments_is_not_missed(missed):
    for late in (0, 0.05, 1, 9.9):
        assert decide(HOURLY, NOON, after(seconds=late), missed) == Step(NOON, after(hours=1), False)
    # a stall of less than a second: each firing makes its job
    assert decide(SECONDLY, NOON, after(seconds=1), missed) == Step(NOON, after(seconds=1), False)


def test_after_a_long_pause_skip_makes_no_job_and_once_makes_one_for_the_last():
    now = after(days=40, minutes=30)
    assert decide(HOURLY, NOON, now, "skip") == Step(None, after(days=40, hours=1), True)
    assert decide(HOURLY, NOON, now, "once") == Step(after(days=40), after(days=40, hours=1), True)
    assert decide(HOURLY, NOON, after(minutes=30), "once") == Step(NOON, after(hours=1), True)
    assert decide(HOURLY, NOON, after(minutes=30), "skip") == Step(None, after(hours=1), True)


@pytest.mark.parametrize("missed", ["skip", "once"])
def test_when_one_is_due_just_now_it_stands_for_those_missed(missed):
    assert decide(HOURLY, NOON, after(hours=5, seconds=3), missed) == Step(None, after(hours=5), True)
    # 30 days of a firing each second, and of 864 a second's: found by halving
    assert decide(SECONDLY, NOON, after(days=30), missed) == Step(None, after(days=30, seconds=-1), True)


@given(st.sampled_from(RULES), st.sampled_from(ZONES), st.integers(0, 500_000_000), st.sampled_from(["skip", "once"]))
def test_made_up_for_is_at_most_once_and_nothing_is_left_behind(cron, zone, late, missed):
    rule = read_rule(cron, None, zone)
    first = rule.next_after(datetime(2025, 3, 28, 12, 34, 56, tzinfo=UTC))
    now = first + timedelta(milliseconds=late % 500_000)
    step = decide(rule, first, now, missed)
    known = list(itertools.takewhile(lambda at: at <= now, _following(rule, first)))
    assert step.next_at in (*known, rule.next_after(known[-1]))
    assert step.fired_for in (None, *known)
    if step.fired_for is None:
        assert step.missed
        assert missed == "skip" or step.next_at <= now
    else:
        assert rule.next_after(step.fired_for) == step.next_at
    assert step.next_at > now - LATE
    if not step.missed:
        assert now - first <= LATE
    assert len([at for at in known if at >= step.next_at and now - at > OVERTAKEN]) <= 1


def _following(rule, first):
    while True:
        yield first
        first = rule.next_after(first)


# the rest


async def test_the_servers_clock_is_known_as_well_as_its_answers_allow(autojump_clock):
    clock = ServerClock()
    start = trio.current_time()
    clock.measured(start, start + 2.0, 1000.0)  # slow: it was between 998 and 1000 at the start
    assert clock.at(1000.0) == pytest.approx(start + 1)
    clock.measured(start + 2.0, start + 2.1, 1001.5)  # quick: it was between 999.4 and 999.5
    assert clock.at(1000.0) == pytest.approx(start + 0.55, abs=0.06)
    clock.measured(start + 3.0, start + 3.1, 5000.0)  # it was set
    assert clock.at(5000.0) == pytest.approx(start + 3.05, abs=0.06)


@pytest.mark.parametrize(
    "headers", [{}, {"fired_for": 5}, {"fired_for": "x"}, {"fired_for": "2025-01-01"}, [1], None, "fired_for"]
)
def test_headers_of_other_origin_are_no_firing(headers):
    assert fired_for(headers) is None
    assert fired_for({"fired_for": "2025-03-30T01:00:00.5Z"}) == datetime(2025, 3, 30, 1, 0, 0, 500_000, tzinfo=UTC)

"""The parts that need no database: demand, floor, bell, batcher, codec, options, plan, backoff."""

from __future__ import annotations

import json
import math
import random
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

import notifyq
from notifyq import InvalidData, InvalidOption, Queue, SchemaMismatch, _schema
from notifyq._answers import Claimed, Haul, Stance
from notifyq._backoff import BASE, CAP, reconnect_delay
from notifyq._batcher import Batcher
from notifyq._beat import Heart
from notifyq._bell import Bell
from notifyq._claimer import Claimer
from notifyq._claimer_calls import ClaimerCalls
from notifyq._codec import encode, from_json, read_json, to_json
from notifyq._demand import Floor, Looks, Rate, demand
from notifyq._due import DueTime
from notifyq._errors import NoLease
from notifyq._schema import Installed, SqlFile, plan
from notifyq._shelf import Shelf
from notifyq._sql import send_parameters, send_statement
from notifyq.events import Events

if TYPE_CHECKING:
    from collections.abc import Callable

HANDS = st.integers(0, 5000)


@given(st.integers(1, 10_000), HANDS, HANDS, st.floats(0, 1e6))
def test_demand_never_exceeds_the_slots_and_100_ms_of_work(capacity, running, buffered, per_second):
    how_many = demand(capacity, running, buffered, per_second)
    assert 0 <= how_many <= capacity + min(2000, per_second * 0.1)
    if buffered == 0 and running < capacity:
        assert how_many >= capacity - running


def test_long_jobs_are_not_hoarded():
    assert demand(10, 10, 0, 2.0) == 0
    assert demand(10, 4, 0, 2.0) == 6


@pytest.mark.parametrize("slots", [1, 2, 10, 20, 500])
@pytest.mark.parametrize("seconds", [0.005, 0.03, 0.5])
def test_slots_that_end_at_one_moment_are_not_taken_for_a_rate(slots, seconds):
    rate = Rate(slots)
    now = 0.0
    rate.busy(now)
    measured = []
    for _ in range(100):
        now += seconds
        for _ in range(slots):
            now += 1e-6
            rate.finished(None)
            measured.append(rate.measure(now))
    assert max(measured) <= 2 * slots / seconds
    assert measured[-1] >= 0.3 * slots / seconds


def claimed(number: int, priority: int = 0) -> Claimed:
    return Claimed(number, 1, number, priority, 0, 1.0, datetime.now(UTC), None, None, None, None)


def test_the_floor_trails_the_head_by_a_second_and_a_ring_lowers_it():
    floor = Floor()
    floor.claimed([claimed(10), claimed(20)], now=100.0)
    assert floor.numbers == {0: 10}
    floor.claimed([claimed(21), claimed(30)], now=101.0)
    assert floor.numbers == {0: 20}
    floor.lower(0, 5)
    floor.lower(3, 7)
    floor.lower(0, 40)
    assert floor.numbers == {0: 5, 3: 7}


def test_the_floor_of_due_times_follows_what_is_due_and_a_ring_lowers_it():
    due = DueTime()
    assert due.heard("5.0")
    assert (due.since(False), due.since(True)) == (None, math.inf)  # nothing is known
    due.learning(now=10.0)
    due.learned(None, server_now=100.0, now=10.0)
    assert (due.since(False), due.since(True)) == (None, 99.0)
    due.learning(now=20.0)
    due.learned(200.0, server_now=113.0, now=23.0)  # which took three seconds
    assert due.floor == 109.0
    assert due.heard("90.5")
    due.heard("95.0")
    assert due.floor == 90.5
    due.learning(now=30.0)
    due.heard("104.0")  # too late to be seen
    due.learned(105.0, server_now=120.0, now=30.0)
    assert due.floor == 104.0
    due.claiming()
    due.heard("103.0")
    due.claimed(115.0)
    assert due.floor == 103.0
    due.claiming()
    due.claimed(115.0)
    assert due.floor == 115.0
    due.claimed(None)
    assert due.floor is None
    with pytest.raises(ValueError, match="soon"):
        due.heard("soon")


def test_what_a_ring_lowered_is_not_raised_by_what_was_claimed_before():
    floor = Floor()
    for second, number in enumerate((10, 20, 30)):
        floor.claimed([claimed(number)], now=100.0 + second)
    assert floor.numbers == {0: 20}
    floor.lower(0, 5)
    floor.claimed([claimed(40)], now=103.0)
    assert floor.numbers == {0: 5}
    floor.claimed([claimed(50)], now=104.0)
    assert floor.numbers == {0: 40}


def test_the_floor_knows_each_priority_of_a_haul():
    floor = Floor()
    for second, at in enumerate((10, 20)):
        floor.claimed([claimed(at + n, priority) for priority in (9, 5, 0) for n in range(3)], now=100.0 + 2 * second)
    assert floor.numbers == {9: 12, 5: 12, 0: 12}


def test_a_look_that_was_asked_for_while_one_was_under_way_is_still_due():
    looks = Looks()
    looks.made(0.0, 10.0)
    looks.made(100.0, 110.0)
    assert not looks.is_due(120.0)
    looks.ask(130.0)
    assert looks.is_due(130.0)
    looks.made(129.0, 140.0)
    assert looks.is_due(140.0)
    looks.made(140.0, 150.0)
    assert not looks.is_due(150.0)
    looks.ask(151.0)
    looks.spared(152.0, 153.0)
    assert not looks.is_due(153.0)


def test_looks_are_put_off_for_five_minutes_at_most():
    looks = Looks()
    looks.made(0.0, 10.0)
    looks.made(100.0, 110.0)
    assert not looks.is_due(110.0 + 299.9)
    assert looks.is_due(110.0 + 300.1)


def test_looks_are_dear_once_two_in_a_row_took_long():
    looks = Looks()
    looks.made(0.0, 0.2)
    assert looks.cheap
    looks.made(2.0, 3.5)
    assert not looks.cheap
    assert not looks.is_due(3.5 + 19.9)
    assert looks.is_due(3.5 + 20.1)  # a look of a fifth of a second may take a hundredth of the time
    assert looks.owed_at == math.inf
    looks.owed = True
    assert 3.5 + 19.9 < looks.owed_at < 3.5 + 20.1
    looks.made(54.0, 54.001)
    assert looks.owed_at == math.inf
    assert looks.cheap


async def test_a_ring_while_nobody_waits_is_kept_and_many_are_one(autojump_clock):
    bell = Bell()
    bell.ring()
    bell.ring()
    await bell.wait()
    bell.clear()
    with trio.move_on_after(1) as patience:
        await bell.wait()
    assert patience.cancelled_caught


@pytest.mark.parametrize(("share", "borne"), [(0.32, True), (0.6, False)])
async def test_a_lease_bears_a_stall_of_a_third_of_it_at_any_moment(autojump_clock, share, borne):
    """With 1.5 s, half a second: for so long no beat is answered."""
    lease = 1.5
    lost = []
    for moment in range(200):
        stall = trio.current_time() + moment / 100

        async def beat(stall: float = stall) -> Any:
            if stall <= trio.current_time() < stall + share * lease:
                await trio.sleep_until(stall + share * lease)
            return SimpleNamespace(renewed=True)

        heart = Heart(
            "r",
            lease,
            beat=beat,
            register=trio.lowlevel.checkpoint,
            told=lambda beat: None,
            lost=lambda moment=moment: lost.append(moment),
            events=Events(),
        )
        with trio.move_on_after(4):
            await heart.run()
    assert (lost == []) is borne


async def test_a_lease_is_given_up_in_time_however_long_a_beat_takes_to_be_cancelled(autojump_clock):
    began = trio.current_time()
    given_up = []

    async def beat() -> Any:
        if trio.current_time() > began:
            with trio.CancelScope(shield=True):
                await trio.sleep(10)  # it waits for its connection's last answer, say
        return SimpleNamespace(renewed=True)

    heart = Heart(
        "r",
        6.0,
        beat=beat,
        register=trio.lowlevel.checkpoint,
        told=lambda beat: None,
        lost=lambda: given_up.append(trio.current_time() - began),
        events=Events(),
    )
    with trio.move_on_after(8):
        await heart.run()
    assert given_up == [pytest.approx(5.0)]


async def test_the_batcher_batches_what_arrives_during_a_flush_and_loses_nothing_when_cancelled(autojump_clock):
    flushed: list[list[int]] = []

    async def flush(items: list[int]) -> None:
        await trio.sleep(1)
        flushed.append(items)

    batcher: Batcher[int] = Batcher(flush, limit=3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(batcher.run)
        batcher.put(0)
        await trio.sleep(0.5)
        for number in range(1, 6):
            batcher.put(number)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert flushed == [[0]]
    await batcher.close()
    assert flushed == [[0], [1, 2, 3], [4, 5]]
    assert batcher.backlog == 0


async def test_the_next_flush_is_begun_before_those_go_on_who_wait_for_room():
    order: list[Any] = []

    async def flush(items: list[int]) -> None:
        order.append(items)
        await trio.lowlevel.checkpoint()

    batcher: Batcher[int] = Batcher(flush, limit=1)

    async def waits() -> None:
        await batcher.wait_backlog_below(2)
        order.append("room")

    batcher.put(1)
    batcher.put(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waits)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(batcher.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert order == [[1], [2], "room"]


@given(st.integers(1, 10_000), st.integers())
def test_reconnect_delay_lies_within_its_documented_bounds(failures, seed):
    ceiling = min(CAP, BASE * 2.0 ** min(failures - 1, 60))
    assert ceiling / 2 <= reconnect_delay(failures, random.Random(seed)) <= ceiling


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_what_json_takes_comes_back_equal_and_the_rest_is_refused(value):
    try:
        text = to_json(value)
    except InvalidData:
        plain = json.dumps(value)
        assert "\\u0000" in plain or "\\ud" in plain
    else:
        assert json.loads(text) == value
        assert "\x00" not in text


@attrs.frozen
class Inner:
    when: datetime
    tags: list[str]


@attrs.frozen
class Outer:
    inner: Inner
    n: int = 0


def test_typed_data_comes_back_as_it_was():
    value = Outer(Inner(datetime(2026, 1, 2, tzinfo=UTC), ["a"]), 3)
    assert from_json(read_json(encode(value, Outer)), Outer) == value


def test_data_that_does_not_fit_names_every_place():
    with pytest.raises(InvalidData) as caught:
        from_json({"inner": {"when": "never", "tags": ["a", {}]}, "n": "x"}, Outer)
    text = str(caught.value)
    assert "@ $.inner.when" in text
    assert "@ $.n" in text


@pytest.mark.parametrize(
    ("value", "type_", "message"),
    [
        (float("nan"), float, "not JSON"),
        ("a\x00b", str, "NUL"),
        ({"a": ["\x00"]}, dict, "NUL"),
        ("\ud800", str, "surrogates"),
        (b"bytes", dict, "expected dict, not bytes"),
        (True, int, "expected int, not bool"),
        ("1", int, "expected int, not str"),
        ([1, "x"], list[int], "@ $"),
        ({"n": 1}, Outer, "Outer"),
        (Outer(Inner(datetime(2026, 1, 2, tzinfo=UTC), ["a"]), "3"), Outer, r"expected int @ $.n"),
    ],
)
def test_bad_data_is_refused_when_sent(value, type_, message):
    with pytest.raises(InvalidData, match=message.replace("$", r"\$")) as caught:
        Queue("q", type_).encode(value)
    assert "queue 'q'" in str(caught.value)


def test_deep_and_circular_data_is_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    circle: list = []
    circle.append(circle)
    for value in (deep, circle):
        with pytest.raises(InvalidData):
            to_json(value)


def test_backslashes_before_u0000_are_not_nul():
    assert json.loads(to_json("\\u0000")) == "\\u0000"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": datetime(2026, 1, 1)}, "aware"),
        ({"delay": "soon"}, "delay"),
        ({"delay": float("inf")}, "delay"),
        ({"priority": 1.5}, "priority"),
        ({"priority": 10**6}, "priority"),
        ({"headers": []}, "headers"),
        ({"id_key": 3}, "id_key"),
        ({"retry_backoff": "yes"}, "retry_backoff"),
        ({"start_after": 5}, "delay takes"),
        ({"visibility_timeout": 5}, "lease"),
        ({"dealy": 5}, "has no option 'dealy'"),
    ],
)
def test_a_bad_option_is_refused_by_name_with_the_fix(options, message):
    with pytest.raises(InvalidOption, match=message):
        Queue("q").statement(None, **options)


def test_a_statement_for_any_connection():
    sql, parameters = Queue("q", int).statement(5, delay=timedelta(minutes=1), schema="jobs")
    assert sql.startswith('select * from "jobs"."send"(%s::text, %s::jsonb')
    assert parameters[:4] == ("q", "5", None, "60.0 s")
    with pytest.raises(InvalidOption, match="lower-case"):
        Queue("q").statement(1, schema='x"; drop')


def test_parameters_and_statement_agree():
    assert send_statement("notifyq").count("%s") == len(send_parameters("q", "1", {}))
    assert len(send_parameters("q", "1", {"priority": 1})) == len(send_parameters("q", "1", {}))


@pytest.mark.parametrize("name", ["", "a" * 101, "sp ace", "ünder", "semi;", "a\n", 5])
def test_a_bad_queue_name_is_refused_with_the_rule(name):
    with pytest.raises(InvalidOption, match="1 to 100 letters"):
        Queue(name)


def test_a_type_that_json_cannot_hold_is_refused_at_declaration():
    with pytest.raises(InvalidData, match="queue 'q'"):
        Queue("q", type("Odd", (), {"__init__": lambda self, x: None}))


@pytest.mark.parametrize("no_type", [None, 5, "int"])
def test_what_is_no_type_is_refused_at_declaration_with_what_is_one(no_type):
    with pytest.raises(InvalidData, match=rf"queue 'q': {no_type!r} is not a type: give a class"):
        Queue("q", no_type)


def test_none_is_the_type_of_what_a_worker_that_returns_nothing_returns():
    queue = Queue("q", int, None)
    assert queue.output_type is type(None)


def good(job):
    return None


async def generator(job):
    yield 1


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda q: q.worker(generator), "must be an async def or a plain function"),
        (lambda q: q.worker(5), "must be an async def"),
        (lambda q: q.worker(lambda: None), "must take one argument"),
        (lambda q: q.worker(name="x"), "known by its queue"),
        (lambda q: q.worker(visibility_timeout=5), "lease"),
        (lambda q: q.worker(lock_duration=5), "lease"),
        (lambda q: q.worker(batch_size=5), "batch_worker"),
        (lambda q: q.worker(concurrency=0)(good), "concurrency must be"),
        (lambda q: q.worker(poll_interval=0)(good), "poll_interval must be above zero"),
        (lambda q: q.batch_worker(batch_size=5)(good), "batch worker must be an async def"),
        (lambda q: q.batch_worker(batch_size=5, name="x"), "known by its queue"),
        (lambda q: (q.worker(good), q.worker(good)), "is registered on it already"),
    ],
)
def test_a_bad_registration_is_refused_with_the_fix(register, message):
    with pytest.raises(InvalidOption, match=message):
        register(Queue("q"))


def test_a_runtime_refuses_what_it_cannot_run():
    working = Queue("w")
    working.worker(good)
    for queues, options, message in (
        ([], {}, "at least one queue"),
        ([Queue("q")], {}, "has no worker"),
        ([working, working], {}, "given twice"),
        ([working], {"lease": 0.1}, "lease must be"),
        ([working], {"grace": -1}, "grace must be"),
        ([working], {"schema": "Bad"}, "lower-case"),
    ):
        with pytest.raises(InvalidOption, match=message):
            notifyq.Runtime(queues, **options)


FILES = [SqlFile("migrations/0001_a.sql", "", "h1"), SqlFile("functions/10_b.sql", "", "h2")]
NOW = _schema._parsed(_schema.VERSION)


def test_the_plan_runs_what_is_missing_and_refuses_what_is_newer():
    both = {"migrations/0001_a.sql": "h1", "functions/10_b.sql": "h2"}
    assert plan(None, FILES) == FILES
    assert plan(Installed(both, NOW), FILES) == []
    assert plan(Installed({**both, "functions/10_b.sql": "old"}, NOW), FILES) == FILES[1:]
    assert plan(Installed({**both, "functions/10_b.sql": "new"}, (99, 0, 0)), FILES) == []
    with pytest.raises(SchemaMismatch, match=r"newer than notifyq .*0002_c"):
        plan(Installed({**both, "migrations/0002_c.sql": "h3"}, NOW), FILES)
    with pytest.raises(SchemaMismatch, match="another migrations/0001_a"):
        plan(Installed({**both, "migrations/0001_a.sql": "edited"}, NOW), FILES)


def test_a_schema_of_another_name_has_no_trace_of_the_first():
    assert all("notifyq" not in file.text for file in _schema.load("other"))


def claimer_of_nothing(claim_at_once: Callable[..., bool], release: Callable[[Any], object]) -> Claimer:
    async def claim(_how_many: int, _floors: Any, _due_floor: float | None) -> Haul:
        return Haul([])

    async def next_due(_due_floor: float | None) -> tuple[None, float]:
        return None, 0.0

    async def stand_free(_due_floor: float | None) -> Stance:
        return Stance(stands=True, passed=True, ready=False, due=None, clock=0.0)

    calls = ClaimerCalls(
        claim=claim,
        claim_at_once=claim_at_once,
        next_due=next_due,
        stand_free=stand_free,
        stand_busy=lambda: None,
        stand_far=lambda _: None,
        say_taken=lambda _: None,
        release=release,
        gone=lambda: None,
    )
    return Claimer("q", calls, capacity=3, poll_interval=None, events=Events())


async def test_a_ring_lowers_the_floor_also_of_one_that_looks_by_itself():
    claimer = claimer_of_nothing(lambda _how_many, _answered: False, lambda _: None)
    for number in range(100, 0, -1):
        claimer.heard(f"r:0:{number}")
    assert claimer._watch.crowded
    assert claimer._floor.numbers == {0: 1}


async def test_a_ring_lowers_the_floor_also_in_a_pause():
    claimer = claimer_of_nothing(lambda _how_many, _answered: False, lambda _: None)
    claimer.heard("r:0:100")
    claimer.pause(True)
    claimer.bell.clear()
    for payload in ("r:0:7", "d:5.0", "room", "t:1"):
        claimer.heard(payload)
    assert claimer._floor.numbers == {0: 7}
    claimer.looks.made(trio.current_time(), trio.current_time())
    await trio.sleep(0.001)
    for payload in ("look", "nonsense"):
        claimer.heard(payload)
    assert claimer._floor.numbers == {}
    assert claimer.looks.is_due(-math.inf)
    assert not claimer.bell.rung


@pytest.mark.parametrize("answer", [NoLease("stopping"), psycopg.OperationalError("gone"), [claimed(1), claimed(2)]])
async def test_what_a_claim_brings_that_was_asked_for_just_before_the_end_is_handed_back(answer):
    asked: list[int] = []
    answers: list[Callable[[Any], None]] = []

    def claim_at_once(how_many: int, answered: Callable[[Any], None]) -> bool:
        asked.append(how_many)
        answers.append(answered)
        return True

    claimer = claimer_of_nothing(claim_at_once, asked.append)
    async with trio.open_nursery() as nursery:
        claiming = trio.CancelScope()

        async def run() -> None:
            with claiming:
                await claimer.run()

        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        claimer.heard("r:0:1")
        claiming.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert claimer.hands.shelf.take_back() == []
        assert asked == [3]
        answers.pop()(Haul(answer) if isinstance(answer, list) else answer)
    assert claimer.hands.shelf.take_back() == (answer if isinstance(answer, list) else [])


async def test_a_job_that_is_dropped_before_it_starts_leaves_its_place_to_the_next_of_its_key():
    claimer = claimer_of_nothing(lambda *_: False, lambda _: None)
    claimer.full_keys = {""}
    claimer.hands.shelf.put([claimed(1), claimed(2)])
    claimer.drop([3])
    assert not claimer.bell.rung
    claimer.drop([1])
    assert claimer.bell.rung


@pytest.mark.parametrize("fair", [False, True])
async def test_on_the_shelf_of_a_fair_queue_keys_take_turns_within_a_priority(fair):
    def put(*names: str) -> None:
        jobs = [claimed(int(name[1:]), {"-": -1, "+": 1}.get(name[-1], 0)) for name in names]
        for job, name in zip(jobs, names, strict=True):
            job.key = name[0]
        shelf.put(jobs)

    async def take(how_many: int) -> list[str]:
        return [f"{job.key}{job.id}" for job in await shelf.take(how_many)]

    shelf = Shelf()
    shelf.fair = fair
    put("a1", "a2", "a3", "a4")
    assert await take(1) == ["a1"]
    put("b5", "b6", "c7", "a8", "b9")
    assert await take(2) == (["a2", "b5"] if fair else ["a2", "a3"])
    put("d10")
    assert await take(20) == (
        ["c7", "a3", "b6", "d10", "a4", "b9", "a8"] if fair else ["a4", "b5", "b6", "c7", "a8", "b9", "d10"]
    )


async def test_on_the_shelf_of_a_fair_queue_a_higher_priority_goes_before_anybodys_turn():
    shelf = Shelf()
    shelf.fair = True
    shelf.put([claimed(1, 5), claimed(2, 5), claimed(3)])
    other = [claimed(4), claimed(5, 5), claimed(6, -1)]
    for job in other:
        job.key = "other"
    shelf.put(other)
    assert [job.id for job in await shelf.take(9)] == [1, 5, 2, 3, 4, 6]

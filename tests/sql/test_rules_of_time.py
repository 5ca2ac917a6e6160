"""The rules of time: a plain model of rates and turns and the SQL functions, step by step together.

No test waits. Time passes because the times that are stored move into the past, by whole hundredths of a period, the
finest that a rate counts: a start that is 99 of them old counts, one that is 101 old does not, and since what a start
that is 100 old does depends on the moment within its hundredth, the machine never looks then. A hundredth is about a
day, so the real time that a run takes changes nothing.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from notifyq import testing

if TYPE_CHECKING:
    from collections.abc import Iterator

HUNDREDTH = 80_000
"""Seconds in a hundredth of the period of a rate; so many of waiting make up for a step of priority, too, which may be a
day at most. Not of a day's length, so that its slots do not begin at midnight."""

KEYS = st.sampled_from(["a", "b", "c"])
PRIORITIES = st.sampled_from([0, 0, 0, 0, 60, -60])
OPTIONS = {
    "rate_limit": st.integers(1, 4),
    "key_rate_limit": st.integers(1, 3),
    "key_limit": st.integers(1, 3),
    "active_limit": st.integers(1, 4),
    "turns": st.sampled_from([{"fair": True}, {"ageing": HUNDREDTH}]),
}
QUEUES = st.fixed_dictionaries({}, optional=OPTIONS)


@attrs.define(eq=False)
class ModelJob:
    """What the model knows of a job."""

    id: int
    key: str
    priority: int
    number: tuple[int, int] = (0, 0)
    """Its place in line, among those of a priority."""
    state: str = "ready"
    due: tuple[int, int, int] = (0, 0, 0)
    """When it is due, in hundredths; and what orders those that are due at once."""


class Model:
    """The rules, as plainly as they can be said."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.rate_limit = options.get("rate_limit")
        self.key_rate_limit = options.get("key_rate_limit")
        self.fair = "fair" in options
        self.ageing = "ageing" in options
        self.slots = options.get("key_limit")
        self.active_limit = options.get("active_limit")
        self.jobs: dict[int, ModelJob] = {}
        self.starts: list[tuple[int, str]] = []
        self.turns: dict[str, ModelJob] = {}
        """The job of a key that is scheduled for when the rate lets the key go on."""
        self.clock = 0
        self.next_start: int | None = None
        self.numbers = itertools.count(1)

    def of(self, *states: str, key: str | None = None) -> list[ModelJob]:
        found = [job for job in self.jobs.values() if job.state in states and key in (None, job.key)]
        return sorted(found, key=self.place)

    def place(self, job: ModelJob) -> tuple[int, tuple[int, int]]:
        return (0 if self.ageing else -job.priority, job.number)

    def number(self, job: ModelJob) -> None:
        """It goes to the end of the line, or to where its priority and the moment say."""
        job.number = (self.clock - job.priority if self.ageing else 0, next(self.numbers))

    def sent(self, id: int, key: str, priority: int, delay: int = 0, *, waits: bool = False) -> None:
        job = self.jobs[id] = ModelJob(id, key, priority, state="blocked" if waits else "ready")
        self.number(job)
        if delay:
            self.later(job, delay)

    def later(self, job: ModelJob, delay: int) -> None:
        job.state = "scheduled"
        job.due = (self.clock + delay, 1, next(self.numbers))

    def again(self, job: ModelJob) -> None:
        job.state = "ready"
        self.number(job)

    def edit(self, job: ModelJob, priority: int | None, delay: int | None) -> None:
        """It takes its new place; who has waited behind it for it to start does not any longer if it is put off."""
        was = job.state
        if priority is not None:
            job.priority = priority
            if self.ageing and (was == "ready" or (was == "blocked" and not delay)):
                self.number(job)
        if delay:
            self.later(job, delay)
            if was == "ready" or self.turns.get(job.key) is job:
                self.turns.pop(job.key if was == "scheduled" else "", None)
                self.advance(job.key)
        elif was == "scheduled" and delay == 0:
            self.again(job)
        elif was == "blocked" and priority is not None:
            job.state = "ready"

    def counting(self, key: str | None = None) -> list[int]:
        return [at for at, of in self.starts if self.clock - at < 101 and key in (None, of)]

    def rate_left(self, key: str) -> int | None:
        return None if self.key_rate_limit is None else self.key_rate_limit - len(self.counting(key))

    def slots_left(self, key: str) -> int | None:
        return None if self.slots is None else self.slots - len(self.of("active", key=key))

    def room(self, how_many: int) -> int:
        active = None if self.active_limit is None else self.active_limit - len(self.of("active"))
        rate = None if self.rate_limit is None else self.rate_limit - len(self.counting())
        return least(how_many, active, rate)

    def start(self, job: ModelJob) -> int:
        job.state = "active"
        self.starts.append((self.clock, job.key))
        return job.id

    def claim(self, how_many: int, claimed: list[int]) -> None:
        """What this claim may bring: claimed, or an AssertionError."""
        due = sorted((job for job in self.of("scheduled") if job.due[0] <= self.clock), key=lambda job: job.due)
        for job in due:
            self.again(job)
        room = all_room = self.room(how_many)
        started: list[ModelJob] = []
        rated: set[str] = set()
        size = max(room, 16)
        while room > 0:
            front = self.of("ready")[:size]
            starting = self.sift(front, room, {job.key for job in started}, rated)
            started += starting
            room -= len(starting)
            if len(front) < size:
                break
            size *= 4
        assert claimed[: len(started)] == [job.id for job in started]
        helping = [self.jobs[id] for id in claimed[len(started) :]]
        keys = {job.key for job in started}
        if self.fair or self.key_rate_limit is not None:
            self.help_out(helping, room, keys)
            self.next_turns(keys | rated)
        else:
            assert not helping
        if all_room > 0 or self.rate_limit is not None:
            used_up = self.rate_limit is not None and len(self.counting()) >= self.rate_limit
            self.next_start = min(self.counting()) + 101 if used_up and self.of("ready") else None

    def sift(self, front: list[ModelJob], room: int, had_turn: set[str], rated: set[str]) -> list[ModelJob]:
        """Those that start; the others of their keys step back."""
        ranks = {key: itertools.count(1) for key in {job.key for job in front}}
        slots = {key: 0 if self.fair and key in had_turn else self.slots_left(key) for key in ranks}
        slots = {key: least(1, left) if self.fair else left for key, left in slots.items()}
        rates = {key: self.rate_left(key) for key in ranks}
        starting = []
        for job in front:
            rank = next(ranks[job.key])
            by_slots, by_rate = (left is None or rank <= left for left in (slots[job.key], rates[job.key]))
            if by_slots and by_rate:
                if len(starting) < room:
                    starting.append(job)
                continue
            job.state = "blocked"
            if by_slots:
                rated.add(job.key)
        for job in starting:
            self.start(job)
        return starting

    def help_out(self, helping: list[ModelJob], room: int, keys: set[str]) -> None:
        """Keys that started may go on while there is room, evenly, and each in its order."""
        behind = {key: self.of("blocked", key=key) for key in keys}
        could = {key: max(least(len(behind[key]), self.slots_left(key), self.rate_left(key)), 0) for key in keys}
        brought = {key: [job for job in helping if job.key == key] for key in keys}
        assert len(helping) == min(room, sum(could.values()))
        assert len(helping) == sum(len(jobs) for jobs in brought.values())
        for key, jobs in brought.items():
            assert sorted(jobs, key=self.place) == behind[key][: len(jobs)]
            for other, more in brought.items():
                assert len(more) <= len(jobs) + 1 or len(jobs) == could[key], (key, other)
            for job in jobs:
                self.start(job)

    def next_turns(self, keys: set[str]) -> None:
        resting = []
        going = []
        for key in keys:
            left = self.rate_left(key)
            if self.slots is None or len(self.of("active", key=key)) < self.slots:
                (going if left is None or left > 0 else resting).append(key)
        self.advance(*going)
        for key in resting:
            due = (min(self.counting(key)) + 101, 0)
            turn = self.turns.get(key)
            waiting = self.of("blocked", key=key)
            if waiting and not (turn and turn.state == "scheduled" and turn.due[:2] <= due):
                self.turns[key] = waiting[0]
                waiting[0].state = "scheduled"
                waiting[0].due = (*due, waiting[0].id)

    def advance(self, *keys: str) -> None:
        """The next one of each key comes to the line; where keys take turns, to its end."""
        going = [waiting[0] for key in keys if (waiting := self.of("blocked", key=key))]
        for job in sorted(going, key=lambda job: job.number):
            job.state = "ready"
            if self.fair:
                self.number(job)

    def leave(self, job: ModelJob, state: str) -> None:
        """It leaves active, or the line, for good or not."""
        was, job.state = job.state, state
        if (was == "active" and self.slots is not None) or was in ("ready", "scheduled"):
            self.advance(job.key)


def least(first: int, *more: int | None) -> int:
    """The least of several limits, of which there may be none."""
    return min([first, *(one for one in more if one is not None)])


class Machine(RuleBasedStateMachine):
    """Does the same to a model and to a queue of the database."""

    connection: psycopg.Connection[Any]
    names = (f"q{number}" for number in itertools.count())

    def ask(self, statement: str, *parameters: object) -> list[Any]:
        cursor = self.connection.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []

    def make(self, options: dict[str, Any]) -> None:
        self.queue = next(self.names)
        defaults = {"retry_limit": 1000, "retry_delay": 0, "timeout": "50 years"}
        self.ask("select notifyq.create_queue(%s, %s)", self.queue, json.dumps(defaults | options))
        [(self.number,)] = self.ask("select number from notifyq.queue where name = %s", self.queue)

    def teardown(self) -> None:
        if hasattr(self, "queue"):
            self.ask("select notifyq.delete_queue(%s)", self.queue)


class Gate(Machine):
    """Rates and turns."""

    @initialize(options=QUEUES)
    def make_queue(self, options: dict[str, Any]) -> None:
        options = {name: value for name, value in options.items() if name != "turns"} | options.get("turns", {})
        for rate in {"rate", "key_rate"} & {name.removesuffix("_limit") for name in options}:
            options[f"{rate}_period"] = 100 * HUNDREDTH
        self.make(options)
        self.model = Model(options)

    def pick(self, data: st.DataObject, *states: str) -> ModelJob:
        return data.draw(st.sampled_from(sorted(self.model.of(*states), key=lambda job: job.id)))

    @rule(key=KEYS, priority=PRIORITIES, delay=st.sampled_from([0, 0, 0, 40, 101]))
    def send(self, key: str, priority: int, delay: int) -> None:
        call = "select notifyq.send(%s, key => %s, priority => %s, delay => %s)"
        [(id,)] = self.ask(call, self.queue, key, priority, f"{delay * HUNDREDTH} s" if delay else None)
        self.model.sent(id, key, priority, delay)

    @rule(keys=st.lists(KEYS, min_size=2, max_size=12), priority=PRIORITIES)
    def send_many(self, keys: list[str], priority: int) -> None:
        """Of each key, no more than could start go to the line."""
        jobs = json.dumps([{"key": key, "priority": priority} for key in keys])
        limit = self.model.slots or 1
        limited = self.model.fair or self.model.slots or self.model.key_rate_limit
        for place, (id,) in enumerate(self.ask("select id from notifyq.send_many(%s, %s)", self.queue, jobs)):
            waits = bool(limited) and keys[:place].count(keys[place]) >= limit
            self.model.sent(id, keys[place], priority, waits=waits)

    @precondition(lambda self: self.model.of("ready", "blocked", "scheduled"))
    @rule(data=st.data(), priority=st.one_of(st.none(), PRIORITIES), delay=st.sampled_from([None, None, 0, 40]))
    def edit(self, data: st.DataObject, priority: int | None, delay: int | None) -> None:
        self.wait(1)  # or its new place could be that of a job that was sent in the same millisecond
        job = self.pick(data, "ready", "blocked", "scheduled")
        call = "select notifyq.update_job(%s, data => '1', priority => %s, delay => %s)"
        interval = None if delay is None else f"{delay * HUNDREDTH} s"
        assert self.ask(call, job.id, priority, interval) == [(job.id,)]
        self.model.edit(job, priority, delay)

    @rule(how_many=st.integers(1, 12))
    def claim(self, how_many: int) -> None:
        self.ask(
            "select notifyq.promote(%s)", self.number
        )  # as runtimes do; a claim by hand moves only some of what is due
        rows = self.ask("select id from notifyq.claim(%s, %s)", self.queue, how_many)
        self.model.claim(how_many, [id for (id,) in rows])
        [(due,)] = self.ask("select extract(epoch from notifyq.next_due(%s) - now())::float8", self.number)
        dues = [job.due[0] for job in self.model.of("scheduled")]
        expected = min(dues if self.model.next_start is None else [*dues, self.model.next_start], default=None)
        if expected is None:
            assert due is None
        else:
            assert expected - 1.01 < self.model.clock + due / HUNDREDTH <= expected

    @rule(hundredths=st.sampled_from([1, 25, 50, 74, 99, 101]))
    def wait(self, hundredths: int) -> None:
        """Time passes."""
        model = self.model
        while any(model.clock + hundredths - at == 100 for at, _ in model.starts):
            hundredths += 1
        model.clock += hundredths
        for table in ("gate", "key"):
            shifted = "select array_agg(s - %s order by s) from unnest(starts) s"
            self.ask(f"update notifyq.{table} set starts = ({shifted}) where queue = %s", hundredths, self.number)
        by = f"{hundredths * HUNDREDTH} s"
        self.ask(
            "update notifyq.gate set next_start_at = next_start_at - %s::interval where queue = %s", by, self.number
        )
        self.ask("update notifyq.scheduled set due_at = due_at - %s::interval where queue = %s", by, self.number)
        for table in ("ready", "blocked", "active") if model.ageing else ():
            change = f"update notifyq.{table} set number = number - %s::bigint * 1000 * 1048576 where queue = %s"
            self.ask(change, hundredths * HUNDREDTH, self.number)

    @precondition(lambda self: self.model.of("active"))
    @rule(data=st.data(), how=st.sampled_from(["complete", "release", "fail", "snooze"]))
    def end(self, data: st.DataObject, how: str) -> None:
        """However it ends, its start counts."""
        job = self.pick(data, "active")
        if how == "complete":
            assert self.ask("select notifyq.complete(%s)", job.id) == [(True,)]
            self.model.leave(job, "completed")
            return
        if how == "fail":
            assert self.ask("select notifyq.fail(%s, 'x')", job.id) == [("ready",)]
            self.model.number(job)
        elif how == "release":
            self.ask("select notifyq.release(array[%s::bigint])", job.id)
        elif how == "snooze":
            self.ask("select notifyq.snooze(array[%s::bigint], array[%s::interval])", job.id, f"{40 * HUNDREDTH} s")
            self.model.later(job, 40)
            job.state = "active"
        self.model.leave(job, "scheduled" if how == "snooze" else "ready")

    @precondition(lambda self: self.model.of("ready", "blocked", "scheduled", "active"))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = self.pick(data, "ready", "blocked", "scheduled", "active")
        assert self.ask("select notifyq.cancel(%s)", job.id) == [(True,)]
        self.model.leave(job, "cancelled")

    @rule()
    def purge(self) -> None:
        """Nothing that counts is forgotten."""
        self.ask("select notifyq.purge()")
        for key in {job.key for job in self.model.jobs.values()}:
            if not self.model.counting(key) and not (self.model.slots and self.model.of("active", key=key)):
                self.model.turns.pop(key, None)

    @invariant()
    def the_database_agrees(self) -> None:
        if hasattr(self, "model"):
            rows = self.ask("select id, state from notifyq.jobs where queue = %s", self.queue)
            assert dict(rows) == {job.id: job.state for job in self.model.jobs.values()}


@pytest.fixture
def database(server: str, template: str) -> Iterator[psycopg.Connection[Any]]:
    name = "notifyq_rules_of_time"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"create database {name} template {template}".encode())
        with psycopg.connect(testing.with_database(server, name), autocommit=True) as connection:
            yield connection
        admin.execute(f"drop database {name}".encode())


def run(connection: psycopg.Connection[Any], machine: type[Machine], examples: int, *, shrink: bool) -> None:
    run_state_machine_as_test(
        type("MachineHere", (machine,), {"connection": connection}),
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            derandomize="NOTIFYQ_RULES" not in os.environ,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            report_multiple_bugs=False,
            print_blob=True,
        ),
    )


@pytest.mark.parametrize("machine", [Gate])
def test_the_sql_functions_do_what_the_model_says(database, machine):
    """The same examples each time; ``NOTIFYQ_RULES=1000`` tries so many others."""
    run(database, machine, int(os.environ.get("NOTIFYQ_RULES", "80")), shrink=True)


BROKEN = {
    "a rate lets one more start": (Gate, "rate_room", "rate_room.rate_limit -", "rate_room.rate_limit + 1 -"),
}
"""What is broken: by a function whose text is changed so."""


@pytest.mark.parametrize(("machine", "function", "text", "other"), BROKEN.values(), ids=BROKEN.keys())
def test_the_model_notices_a_function_that_is_broken(database, machine, function, text, other):
    call = "select pg_get_functiondef(oid) from pg_proc where pronamespace = 'notifyq'::regnamespace and proname = %s"
    [(definition,)] = database.execute(call.encode(), [function]).fetchall()
    assert text in definition
    database.execute(definition.replace(text, other).encode())
    with pytest.raises((AssertionError, psycopg.Error, ExceptionGroup)):
        run(database, machine, 200, shrink=False)

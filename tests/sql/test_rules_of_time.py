"""The rules of time: a plain model of rates, turns, ageing and slots and the SQL functions, step by step together.

No test waits: the times that are stored move into the past, as ``age_jobs`` moves them, by whole hundredths of a period,
the finest that a rate counts. A start that is 99 of them old counts, one that is 101 old does not; what one that is 100 old
does depends on the moment within its hundredth, and the machine never looks then. A hundredth takes days and none ends
while this runs.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from importlib.resources import files
from math import inf
from typing import Any

import attrs
import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings, stateful
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from notifyq import testing

HUNDREDTH = min(range(290_000, 300_001, 1_000), key=lambda seconds: time.time() % seconds)
"""Seconds in a hundredth of the period of a rate, in a slot of a throttle or debounce, and in four steps of ageing: of
several lengths, the one of which one began last, and ends days after this."""

KEYS = st.sampled_from(["a", "a", "b", "c"])
PRIORITIES = st.sampled_from([0, 80, -80])
CHANGES = st.tuples(st.sampled_from([None, None, 0, 80, -80]), st.sampled_from([None, None, None, 0, 40]))
OPTIONS = {
    "rate_limit": st.integers(1, 4),
    "key_rate_limit": st.integers(1, 3),
    "key_limit": st.integers(1, 2),
    "active_limit": st.integers(1, 4),
    "fair": st.just(True),
    "ageing": st.just(HUNDREDTH / 4),
}
RULES = [
    "rate_limit",
    "rate_limit active_limit ageing",
    "key_rate_limit",
    "key_rate_limit key_limit",
    "key_rate_limit ageing",
    "key_limit ageing",
    "key_limit fair",
    "fair",
    "fair key_rate_limit",
    "fair key_rate_limit rate_limit key_limit active_limit",
]
ENDS = {
    "complete": "select notifyq.complete(%s)",
    "fail": "select notifyq.fail(%s, 'x')",
    "release": "select notifyq.release(array[%s::bigint])",
    "snooze": f"select notifyq.snooze(array[%s::bigint], array[interval '{40 * HUNDREDTH} s'])",
}
WAITING = ("ready", "blocked", "scheduled")


@attrs.define(eq=False)
class ModelJob:
    """What the model knows of a job."""

    id: int
    key: str
    priority: int
    data: int
    state: str = "ready"
    attempt: int = 0
    alone: bool = False  # it was sent by itself, to a fair queue
    number: tuple[float, int] = (0, 0)  # its place in line, among those of a priority
    due: tuple[int, int, int] = (0, 0, 0)  # when, in hundredths; and what orders those that are due at once


class Model:
    """The rules, as plainly as they can be said."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.rate_limit = options.get("rate_limit", inf)
        self.key_rate_limit = options.get("key_rate_limit", inf)
        self.key_limit = options.get("key_limit", inf)
        self.active_limit = options.get("active_limit", inf)
        self.fair = "fair" in options
        self.ageing = "ageing" in options
        self.takes_turns = self.fair or self.key_rate_limit < inf
        self.jobs: dict[int, ModelJob] = {}
        self.starts: list[tuple[int, str]] = []
        self.turns: dict[str, ModelJob] = {}  # the job of a key that is scheduled for when the rate lets the key go on
        self.taken: dict[tuple[str, str, int], ModelJob] = {}  # what has a slot of a throttled or debounced key
        self.clock, self.next_start, self.numbers = 0, inf, itertools.count(1)

    def of(self, *states: str, key: str | None = None) -> list[ModelJob]:
        found = [job for job in self.jobs.values() if job.state in states and key in (None, job.key)]
        return sorted(found, key=self.place)

    def place(self, job: ModelJob) -> tuple[int, tuple[float, int]]:
        return (0 if self.ageing else -job.priority, job.number)

    def number(self, job: ModelJob) -> None:
        """It goes to the end of the line, or to where its priority and the moment say."""
        job.number = (self.clock - job.priority / 4 if self.ageing else 0, next(self.numbers))

    def sent(self, id: int, key: str, priority: int, data: int, state: str = "ready") -> ModelJob:
        job = self.jobs[id] = ModelJob(id, key, priority, data, state)
        self.number(job)
        return job

    def standing(self, kind: str, key: str) -> tuple[ModelJob | None, int]:
        """The job that keeps a throttled or debounced send from making one, and the slot."""
        taken = self.taken.get((kind, key, self.clock))
        if taken is None or kind == "throttle":
            return taken, self.clock
        taken = self.taken.get((kind, key, self.clock + 1))
        return (taken if taken and taken.state in WAITING else None), self.clock + 1

    def put_off(self, job: ModelJob, until: int, *, exactly: bool = False) -> None:
        """What is due just when a hundredth begins comes before what was put off by whole ones."""
        job.state = "scheduled"
        job.due = (until, 0, job.id) if exactly else (until, 1, next(self.numbers))

    def again(self, job: ModelJob) -> None:
        job.state, job.alone = "ready", False
        self.number(job)

    def edit(self, job: ModelJob, priority: int | None, delay: int | None) -> None:
        """It takes its new place; who has waited behind it for it to start does not any longer if it is put off."""
        was = job.state
        job.alone = job.alone and was != "ready"
        if priority is not None:
            job.priority = priority
            if self.ageing and (was == "ready" or (was == "blocked" and not delay)):
                self.number(job)
        if delay:
            self.put_off(job, self.clock + delay)
            if was == "ready" or self.turns.get(job.key) is job:
                self.turns.pop(job.key if was == "scheduled" else "", None)
                self.advance(job.key)
        elif was == "scheduled" and delay == 0:
            self.again(job)
        elif was == "blocked" and priority is not None:
            job.state, job.alone = "ready", False

    def counting(self, key: str | None = None) -> list[int]:
        return [at for at, of in self.starts if self.clock - at < 101 and key in (None, of)]

    def rate_left(self, key: str) -> float:
        return self.key_rate_limit - len(self.counting(key))

    def slots_left(self, key: str) -> float:
        return self.key_limit - len(self.of("active", key=key))

    def start(self, job: ModelJob) -> None:
        job.state = "active"
        job.attempt += 1
        self.starts.append((self.clock, job.key))

    def claim(self, how_many: int, claimed: list[int]) -> None:
        """What this claim may bring: claimed, or an AssertionError."""
        for job in sorted(self.of("scheduled"), key=lambda job: job.due):
            if job.due[0] <= self.clock:
                self.again(job)
                job.alone = self.fair and job.attempt == 0 and not self.of("blocked", key=job.key)
        room = min(how_many, self.active_limit - len(self.of("active")), self.rate_limit - len(self.counting()))
        started: list[ModelJob] = []
        rated: set[str] = set()
        queued: set[str] = set()
        size = max(room, 16)
        while room > 0:
            front = self.of("ready")[:size]
            starting = self.sift(front, room, {job.key for job in started}, rated, queued)
            started += starting
            room -= len(starting)
            if len(front) < size:
                break
            size *= 4
        assert claimed[: len(started)] == [job.id for job in started]
        helping = [self.jobs[id] for id in claimed[len(started) :]]
        keys = {job.key for job in started} if self.takes_turns else set()
        self.help_out(helping, room, keys | queued)
        self.next_turns(keys | rated)
        used_up = len(self.counting()) >= self.rate_limit
        self.next_start = min(self.counting()) + 101 if used_up and self.of("ready") else inf

    def sift(
        self, front: list[ModelJob], room: int, had_turn: set[str], rated: set[str], queued: set[str]
    ) -> list[ModelJob]:
        """Those that start; the others of their keys step back."""
        first = {job.key: job for job in reversed(self.of("blocked"))}
        behind = [job for job in front if job.alone and self.place(first.get(job.key, job)) < self.place(job)]
        for job in behind:
            job.state = "blocked"
            queued.add(job.key)
        front = [job for job in front if job not in behind]
        ranks = {key: itertools.count(1) for key in {job.key for job in front}}
        slots = {key: min(key not in had_turn if self.fair else inf, self.slots_left(key)) for key in ranks}
        rates = {key: self.rate_left(key) for key in ranks}
        starting = []
        for job in front:
            rank = next(ranks[job.key])
            if rank > min(slots[job.key], rates[job.key]):
                job.state = "blocked"
                if rank <= slots[job.key]:
                    rated.add(job.key)
            elif len(starting) < room:
                self.start(job)
                starting.append(job)
        return starting

    def help_out(self, helping: list[ModelJob], room: int, keys: set[str]) -> None:
        """Keys that started may go on while there is room, evenly, and each in its order."""
        behind = {key: self.of("blocked", key=key) for key in keys}
        could = {key: max(min(len(behind[key]), self.slots_left(key), self.rate_left(key)), 0) for key in keys}
        brought = {key: [job for job in helping if job.key == key] for key in keys}
        assert sum(map(len, brought.values())) == len(helping) == min(room, sum(could.values()))
        for key, jobs in brought.items():
            assert sorted(jobs, key=self.place) == behind[key][: len(jobs)]
            assert len(jobs) == could[key] or all(len(more) <= len(jobs) + 1 for more in brought.values())
            for job in jobs:
                self.start(job)

    def next_turns(self, keys: set[str]) -> None:
        keys = {key for key in keys if self.slots_left(key) > 0}
        resting = {key for key in keys if self.rate_left(key) <= 0}
        self.advance(*keys - resting)
        for key in resting:
            due = min(self.counting(key)) + 101
            turn, waiting = self.turns.get(key), self.of("blocked", key=key)
            if waiting and not (turn and turn.state == "scheduled" and turn.due[:2] <= (due, 0)):
                self.turns[key] = waiting[0]
                self.put_off(waiting[0], due, exactly=True)

    def advance(self, *keys: str) -> None:
        """The next one of each key comes to the line; where keys take turns, to its end."""
        going = [waiting[0] for key in keys if (waiting := self.of("blocked", key=key))]
        for job in sorted(going, key=lambda job: job.number):
            job.state, job.alone = "ready", False
            if self.fair:
                self.number(job)

    def leave(self, job: ModelJob, state: str) -> None:
        """It leaves active, or the line, for good or not."""
        was, job.state = job.state, state
        if (was == "active" and self.key_limit < inf) or was in ("ready", "scheduled"):
            self.advance(job.key)


class Rules(stateful.RuleBasedStateMachine):
    """Does the same to a model and to a queue of the database."""

    connection: psycopg.Connection[Any]
    queues = RULES
    names = (f"q{number}" for number in itertools.count())
    contents = itertools.count(1)

    def ask(self, statement: str, *parameters: object) -> list[Any]:
        cursor = self.connection.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []

    @initialize(data=st.data())
    def make_queue(self, data: st.DataObject) -> None:
        self.queue = next(self.names)
        names = data.draw(st.sampled_from(self.queues)).split()
        options = data.draw(st.fixed_dictionaries({name: OPTIONS[name] for name in names}))
        periods = {name[:-5] + "period": 100 * HUNDREDTH for name in names if name.endswith("rate_limit")}
        defaults = {"retry_limit": 1000, "retry_delay": 0, "timeout": "50 years", "retention": None}
        self.ask("select notifyq.create_queue(%s, %s)", self.queue, json.dumps({**defaults, **options, **periods}))
        [(self.number,)] = self.ask("select number from notifyq.queue where name = %s", self.queue)
        self.model = Model(options)

    def teardown(self) -> None:
        if hasattr(self, "queue"):
            self.let_all_start()
            self.ask("select notifyq.delete_queue(%s)", self.queue)

    def let_all_start(self) -> None:
        """Nothing waits for ever."""
        waiting = (
            "select exists (select from notifyq.jobs where queue = %s and state in ('ready', 'blocked', 'scheduled'))"
        )
        for _ in self.model.jobs:
            self.ask("select notifyq.complete(id) from notifyq.jobs where queue = %s and state = 'active'", self.queue)
            if self.ask(waiting, self.queue) == [(False,)]:
                return
            self.pass_by(102)
            self.ask("select notifyq.promote(%s)", self.number)
            assert self.ask("select id from notifyq.claim(%s, 100)", self.queue)

    def pick(self, data: st.DataObject, *states: str) -> ModelJob:
        state = data.draw(st.sampled_from([state for state in states if self.model.of(state)]))
        return data.draw(st.sampled_from(self.model.of(state)))

    @rule(key=KEYS, priority=PRIORITIES, delay=st.sampled_from([0, 0, 0, 40, 101]))
    def send(self, key: str, priority: int, delay: int) -> None:
        call = "select notifyq.send(%s, %s, key => %s, priority => %s, delay => %s)"
        content = next(self.contents)
        [(id,)] = self.ask(call, self.queue, str(content), key, priority, f"{delay * HUNDREDTH} s" if delay else None)
        job = self.model.sent(id, key, priority, content)
        job.alone = self.model.fair
        if delay:
            self.model.put_off(job, self.model.clock + delay)

    @rule(key=KEYS, kind=st.sampled_from(["debounce", "debounce", "throttle"]))
    def send_in_a_slot(self, key: str, kind: str) -> None:
        content = next(self.contents)
        standing, slot = self.model.standing(kind, key)
        call = f"select id, created from notifyq.try_send(%s, %s, key => %s, {kind} => %s)"
        [(id, created)] = self.ask(call, self.queue, str(content), key, f"{HUNDREDTH} s")
        assert created == (standing is None)
        if standing is not None:
            assert id == standing.id
            if kind == "debounce":
                standing.data = content
            return
        job = self.model.taken[kind, key, slot] = self.model.sent(id, key, 0, content)
        job.alone = self.model.fair
        if slot > self.model.clock:
            self.model.put_off(job, slot, exactly=True)

    @rule(keys=st.lists(KEYS, min_size=2, max_size=12), priority=PRIORITIES)
    def send_many(self, keys: list[str], priority: int) -> None:
        """Of each key, no more than could start go to the line."""
        jobs = json.dumps([{"key": key, "priority": priority, "data": 0} for key in keys])
        first = 1 if self.model.key_limit == inf and self.model.takes_turns else self.model.key_limit
        for place, (id,) in enumerate(self.ask("select id from notifyq.send_many(%s, %s)", self.queue, jobs)):
            self.model.sent(
                id, keys[place], priority, 0, "blocked" if keys[:place].count(keys[place]) >= first else "ready"
            )

    @precondition(lambda self: self.model.of(*WAITING))
    @rule(data=st.data(), change=CHANGES)
    def edit(self, data: st.DataObject, change: tuple[int | None, int | None]) -> None:
        self.pass_by(1)  # or its new place could be that of a job that was sent in the same millisecond
        job = self.pick(data, *WAITING)
        job.data = next(self.contents)
        priority, delay = change
        call = "select notifyq.update_job(%s, data => %s, priority => %s, delay => %s)"
        interval = None if delay is None else f"{delay * HUNDREDTH} s"
        assert self.ask(call, job.id, str(job.data), priority, interval) == [(job.id,)]
        self.model.edit(job, priority, delay)

    @rule(how_many=st.sampled_from([1, 1, 2, 3, 5, 7, 12]))
    def claim(self, how_many: int) -> None:
        # As runtimes do; which of two that are due a claim by hand moves is not said.
        self.ask("select notifyq.promote(%s)", self.number)
        rows = self.ask("select id from notifyq.claim(%s, %s)", self.queue, how_many)
        self.model.claim(how_many, [id for (id,) in rows])
        due_in = "select coalesce(extract(epoch from notifyq.next_due(%s) - now()), 'infinity')::float8"
        [(due,)] = self.ask(due_in, self.number)
        expected = min([self.model.next_start, *(job.due[0] for job in self.model.of("scheduled"))])
        assert expected == due == inf or expected - 1.01 < self.model.clock + due / HUNDREDTH <= expected

    @rule(hundredths=st.sampled_from([1, 30, 70]), age=st.sampled_from([None, 99, 101]), purge=st.booleans())
    def wait(self, hundredths: int, age: int | None, purge: bool) -> None:
        """So many hundredths, or until a start is of an age that matters; a purge forgets nothing that counts."""
        counting = self.model.counting()
        self.pass_by(max(1, min(counting) + age - self.model.clock) if age and counting else hundredths)
        if purge:
            self.ask("select notifyq.purge()")
            for key in list(self.model.turns):
                if not self.model.counting(key) and not (
                    self.model.key_limit < inf and self.model.of("active", key=key)
                ):
                    del self.model.turns[key]

    def pass_by(self, hundredths: int) -> None:
        model = self.model
        while any(model.clock + hundredths - at == 100 for at, _ in model.starts):
            hundredths += 1
        model.clock += hundredths
        self.ask("select notifyq.age(%s)", f"{hundredths * HUNDREDTH} s")

    @precondition(lambda self: self.model.of("active"))
    @rule(data=st.data(), how=st.sampled_from(list(ENDS)))
    def end(self, data: st.DataObject, how: str) -> None:
        """However it ends, its start counts."""
        job = self.pick(data, "active")
        self.ask(ENDS[how], job.id)
        if how == "fail":
            self.model.number(job)
        elif how != "complete":
            job.attempt -= 1
        job.alone = False
        self.model.leave(job, "completed" if how == "complete" else "ready")
        if how == "snooze":
            self.model.put_off(job, self.model.clock + 40)

    @precondition(lambda self: self.model.of(*WAITING, "active"))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = self.pick(data, *WAITING, "active")
        assert self.ask("select notifyq.cancel(%s)", job.id) == [(True,)]
        self.model.leave(job, "cancelled")

    @invariant()
    def the_database_agrees(self) -> None:
        rows = self.ask("select id, state, data from notifyq.jobs where queue = %s order by id", self.queue)
        assert rows == [(job.id, job.state, job.data) for job in self.model.jobs.values()]
        for table, by in (("ready", "queue"), ("blocked", "key")):
            order = f"select job from notifyq.{table} where queue = %s order by {by}, priority desc, number"
            line = sorted(self.model.of(table), key=lambda job: job.key if table == "blocked" else "")
            assert self.ask(order, self.number) == [(job.id,) for job in line]


@pytest.fixture
def database(server, template):
    name = "notifyq_rules_of_time"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"create database {name} template {template}".encode())
        with psycopg.connect(testing.with_database(server, name), autocommit=True) as connection:
            connection.execute((files("notifyq") / "sql" / "testing" / "age.sql").read_bytes())
            connection.execute("set statement_timeout = '30 s'")  # a function that is broken may go round for ever
            yield connection
        admin.execute(f"drop database {name}".encode())


def run(connection: psycopg.Connection[Any], examples: int, rules: list[str], *, shrink: bool) -> None:
    stateful.run_state_machine_as_test(
        type("RulesHere", (Rules,), {"connection": connection, "queues": rules}),
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            derandomize="NOTIFYQ_RULES" not in os.environ,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        ),
    )


def test_the_sql_functions_do_what_the_model_says(database):
    """The same examples each time; ``NOTIFYQ_RULES=1000`` tries so many others."""
    run(database, int(os.environ.get("NOTIFYQ_RULES", "80")), RULES, shrink=True)


BROKEN = {
    "a rate forgets too early": ("rate_limit", "rate_room", "s.slot + 101", "s.slot + 98"),
    "a rate forgets too late": ("rate_limit", "rate_room", "s.slot + 101", "s.slot + 104"),
    "a rate names the wrong moment": ("rate_limit", "rate_next", "min(s.slot)", "max(s.slot)"),
    "a rate forgets what it has counted": ("rate_limit", "rate_add", "union all", "where false union all"),
    "starts of a key are not counted": ("key_rate_limit", "count_starts", "is null or", "is not null or"),
    "a key wakes too late": ("key_rate_limit", "take_turns", ".moment) as due_at", ".moment) + '9 days' as due_at"),
    "a purge forgets what counts": ("key_rate_limit", "purge", "] + 101)", "] - 101)"),
    "keys take no turns": ("fair", "advance", "when q.fair then", "when false then"),
    "single sends have turns of their own": ("fair", "sift", "when f.is_behind then 0", ""),
    "a single send is behind what came later": ("fair", "stand_behind", "and n.number < t.number", ""),
    "a share is of what there was": ("fair", "take_turns", "greatest(room /", "greatest(take_turns.room /"),
    "priority counts for nothing": ("ageing", "line_number", "line_number.priority *", "0 *"),
    "a bulk send knows no ageing": ("key_limit ageing", "send_each", "select e.id, e.number,", "select e.id, e.id,"),
    "an edit keeps what is blocked": ("key_limit ageing", "edit", "(g.job, rank", "(g.job, j.priority"),
    "an edit of data is one of priority": (
        "key_limit ageing",
        "edit",
        "then rank else b.priority",
        "then rank else rank",
    ),
    "a slot is anybody's": ("fair", "reserve", "return standing", "return reserve.job"),
    "a debounce keeps the first data": ("fair", "send_one", "coalesce(send_one.data, 'null')", "null"),
}
"""What is broken: with queues of these rules, a function, by a change of its text."""


@pytest.mark.parametrize(("rules", "function", "text", "other"), BROKEN.values(), ids=BROKEN.keys())
def test_the_model_notices_a_function_that_is_broken(database, rules, function, text, other):
    call = "select pg_get_functiondef(oid) from pg_proc where pronamespace = 'notifyq'::regnamespace and proname = %s"
    [(definition,)] = database.execute(call.encode(), [function]).fetchall()
    assert text in definition
    database.execute(definition.replace(text, other).encode())
    with pytest.raises((AssertionError, psycopg.Error, ExceptionGroup)):
        run(database, 100, [rules], shrink=False)

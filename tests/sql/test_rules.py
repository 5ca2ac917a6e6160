"""The rules of keys, slots, limits, retries, edits and flows: a plain model and the SQL functions, step by step together.

What the model calls waiting may be a ticket in ready or in blocked: the gate moves them when it looks at them. All else is
compared state by state, and every claim must bring just the jobs that the model says, in its order.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import pytest
import trio
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

from notifyq import _schema, testing
from notifyq._opening import open_connection

if TYPE_CHECKING:
    from collections.abc import Iterator

KEYS = st.sampled_from(["a", "b", "c"])
PRIORITIES = st.sampled_from([0, 0, 0, 1, -1])
ID_KEYS = st.sampled_from([None, None, None, "x", "y"])
SLOTS = st.sampled_from([None, None, None, "debounce", "debounce", "throttle"])
SLOT = "1 year"
"""None of these ends while this runs, but once a year."""
QUEUES = st.one_of(
    st.sampled_from([{"policy": p} for p in ("standard", "short", "singleton", "stately", "exclusive", "ordered")]),
    st.builds(lambda n: {"key_limit": n}, st.integers(1, 3)),
    st.builds(lambda n: {"active_limit": n}, st.integers(1, 3)),
    st.builds(lambda n, m: {"active_limit": n, "key_limit": m}, st.integers(1, 4), st.integers(1, 2)),
)


@attrs.define(eq=False)
class ModelJob:
    """What the model knows of a job."""

    id: int
    key: str
    priority: int
    number: int
    """Its place in line."""
    state: str = "waiting"
    attempt: int = 0
    parents: dict[int, str | None] = attrs.field(factory=dict)
    """The jobs it comes after, and how each that has counted ended."""
    on_failure: str = "cancel"
    data: Any = None
    reserves: bool = False
    """It holds its key against further sends."""
    debounced: bool = False
    id_key: str | None = None
    put_off: bool = False
    """Its parents' end makes it scheduled."""


class Model:
    """The rules, as plainly as they can be said."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.policy = options.get("policy", "standard")
        self.slots = 1 if self.policy in ("singleton", "stately", "ordered") else options.get("key_limit")
        self.active_limit = options.get("active_limit")
        self.retry_limit = options["retry_limit"]
        self.jobs: dict[int, ModelJob] = {}
        self.heads: dict[str, int] = {}
        self.numbers = itertools.count(1)
        self.taken: dict[tuple[str, str, int], int] = {}
        """Who has the slots of throttled and debounced keys: 0 is the one that is now, 1 the next."""

    def standing(self, key: str) -> int | None:
        """The job that keeps another one of its key from being sent."""
        return next((job.id for job in self.jobs.values() if job.reserves and job.key == key), None)

    def try_send(self, key: str, slot: str | None, id_key: str | None, data: Any) -> tuple[int | None, int]:
        """The job that keeps this one from being made, which may get its data; and the slot that this one gets."""
        if id_key is not None and id_key in self.id_keys():
            return self.id_keys()[id_key], 0
        standing = self.standing(key)
        if standing is not None:
            if slot == "debounce" and self.jobs[standing].debounced:
                self.give(standing, data)
            return standing, 0
        if slot is None or (slot, key, 0) not in self.taken:
            return None, 0
        if slot == "throttle":
            return self.taken[slot, key, 0], 0
        standing = self.taken.get((slot, key, 1))
        return (standing if standing is not None and self.give(standing, data) else None), 1

    def give(self, job: int, data: Any) -> bool:
        """A job that waits gets other data."""
        if self.jobs[job].state not in ("waiting", "scheduled", "blocked"):
            return False
        self.jobs[job].data = data
        return True

    def id_keys(self) -> dict[str, int]:
        return {job.id_key: job.id for job in self.jobs.values() if job.id_key is not None and job.state != "deleted"}

    def sent(self, id: int, key: str, priority: int, *, number: int | None = None, **more: Any) -> ModelJob:
        reserves = self.policy in ("short", "stately", "exclusive")
        job = ModelJob(id, key, priority, number or next(self.numbers), reserves=reserves, **more)
        self.jobs[id] = job
        return job

    def of(self, *states: str) -> list[ModelJob]:
        return [job for job in self.jobs.values() if job.state in states]

    def claim(self, how_many: int) -> list[int]:
        taken = []
        for job in sorted(self.of("waiting"), key=lambda job: (-job.priority, job.number)):
            active = self.of("active")
            if len(taken) == how_many or (self.active_limit is not None and len(active) >= self.active_limit):
                break
            head = self.heads.get(job.key)
            if head not in (None, job.id):
                continue
            if self.slots is not None and sum(other.key == job.key for other in active) >= self.slots:
                continue
            job.state = "active"
            job.attempt += 1
            job.reserves &= self.policy == "exclusive"
            if self.policy in ("stately", "ordered"):
                self.heads[job.key] = job.id
            taken.append(job.id)
        return taken

    def again(self, job: ModelJob, state: str) -> None:
        """It waits for another attempt, or goes on waiting, at the end of the line."""
        job.state = state
        job.number = next(self.numbers)

    def end(self, job: ModelJob, state: str) -> None:
        """It is over; what comes after it is told."""
        job.state = state
        job.reserves = False
        if self.heads.get(job.key) == job.id and not (state == "failed" and self.policy == "ordered"):
            del self.heads[job.key]
        for child in sorted(self.of("blocked"), key=lambda child: child.id):
            if child.parents.get(job.id, "none") is None:
                self._parent_ended(child, job.id, state)

    def _parent_ended(self, child: ModelJob, parent: int, state: str) -> None:
        if state == "completed" or child.on_failure == "run":
            child.parents[parent] = state
            if None not in child.parents.values():
                self.again(child, "scheduled" if child.put_off else "waiting")
        elif child.on_failure == "cancel" or state == "deleted":
            child.parents[parent] = state
            self.end(child, "cancelled")


class Rules(RuleBasedStateMachine):
    """Does the same to the model and to a queue of the database."""

    connection: psycopg.Connection[Any]
    names = (f"q{number}" for number in itertools.count())
    contents = itertools.count(1)

    def ask(self, statement: str, *parameters: object) -> list[Any]:
        cursor = self.connection.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []

    @initialize(options=QUEUES, retry_limit=st.integers(0, 2))
    def make_queue(self, options: dict[str, Any], retry_limit: int) -> None:
        self.queue = next(self.names)
        self.options = {"retry_limit": retry_limit, "retry_delay": 0, "timeout": 3600, **options}
        self.ask("select notifyq.create_queue(%s, %s)", self.queue, json.dumps(self.options))
        self.model = Model(self.options)

    def teardown(self) -> None:
        if hasattr(self, "queue"):
            self.ask("select notifyq.delete_queue(%s)", self.queue)

    def pick(self, data: st.DataObject, *states: str) -> ModelJob:
        return data.draw(st.sampled_from(sorted(self.model.of(*states), key=lambda job: job.id)))

    # sends

    def sent(
        self,
        key: str,
        priority: int,
        slot: str | None,
        id_key: str | None,
        data: Any,
        answer: tuple[int, bool],
        *,
        delayed: bool = False,
        number: int | None = None,
    ) -> None:
        """A send was answered so."""
        id, created = answer
        standing, place = self.model.try_send(key, slot, id_key, data)
        assert (id, created) == (standing, False) if standing is not None else created
        if not created:
            return
        if slot is not None:
            self.model.taken[slot, key, place] = id
        state = "scheduled" if delayed or place else "waiting"
        debounced = slot == "debounce"
        self.model.sent(id, key, priority, number=number, data=data, state=state, debounced=debounced, id_key=id_key)

    @rule(key=KEYS, priority=PRIORITIES, delayed=st.sampled_from([False, False, True]), slot=SLOTS, id_key=ID_KEYS)
    def send(self, key: str, priority: int, delayed: bool, slot: str | None, id_key: str | None) -> None:
        delayed &= slot != "debounce"
        data = next(self.contents)
        call = (
            "select id, created from notifyq.try_send(%s, %s, key => %s, priority => %s, delay => %s, id_key => %s,"
            " throttle => %s, debounce => %s)"
        )
        slots = [SLOT if slot == kind else None for kind in ("throttle", "debounce")]
        [answer] = self.ask(call, self.queue, str(data), key, priority, "1 hour" if delayed else None, id_key, *slots)
        self.sent(key, priority, slot, id_key, data, answer, delayed=delayed)

    @rule(
        entries=st.lists(st.tuples(KEYS, SLOTS, ID_KEYS), min_size=1, max_size=6),
        slots=st.booleans(),
        priority=PRIORITIES,
    )
    def send_many(self, entries: list[tuple[str, str | None, str | None]], slots: bool, priority: int) -> None:
        entries = [(key, slot if slots else None, id_key) for key, slot, id_key in entries]
        jobs = [
            {"key": key, "priority": priority, "data": next(self.contents)}
            | ({slot: SLOT} if slot else {})
            | ({"id_key": id_key} if id_key else {})
            for key, slot, id_key in entries
        ]
        rows = self.ask("select id, created from notifyq.send_many(%s, %s)", self.queue, json.dumps(jobs))
        numbers = [next(self.model.numbers) for _ in jobs]
        order = range(len(jobs))
        if self.model.policy in ("short", "stately", "exclusive") or any(slot for _, slot, _ in entries):
            # What is reserved by key is sent in the order of the keys and id_keys.
            order = sorted(order, key=lambda n: (entries[n][0], entries[n][2] is None, entries[n][2] or "", n))
        for n in order:
            key, slot, id_key = entries[n]
            self.sent(key, priority, slot, id_key, jobs[n]["data"], rows[n], number=numbers[n])

    @rule(key=KEYS)
    def upsert(self, key: str) -> None:
        waiting = [job for job in self.model.of("waiting", "scheduled", "blocked") if job.key == key]
        [(id, created)] = self.ask("select id, created from notifyq.upsert(%s, '\"upserted\"', %s)", self.queue, key)
        if waiting:
            assert not created
            assert id == min(waiting, key=lambda job: (-job.priority, job.id)).id
            self.model.jobs[id].data = "upserted"
        elif self.model.standing(key) is None:
            assert created
            self.model.sent(id, key, 0, data="upserted")
        else:
            assert (id, created) == (self.model.standing(key), False)

    @precondition(lambda self: self.model.policy not in ("short", "stately", "exclusive"))
    @rule(
        edges=st.lists(st.lists(st.integers(0, 3), max_size=3, unique=True), min_size=2, max_size=4),
        on_failure=st.sampled_from(["cancel", "run", "wait"]),
        key=KEYS,
    )
    def send_flow(self, edges: list[list[int]], on_failure: str, key: str) -> None:
        nodes = [
            {
                "name": str(n),
                "queue": self.queue,
                "key": key,
                "after": [str(p) for p in after if p < n],
                "on_failure": on_failure,
            }
            for n, after in enumerate(edges)
        ]
        ids = dict(self.ask("select name, id from notifyq.send_flow(%s)", json.dumps(nodes)))
        for node in sorted(nodes, key=lambda node: ids[node["name"]]):
            parents: dict[int, str | None] = {ids[name]: None for name in node["after"]}
            state = "blocked" if parents else "waiting"
            self.model.sent(ids[node["name"]], key, 0, parents=parents, on_failure=on_failure, state=state)

    # claims and ends

    @rule(how_many=st.integers(1, 6))
    def claim(self, how_many: int) -> None:
        claimed = self.ask("select id, attempt from notifyq.claim(%s, %s)", self.queue, how_many)
        expected = self.model.claim(how_many)
        assert claimed == [(id, self.model.jobs[id].attempt) for id in expected]

    @precondition(lambda self: self.model.of("active"))
    @rule(data=st.data(), number=st.integers(1, 3))
    def complete(self, data: st.DataObject, number: int) -> None:
        jobs = sorted(job.id for job in self.model.of("active"))[:number]
        assert self.ask("select notifyq.complete(%s::bigint[])", jobs) == [(jobs,)] or len(jobs) > 1
        for id in jobs:
            self.model.end(self.model.jobs[id], "completed")

    @precondition(lambda self: self.model.of("active"))
    @rule(data=st.data(), later=st.booleans(), final=st.booleans())
    def fail(self, data: st.DataObject, later: bool, final: bool) -> None:
        job = self.pick(data, "active")
        retry_in = "1 hour" if later else None
        [(state,)] = self.ask("select notifyq.fail(%s, 'x', final => %s, retry_in => %s)", job.id, final, retry_in)
        if final or job.attempt > self.model.retry_limit:
            assert state == "failed"
            self.model.end(job, "failed")
        else:
            self.model.again(job, "scheduled" if later else "waiting")

    @precondition(lambda self: self.model.of("active"))
    @rule(data=st.data(), later=st.booleans())
    def snooze(self, data: st.DataObject, later: bool) -> None:
        job = self.pick(data, "active")
        self.ask("select notifyq.snooze(%s::bigint[], %s::interval[])", [job.id], ["1 hour" if later else "0"])
        job.attempt -= 1
        self.model.again(job, "scheduled" if later else "waiting")

    @precondition(lambda self: self.model.of("active"))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        job = self.pick(data, "active")
        self.ask("select notifyq.release(%s::bigint[])", [job.id])
        job.attempt -= 1
        job.state = "waiting"

    @precondition(lambda self: self.model.of("active"))
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """Its deadline passes, and it is rescued."""
        job = self.pick(data, "active")
        self.ask("update notifyq.active set deadline = now() - interval '1 s' where job = %s", job.id)
        self.ask("select * from notifyq.rescue()")
        if job.attempt > self.model.retry_limit:
            self.model.end(job, "failed")
        else:
            job.state = "waiting"

    # what operators do

    @precondition(lambda self: self.model.of("waiting", "scheduled", "blocked", "active"))
    @rule(data=st.data(), how=st.sampled_from(["cancel", "delete"]))
    def take_away(self, data: st.DataObject, how: str) -> None:
        job = self.pick(data, "waiting", "scheduled", "blocked", "active")
        assert self.ask(f"select notifyq.{how}(%s)", job.id) == [(True,)]
        self.model.end(job, "cancelled" if how == "cancel" else "deleted")

    @precondition(lambda self: self.model.of("completed", "failed", "cancelled"))
    @rule(data=st.data())
    def delete_finished(self, data: st.DataObject) -> None:
        job = self.pick(data, "completed", "failed", "cancelled")
        assert self.ask("select notifyq.delete(%s)", job.id) == [(True,)]
        self.model.end(job, "deleted")

    @precondition(lambda self: self.model.of("failed", "cancelled"))
    @rule(data=st.data())
    def revive(self, data: st.DataObject) -> None:
        job = self.pick(data, "failed", "cancelled")
        how = "retry" if job.state == "failed" else "resume"
        refused = self.model.policy == "exclusive" and self.model.standing(job.key) is not None
        assert self.ask(f"select notifyq.{how}(%s)", job.id) == [(not refused,)]
        if not refused:
            job.reserves = self.model.policy == "exclusive"
            job.debounced = False
            self.model.again(job, "waiting")

    @precondition(lambda self: self.model.of("scheduled"))
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        job = self.pick(data, "scheduled")
        self.ask("update notifyq.scheduled set due_at = now() - interval '1 s' where job = %s", job.id)
        self.ask("select notifyq.promote(number) from notifyq.queue where name = %s", self.queue)
        self.model.again(job, "waiting")

    @precondition(lambda self: [job for job in self.model.of("waiting", "scheduled") if job.attempt == 0])
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        unstarted = [job for job in self.model.of("waiting", "scheduled") if job.attempt == 0]
        job = data.draw(st.sampled_from(unstarted))
        self.ask("update notifyq.job set expires_at = now() - interval '1 s' where id = %s", job.id)
        assert self.ask("select notifyq.expire()") == [(1,)]
        self.model.end(job, "failed")
        if self.model.heads.get(job.key) == job.id:
            del self.model.heads[job.key]

    @precondition(lambda self: self.model.of("waiting", "scheduled", "blocked", "active", "completed"))
    @rule(data=st.data(), priority=st.one_of(st.none(), PRIORITIES), delay=st.sampled_from([None, None, "0", "1 hour"]))
    def edit(self, data: st.DataObject, priority: int | None, delay: str | None) -> None:
        job = self.pick(data, "waiting", "scheduled", "blocked", "active", "completed")
        call = "select notifyq.update_job(%s, data => '\"edited\"', priority => %s, delay => %s)"
        [(edited,)] = self.ask(call, job.id, priority, delay)
        if job.state in ("active", "completed"):
            assert edited is None
            return
        assert edited == job.id
        job.data = "edited"
        if priority is not None:
            job.priority = priority
        if job.state == "waiting" and delay == "1 hour":
            job.state = "scheduled"
        elif job.state == "scheduled" and delay == "0":
            self.model.again(job, "waiting")
        elif job.state == "blocked" and delay is not None:
            job.put_off = delay == "1 hour"

    @rule()
    def look_at_what_is_reserved(self) -> None:
        number = "queue = (select number from notifyq.queue where name = %s)"
        assert dict(self.ask(f"select key, job from notifyq.id_key where {number}", self.queue)) == self.model.id_keys()
        reserved = self.ask(f"select job from notifyq.reserved where kind = 'p' and {number} order by job", self.queue)
        assert [id for (id,) in reserved] == sorted(job.id for job in self.model.jobs.values() if job.reserves)

    # what must hold after each step

    @invariant()
    def the_database_agrees(self) -> None:
        if not hasattr(self, "model"):
            return
        rows = self.ask("select id, state, attempt, priority, data from notifyq.jobs where queue = %s", self.queue)
        pending = {job for (job,) in self.ask("select job from notifyq.blocked where parents > 0")}
        found = {
            id: ("waiting" if state == "ready" or (state == "blocked" and id not in pending) else state, *rest)
            for id, state, *rest in rows
        }
        expected = {
            job.id: (job.state, job.attempt, job.priority, job.data)
            for job in self.model.jobs.values()
            if job.state != "deleted"
        }
        assert found == expected


def machine(connection: psycopg.Connection[Any]) -> type[Rules]:
    return type("RulesHere", (Rules,), {"connection": connection})


@pytest.fixture
def database(server: str) -> Iterator[psycopg.Connection[Any]]:
    name = "notifyq_rules"

    async def install() -> None:
        connection = await open_connection(testing.with_database(server, name))
        await _schema.apply(connection, "notifyq")
        await connection.close()

    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"create database {name}".encode())
        trio.run(install)
        with psycopg.connect(testing.with_database(server, name), autocommit=True) as connection:
            connection.execute("set statement_timeout = '30 s'")  # a function that is broken may go round for ever
            yield connection
        admin.execute(f"drop database {name}".encode())


def run(connection: psycopg.Connection[Any], examples: int, *, shrink: bool) -> None:
    run_state_machine_as_test(
        machine(connection),
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            derandomize="NOTIFYQ_RULES" not in os.environ,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            report_multiple_bugs=shrink,  # or it goes on after the first one
            print_blob=True,
        ),
    )


def test_the_sql_functions_do_what_the_model_says(database):
    """The same examples each time; ``NOTIFYQ_RULES=1000`` tries so many others."""
    run(database, int(os.environ.get("NOTIFYQ_RULES", "80")), shrink=True)


BROKEN = {
    "a freed key lets nothing go on": (
        "notifyq.advance(queue notifyq.queue, keys text[])",
        "void language sql as ''",
    ),
    "a parent's end is told to nobody": (
        "notifyq.parents_ended(jobs bigint[], how text)",
        "void language sql as ''",
    ),
    "a reserved key is given back to nobody": (
        "notifyq.unreserve(queue int, key text, job bigint)",
        "void language sql as ''",
    ),
    "an edit changes nothing": (
        "notifyq.edit(job bigint, data jsonb, priority int, delay interval, due_at timestamptz)",
        "boolean language sql as 'select false'",
    ),
    "a retry waits twice as long as it is told": (
        "notifyq.backoff(retry_delay interval, retry_delay_max interval, retry_backoff boolean, attempt int)",
        "interval language sql as $$ select interval '1 hour' $$",
    ),
}


@pytest.mark.parametrize(("signature", "body"), BROKEN.values(), ids=BROKEN.keys())
def test_the_model_notices_a_function_that_is_broken(database, signature, body):
    database.execute(f"create or replace function {signature} returns {body}".encode())
    with pytest.raises((AssertionError, psycopg.Error, ExceptionGroup)):
        run(database, 200, shrink=False)

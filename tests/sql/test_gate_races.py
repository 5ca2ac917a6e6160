"""Sessions that meet at one key, limit, rate, flow or edit: what each finds, whichever way the first one ends.

After each meeting the books are in order, and all that is left can be run to its end.
"""

from __future__ import annotations

import itertools
import json
from datetime import timedelta
from random import Random
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import trio

from notifyq._opening import open_connection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from notifyq._connection import TrioConnection

CLAIM = "select id from notifyq.claim('q', 10)"
SEND = "select id, created from notifyq.try_send('q', key => 'k')"
CLOCK = "select extract(epoch from clock_timestamp())::float8"

either_end = pytest.mark.parametrize("commit", [True, False], ids=["committed", "undone"])
whatever_isolation = pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])


async def rows(connection: TrioConnection, statement: str, *parameters: object) -> list:
    cursor = await connection.execute(statement.encode(), parameters or None)
    while cursor.nextset():
        pass
    return await cursor.fetchall() if cursor.description else []


async def until_waiting(watcher: TrioConnection, waiter: TrioConnection) -> None:
    """Return once a session waits for a lock."""
    waits = "select 1 from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
    with trio.fail_after(20):
        while not await rows(watcher, waits, waiter.info.backend_pid):
            await trio.sleep(0.005)


async def until_waiting_for(watcher: TrioConnection, waiter: TrioConnection, holder: TrioConnection) -> None:
    """Return once a session waits for a lock that another holds."""
    waits = "select 1 where %s = any (pg_blocking_pids(%s))"
    with trio.fail_after(20):
        while not await rows(watcher, waits, holder.info.backend_pid, waiter.info.backend_pid):
            await trio.sleep(0.005)


class Call:
    """A statement that a session runs while others go on."""

    def __init__(self, session: TrioConnection, statement: str) -> None:
        self.session = session
        self.statement = statement
        self.through = trio.Event()
        self._answer: list = []
        self._failure: psycopg.Error | None = None

    async def run(self) -> None:
        try:
            self._answer = await rows(self.session, self.statement)
        except psycopg.Error as error:
            self._failure = error
        self.through.set()

    async def answer(self) -> list:
        with trio.fail_after(10):
            await self.through.wait()
        if self._failure:
            raise self._failure
        return self._answer


@pytest.fixture
async def third(dsn: str) -> AsyncIterator[TrioConnection]:
    third = await open_connection(dsn)
    yield third
    await third.close()


@pytest.fixture
def race(connection: TrioConnection, other: TrioConnection, nursery):
    async def race(first: str, second: str, *, commit: bool, waits: bool = True) -> tuple[list, list]:
        """Run the first in a transaction; once the second waits for it (or is through), end it. Give both answers."""
        async with connection.transaction(force_rollback=not commit):
            mine = await rows(connection, first)
            call = Call(other, second)
            nursery.start_soon(call.run)
            if waits:
                await until_waiting(connection, other)
            else:
                with trio.fail_after(20):
                    await call.through.wait()
        return mine, await call.answer()

    return race


@pytest.fixture
def queue(ask):
    async def queue(name: str = "q", **options: Any) -> None:
        await ask("select notifyq.create_queue(%s, %s)", name, json.dumps({"retry_delay": 0, **options}))

    return queue


@pytest.fixture
def send(ask):
    async def send(*keys: str | None, queue: str = "q") -> list[int]:
        return [(await ask("select notifyq.send(%s, key => %s)", queue, key))[0][0] for key in keys]

    return send


@pytest.fixture
def claim(ask):
    async def claim(how_many: int = 10, queue: str = "q") -> list[int]:
        return [id for (id,) in await ask("select id from notifyq.claim(%s, %s)", queue, how_many)]

    return claim


@pytest.fixture
def states(ask):
    async def states(*jobs: int) -> list[str]:
        found = dict(await ask("select id, state from notifyq.jobs"))
        return [found.get(job, "gone") for job in jobs]

    return states


TICKETS = " union all ".join(
    f"select job from notifyq.{table}" for table in ("ready", "scheduled", "blocked", "active")
)

# A key with blocked tickets whose slots those active and those in ready do not make up, or whose turn nobody has.
IDLE_KEYS = """
    select b.queue, b.key
    from (select queue, key, count(*) as number from notifyq.blocked where parents = 0 group by queue, key) b
    join notifyq.queue q on q.number = b.queue
    left join notifyq.key k on k.queue = b.queue and k.key = b.key
    cross join lateral (
        select count(*) as number
        from notifyq.ready r join notifyq.job j on j.id = r.job
        where r.queue = b.queue and coalesce(j.key, '') = b.key
    ) r
    where k.head is null
    and coalesce(k.held, 0) + r.number < coalesce(q.slots, 1)
    and not exists (select from notifyq.scheduled s where s.job = k.turn)
    and (q.slots is not null or r.number = 0)
"""
MISCOUNTED_KEYS = """
    select q.name, a.key, a.number, k.held, k.head
    from (select queue, key, count(*) as number from notifyq.active group by queue, key) a
    full join notifyq.key k on k.queue = a.queue and k.key = a.key
    join notifyq.queue q on q.number = coalesce(a.queue, k.queue)
    where q.slots is not null
    and case when q.policy in ('stately', 'ordered')
        then (coalesce(k.held, 0) = 1) <> (k.head is not null) or coalesce(a.number, 0) > coalesce(k.held, 0)
        else coalesce(a.number, 0) <> coalesce(k.held, 0) end
"""
STRAY_KEYS = """
    select k.queue, k.key, k.generation
    from notifyq.key k
    where k.generation is distinct from (select g.generation from notifyq.gate g where g.queue = k.queue)
"""
STRAY_BLOCKED = """
    select b.queue, b.job, b.generation
    from notifyq.blocked b
    where b.generation <> coalesce((select g.generation from notifyq.gate g where g.queue = b.queue), -1)
"""
MISCOUNTED_GATES = """
    select q.name, g.held
    from notifyq.gate g join notifyq.queue q on q.number = g.queue
    where q.active_limit is not null
    and g.held <> (select count(*) from notifyq.active a where a.queue = q.number)
"""
MISCOUNTED_PARENTS = """
    select b.job from notifyq.blocked b where b.parents <>
        (select count(*) from notifyq.dependency d where d.child = b.job and d.state is null)
"""
LEAKED_RESERVATIONS = """
    select r.* from notifyq.reserved r where r.kind = 'p' and not exists (select from notifyq.job j where j.id = r.job)
"""
UNRESERVED = """
    select j.id from notifyq.job j join notifyq.queue q on q.number = j.queue
    where q.policy = 'exclusive' and j.provenance is null
    and not exists (select from notifyq.reserved r where r.job = j.id)
"""


@pytest.fixture
def books(ask):
    async def books() -> None:
        """Every live job has one ticket; keys, gates, parents and reservations are counted right; no key is idle."""
        assert await ask(f"{TICKETS} order by job") == await ask("select id from notifyq.job order by id")
        for wrong in (
            IDLE_KEYS,
            MISCOUNTED_KEYS,
            STRAY_KEYS,
            STRAY_BLOCKED,
            MISCOUNTED_GATES,
            MISCOUNTED_PARENTS,
            LEAKED_RESERVATIONS,
            UNRESERVED,
        ):
            assert await ask(wrong) == [], wrong

    return books


@pytest.fixture
def well(ask, books):
    async def well() -> list[int]:
        """The books are in order, and claims and completions bring everything to its end; give that order."""
        await books()
        await ask("select notifyq.delete_all(name, 'failed') from notifyq.queue where policy = 'ordered'")
        active = [job for (job,) in await ask("select job from notifyq.active order by job")]
        await ask("select notifyq.complete(%s::bigint[])", active)
        await ask("update notifyq.scheduled set due_at = now()")
        order: list[int] = []
        with trio.fail_after(10):
            while await ask("select 1 from notifyq.job"):
                for (name,) in await ask("select name from notifyq.queue order by name"):
                    jobs = [job for (job,) in await ask("select id from notifyq.claim(%s, 3)", name)]
                    await books()
                    await ask("select notifyq.complete(%s::bigint[])", sorted(jobs))
                    order += jobs
        assert await ask(TICKETS) == []
        assert await ask("select 1 from notifyq.reserved where kind = 'p'") == []
        assert await ask("select 1 from notifyq.key where held > 0 or head is not null") == []
        return order

    return well


def complete(*jobs: int) -> str:
    return f"select notifyq.complete('{{{','.join(map(str, jobs))}}}'::bigint[])"


# ends in a transaction that sees what was there when it began

ENDINGS = [
    complete(1),
    "select notifyq.cancel(1)",
    "select notifyq.delete(1)",
    "select notifyq.fail(1, 'x', final => true)",
]
OLD_SNAPSHOTS = pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])


@OLD_SNAPSHOTS
@pytest.mark.parametrize("options", [{"policy": "singleton"}, {"policy": "ordered", "retention": 0}, {"key_limit": 1}])
@pytest.mark.parametrize("ending", ENDINGS)
async def test_an_end_in_a_snapshot_from_before_a_claim_blocked_something_is_to_be_tried_again(
    ask, other, queue, send, claim, well, options, ending, isolation
):
    await queue(**options)
    assert (await send("k"), await claim()) == ([1], [1])
    await rows(other, f"begin isolation level {isolation}")
    await rows(other, "select count(*) from notifyq.job")
    [waits] = await send("k")
    assert await claim() == []
    with pytest.raises(psycopg.errors.SerializationFailure):
        await rows(other, ending)
    await rows(other, "rollback")
    await rows(other, f"begin isolation level {isolation}")
    await rows(other, ending)
    await rows(other, "commit")
    assert await claim() == [waits]
    await well()


@OLD_SNAPSHOTS
async def test_an_end_in_a_snapshot_that_is_still_true_needs_no_second_try(
    ask, other, queue, send, claim, well, isolation
):
    await queue(policy="singleton")
    assert (await send("k", "k"), await claim()) == ([1, 2], [1])
    for job in (1, 2):
        await rows(other, f"begin isolation level {isolation}")
        await rows(other, "select count(*) from notifyq.job")
        await send("k", "other")
        await rows(other, complete(job))
        await rows(other, "commit")
        assert job + 1 in await claim()
    await well()


@OLD_SNAPSHOTS
@pytest.mark.parametrize("ending", [complete(1), "select notifyq.cancel(1)"])
async def test_a_parents_end_in_a_snapshot_from_before_a_flow_came_after_it_is_to_be_tried_again(
    ask, other, queue, send, claim, ending, isolation
):
    await queue()
    await ask("""select notifyq.send_flow('[{"name": "a", "queue": "q"}]')""")
    [parent] = await claim()
    ending = ending.replace("1", str(parent))
    await rows(other, f"begin isolation level {isolation}")
    await rows(other, "select count(*) from notifyq.job")
    await ask(
        f"""select notifyq.send_flow('[{{"name": "b", "queue": "q", "after": [{parent}], "on_failure": "run"}}]')"""
    )
    with pytest.raises(psycopg.errors.SerializationFailure):
        await rows(other, ending)
    await rows(other, "rollback")
    await ask(ending)
    assert len(await claim()) == 1


# senders of one key


@either_end
@whatever_isolation
@pytest.mark.parametrize("policy", ["short", "stately", "exclusive"])
async def test_of_two_senders_of_a_key_the_second_makes_a_job_only_if_the_first_is_undone(
    ask, other, race, queue, well, policy, isolation, commit
):
    await queue(policy=policy)
    await rows(other, f"set default_transaction_isolation = '{isolation}'")
    if commit and isolation != "read committed":
        with pytest.raises(psycopg.errors.SerializationFailure):
            await race(SEND, SEND, commit=True)
        assert [created for _, created in await rows(other, SEND)] == [False]
    else:
        [(first, _)], [(second, created)] = await race(SEND, SEND, commit=commit)
        assert (second == first, created) == (commit, not commit)
    assert len(await ask("select 1 from notifyq.job")) == 1
    await well()


@either_end
@whatever_isolation
@pytest.mark.parametrize("policy", ["short", "stately"])
async def test_a_sender_waits_for_the_claim_that_frees_its_key(
    race, other, queue, send, well, policy, isolation, commit
):
    await queue(policy=policy)
    [job] = await send("k")
    await rows(other, f"set default_transaction_isolation = '{isolation}'")
    claimed, [(sent, created)] = await race(CLAIM, SEND, commit=commit)
    assert claimed == [(job,)]
    assert (sent != job, created) == (commit, commit)
    await well()


@either_end
@whatever_isolation
@pytest.mark.parametrize("ending", [complete(1), "select notifyq.cancel(1)", "select notifyq.delete(1)"])
async def test_a_sender_waits_for_the_end_that_frees_an_exclusive_key(
    race, other, queue, send, claim, well, ending, isolation, commit
):
    await queue(policy="exclusive")
    assert (await send("k"), await claim()) == ([1], [1])
    await rows(other, f"set default_transaction_isolation = '{isolation}'")
    _, [(sent, created)] = await race(ending, SEND, commit=commit)
    assert (sent != 1, created) == (commit, commit)
    await well()


@either_end
async def test_a_claim_does_not_wait_for_a_sender_and_the_sent_job_comes_later(race, queue, send, claim, well, commit):
    await queue(policy="short")
    [a] = await send("a")
    [(job, _)], claimed = await race(SEND, CLAIM, commit=commit, waits=False)
    assert claimed == [(a,)]
    assert await claim() == ([job] if commit else [])
    await well()


@either_end
@pytest.mark.parametrize("way", ["retry", "send"])
async def test_a_retry_and_a_send_of_an_exclusive_key_do_not_both_have_it(
    ask, race, queue, send, claim, states, well, way, commit
):
    await queue(policy="exclusive", retry_limit=0)
    [job] = await send("k")
    await claim()
    await ask("select notifyq.fail(%s, 'x')", job)
    retry = f"select notifyq.retry({job})"
    if way == "retry":
        mine, [(sent, created)] = await race(retry, SEND, commit=commit)
        assert mine == [(True,)]
        assert (sent == job, created) == (commit, not commit)
    else:
        [(sent, _)], theirs = await race(SEND, retry, commit=commit)
        assert theirs == [(not commit,)]
    assert await states(job) == ["failed" if (way == "retry") != commit else "ready"]
    await well()


@either_end
@pytest.mark.parametrize("way", ["redrive", "send"])
async def test_a_redrive_and_a_send_of_an_exclusive_key_do_not_both_have_it(
    ask, race, queue, send, claim, well, way, commit
):
    await queue("dead")
    await queue(policy="exclusive", retry_limit=0, dead_letter="dead")
    [job] = await send("k")
    await claim()
    await ask("select notifyq.fail(%s, 'x')", job)
    redrive = "select new_id from notifyq.redrive('dead')"
    if way == "redrive":
        [(again,)], [(sent, created)] = await race(redrive, SEND, commit=commit)
        assert (sent == again, created) == (commit, not commit)
    else:
        [(sent, _)], theirs = await race(SEND, redrive, commit=commit)
        assert len(theirs) == (not commit)
    assert await ask(
        "select count(*) from notifyq.job j join notifyq.queue q on q.number = j.queue and q.name = 'q'"
    ) == [(1,)]
    await well()


async def test_two_redrives_and_a_bulk_send_take_keys_in_one_order(
    ask, connection, other, third, nursery, queue, send, claim, well
):
    await queue("dead")
    await queue(policy="exclusive", retry_limit=0, dead_letter="dead")
    for job in await send("z", "a"):
        await claim()
        await ask("select notifyq.fail(%s, 'x')", job)
    async with connection.transaction():
        await ask("select notifyq.send('q', key => 'm')")
        bulk = Call(other, 'select id from notifyq.send_many(\'q\', \'[{"key": "a"}, {"key": "m"}, {"key": "z"}]\')')
        nursery.start_soon(bulk.run)
        await until_waiting(connection, other)
        redrive = Call(third, "select new_id from notifyq.redrive('dead')")
        nursery.start_soon(redrive.run)
        await until_waiting(connection, third)
    assert len(await bulk.answer()) == 3
    assert await redrive.answer() == []
    await well()


@pytest.mark.parametrize(
    ("policy", "held", "second"),
    [
        ("exclusive", {"key": "b"}, [{"key": "a"}, {"key": "b"}]),
        ("exclusive", {"key": "b"}, [{"key": "b"}, {"key": "a"}]),
        ("standard", {"id_key": "y"}, [{"id_key": "y", "key": "b"}, {"id_key": "z", "key": "a"}]),
        ("standard", {"id_key": "y"}, [{"id_key": "y", "key": "b", "throttle": 60}, {"id_key": "z", "key": "a"}]),
    ],
)
async def test_bulk_sends_take_their_keys_and_id_keys_in_one_order(
    connection, other, third, nursery, queue, well, policy, held, second
):
    await queue(policy=policy)
    first = [{"id_key": "z", "key": "a", "throttle": 60}, {"id_key": "y", "key": "b"}]
    call = "select id from notifyq.send_many('q', '{}')"
    async with connection.transaction(force_rollback=True):
        await rows(connection, call.format(json.dumps([held])))
        calls = []
        for session, jobs in ((other, first), (third, second)):
            bulk = Call(session, call.format(json.dumps(jobs)))
            nursery.start_soon(bulk.run)
            await until_waiting(connection, session)
            calls.append(bulk)
    answers = [await bulk.answer() for bulk in calls]
    assert sorted(answers[0]) == sorted(answers[1])
    await well()


async def test_of_two_bulk_sends_that_deadlock_one_sends_all_and_the_other_nothing(
    ask, connection, other, third, nursery, queue, well
):
    await queue()
    bulk = "select created from notifyq.send_many('q', '{}')".format
    calls = []
    async with connection.transaction(force_rollback=True):
        await ask("select notifyq.send('q', id_key => 'm')")
        for session, id_keys in ((other, "xmy"), (third, "ymx")):  # the same ones, with other keys
            jobs = [{"id_key": id_key, "key": key} for id_key, key in zip(id_keys, "abc", strict=True)]
            calls.append(Call(session, bulk(json.dumps(jobs))))
            nursery.start_soon(calls[-1].run)
            await until_waiting(connection, session)
    created = []
    for call in calls:
        try:
            created.append(await call.answer())
        except psycopg.errors.DeadlockDetected:
            again = call
    assert created == [[(True,)] * 3]
    assert await rows(again.session, again.statement) == [(False,)] * 3
    await well()


# ends and claims of one key


@either_end
async def test_two_completions_that_free_the_same_key_let_two_jobs_go_on(race, queue, send, claim, well, commit):
    await queue(key_limit=2)
    a, b, c, d, _ = await send(*"kkkkk")
    assert await claim() == [a, b]
    await race(complete(a), complete(b), commit=commit)
    assert await claim() == ([c, d] if commit else [c])
    await well()


ENDS = {
    "complete": "select notifyq.complete({})",
    "fail": "select notifyq.fail({}, 'x', final => true)",
    "cancel": "select notifyq.cancel({})",
    "delete": "select notifyq.delete({})",
    "discard": "select notifyq.discard(array[{}])",
    "snooze": "select notifyq.snooze(array[{}::bigint], array[interval '1 hour'])",
    "rescue": "update notifyq.active set deadline = now() where job = {}; select * from notifyq.rescue()",
}
one_slot = pytest.mark.parametrize("rule", [{"policy": "singleton"}, {"key_limit": 1}, {"fair": True, "key_limit": 1}])


@either_end
@one_slot
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_a_claim_waits_for_the_end_that_frees_the_key(race, queue, send, claim, well, rule, end, commit):
    await queue(retry_limit=1, **rule)
    a, b, _ = await send(*"kkk")
    assert await claim() == [a]
    assert await claim() == []
    _, claimed = await race(end.format(a), CLAIM, commit=commit)
    expected = a if end == ENDS["rescue"] else b
    assert claimed == ([(expected,)] if commit else [])
    await well()


@either_end
@one_slot
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_an_end_waits_for_the_claim_that_blocks_the_next_of_its_key(
    race, queue, send, claim, states, well, rule, end, commit
):
    await queue(retry_limit=1, **rule)
    [a] = await send("k")
    assert await claim() == [a]
    b, other = await send("k", "other")
    claimed, _ = await race(CLAIM, end.format(a), commit=commit)
    assert claimed == [(other,)]
    assert await states(b) == ["ready"]
    await well()


@either_end
@pytest.mark.parametrize("taker", ["cancel", "delete"])
async def test_the_next_of_a_key_is_taken_away_while_the_end_would_let_it_go_on(
    race, queue, send, claim, well, taker, commit
):
    await queue(policy="singleton")
    a, b, c = await send(*"kkk")
    assert await claim() == [a]
    assert await claim() == []
    await race(f"select notifyq.{taker}({b})", complete(a), commit=commit)
    assert await claim() == ([c] if commit else [b])
    await well()


@either_end
@pytest.mark.parametrize("taker", ["cancel", "delete"])
async def test_the_next_of_a_key_is_taken_away_when_an_end_has_just_let_it_go_on(
    race, queue, send, claim, well, taker, commit
):
    await queue(policy="singleton")
    a, b, c = await send(*"kkk")
    assert await claim() == [a]
    assert await claim() == []
    await race(complete(a), f"select notifyq.{taker}({b})", commit=commit)
    assert await claim() == ([c] if commit else [])
    await well()


# expiry


@either_end
@pytest.mark.parametrize("rule", [{"policy": "singleton"}, {"policy": "exclusive"}, {"policy": "stately"}])
async def test_a_job_that_is_being_claimed_does_not_expire(ask, race, queue, send, states, well, rule, commit):
    await queue(**rule)
    [job] = await send("k")
    expire = "update notifyq.job set expires_at = now(); select notifyq.expire()"
    assert await race(CLAIM, expire, commit=commit) == ([(job,)], [(0 if commit else 1,)])
    assert await states(job) == ["active" if commit else "failed"]
    await well()


@either_end
@pytest.mark.parametrize("rule", [{"policy": "singleton"}, {"policy": "exclusive"}, {"policy": "stately"}])
async def test_a_claim_waits_for_the_expiry_and_takes_the_next(ask, race, queue, send, states, well, rule, commit):
    await queue(**rule)
    [job] = await send("k")
    [other] = await send("other")
    expire = f"update notifyq.job set expires_at = now() where id = {job}; select notifyq.expire()"
    mine, theirs = await race(expire, CLAIM, commit=commit)
    assert (mine, theirs) == ([(1,)], [(other,)] if commit else [(job,), (other,)])
    await well()


async def test_a_job_that_expires_while_its_claim_waits_for_the_gate_holds_no_slot_or_is_claimed(
    ask, connection, other, nursery, queue, send, claim, states, books, well
):
    await queue(policy="singleton")
    job, late = await send("k", "other")
    await ask("select notifyq.send('q', key => 'due', delay => '1 hour')")
    await ask("update notifyq.scheduled set due_at = now()")
    async with connection.transaction():
        await ask("select notifyq.update_job(%s, data => '1')", job)
        call = Call(other, CLAIM)
        nursery.start_soon(call.run)
        await until_waiting(connection, other)
        await ask("update notifyq.job set expires_at = clock_timestamp() where id = %s", late)
    assert await call.answer() == [(job,), (late + 1,)]
    assert await states(late) == ["failed"]
    await well()


@either_end
async def test_a_job_that_has_failed_and_is_retried_meanwhile_does_not_expire(
    ask, race, queue, send, states, well, commit
):
    await queue(policy="singleton")
    [job] = await send("k")
    await ask("update notifyq.job set expires_at = now()")
    again = f"{CLAIM}; select notifyq.retry({job})"
    mine, theirs = await race(again, "select notifyq.expire()", commit=commit)
    assert (mine, theirs) == ([(True,)], [(0 if commit else 1,)])
    assert await states(job) == ["ready" if commit else "failed"]
    await well()


# ordered keys


@pytest.fixture
async def failed_head(ask, queue, send, claim):
    await queue(policy="ordered", retry_limit=0, retention=None)
    a, b = await send("k", "k")
    assert await claim() == [a]
    await ask("select notifyq.fail(%s, 'x')", a)
    assert await claim() == []
    await ask("select notifyq.update_queue('q', '{\"retention\": 3600}')")
    await ask("update notifyq.archive set finished_at = now() - interval '2 hours'")
    return a, b


GOING = ["select notifyq.delete({})", "select notifyq.purge()", "select notifyq.retry({})"]


@either_end
@pytest.mark.parametrize("going", GOING)
async def test_a_claim_finds_what_becomes_of_a_failed_head(race, claim, failed_head, well, going, commit):
    a, b = failed_head
    _, claimed = await race(going.format(a), CLAIM, commit=commit, waits="retry" not in going)
    next_one = a if "retry" in going else b
    assert claimed == ([(next_one,)] if commit and "retry" not in going else [])
    assert await claim() == ([next_one] if commit and not claimed else [])
    await well()


@either_end
@pytest.mark.parametrize("going", GOING)
async def test_a_failed_head_goes_while_a_claim_looks_at_its_key(race, send, claim, failed_head, well, going, commit):
    a, b = failed_head
    [other] = await send("other")
    claimed, _ = await race(CLAIM, going.format(a), commit=commit, waits="retry" not in going)
    assert claimed == [(other,)]
    assert sorted(await claim()) == sorted([a if "retry" in going else b] + [other] * (not commit))
    await well()


@pytest.mark.parametrize("taker", ["cancel", "delete"])
async def test_a_job_that_is_retried_while_it_is_deleted_is_taken_gate_first(
    ask, connection, other, third, nursery, queue, send, claim, states, well, taker
):
    await queue(policy="singleton", retry_limit=0)
    [a] = await send("k")
    await claim()
    await ask("select notifyq.fail(%s, 'x')", a)
    async with third.transaction():
        async with connection.transaction():
            await ask("select notifyq.retry(%s)", a)
            delete = Call(other, f"select notifyq.delete({a})")
            nursery.start_soon(delete.run)
            await until_waiting(connection, other)
            await rows(third, "select queue from notifyq.gate for update")
        await until_waiting_for(connection, other, third)
        assert await rows(third, f"select notifyq.{taker}({a})") == [(True,)]
    assert await delete.answer() == [(taker == "cancel",)]
    assert await states(a) == ["gone"]
    await well()


@either_end
async def test_a_sender_does_not_wait_for_the_failed_head_that_goes(race, claim, failed_head, well, commit):
    a, b = failed_head
    _, [(c, created)] = await race(f"select notifyq.delete({a})", SEND, commit=commit, waits=False)
    assert created
    assert await claim() == ([b] if commit else [])
    assert await well() == [*([] if commit else [b]), c]


@either_end
@pytest.mark.parametrize("edit", ["data => '1'", "priority => 1", "delay => '0'"])
async def test_what_is_behind_a_ticket_that_is_edited_waits_for_it(race, queue, send, claim, well, edit, commit):
    await queue(policy="ordered")
    a, b = await send("k", "k")
    _, claimed = await race(f"select notifyq.update_job({a}, {edit})", CLAIM, commit=commit)
    assert claimed == [(a,)]
    assert await well() == [b]


# limits and rates


async def four_sessions(dsn: str, work: Any) -> None:
    sessions = [await open_connection(dsn) for _ in range(4)]
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for session in sessions:
                nursery.start_soon(work, session)
    for session in sessions:
        await session.close()


@pytest.mark.parametrize("rule", [{"active_limit": 3}, {"key_limit": 3}, {"fair": True, "key_limit": 3}])
async def test_four_sessions_never_hold_more_than_the_limit(ask, dsn, queue, send, well, rule):
    await queue(**rule)
    jobs = await send(*["k"] * 120)
    done: list[int] = []

    async def work(session: TrioConnection) -> None:
        while len(done) < len(jobs):
            claimed = sorted(id for (id,) in await rows(session, "select id from notifyq.claim('q', 2)"))
            assert (await rows(session, "select count(*) from notifyq.active"))[0][0] <= 3
            await rows(session, complete(*claimed))
            done.extend(claimed)

    await four_sessions(dsn, work)
    assert sorted(done) == jobs
    await well()


@pytest.mark.parametrize(
    "rule", [{"rate_limit": 4, "rate_period": 0.3}, {"key_rate_limit": 4, "key_rate_period": 0.3}], ids=["queue", "key"]
)
async def test_four_sessions_start_no_more_than_a_rate_allows_in_any_period(ask, dsn, queue, send, well, rule):
    await queue("warm", **rule)
    await ask("select notifyq.send('warm') from generate_series(1, 4)")
    await queue(**rule)
    jobs = await send(*["k"] * 24)
    done: list[int] = []

    async def work(session: TrioConnection) -> None:
        await rows(session, "select id from notifyq.claim('warm', 3)")  # its first claim has everything to plan
        while len(done) < len(jobs):
            claimed = sorted(id for (id,) in await rows(session, "select id from notifyq.claim('q', 3)"))
            await rows(session, complete(*claimed))
            done.extend(claimed)

    await four_sessions(dsn, work)
    assert sorted(done) == jobs
    starts = [
        at for (at,) in await ask("select extract(epoch from claimed_at)::float8 from notifyq.archive order by 1")
    ]
    shortest = min(late - early for early, late in zip(starts, itertools.islice(starts, 4, None), strict=False))
    assert shortest >= 0.3
    await well()


@pytest.mark.parametrize("rule", ["rate", "key_rate"])
async def test_a_start_that_waited_for_the_gate_counts_from_when_it_was_let_through(
    ask, connection, other, nursery, queue, send, rule
):
    await queue(**{f"{rule}_limit": 100, f"{rule}_period": 1})
    await send("k", "k")
    async with connection.transaction():
        await ask("select id from notifyq.claim('q', 1)")
        call = Call(other, "select id from notifyq.claim('q', 1)")
        nursery.start_soon(call.run)
        await until_waiting(connection, other)
        await ask("select pg_sleep(0.05)")  # five of the hundredths in which starts are counted
        [(now,)] = await ask(CLOCK)
    assert len(await call.answer()) == 1
    [(slot,)] = await ask(f"select starts[cardinality(starts)] from notifyq.{'gate' if rule == 'rate' else 'key'}")
    assert slot >= int(now * 100)


@pytest.mark.parametrize(
    "rule",
    [{"key_rate_limit": 2, "key_rate_period": 0.5}, {"rate_limit": 2, "rate_period": 0.5, "key_limit": 9}],
    ids=["key", "queue"],
)
async def test_a_claim_that_is_held_up_after_it_was_let_through_starts_no_more_than_the_rate_allowed_then(
    ask, connection, other, nursery, queue, send, claim, well, rule
):
    await queue(**rule)
    await send(*["k"] * 4)
    assert len(await claim(1)) == 1
    async with connection.transaction():
        await ask("select from notifyq.key for update")
        call = Call(other, CLAIM)
        nursery.start_soon(call.run)
        await until_waiting(connection, other)
        await ask("select pg_sleep(0.52)")  # the first start counts no longer, but did when the claim was let through
    await call.answer()
    starts = [at for (at,) in await ask("select claimed_at from notifyq.active order by 1")]
    assert all(late - early >= timedelta(seconds=0.5) for early, late in zip(starts, starts[2:], strict=False))
    if "rate_limit" in rule and len(starts) == 2:  # and whoever claims hears when to look again
        assert await ask("select next_start_at is not null from notifyq.gate") == [(True,)]
    await well()


@either_end
@pytest.mark.parametrize("wider", [{"key_limit": 2}, {"key_limit": None}, {"key_limit": 2, "fair": True}])
async def test_a_claim_waits_for_a_change_of_limits_and_heeds_it(ask, race, queue, send, claim, well, wider, commit):
    await queue(key_limit=1)
    a, b, c = await send(*"kkk")
    assert await claim() == [a]
    assert await claim() == []
    update = f"select notifyq.update_queue('q', '{json.dumps(wider)}')"
    _, claimed = await race(update, CLAIM, commit=commit)
    assert claimed == ([] if not commit else [(b,)] if wider["key_limit"] else [(b,), (c,)])
    await well()


@either_end
@pytest.mark.parametrize("change", [{"key_limit": 2}, {"key_limit": None}, {"active_limit": 1}, {"fair": True}])
async def test_a_change_of_limits_waits_for_a_claim_and_counts_it(ask, race, queue, send, claim, well, change, commit):
    await queue(key_limit=1)
    a, _, _ = await send(*"kkk")
    claimed, _ = await race(CLAIM, f"select notifyq.update_queue('q', '{json.dumps(change)}')", commit=commit)
    assert claimed == [(a,)]
    await well()


@either_end
@pytest.mark.parametrize("change", [{"key_limit": 1}, {"key_limit": None}, {"active_limit": 1}, {"fair": True}])
async def test_a_completion_waits_for_a_change_of_limits(ask, race, queue, send, claim, well, change, commit):
    await queue(key_limit=2)
    a, b, _, _ = await send(*"kkkk")
    assert await claim() == [a, b]
    await race(f"select notifyq.update_queue('q', '{json.dumps(change)}')", complete(a), commit=commit)
    await well()


@either_end
async def test_a_completion_waits_while_its_queue_gets_its_first_limit(race, queue, send, claim, well, commit):
    await queue()
    a, b = await send("k", "k")
    assert await claim() == [a, b]
    await race(
        "select notifyq.update_queue('q', '{\"key_limit\": 1, \"active_limit\": 1}')", complete(a), commit=commit
    )
    await well()


@either_end
async def test_the_first_limit_waits_for_a_completion(race, queue, send, claim, well, commit):
    await queue()
    a, b = await send("k", "k")
    assert await claim() == [a, b]
    await race(
        complete(a), "select notifyq.update_queue('q', '{\"key_limit\": 1, \"active_limit\": 1}')", commit=commit
    )
    await well()


async def test_an_end_in_a_queue_without_rules_any_more_waits_for_no_gate(ask, race, queue, send, claim, well):
    await queue(key_limit=1)
    [job] = await send("k")
    assert await claim() == [job]
    await ask("select notifyq.update_queue('q', '{\"key_limit\": null}')")
    gate = "select queue from notifyq.gate for update"
    await race(gate, complete(job), commit=True, waits=False)
    await well()


MANY = 'select id from notifyq.send_many(\'q\', \'[{"key": "k"}, {"key": "k"}, {"key": "k"}]\')'
RULES_OFF = "select notifyq.update_queue('q', '{\"fair\": false, \"key_limit\": null}')"


@either_end
@pytest.mark.parametrize("rule", [{"fair": True}, {"key_limit": 1}, {"fair": True, "active_limit": 9}])
async def test_what_a_bulk_send_has_blocked_is_let_go_when_its_rule_is_taken_away(
    race, queue, states, well, rule, commit
):
    await queue(**rule)
    sent, _ = await race(MANY, RULES_OFF, commit=commit)
    assert await states(*(id for (id,) in sent)) == ["ready" if commit else "gone"] * 3
    await well()


@either_end
@whatever_isolation
async def test_a_bulk_send_waits_for_the_rule_that_is_taken_away(race, other, queue, states, well, isolation, commit):
    await queue(fair=True)
    await rows(other, f"set default_transaction_isolation = '{isolation}'")
    if commit and isolation != "read committed":
        with pytest.raises(psycopg.errors.SerializationFailure):
            await race(RULES_OFF, MANY, commit=True)
        return
    _, sent = await race(RULES_OFF, MANY, commit=commit)
    assert await states(*(id for (id,) in sent)) == ["ready"] + ["ready" if commit else "blocked"] * 2
    await well()


async def test_a_key_that_a_sender_has_reserved_while_the_policy_changed_is_free_when_it_is_back(
    ask, race, queue, claim
):
    await queue(policy="exclusive")
    to = "select notifyq.update_queue('q', '{{\"policy\": \"{}\"}}')".format
    [(job, _)], _ = await race(SEND, to("standard"), commit=True, waits=False)
    assert await claim() == [job]
    await ask(complete(job))
    await ask(to("exclusive"))
    assert [created for _, created in await ask(SEND)] == [True]


async def test_a_queue_is_deleted_while_claims_of_it_wait(ask, connection, other, third, nursery, queue, send):
    await queue(policy="singleton")
    await ask("alter function notifyq.delete_queue(text) set lock_timeout = '10s'")
    await send(*"kkk")
    async with connection.transaction():
        await ask(CLAIM)
        delete = Call(other, "select notifyq.delete_queue('q')")
        nursery.start_soon(delete.run)
        await until_waiting(connection, other)
        claim = Call(third, CLAIM)
        nursery.start_soon(claim.run)
        await until_waiting(connection, third)
    assert await delete.answer() == [(3,)]
    with pytest.raises(psycopg.DatabaseError, match="no queue named 'q'"):
        await claim.answer()
    for table in ("queue", "job", "ready", "blocked", "active", "key", "gate"):
        assert await ask(f"select 1 from notifyq.{table}") == [], table


async def test_what_takes_several_gates_takes_them_in_one_order(
    ask, connection, other, third, nursery, queue, send, claim, well
):
    await queue("q1", policy="singleton")
    await queue("q2", policy="singleton")
    runtime = "00000000-0000-0000-0000-000000000001"
    await ask("select notifyq.register(%s, '{q1,q2}')", runtime)
    for name in ("q2", "q1"):
        await send("k", "k", queue=name)
        assert len(await ask("select id from notifyq.claim(%s, 1, %s)", name, runtime)) == 1
    waiting = [job for (job,) in await ask("select job from notifyq.blocked order by job")]
    async with connection.transaction():
        await ask("select id from notifyq.claim('q2', 1)")
        goodbye = Call(other, f"select state from notifyq.deregister('{runtime}')")
        nursery.start_soon(goodbye.run)
        await until_waiting(connection, other)
        cancel = Call(third, f"select notifyq.cancel('{{{','.join(map(str, waiting))}}}'::bigint[])")
        nursery.start_soon(cancel.run)
        await until_waiting(connection, third)
    assert await goodbye.answer() == [("ready",), ("ready",)]
    assert [sorted(ids) for (ids,) in await cancel.answer()] == [waiting]
    await well()


# rescues


RUNTIME = "00000000-0000-0000-0000-000000000001"
RESCUE = "select job, state from notifyq.rescue() order by job"
BEAT = f"select renewed from notifyq.beat('{RUNTIME}')"
ROWS = "select (select count(*)::int from notifyq.runtime), (select count(*)::int from notifyq.active)"


@pytest.fixture
def lose(ask, queue, send):
    async def lose(*names: str) -> list[int]:
        """The jobs of a dead runtime, one of each of these queues. All but 'plain' have a rule, and another job waits."""
        await ask("select notifyq.register(%s, '{*}')", RUNTIME)
        lost = []
        for name in names:
            ruled = name != "plain"
            await queue(name, retry_limit=1, **({"key_limit": 1} if ruled else {}))
            await send(*(["k", "k"] if ruled else ["k"]), queue=name)
            lost += await ask("select id from notifyq.claim(%s, 1, %s)", name, RUNTIME)
        await ask("update notifyq.runtime set lease = '1 ms', lease_until = clock_timestamp() - interval '1 second'")
        return [job for (job,) in lost]

    return lose


@either_end
async def test_a_rescue_steps_over_a_gate_that_is_in_use_and_the_next_one_recovers_the_rest(
    ask, connection, other, lose, well, commit
):
    first, free, plain, last = await lose("q", "q2", "plain", "q3")
    with trio.fail_after(5):
        async with connection.transaction(force_rollback=not commit):
            await ask(CLAIM)  # nothing: the key is held
            assert await rows(other, RESCUE) == [(free, "ready"), (plain, "ready"), (last, "ready")]
            assert await rows(other, ROWS) == [(1, 1)]
            assert await rows(other, RESCUE) == []
            assert await rows(other, ROWS) == [(1, 1)]
    assert await ask(RESCUE) == [(first, "ready")]
    assert await ask(ROWS) == [(0, 0)]
    assert await ask("select job, attempt, type from notifyq.attempt order by job") == [
        (job, 1, "lost") for job in (first, free, plain, last)
    ]
    await well()


@either_end
async def test_a_rescue_waits_for_no_gate_of_many_but_a_moment_for_one(ask, connection, other, lose, well, commit):
    queues = [f"q{number}" for number in range(20)]
    jobs = await lose(*queues)
    async with connection.transaction(force_rollback=not commit):
        for name in queues[:-1]:
            await ask("select id from notifyq.claim(%s)", name)
        with trio.fail_after(2):
            assert await rows(other, RESCUE) == [(jobs[-1], "ready")]
    assert [job for job, _ in await ask(RESCUE)] == jobs[:-1]
    await well()


@either_end
async def test_a_rescue_gets_at_the_gate_of_a_queue_whose_transactions_are_short(
    ask, connection, other, nursery, lose, well, commit
):
    [job] = await lose("q")
    rescue = Call(other, RESCUE)
    async with connection.transaction(force_rollback=not commit):
        await ask(CLAIM)
        nursery.start_soon(rescue.run)
        with trio.fail_after(5):
            while not (rescue.through.is_set() or await ask("select 1 from pg_locks where not granted")):
                await trio.sleep(0.001)
    assert await rescue.answer() == [(job, "ready")]
    await well()


async def test_a_rescue_does_not_wait_for_a_gate_that_is_being_made(ask, connection, other, lose, well):
    [plain] = await lose("plain")
    await ask("select notifyq.update_queue('plain', '{\"key_limit\": 1}')")
    async with connection.transaction():
        await ask("select id from notifyq.claim('plain')")
        with trio.fail_after(5):
            assert await rows(other, RESCUE) == []
    assert await ask(RESCUE) == [(plain, "ready")]
    await well()


@either_end
async def test_a_rescue_steps_over_a_ticket_that_somebody_takes(ask, connection, other, lose, commit):
    plain, behind = await lose("plain", "q")
    async with connection.transaction(force_rollback=not commit):
        await ask(f"select notifyq.complete('{{{plain}}}', runtime => '{RUNTIME}')")
        with trio.fail_after(5):
            assert await rows(other, RESCUE) == [(behind, "ready")]
        assert await rows(other, ROWS) == [(1, 1)]
    assert await ask(RESCUE) == ([] if commit else [(plain, "ready")])
    assert await ask(ROWS) == [(0, 0)]


async def test_a_runtime_that_was_rescued_in_part_learns_that_its_lease_is_lost(ask, connection, other, lose, well):
    behind, plain = await lose("q", "plain")
    with trio.fail_after(5):
        async with connection.transaction():
            await ask(CLAIM)
            assert await rows(other, RESCUE) == [(plain, "ready")]
            assert await rows(other, BEAT) == [(False,)]
            with pytest.raises(psycopg.DatabaseError, match="no live lease"):
                await rows(other, f"select id from notifyq.claim('plain', 1, '{RUNTIME}')")
            await rows(other, f"select notifyq.register('{RUNTIME}', '{{*}}')")
            assert await rows(other, BEAT) == [(True,)]
            assert await rows(other, f"select job from notifyq.held('{RUNTIME}')") == [(behind,)]
    assert await ask(RESCUE) == []
    assert await ask(ROWS) == [(1, 1)]
    await ask(f"select notifyq.deregister('{RUNTIME}')")
    await well()


async def test_a_runtime_all_of_whose_jobs_were_stepped_over_may_renew_its_lease(ask, connection, other, lose, well):
    await lose("q")
    with trio.fail_after(5):
        async with connection.transaction():
            await ask(CLAIM)
            assert await rows(other, RESCUE) == []
            await rows(other, "update notifyq.runtime set lease = '1 minute'")
            assert await rows(other, BEAT) == [(True,)]
    assert await ask(RESCUE) == []
    assert await ask(ROWS) == [(1, 1)]
    await ask(f"select notifyq.deregister('{RUNTIME}')")
    await well()


# flows


@pytest.fixture
def flow(ask):
    async def flow(**jobs: dict[str, Any]) -> list[int]:
        entries = [{"name": name, "queue": "q", **entry} for name, entry in jobs.items()]
        return [id for _, id in await ask("select name, id from notifyq.send_flow(%s)", json.dumps(entries))]

    return flow


after_both = {"after": ["a", "b"]}
rules_of_flows = pytest.mark.parametrize("rule", [{}, {"policy": "singleton"}, {"active_limit": 9}])


@either_end
@rules_of_flows
async def test_of_two_parents_that_finish_together_the_last_one_frees_the_child(
    ask, race, queue, claim, flow, states, well, rule, commit
):
    await queue(**rule)
    a, b, c = await flow(a={"key": "a"}, b={"key": "b"}, c={"key": "c", **after_both})
    assert await claim() == [a, b]
    await race(complete(a), complete(b), commit=commit)
    assert (
        await states(a, b, c) == ["completed", "completed", "ready"] if commit else ["active", "completed", "blocked"]
    )
    await well()


@either_end
@rules_of_flows
@pytest.mark.parametrize("on_failure", ["cancel", "run", "wait"])
@pytest.mark.parametrize("way", [1, -1], ids=["completes first", "fails first"])
async def test_one_parent_completes_while_the_other_fails(
    ask, race, queue, claim, flow, states, well, rule, on_failure, way, commit
):
    await queue(retry_limit=0, **rule)
    a, b, c = await flow(a={"key": "a"}, b={"key": "b"}, c={"key": "c", "on_failure": on_failure, **after_both})
    assert await claim() == [a, b]
    await race(*[complete(a), ENDS["fail"].format(b)][::way], commit=commit)
    both = {"cancel": "cancelled", "run": "ready", "wait": "blocked"}[on_failure]
    undone = "cancelled" if on_failure == "cancel" and way == 1 else "blocked"
    assert await states(c) == [both if commit else undone]
    await ask("select notifyq.complete(array(select job from notifyq.active))")
    await ask("select notifyq.retry(%s)", b)
    await well()


async def test_a_failed_parent_does_not_wait_for_the_gate_of_a_child_that_it_cancels(
    ask, race, queue, claim, flow, states, well
):
    await queue(policy="singleton")
    await queue("elsewhere", retry_limit=0)
    a, b, c, d = await flow(a={}, b={"queue": "elsewhere"}, c=after_both, d={"after": ["c"]})
    assert await claim(queue="elsewhere") == [b]
    claimed, _ = await race(CLAIM, ENDS["fail"].format(b), commit=True, waits=False)
    assert claimed == [(a,)]
    assert await states(a, b, c, d) == ["active", "failed", "cancelled", "cancelled"]
    await well()


async def test_two_failing_parents_cancel_one_tree_from_two_sides(
    ask, connection, other, third, nursery, queue, claim, flow, states, well
):
    await queue(retry_limit=0)
    p, r, x, y, z = await flow(p={}, r={}, x={"after": ["p"]}, y={"after": ["r", "x"]}, z={"after": ["p", "y"]})
    assert await claim() == [p, r]
    async with connection.transaction():
        await ask("select from notifyq.blocked where job = %s for update", y)
        calls = [Call(other, ENDS["fail"].format(p)), Call(third, ENDS["fail"].format(r))]
        for call in calls:
            nursery.start_soon(call.run)
            await until_waiting(connection, call.session)
    assert [await call.answer() for call in calls] == [[("failed",)], [("failed",)]]
    assert await states(x, y, z) == ["cancelled"] * 3
    await well()


@either_end
@rules_of_flows
@pytest.mark.parametrize("taker", ["cancel", "delete"])
async def test_a_child_is_taken_away_while_its_parent_finishes(
    ask, race, queue, claim, flow, states, well, rule, taker, commit
):
    await queue(**rule)
    a, b = await flow(a={}, b={"after": ["a"]})
    assert await claim() == [a]
    _, theirs = await race(complete(a), f"select notifyq.{taker}({b})", commit=commit)
    assert theirs == [(True,)]
    assert await states(b) == ["cancelled" if taker == "cancel" else "gone"]
    await well()


@either_end
@rules_of_flows
@pytest.mark.parametrize("taker", ["cancel", "delete"])
async def test_a_parent_finishes_while_its_child_is_taken_away(
    ask, race, queue, claim, flow, states, well, rule, taker, commit
):
    await queue(**rule)
    a, b = await flow(a={}, b={"after": ["a"]})
    assert await claim() == [a]
    await race(f"select notifyq.{taker}({b})", complete(a), commit=commit)
    assert await states(a, b) == ["completed", ("cancelled" if taker == "cancel" else "gone") if commit else "ready"]
    await well()


def flow_after(parent: int, on_failure: str = "cancel") -> str:
    entry = {"name": "late", "queue": "q", "after": [parent], "on_failure": on_failure, "key": "late"}
    return f"select id from notifyq.send_flow('{json.dumps([entry])}')"


@either_end
@rules_of_flows
async def test_a_flow_comes_after_a_parent_that_is_finishing(ask, race, queue, send, claim, states, well, rule, commit):
    await queue(**rule)
    [a] = await send("k")
    assert await claim() == [a]
    _, [(late,)] = await race(complete(a), flow_after(a), commit=commit)
    assert await states(late) == ["ready" if commit else "blocked"]
    await well()


@either_end
@pytest.mark.parametrize("on_failure", ["cancel", "run", "wait"])
async def test_a_flow_comes_after_a_parent_that_is_failing(
    ask, race, queue, send, claim, states, well, on_failure, commit
):
    await queue(retry_limit=0)
    [a] = await send("k")
    assert await claim() == [a]
    fail = ENDS["fail"].format(a)
    if commit and on_failure == "cancel":
        with pytest.raises(psycopg.Error, match="has failed already"):
            await race(fail, flow_after(a), commit=True)
        return
    _, [(late,)] = await race(fail, flow_after(a, on_failure), commit=commit)
    assert await states(late) == ["ready" if commit and on_failure == "run" else "blocked"]
    await ask("select notifyq.retry(%s)", a)
    await well()


@either_end
@rules_of_flows
async def test_a_parent_finishes_while_a_flow_is_sent_after_it(
    ask, race, queue, send, claim, states, well, rule, commit
):
    await queue(**rule)
    [a] = await send("k")
    assert await claim() == [a]
    [(late,)], _ = await race(flow_after(a), complete(a), commit=commit)
    assert await states(a, late) == ["completed", "ready" if commit else "gone"]
    await well()


async def test_a_flow_after_a_parent_that_is_forgotten_as_it_finishes_is_refused(ask, race, queue, send, claim):
    await queue(retention=0)
    [a] = await send("k")
    assert await claim() == [a]
    with pytest.raises(psycopg.Error, match="there is no job 1 to come after"):
        await race(complete(a), flow_after(a), commit=True)


# edits


plain_or_gated = pytest.mark.parametrize("rule", [{}, {"policy": "singleton"}], ids=["plain", "gated"])
UPSERT = "select id, created from notifyq.upsert('q', '\"new\"', 'k')"


@either_end
@plain_or_gated
async def test_of_two_upserts_one_sends_and_the_other_edits(ask, race, queue, well, rule, commit):
    await queue(**rule)
    [(first, created)], [(second, again)] = await race(UPSERT, UPSERT.replace("new", "newer"), commit=commit)
    assert created
    assert (second == first, again) == (commit, not commit)
    assert await ask("select id, data from notifyq.job") == [(second, "newer")]
    await well()


@either_end
@pytest.mark.parametrize("policy", ["short", "stately", "exclusive"])
async def test_an_upsert_waits_for_a_send_of_its_key_and_edits_what_that_made(ask, race, queue, well, policy, commit):
    await queue(policy=policy)
    [(sent, _)], [(job, created)] = await race(SEND, UPSERT, commit=commit)
    assert (job == sent, created) == (commit, not commit)
    assert await ask("select id, data from notifyq.job") == [(job, "new")]
    await well()


@either_end
async def test_an_upsert_of_a_key_whose_exclusive_job_is_ending_sends_or_leaves_that_alone(
    ask, race, queue, send, claim, well, commit
):
    await queue(policy="exclusive")
    assert (await send("k"), await claim()) == ([1], [1])
    _, [(job, created)] = await race(complete(1), UPSERT, commit=commit)
    assert (job != 1, created) == (commit, commit)
    assert await ask("select data from notifyq.job") == [("new" if commit else None,)]
    await well()


async def test_an_upsert_that_could_not_see_another_is_refused(other, queue):
    await queue()
    await rows(other, "set default_transaction_isolation = 'repeatable read'")
    with pytest.raises(psycopg.Error, match="upsert does not work in REPEATABLE READ"):
        await rows(other, UPSERT)


@either_end
@plain_or_gated
async def test_an_upsert_waits_for_the_claim_of_the_job_and_then_sends(race, queue, send, well, rule, commit):
    await queue(**rule)
    [job] = await send("k")
    claimed, [(sent, created)] = await race(CLAIM, UPSERT, commit=commit)
    assert claimed == [(job,)]
    assert (sent == job, created) == (not commit, commit)
    await well()


@either_end
@plain_or_gated
async def test_a_job_that_is_being_upserted_is_claimed_with_its_new_data(ask, race, queue, send, rule, commit, well):
    await queue(**rule)
    [job] = await send("k")
    claim = "select id, data from notifyq.claim('q', 10)"
    edited, claimed = await race(UPSERT, claim, commit=commit, waits=bool(rule))
    assert edited == [(job, False)]
    claimed = claimed or await ask(claim)
    assert claimed == [(job, "new" if commit else None)]
    await well()


@either_end
@plain_or_gated
@pytest.mark.parametrize("edit", ["data => '\"new\"'", "priority => 3", "delay => '1 hour'", "delay => '0'"])
async def test_an_edit_waits_for_a_claim_and_does_not_touch_the_active_job(
    ask, race, queue, send, states, well, rule, edit, commit
):
    await queue(**rule)
    [job] = await send("k")
    claimed, [(edited,)] = await race(CLAIM, f"select notifyq.update_job({job}, {edit})", commit=commit)
    assert claimed == [(job,)]
    assert edited == (None if commit else job)
    assert await states(job) == ["active" if commit else "scheduled" if "hour" in edit else "ready"]
    await well()


@either_end
async def test_a_blocked_job_is_put_off_while_the_end_would_let_it_go_on(
    race, queue, send, claim, states, well, commit
):
    await queue(policy="singleton")
    a, b, c = await send(*"kkk")
    assert await claim() == [a]
    assert await claim() == []
    await race(complete(a), f"select notifyq.update_job({b}, delay => '1 hour')", commit=commit)
    assert await states(b) == ["scheduled"]
    assert await claim() == ([c] if commit else [])
    await well()


# slots


@either_end
@whatever_isolation
async def test_two_sends_in_one_slot_of_a_throttle_make_one_job(ask, race, other, queue, isolation, well, commit):
    await queue()
    await rows(other, f"set default_transaction_isolation = '{isolation}'")
    throttled = SEND.replace("'k'", "'k', throttle => '1 year'")
    if commit and isolation != "read committed":
        with pytest.raises(psycopg.errors.SerializationFailure):
            await race(throttled, throttled, commit=True)
    else:
        [(first, _)], [(second, created)] = await race(throttled, throttled, commit=commit)
        assert (second == first, created) == (commit, not commit)
    assert len(await ask("select 1 from notifyq.job")) == 1
    await well()


def debounced(data: int) -> str:
    return SEND.replace("'k'", f"'k', debounce => '1 year', data => '{data}'")


@either_end
@plain_or_gated
async def test_two_debounced_sends_make_one_job_now_and_one_for_the_next_slot(ask, race, queue, well, rule, commit):
    await queue(**rule)
    [(first, _)], [(second, created)] = await race(debounced(1), debounced(2), commit=commit)
    assert created
    expected = [(first, "ready", 1), (second, "scheduled", 2)] if commit else [(second, "ready", 2)]
    assert await ask("select id, state, data from notifyq.jobs order by id") == expected
    await well()


@either_end
@plain_or_gated
async def test_the_last_of_two_debounced_sends_for_the_next_slot_gives_its_data(ask, race, queue, well, rule, commit):
    await queue(**rule)
    await ask(debounced(1))
    [(first, _)], [(second, created)] = await race(debounced(2), debounced(3), commit=commit)
    assert (second == first, created) == (commit, not commit)
    assert await ask("select id, data from notifyq.jobs where state = 'scheduled'") == [(second, 3)]
    await well()


@either_end
@pytest.mark.parametrize("going", ["cancel({})", "delete({})"])
async def test_a_debounced_send_takes_the_slot_of_a_job_that_is_being_taken_away(ask, race, queue, well, going, commit):
    await queue()
    await ask(debounced(1))
    [(job, _)] = await ask(debounced(2))
    _, [(sent, created)] = await race(f"select notifyq.{going.format(job)}", debounced(3), commit=commit)
    assert (sent != job, created) == (commit, commit)
    assert await ask("select id, data from notifyq.jobs where state = 'scheduled'") == [(sent, 3)]
    await well()


@either_end
@pytest.mark.parametrize("policy", ["short", "stately", "exclusive"])
async def test_a_debounced_send_waits_for_the_claim_of_the_job_that_has_its_key(ask, race, queue, well, policy, commit):
    await queue(policy=policy)
    [(first, _)] = await ask(debounced(1))
    _, [(sent, created)] = await race(CLAIM, debounced(2), commit=commit)
    made = commit and policy != "exclusive"
    assert (sent != first, created) == (made, made)
    expected = [(first, "active", 1)] if commit else [(first, "ready", 2)]
    assert (
        await ask("select id, state, data from notifyq.jobs order by id") == expected + [(sent, "scheduled", 2)] * made
    )
    await well()


@either_end
@pytest.mark.parametrize("policy", ["short", "stately", "exclusive"])
@pytest.mark.parametrize("going", ["cancel({})", "delete({})"])
async def test_a_debounced_send_waits_for_the_end_of_the_job_that_has_its_key(
    ask, race, queue, well, policy, going, commit
):
    await queue(policy=policy)
    [(first, _)] = await ask(debounced(1))
    _, [(sent, created)] = await race(f"select notifyq.{going.format(first)}", debounced(2), commit=commit)
    assert (sent != first, created) == (commit, commit)
    waiting = "select id, data from notifyq.jobs where state in ('ready', 'scheduled')"
    assert await ask(waiting) == [(sent, 2)]
    await well()


@either_end
@pytest.mark.parametrize("policy", ["short", "stately", "exclusive"])
async def test_a_claim_waits_for_a_debounced_send_and_brings_its_data(ask, race, queue, well, policy, commit):
    await queue(policy=policy)
    [(first, _)] = await ask(debounced(1))
    claimed = CLAIM.replace("select id", "select id, data")
    _, brought = await race(debounced(2), claimed, commit=commit)
    assert brought == [(first, 2 if commit else 1)]
    await well()


async def test_two_bulk_debounced_sends_whose_keys_overlap_do_not_deadlock(
    ask, connection, other, third, nursery, queue, well
):
    await queue(policy="short")

    def bulk(keys: str, data: int) -> str:
        jobs = [{"key": key, "debounce": 3600, "data": data} for key in keys]
        return f"select id from notifyq.send_many('q', '{json.dumps(jobs)}')"

    await ask(bulk("ac", 1))  # what is sent of these keys is an edit, and locks the gate
    async with connection.transaction():
        await ask("select notifyq.lock_gate(number) from notifyq.queue where name = 'q'")
        calls = []
        for session, keys, data in ((other, "ab", 2), (third, "bc", 3)):
            calls.append(Call(session, bulk(keys, data)))
            nursery.start_soon(calls[-1].run)
            await until_waiting(connection, session)
    (a, b), (b_again, c) = [[job for (job,) in await call.answer()] for call in calls]
    assert b == b_again
    assert await ask("select id, data from notifyq.jobs order by key") == [(a, 2), (b, 3), (c, 3)]
    await well()


# renewed keys

RENEW = "select notifyq.lock_gate(q.number), notifyq.renew_keys(q) from notifyq.queue q"


@either_end
@pytest.mark.parametrize("waiter", ["claim", "complete", "renew"])
@pytest.mark.parametrize(
    "rule",
    [
        {"key_limit": 2},
        {"policy": "ordered"},
        {"key_rate_limit": 2, "key_rate_period": 60},
        {"fair": True, "key_limit": 2, "active_limit": 9},
    ],
    ids=["limit", "ordered", "rate", "fair"],
)
async def test_who_has_waited_while_keys_were_renewed_finds_them(
    ask, race, queue, send, claim, books, rule, waiter, commit
):
    await queue(**rule)
    jobs = await send(*"aaaab")
    started = await claim(2)
    second = {"claim": CLAIM, "complete": complete(started[0]), "renew": RENEW}[waiter]
    await race(RENEW, second, commit=commit)
    assert await ask("select generation from notifyq.gate") == [(commit + (waiter == "renew"),)]
    await books()
    if waiter == "claim":
        active = await ask("select 1 from notifyq.active where job = any (%s)", jobs[:4])
        assert len(active) == (1 if "policy" in rule else 2)
    await claim()
    await books()


@either_end
@pytest.mark.parametrize("rule", [{"key_limit": 1}, {"fair": True}, {"key_rate_limit": 9, "key_rate_period": 60}])
async def test_what_a_send_under_way_blocks_is_found_after_a_renewal(ask, race, queue, send, claim, well, rule, commit):
    await queue(**rule)
    await send("a")
    started = await claim(1)
    sends = "select id from notifyq.send_many('q', '" + json.dumps([{"key": "a"}] * 4) + "')"
    await race(sends, RENEW, commit=commit, waits=False)
    assert await ask("select generation from notifyq.gate") == [(1,)]
    await ask(complete(*started))
    assert len(await well()) == 4 * commit


@either_end
async def test_a_renewal_waits_for_a_claim_and_moves_what_it_started(ask, race, queue, send, claim, well, commit):
    await queue(key_limit=2)
    jobs = await send(*"aaab")
    assert await claim(1) == jobs[:1]
    await race(CLAIM, RENEW, commit=commit)
    held = [("a", 2, 1), ("b", 1, 1)] if commit else [("a", 1, 1)]
    assert await ask("select key, held, generation from notifyq.key order by key") == held
    await well()


async def test_claimers_and_completers_of_few_keys_under_a_snapshot_keep_to_the_limit(
    ask, connection, other, third, nursery, queue, send, well
):
    await queue(key_limit=2)
    await ask("select notifyq.send('q', key => (i % 3)::text) from generate_series(1, 30) i")
    await rows(third, "begin isolation level repeatable read")
    await rows(third, "select from notifyq.queue")
    work = """
        do $$
        declare
            started bigint[];
            most bigint;
        begin
            for i in 1..100 loop
                perform notifyq.send('q', key => ((i + s) % 3)::text) from generate_series(0, 1) s;
                commit;
                started := array(select id from notifyq.claim('q', 2));
                commit;
                select max(k.number) into most from (select count(*) as number from notifyq.active group by key) k;
                assert coalesce(most, 0) <= 2, most;
                perform notifyq.complete(started);
                commit;
            end loop;
        end
        $$
    """
    calls = [Call(session, work) for session in (connection, other)]
    for call in calls:
        nursery.start_soon(call.run)
    for call in calls:
        await call.through.wait()
        await call.answer()
    assert (await ask("select generation > 2 from notifyq.gate")) == [(True,)]
    await rows(third, "rollback")
    await well()


# maintenance


async def test_maintenance_that_waits_for_a_gate_does_not_keep_its_holder_from_the_archive(
    ask, connection, other, nursery, queue, send, claim
):
    await queue(policy="ordered", retry_limit=0, retention=None)
    [head] = await send("failed")
    assert await claim() == [head]
    await ask("select notifyq.fail(%s, 'x')", head)
    await ask("select notifyq.update_queue('q', '{\"retention\": 86400}')")
    await ask("update notifyq.archive set finished_at = now() - interval '2 days'")
    [job] = await send("k")
    async with connection.transaction():
        assert await claim() == [job]
        call = Call(other, "select notifyq.maintain()")
        nursery.start_soon(call.run)
        await until_waiting_for(connection, other, connection)
        await ask("set local lock_timeout = '1 s'")
        assert await ask(complete(job)) == [([job],)]
    assert await call.answer() == [(False,)]
    assert await ask("select id from notifyq.archive") == [(job,)]
    assert await ask("select count(*) > 0 from pg_inherits where inhrelid::regclass::text ~ 'archive_[0-9]'") == [
        (True,)
    ]


# the order of a key


KEPT = {
    "ordered": {"policy": "ordered"},
    "singleton": {"policy": "singleton"},
    "key_limit": {"key_limit": 3},
    "key_limit_and_active_limit": {"key_limit": 3, "active_limit": 5},
    "rate": {"key_limit": 3, "rate_limit": 20, "rate_period": 0.05},
    "ordered_key_rate": {"policy": "ordered", "key_rate_limit": 3, "key_rate_period": 0.05},
}


@pytest.mark.parametrize("rule", KEPT.values(), ids=KEPT.keys())
async def test_jobs_of_a_key_begin_in_the_order_in_which_they_were_sent(ask, dsn, queue, well, rule):
    """Sent alone or together, claimed by whomever and however many at a time."""
    await queue(**rule)
    random = Random(0)
    begun: dict[str, list[int]] = {}
    sent = 0
    all_sent = trio.Event()

    async def send(session: TrioConnection) -> None:
        nonlocal sent
        for _ in range(40):
            keys = random.choices("abcdefgh", weights=[20, 5, 1, 1, 1, 1, 1, 1], k=random.choice([1, 1, 1, 5]))
            if len(keys) == 1:
                await rows(session, "select notifyq.send('q', key => %s)", keys[0])
            else:
                await rows(session, "select notifyq.send_many('q', %s)", json.dumps([{"key": key} for key in keys]))
            sent += len(keys)
        all_sent.set()

    async def work(session: TrioConnection) -> None:
        while not all_sent.is_set() or sum(map(len, begun.values())) < sent:
            # What it brings is noted in the claim's transaction: who holds the gate is alone in that.
            async with session.transaction():
                claimed = await rows(session, "select id, key from notifyq.claim('q', %s)", random.randint(1, 7))
                for id, key in claimed:
                    begun.setdefault(key, []).append(id)
            await rows(session, complete(*sorted(id for id, _ in claimed)))

    sender, *workers = [await open_connection(dsn) for _ in range(4)]
    with trio.fail_after(50):
        async with trio.open_nursery() as nursery:
            for session in workers:
                nursery.start_soon(work, session)
            await send(sender)
    for session in (sender, *workers):
        await session.close()
    assert {key: sorted(order) for key, order in begun.items()} == begun
    await well()

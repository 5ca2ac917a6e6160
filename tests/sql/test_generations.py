"""Keys that are renewed: nothing about them changes, and what is dead of them is not read.

While a snapshot is held open nothing dead is vacuumed, and each start and end of a job leaves a dead row of its key.
"""

from __future__ import annotations

import json
from random import Random
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from notifyq._opening import open_connection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from notifyq._connection import TrioConnection

RULES = [
    {"policy": "singleton"},
    {"key_limit": 2},
    {"key_limit": 2, "active_limit": 5},
    {"policy": "ordered", "retry_limit": 1},
    {"policy": "stately", "retry_limit": 1},
    {"fair": True, "key_limit": 2},
    {"fair": True, "key_rate_limit": 3, "key_rate_period": 3600},
    {"key_rate_limit": 3, "key_rate_period": 3600},
    {"policy": "ordered", "key_rate_limit": 3, "key_rate_period": 3600},
]
RENEW = "select notifyq.lock_gate(q.number), notifyq.renew_keys(q) from notifyq.queue q where q.name = %s"
GENERATION = "select generation from notifyq.gate"
BLOCKED = "select job, number, queue, attempt, priority, key from notifyq.blocked order by job"
KEYS = "select key, held, head, turn, starts, counts from notifyq.key order by queue, key"


@pytest.fixture
async def snapshot(dsn: str) -> AsyncIterator[TrioConnection]:
    """A session that holds a snapshot open."""
    connection = await open_connection(dsn)
    await connection.execute(b"begin isolation level repeatable read")
    await connection.execute(b"select from notifyq.queue")
    yield connection
    await connection.close()


def named(rules: dict[str, Any]) -> str:
    return "-".join(str(value) for value in rules.values())


def starts_and_ends(times: int, jobs: int = 1) -> str:
    """Starts and ends as many jobs so often, each time in transactions of their own."""
    return f"""
        do $$
        declare
            started bigint[];
        begin
            for i in 1..{times} loop
                perform notifyq.send('q', key => k::text) from generate_series(1, {jobs}) k;
                commit;
                started := array(select id from notifyq.claim('q', {jobs}));
                commit;
                perform notifyq.complete(started);
                commit;
            end loop;
        end
        $$
    """


@pytest.fixture
def pages(ask):
    async def pages() -> int:
        """How many pages a look at one key reads, if it is for a key of the generation that counts."""
        [(plan,)] = await ask(
            "explain (analyze, buffers, format json) select from notifyq.key k, notifyq.gate g where g.queue = k.queue"
            f" and k.queue = {await number()} and k.generation = ({GENERATION}) and k.key = '1'"
        )
        return plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"]

    async def number() -> int:
        [(number,)] = await ask("select number from notifyq.queue where name = 'q'")
        return number

    return pages


@pytest.mark.parametrize("rules", RULES, ids=named)
async def test_what_is_renewed_at_every_step_goes_the_same_way(ask, rules):
    """The same is done to a queue whose keys are renewed before each step, and to one where they never are."""

    async def way(name: str, *, renewed: bool) -> list:
        await ask("select notifyq.create_queue(%s, %s)", name, json.dumps({"retry_delay": 0, **rules}))
        random = Random(7)
        jobs: list[int] = []
        active: list[int] = []
        seen: list = []
        for _ in range(60):
            if renewed:
                await ask(RENEW, name)
            step = random.choice(["send", "send", "claim", "claim", "complete", "fail", "cancel", "promote"])
            job = random.choice(active) if active and step in ("complete", "fail") else None
            if step == "send":
                for key in random.choices("abcd", k=3):
                    jobs += [id for (id,) in await ask("select notifyq.send(%s, key => %s)", name, key) if id]
            elif step == "claim":
                how_many = random.randint(1, 4)
                claimed = [id for (id,) in await ask("select id from notifyq.claim(%s, %s)", name, how_many)]
                active += claimed
                seen.append([jobs.index(id) for id in claimed])
            elif step == "cancel":
                await ask("select notifyq.cancel(array[%s::bigint])", random.choice(jobs or [0]))
                still = "select job from notifyq.active where job = any (%s) order by job"
                active = [id for (id,) in await ask(still, active)]
            elif step == "promote":
                await ask("update notifyq.scheduled set due_at = now()")
                await ask("select notifyq.promote(number) from notifyq.queue where name = %s", name)
            elif job:
                active.remove(job)
                await ask(f"select notifyq.{'complete(%s)' if step == 'complete' else 'fail(%s, $$x$$)'}", job)
            held = await ask(
                "select k.key, k.held, k.head, k.turn, k.counts from notifyq.key k join notifyq.queue q"
                " on q.number = k.queue where q.name = %s order by k.key",
                name,
            )
            seen.append(
                [
                    (key, n, head and jobs.index(head), turn and jobs.index(turn), sum(counts or ()))
                    for key, n, head, turn, counts in held
                ]
            )
            seen.append(
                [
                    (key, blocked, [jobs.index(id) for id in by])
                    for key, blocked, by in await ask(
                        "select key, blocked, held_by from notifyq.blocked_keys where queue = %s order by key", name
                    )
                ]
            )
        return seen

    assert await way("renewed", renewed=True) == await way("still", renewed=False)
    generations = "select g.generation from notifyq.gate g join notifyq.queue q on q.number = g.queue order by q.name"
    assert await ask(generations) == [(60,), (0,)]


async def test_keys_are_what_they_were_when_they_are_renewed(ask):
    await ask(
        """select notifyq.create_queue('q', '{"policy": "ordered", "key_rate_limit": 2, "key_rate_period": 60}')"""
    )
    await ask("""select notifyq.create_queue('other', '{"key_limit": 1}')""")
    await ask("select notifyq.send(q, key => k) from unnest('{q,other}'::text[]) q, unnest('{a,a,b,c}'::text[]) k")
    await ask("select notifyq.claim(q, 9) from unnest('{q,other}'::text[]) q")
    keys, blocked = await ask(KEYS), await ask(BLOCKED)
    assert len(keys) == 6
    assert len(blocked) == 2
    await ask(RENEW, "q")
    assert (await ask(KEYS), await ask(BLOCKED)) == (keys, blocked)
    generations = (
        "select distinct q.name, g.generation, k.generation, b.generation, g.moved from notifyq.queue q"
        " join notifyq.gate g on g.queue = q.number join notifyq.key k on k.queue = q.number"
        " join notifyq.blocked b on b.queue = q.number order by 1"
    )
    assert await ask(generations) == [("other", 0, 0, 0, 0), ("q", 1, 1, 1, 4)]


@pytest.mark.parametrize(
    ("rules", "times"),
    [
        ({"key_limit": 1}, 150),
        ({"fair": True, "key_limit": 1}, 150),
        ({"policy": "ordered"}, 150),
        ({"key_rate_limit": 10_000, "key_rate_period": 3600}, 1500),
    ],
    ids=["key_limit", "fair", "ordered", "rate"],
)
async def test_dead_rows_of_keys_are_not_read_again_and_again(ask, snapshot, pages, rules, times):
    await ask("select notifyq.create_queue('q', %s)", json.dumps(rules))
    await ask(starts_and_ends(times, jobs=2))
    [(generation,)] = await ask(GENERATION)
    assert 0 < generation <= times / 5
    assert await pages() < 40


@pytest.mark.parametrize("call", ["lock_gates('{}')", "leave_waiting('{}')", "expire()"])
async def test_what_is_done_about_no_job_reads_none(ask, snapshot, call):
    """The smallest index of all jobs, whatever it is of, would be read: see lock_gates()."""
    await ask("select notifyq.create_queue('q')")
    await ask("select notifyq.send('q', key => 'k') from generate_series(1, 3000)")
    await ask("select notifyq.complete(array(select id from notifyq.claim('q', 3000)))")
    await ask("analyze notifyq.job")
    for _ in range(2):  # the first time looks at what the catalogue says, too
        [(plan,)] = await ask(f"explain (analyze, buffers, format json) select notifyq.{call}")
    assert plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"] < 20


async def test_keys_that_can_be_vacuumed_are_not_renewed(ask):
    await ask("""select notifyq.create_queue('q', '{"key_limit": 1}')""")
    await ask(starts_and_ends(150, jobs=2))
    assert await ask(GENERATION) == [(0,)]


async def test_one_busy_key_among_many_has_them_renewed_more_rarely(ask, snapshot):
    await ask("""select notifyq.create_queue('q', '{"key_limit": 2}')""")
    await ask("select notifyq.send('q', key => 'idle ' || k) from generate_series(1, 2000) k")
    await ask("select count(*) from notifyq.claim('q', 2000)")
    await ask(starts_and_ends(100))
    assert await ask("select generation, moved from notifyq.gate") == [(1, 2000)]


async def test_too_many_keys_are_left_where_they_are(ask):
    await ask("""select notifyq.create_queue('q', '{"key_limit": 2}')""")
    await ask("select notifyq.lock_gate(number) from notifyq.queue where name = 'q'")
    await ask(
        "insert into notifyq.key (queue, key, held) select q.number, i, 1 from notifyq.queue q, generate_series(1, 10001) i"
    )
    await ask(RENEW, "q")
    assert await ask("select generation, moved from notifyq.gate") == [(0, 40_000)]
    assert await ask("select distinct generation from notifyq.key") == [(0,)]
    await ask("delete from notifyq.key where key = '1'")
    await ask(RENEW, "q")
    assert await ask("select generation, moved from notifyq.gate") == [(1, 10_000)]


async def test_too_much_that_is_blocked_is_left_where_it_is(ask):
    await ask("""select notifyq.create_queue('q', '{"key_limit": 1}')""")
    await ask("select notifyq.send('q', key => 'a') from generate_series(1, 10001) i")
    while await ask("select notifyq.claim('q', 2000)"):
        pass
    assert await ask("select count(*) from notifyq.blocked where generation = 0") == [(10_000,)]
    await ask(RENEW, "q")
    assert await ask("select generation, moved from notifyq.gate") == [(0, 40_000)]
    assert await ask("select distinct generation from notifyq.blocked") == [(0,)]
    await ask("select notifyq.cancel(job) from (select job from notifyq.blocked limit 1) b")
    await ask(RENEW, "q")
    assert await ask("select generation, moved from notifyq.gate") == [(1, 10_000)]


async def test_what_is_blocked_and_locked_by_somebody_is_not_waited_for_but_keeps_all_where_it_is(ask, other):
    await ask("""select notifyq.create_queue('q', '{"key_limit": 1}')""")
    await ask("select notifyq.send('q', key => 'a') from generate_series(1, 3) i")
    await ask("select notifyq.claim('q', 3)")
    async with other.transaction():
        await other.execute(b"select from notifyq.blocked order by job limit 1 for update")
        await ask("set lock_timeout = '5 s'")
        await ask(RENEW, "q")
    assert await ask("select g.generation, b.generation from notifyq.gate g, notifyq.blocked b") == [(0, 0)] * 2
    await ask(RENEW, "q")
    assert await ask("select g.generation, b.generation from notifyq.gate g, notifyq.blocked b") == [(1, 1)] * 2


@pytest.mark.parametrize(
    "rules",
    [
        {"key_limit": 1},
        {"fair": True, "key_limit": 1},
        {"fair": True, "key_rate_limit": 10_000, "key_rate_period": 3600},
    ],
    ids=["key_limit", "fair", "rate"],
)
async def test_what_was_blocked_is_not_read_again_and_again(ask, snapshot, rules):
    """Each round blocks two of three jobs of a key."""
    await ask("select notifyq.create_queue('q', %s)", json.dumps(rules))
    await ask(
        """
        do $$
        declare
            started bigint[];
        begin
            for i in 1..150 loop
                perform notifyq.send('q', key => 'a') from generate_series(1, 3);
                commit;
                loop
                    started := array(select id from notifyq.claim('q', 1));
                    commit;
                    exit when started = '{}';
                    perform notifyq.claim('q', 2);
                    perform notifyq.complete(started);
                    commit;
                end loop;
            end loop;
        end
        $$
        """
    )
    [(generation,)] = await ask(GENERATION)
    assert 0 < generation <= 100
    [(plan,)] = await ask(
        "explain (analyze, buffers, format json) select from notifyq.blocked b, notifyq.gate g, notifyq.queue q"
        " where q.name = 'q' and g.queue = q.number and b.queue = g.queue and b.key = 'a' and b.parents = 0"
        f" and b.generation = ({GENERATION})"
    )
    assert plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"] < 40


async def test_an_old_snapshot_renews_no_keys_since_it_could_not_see_all(ask, snapshot, other):
    await ask("""select notifyq.create_queue('q', '{"key_limit": 2}')""")
    await ask("select notifyq.send('q', key => 'a')")
    await ask("select notifyq.claim('q')")
    worn = "select notifyq.lock_gate(q.number), notifyq.renew_worn_keys(q, 1000, 1) from notifyq.queue q"
    for level, generation in (("repeatable read", 0), ("serializable", 0), ("read committed", 1)):
        async with other.transaction():
            await other.execute(f"set transaction isolation level {level}".encode())
            await other.execute(worn.encode())
        assert await ask(GENERATION) == [(generation,)]


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_who_sees_the_keys_of_a_generation_before_writes_none(ask, other, level):
    await ask("""select notifyq.create_queue('q', '{"key_limit": 2}')""")
    [(job,)] = await ask("select notifyq.send('q', key => 'a')")
    await ask("select notifyq.claim('q')")
    await other.execute(f"begin isolation level {level}".encode())
    await other.execute(b"select from notifyq.queue")
    await ask(RENEW, "q")
    with pytest.raises(psycopg.errors.SerializationFailure):
        await other.execute(b"select notifyq.complete(%s)", (job,))
    await other.execute(b"rollback")
    assert await ask("select key, held from notifyq.key") == [("a", 1)]
    assert await ask("select notifyq.complete(%s)", job) == [(True,)]
    assert await ask("select 1 from notifyq.key") == []


async def test_a_deleted_queue_leaves_no_generation(ask):
    await ask("""select notifyq.create_queue('q', '{"key_limit": 2}')""")
    await ask("select notifyq.send('q', key => 'a')")
    await ask("select notifyq.claim('q')")
    await ask(RENEW, "q")
    await ask("select notifyq.delete_queue('q')")
    assert await ask("select 1 from notifyq.key") == await ask("select 1 from notifyq.gate") == []

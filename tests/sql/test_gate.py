"""Keys, policies, limits, rates and turns, from SQL alone."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest


class Line:
    """A queue and what is done to it."""

    def __init__(self, ask: Any) -> None:
        self.ask = ask

    async def send(self, *keys: str | None, **options: Any) -> list[int]:
        return [(await self.try_send(key, **options))[0] for key in keys]

    async def try_send(self, key: str | None = None, **options: Any) -> tuple[int, bool]:
        named = ", ".join(f"{name} => %s" for name in options)
        call = f"select id, created from notifyq.try_send('q', key => %s{', ' * bool(named)}{named})"
        [row] = await self.ask(call, key, *options.values())
        return row

    async def send_many(self, *jobs: dict[str, Any]) -> list[int]:
        rows = await self.ask("select id from notifyq.send_many('q', %s)", json.dumps(jobs))
        return [id for (id,) in rows]

    async def claim(self, how_many: int = 10, **options: Any) -> list[int]:
        named = "".join(f", {name} => %s" for name in options)
        rows = await self.ask(f"select id from notifyq.claim('q', %s{named})", how_many, *options.values())
        return [id for (id,) in rows]

    async def complete(self, *jobs: int) -> None:
        for job in jobs:
            assert await self.ask("select notifyq.complete(%s)", job) == [(True,)]

    async def state(self, job: int) -> str:
        [(state,)] = await self.ask("select state from notifyq.jobs where id = %s", job)
        return state

    async def states(self, *jobs: int) -> list[str]:
        return [await self.state(job) for job in jobs]


@pytest.fixture
def line(ask):
    async def line(**options: Any) -> Line:
        await ask("select notifyq.create_queue('q', %s)", json.dumps({"retry_delay": 0, **options}))
        return Line(ask)

    return line


async def test_a_singleton_key_has_one_active_job_and_holds_back_no_other_key(line):
    q = await line(policy="singleton")
    a, b, other, c = await q.send("k", "k", "other", "k")
    assert await q.claim() == [a, other]
    assert await q.claim() == []
    assert await q.states(a, b, c) == ["active", "blocked", "blocked"]
    assert await q.ask("select queue, key, blocked, held_by from notifyq.blocked_keys") == [("q", "k", 2, [a])]
    await q.complete(a)
    assert await q.states(b, c) == ["ready", "blocked"]
    assert await q.claim() == [b]
    await q.complete(b)
    assert await q.claim() == [c]
    await q.complete(c, other)
    assert await q.ask("select count(*) from notifyq.key") == [(0,)]


async def test_jobs_without_a_key_have_one_common_key(line):
    q = await line(policy="singleton")
    a, b = await q.send(None, None)
    assert await q.claim() == [a]
    await q.complete(a)
    assert await q.claim() == [b]


async def test_a_key_limit_counts_the_active_jobs_of_a_key(line):
    q = await line(key_limit=2)
    jobs = await q.send(*"aaaab")
    assert await q.claim() == [jobs[0], jobs[1], jobs[4]]
    await q.complete(jobs[1])
    assert await q.claim() == [jobs[2]]
    await q.complete(jobs[0], jobs[2])
    assert await q.claim() == [jobs[3]]


@pytest.mark.parametrize("number", [1, 2, 3, 5])
async def test_a_bulk_send_of_one_key_blocks_what_is_behind_the_limit(line, number):
    q = await line(key_limit=2)
    jobs = await q.send_many(*[{"data": n, "key": "k"} for n in range(number)])
    assert await q.states(*jobs) == ["ready"] * min(number, 2) + ["blocked"] * (number - 2)
    done = []
    while claimed := await q.claim():
        assert len(claimed) <= 2
        done += claimed
        await q.complete(*claimed)
    assert done == jobs


@pytest.mark.parametrize(
    "ending",
    ["cancel({})", "delete({})", "fail({}, 'x', final => true)", "fail({}, 'x', retry_in => '1 hour')", "complete({})"],
)
@pytest.mark.parametrize("policy", [{"policy": "singleton"}, {"key_limit": 1}])
async def test_whatever_takes_an_active_job_away_lets_the_next_of_its_key_start(line, policy, ending):
    q = await line(**policy)
    a, b = await q.send("k", "k")
    assert await q.claim() == [a]
    await q.ask(f"select notifyq.{ending.format(a)}")
    assert await q.claim() == [b]


@pytest.mark.parametrize("ending", ["snooze(array[{}], array['1 hour'::interval])", "release(array[{}])"])
async def test_a_job_that_goes_back_unstarted_gives_its_slot_back(line, ending):
    q = await line(policy="singleton")
    a, b = await q.send("k", "k")
    assert await q.claim() == [a]
    await q.ask(f"select notifyq.{ending.format(a)}")
    assert await q.claim() == ([a] if "release" in ending else [b])


async def test_a_rescued_job_gives_its_slot_back_and_comes_first_again(line):
    q = await line(policy="singleton")
    a, b = await q.send("k", "k")
    assert await q.claim() == [a]
    assert await q.claim() == []
    await q.ask("update notifyq.active set deadline = now() - interval '1 s'")
    assert await q.ask("select * from notifyq.rescue()") == [(a, "ready")]
    assert await q.claim() == [a]
    await q.complete(a)
    assert await q.claim() == [b]


@pytest.mark.parametrize("leaving", ["cancel({})", "delete({})", "update_job({}, delay => '1 hour')"])
async def test_a_job_that_leaves_the_line_before_it_starts_leaves_its_place_to_the_next(line, leaving):
    q = await line(policy="singleton")
    a, b, c = await q.send("k", "k", "k")
    assert await q.claim() == [a]
    assert await q.claim() == []
    await q.complete(a)
    assert await q.states(b, c) == ["ready", "blocked"]
    await q.ask(f"select notifyq.{leaving.format(b)}")
    assert await q.claim() == [c]


async def test_an_expired_job_holds_no_slot(line):
    q = await line(policy="singleton")
    a = (await q.try_send("k", expire_in="1 hour"))[0]
    [b] = await q.send("k")
    await q.ask("update notifyq.job set expires_at = now() - interval '1 s' where id = %s", a)
    assert await q.claim() == [b]
    assert await q.state(a) == "failed"


async def test_priority_is_kept_within_a_key_and_between_keys(line):
    q = await line(policy="singleton")
    [low] = await q.send("k")
    assert await q.claim() == [low]
    ids = [(await q.try_send("k", priority=p))[0] for p in (1, 5, 3)]
    assert await q.claim() == []
    order = []
    running = low
    for _ in ids:
        await q.complete(running)
        [running] = await q.claim()
        order.append(running)
    assert order == [ids[1], ids[2], ids[0]]


async def test_short_lets_one_job_of_a_key_wait(line):
    q = await line(policy="short")
    first = await q.try_send("k")
    assert first[1]
    assert await q.try_send("k") == (first[0], False)
    assert (await q.try_send("other"))[1]
    assert len(await q.claim()) == 2
    second = await q.try_send("k")
    assert second[1]
    assert await q.claim() == [second[0]]
    third = await q.try_send("k")
    assert third[1]
    await q.ask("select notifyq.cancel(%s)", third[0])
    assert (await q.try_send("k"))[1]


async def test_exclusive_lets_one_job_of_a_key_wait_or_be_active(line):
    q = await line(policy="exclusive")
    first = await q.try_send("k")
    assert await q.try_send("k") == (first[0], False)
    assert await q.claim() == [first[0]]
    assert await q.try_send("k") == (first[0], False)
    await q.ask("select notifyq.fail(%s, 'x')", first[0])
    assert await q.try_send("k") == (first[0], False)
    assert await q.claim() == [first[0]]
    await q.complete(first[0])
    assert (await q.try_send("k"))[1]


@pytest.mark.parametrize("ending", ["cancel({})", "delete({})"])
async def test_an_exclusive_job_that_never_starts_gives_its_key_back(line, ending):
    q = await line(policy="exclusive")
    first, _ = await q.try_send("k")
    await q.ask(f"select notifyq.{ending.format(first)}")
    assert (await q.try_send("k"))[1]
    assert await q.ask("select count(*) from notifyq.reserved") == [(1,)]


async def test_a_failed_exclusive_job_is_retried_only_while_nobody_has_its_key(line):
    q = await line(policy="exclusive", retry_limit=0)
    first, _ = await q.try_send("k")
    await q.claim()
    await q.ask("select notifyq.fail(%s, 'x')", first)
    second, created = await q.try_send("k")
    assert created
    assert await q.ask("select notifyq.retry(%s)", first) == [(False,)]
    await q.ask("select notifyq.cancel(%s)", second)
    assert await q.ask("select notifyq.retry(%s)", first) == [(True,)]
    assert await q.try_send("k") == (first, False)


async def test_stately_has_one_waiting_and_one_active_and_a_retrying_one_keeps_the_key(line):
    q = await line(policy="stately", retry_limit=1)
    a, _ = await q.try_send("k")
    assert await q.try_send("k") == (a, False)
    assert await q.claim() == [a]
    b, created = await q.try_send("k")
    assert created
    assert await q.try_send("k") == (b, False)
    assert await q.claim() == []
    await q.ask("select notifyq.fail(%s, 'x', retry_in => '1 hour')", a)
    assert await q.claim() == []
    await q.ask("select notifyq.update_job(%s, delay => '0')", a)
    assert await q.claim() == [a]
    await q.ask("select notifyq.fail(%s, 'x')", a)
    assert await q.claim() == [b]


async def test_ordered_needs_a_key(line):
    q = await line(policy="ordered")
    with pytest.raises(psycopg.Error, match="ordered by key, and this job has none"):
        await q.try_send(None)
    with pytest.raises(psycopg.Error, match="ordered by key"):
        await q.send_many({"data": 1})


async def test_an_active_retrying_or_failed_head_holds_back_its_key_alone(line):
    q = await line(policy="ordered", retry_limit=1)
    a, b, other = await q.send("k", "k", "other")
    assert await q.claim() == [a, other]
    assert await q.claim() == []
    await q.ask("select notifyq.fail(%s, 'x', retry_in => '1 hour')", a)
    assert await q.claim() == []
    await q.ask("select notifyq.update_job(%s, delay => '0')", a)
    assert await q.claim() == [a]
    await q.ask("select notifyq.fail(%s, 'x')", a)
    assert await q.claim() == []
    assert await q.ask("select held_by from notifyq.blocked_keys") == [([a],)]
    assert await q.ask("select notifyq.retry(%s)", a) == [(True,)]
    assert await q.claim() == [a]
    await q.complete(a)
    assert await q.claim() == [b]


@pytest.mark.parametrize("freeing", ["select notifyq.delete({})", "select notifyq.delete_all('q', 'failed')"])
async def test_deleting_the_failed_head_of_an_ordered_key_frees_it(line, freeing):
    q = await line(policy="ordered", retry_limit=0)
    a, b = await q.send("k", "k")
    assert await q.claim() == [a]
    await q.ask("select notifyq.fail(%s, 'x')", a)
    assert await q.claim() == []
    await q.ask(freeing.format(a))
    assert await q.claim() == [b]


async def test_a_failed_head_that_is_not_kept_frees_its_key_at_once(line):
    q = await line(policy="ordered", retry_limit=0, retention=0)
    a, b, c = await q.send("k", "k", "k")
    assert await q.claim() == [a]
    assert await q.claim() == []
    await q.ask("select notifyq.fail(%s, 'x')", a)
    assert await q.claim() == [b]
    assert await q.claim() == []
    await q.ask("select notifyq.fail(%s, 'x')", b)
    assert await q.claim() == [c]


@pytest.mark.parametrize("options", [{"policy": "singleton"}, {"policy": "ordered"}, {"key_limit": 1}])
async def test_deleting_all_of_one_state_leaves_what_comes_to_stand_there_meanwhile(line, options):
    q = await line(**options)
    jobs = await q.send(*"kkkkk")
    assert await q.claim() == jobs[:1]
    await q.complete(jobs[0])
    assert await q.states(*jobs[1:]) == ["ready", "blocked", "blocked", "blocked"]
    assert await q.ask("select notifyq.delete_all('q', 'ready')") == [(1,)]
    assert await q.claim() == jobs[2:3]
    assert await q.ask("select notifyq.delete_all('q', 'active')") == [(1,)]
    assert await q.states(*jobs[3:]) == ["ready", "blocked"]
    assert await q.ask("select notifyq.delete_all('q', 'waiting')") == [(2,)]


@pytest.mark.parametrize("policy", ["short", "stately", "exclusive"])
async def test_a_retry_is_refused_while_the_policy_has_its_key_taken(line, policy):
    q = await line(policy=policy, retry_limit=0)
    [a] = await q.send("k")
    assert await q.claim() == [a]
    await q.ask("select notifyq.fail(%s, 'x')", a)
    [b] = await q.send("k")
    assert await q.ask("select notifyq.retry(%s)", a) == [(False,)]
    assert await q.claim() == [b]
    await q.complete(b)
    assert await q.ask("select notifyq.retry(%s)", a) == [(True,)]
    assert await q.ask("select created from notifyq.try_send('q', key => 'k')") == [(False,)]
    assert await q.claim() == [a]


async def test_a_dead_letter_whose_key_is_taken_does_not_keep_others_from_being_redriven(ask, line):
    await ask("select notifyq.create_queue('dead')")
    q = await line(policy="exclusive", retry_limit=0, dead_letter="dead")
    await q.send("a", "b")
    for job in await q.claim():
        await q.ask("select notifyq.fail(%s, 'x')", job)
    await q.send("a")
    [(first,), (second,)] = await q.ask("select id from notifyq.jobs where queue = 'dead' order by id")
    for preview in (True, False):
        redriven = await q.ask("select id from notifyq.redrive('dead', how_many => 1, preview => %s)", preview)
        assert redriven == [(second,)]
    assert await q.ask("select id from notifyq.redrive('dead')") == []
    assert await q.ask("select id from notifyq.jobs where queue = 'dead'") == [(first,)]


async def test_a_child_that_was_cancelled_and_taken_back_does_not_wait_for_its_parent(ask, line):
    q = await line(key_limit=1)
    [holder] = await q.send("k")
    assert await q.claim() == [holder]
    flow = '[{"name": "a", "queue": "parents"}, {"name": "b", "queue": "q", "key": "k", "after": ["a"]}]'
    await ask("select notifyq.create_queue('parents')")
    _, (_, child) = await ask("select * from notifyq.send_flow(%s)", flow)
    assert await ask("select notifyq.cancel(%s), notifyq.resume(%s)", child, child) == [(True, True)]
    assert await q.claim() == []
    assert await q.states(child) == ["blocked"]
    await ask("select notifyq.complete(id) from notifyq.claim('parents')")
    await q.complete(holder)
    assert await q.claim() == [child]


@pytest.mark.parametrize("policy", ["standard", "exclusive"])
async def test_what_comes_after_a_dead_letter_comes_after_what_it_was_redriven_as(ask, line, policy):
    await ask("select notifyq.create_queue('dead', %s)", json.dumps({"policy": policy, "retry_limit": 0}))
    q = await line(retry_limit=0, dead_letter="dead")
    await q.send("k")
    for job in await q.claim():
        await q.ask("select notifyq.fail(%s, 'x')", job)
    [(dead,)] = await ask("select id from notifyq.claim('dead')")
    await ask("select notifyq.fail(%s, 'x', final => true)", dead)
    await ask("select notifyq.retry(%s)", dead)
    flow = json.dumps([{"name": "b", "queue": "q", "after": [dead]}])
    [(_, child)] = await ask("select * from notifyq.send_flow(%s)", flow)
    [(_, _, again)] = await ask("select * from notifyq.redrive('dead')")
    assert await q.claim() == [again]
    assert await q.states(child) == ["blocked"]
    await q.complete(again)
    assert await q.claim() == [child]
    assert await ask("select created from notifyq.try_send('dead')") == [(True,)]


@pytest.mark.parametrize("policy", ["ordered", "stately"])
async def test_another_period_of_a_rate_does_not_count_starts_as_of_its_own(ask, line, policy):
    q = await line(policy=policy, key_rate_limit=1, key_rate_period=1)
    [a] = await q.send("k")
    assert await q.claim() == [a]
    await ask("select notifyq.fail(%s, 'x', retry_in => '0')", a)
    await ask("""select notifyq.update_queue('q', '{"key_rate_period": 60}')""")
    assert await q.claim() == [a]
    await q.complete(a)
    [b] = await q.send("k")
    assert await q.claim() == []
    [(seconds,)] = await ask(
        "select extract(epoch from due_at - now())::float8 from notifyq.scheduled where job = %s", b
    )
    assert 0 < seconds < 62


async def test_without_ageing_blocked_jobs_have_their_priorities_again(ask, line):
    q = await line(key_limit=1, ageing=60)
    [a, b] = await q.send("k", "k")
    assert await q.claim() == [a]
    [(urgent,)] = await ask("select notifyq.send('q', key => 'k', priority => 9)")
    assert await q.claim() == []
    await ask("""select notifyq.update_queue('q', '{"ageing": null}')""")
    [(less,)] = await ask("select notifyq.send('q', key => 'k', priority => 2)")
    for job, following in ((a, urgent), (urgent, less), (less, b)):
        await q.complete(job)
        assert await q.claim() == [following]


async def test_an_ordered_queue_is_no_dead_letter_queue(ask, line):
    await line(policy="ordered")
    await ask("select notifyq.create_queue('dead'), notifyq.create_queue('other', '{\"dead_letter\": \"dead\"}')")
    for change in ("'other', '{\"dead_letter\": \"q\"}'", "'dead', '{\"policy\": \"ordered\"}'"):
        with pytest.raises(psycopg.Error, match=r"have no key|have none") as caught:
            await ask(f"select notifyq.update_queue({change})")
        assert caught.value.sqlstate == "NQ003"
    await ask("""select notifyq.update_queue('other', '{"dead_letter": null}')""")
    await ask("""select notifyq.update_queue('dead', '{"policy": "ordered"}')""")


async def test_a_failed_head_that_is_purged_frees_its_key(line):
    q = await line(policy="ordered", retry_limit=0, retention=None)
    a, b = await q.send("k", "k")
    assert await q.claim() == [a]
    await q.ask("select notifyq.fail(%s, 'x')", a)
    await q.ask("select notifyq.update_queue('q', '{\"retention\": 1}')")
    await q.ask("update notifyq.archive set finished_at = now() - interval '2 s'")
    assert await q.ask("select notifyq.purge()") == [(1,)]
    assert await q.claim() == [b]


async def test_a_delayed_job_of_an_ordered_key_takes_its_place_when_it_is_due(line):
    q = await line(policy="ordered")
    late, _ = await q.try_send("k", delay="1 hour")
    [now] = await q.send("k")
    assert await q.claim() == [now]
    await q.ask("update notifyq.scheduled set due_at = now() - interval '1 s'")
    assert await q.claim() == []
    await q.complete(now)
    assert await q.claim() == [late]


async def test_the_cancelled_retrying_head_frees_its_key(line):
    q = await line(policy="ordered")
    a, b = await q.send("k", "k")
    assert await q.claim() == [a]
    await q.ask("select notifyq.fail(%s, 'x', retry_in => '1 hour')", a)
    assert await q.claim() == []
    await q.ask("select notifyq.cancel(%s)", a)
    assert await q.claim() == [b]


async def test_an_active_limit_counts_the_active_jobs_of_the_queue(line):
    q = await line(active_limit=2)
    jobs = await q.send(*[None] * 5)
    assert await q.claim() == jobs[:2]
    assert await q.claim() == []
    assert await q.states(*jobs[2:]) == ["ready"] * 3
    await q.complete(jobs[0])
    assert await q.claim() == [jobs[2]]


@pytest.mark.parametrize(
    "options", [{}, {"key_limit": 5}, {"active_limit": 50}, {"rate_limit": 50, "rate_period": 60}, {"ageing": 60}]
)
async def test_a_claim_may_bring_so_many_of_a_key_and_steps_over_the_others(line, options):
    q = await line(**options)
    a = await q.send(*"a" * 30)
    b = await q.send(*"bb")
    [c] = await q.send(None)
    assert await q.claim(10, key_limit=2) == [*a[:2], *b, c]
    assert await q.claim(10, key_limit=2, at_work='{"a": 2}') == []
    assert await q.claim(10, key_limit=2, at_work='{"a": 1, "b": 3}') == a[2:3]
    assert await q.claim(2, key_limit=4, at_work='{"a": 2.0}') == a[3:5]
    assert await q.claim(3) == ([] if "key_limit" in options else a[5:8])


async def test_jobs_without_a_key_have_one_common_key_in_a_claim_of_so_many_of_a_key(line):
    q = await line()
    first, second, third = await q.send(None, None, None)
    assert await q.claim(key_limit=1) == [first]
    assert await q.claim(key_limit=1, at_work='{"": 1}') == []
    assert await q.claim(key_limit=2, at_work='{"": 1}') == [second]
    assert await q.claim() == [third]


async def test_the_smaller_of_both_limits_of_a_key_holds(line):
    q = await line(key_limit=2)
    a = await q.send(*"aaaa")
    assert await q.claim(key_limit=3) == a[:2]
    assert await q.states(*a) == ["active", "active", "blocked", "blocked"]
    await q.complete(a[0])
    assert await q.claim(key_limit=3, at_work='{"a": 3}') == []
    assert await q.claim(key_limit=3) == a[2:3]


async def test_a_key_has_its_turn_elsewhere_when_this_process_has_enough_of_it(line):
    q = await line(fair=True)
    a = await q.send(*"aaaa")
    b = await q.send(*"bbb")
    assert await q.claim(10, key_limit=2) == [a[0], b[0], a[1], b[1]]
    assert await q.claim(10, key_limit=2, at_work='{"a": 2, "b": 1}') == [b[2]]
    assert await q.claim(10, key_limit=2, at_work='{"a": 2}') == []
    assert await q.claim(10, key_limit=2) == a[2:]


async def test_an_ordered_key_keeps_its_order_when_a_claim_may_bring_so_many_of_a_key(line):
    q = await line(policy="ordered")
    a = await q.send(*"aa")
    b = await q.send(*"b")
    assert await q.claim(10, key_limit=1, at_work='{"a": 1}') == b
    assert await q.claim(10, key_limit=1) == a[:1]
    await q.complete(a[0])
    assert await q.claim(10, key_limit=1) == a[1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_limit": 0}, "key_limit must be 1 or more, not 0"),
        ({"key_limit": -1}, "key_limit must be 1 or more, not -1"),
        ({"key_limit": 1, "at_work": "[1]"}, "at_work must be an object"),
        ({"key_limit": 1, "at_work": '{"a": "x"}'}, "at_work must be an object"),
        ({"key_limit": 1, "at_work": '{"a": {"b": 1}}'}, "at_work must be an object"),
        *(({"key_limit": 1, "at_work": f'{{"a": {value}}}'}, "at_work must be an object") for value in ("1e400", "-1")),
    ],
)
async def test_a_limit_of_a_claim_that_cannot_be_is_refused_in_words(line, options, message):
    q = await line()
    [job] = await q.send(None)
    with pytest.raises(psycopg.Error, match=message) as raised:
        await q.claim(1, **options)
    assert raised.value.sqlstate == "NQ003"
    assert await q.state(job) == "ready"


async def test_a_rate_limits_starts_and_says_when_the_next_one_is(line, ask):
    q = await line(rate_limit=2, rate_period=60)
    jobs = await q.send(*[None] * 3)
    assert await q.claim() == jobs[:2]
    assert await q.claim() == []
    [(due,)] = await ask("select extract(epoch from notifyq.next_due(number) - now()) from notifyq.queue")
    assert 58 < due <= 61
    await q.complete(*jobs[:2])
    assert await q.claim() == []
    await ask("update notifyq.gate set starts = array[starts[1] - 101]")
    assert await q.claim() == [jobs[2]]


async def test_a_rate_by_key_lets_the_next_start_when_it_is_due_and_holds_back_no_other_key(line, ask):
    q = await line(key_rate_limit=2, key_rate_period=60)
    jobs = await q.send(*"aaaaab")
    assert await q.claim() == [jobs[0], jobs[1], jobs[5]]
    assert await q.states(*jobs[2:5]) == ["scheduled", "blocked", "blocked"]
    await q.complete(jobs[0])
    assert await q.claim() == []
    late = await q.send("a")
    assert await q.claim() == []
    assert await q.states(*jobs[2:5], *late) == ["scheduled", "blocked", "blocked", "blocked"]
    await ask("update notifyq.key set starts = array[starts[1] - 101] where key = 'a'")
    await ask("update notifyq.scheduled set due_at = now()")
    assert await q.claim() == [jobs[2], jobs[3]]
    assert await q.states(jobs[4], *late) == ["scheduled", "blocked"]


@pytest.mark.parametrize("promoted", [True, False])
async def test_what_waited_for_the_rate_of_an_ordered_key_comes_before_what_was_sent_later(line, ask, promoted):
    q = await line(policy="ordered", key_rate_limit=1, key_rate_period=60)
    a, b = await q.send("k", "k")
    others = await q.send(*[f"other {n}" for n in range(20)])  # more than a claim of one looks at
    [c] = await q.send("k")
    assert await q.claim(1) == [a]
    await q.complete(a)
    assert await q.claim(1) == others[:1]
    assert await q.states(b, c) == ["scheduled", "ready"]
    await ask("update notifyq.key set starts = array[starts[1] - 101] where key = 'k'")
    if promoted:
        await ask("update notifyq.scheduled set due_at = now()")
        assert await q.claim(30) == [b, *others[1:]]
    else:
        assert await q.claim(30) == others[1:]
        await ask("update notifyq.scheduled set due_at = now()")
        assert await q.claim(30) == [b]
    assert await q.state(c) == "blocked"


async def test_a_retrying_head_of_an_ordered_key_with_a_rate_keeps_its_key(line, ask):
    q = await line(policy="ordered", key_rate_limit=1, key_rate_period=60)
    a, b = await q.send("k", "k")
    assert await q.claim() == [a]
    await ask("update notifyq.key set starts = array[starts[1] - 101]")
    await ask("select notifyq.fail(%s, 'x', retry_in => '1 minute')", a)
    await ask("update notifyq.scheduled set due_at = now()")
    assert await q.claim() == [a]
    await q.complete(a)
    await ask("update notifyq.key set starts = array[starts[1] - 101]")
    await ask("update notifyq.scheduled set due_at = now()")
    assert await q.claim() == [b]


async def test_keys_of_a_fair_queue_take_turns(line):
    q = await line(fair=True)
    many = await q.send(*"a" * 50)
    [one] = await q.send("b")
    assert await q.claim(2) == [many[0], one]
    assert await q.claim(3) == many[1:4]
    two = await q.send("b", "b")
    order = [job for _ in range(4) for job in await q.claim(1)]
    assert sorted(order) == sorted([many[4], many[5], *two])
    assert await q.claim(100) == many[6:]


async def test_a_bulk_send_of_one_key_delays_no_other_key_of_a_fair_queue(line, ask):
    q = await line(fair=True)
    await q.send_many(*[{"key": "a"} for _ in range(1000)])
    assert await ask("select count(*) from notifyq.ready") == [(1,)]
    [one] = await q.send("b")
    assert one in await q.claim(2)


@pytest.mark.parametrize("delayed", [False, True])
async def test_single_sends_of_one_key_delay_no_other_key_of_a_fair_queue_however_many_they_are(line, ask, delayed):
    await line(fair=True)
    # More than one claim looks at.
    await ask(
        "select count(notifyq.send('q', key => 'a', delay => %s)) from generate_series(1, 6000)",
        "1 hour" if delayed else None,
    )
    for key in "bcd":
        await ask("select notifyq.send('q', key => %s, delay => %s)", key, "1 hour" if delayed else None)
    if delayed:
        await ask("update notifyq.scheduled set due_at = now()")
        while await ask("select notifyq.promote((select number from notifyq.queue where name = 'q'), 10000)") != [(0,)]:
            pass
    assert await ask("select key from notifyq.claim('q', 3)") == [("a",), ("b",), ("c",)]
    assert await ask("select key from notifyq.claim('q', 2)") == [("d",), ("a",)]


async def test_many_single_sends_of_one_key_get_one_turn_before_the_next_key(line, ask):
    q = await line(fair=True)
    many = await q.send(*"a" * 100)
    [one] = await q.send("b")
    assert await q.claim(1) == [many[0]]
    assert await q.claim(1) == [one]
    assert [await q.claim(1) for _ in range(3)] == [[job] for job in many[1:4]]
    assert await q.claim(100) == many[4:]


async def test_ageing_lets_a_low_priority_overtake_in_time(line, ask):
    q = await line(ageing=1)
    old, _ = await q.try_send(None, priority=0)
    new, _ = await q.try_send(None, priority=5)
    assert await ask("select job from notifyq.ready order by priority desc, number") == [(new,), (old,)]
    await ask("update notifyq.ready set number = number - 10 * 1000 * 1048576::bigint where job = %s", old)
    assert await q.claim() == [old, new]


@pytest.mark.parametrize(("before", "after"), [(1, None), (None, 1), (1, 60)])
async def test_a_line_keeps_its_order_when_ageing_is_set_or_unset(line, before, after):
    q = await line(ageing=before, key_limit=2)
    a = await q.send("a", "a", "a", "a")
    assert await q.claim(2) == a[:2]
    assert await q.claim() == []
    await q.ask("select notifyq.update_queue('q', %s)", json.dumps({"ageing": after}))
    [b] = await q.send("b")
    await q.ask("select notifyq.release(%s::bigint[])", a[:2])
    assert await q.claim() == [*a[:2], b]
    await q.complete(*a[:2])
    assert await q.claim() == a[2:]


async def test_a_throttle_makes_one_job_a_slot_and_names_it(line, ask):
    q = await line()
    first, created = await q.try_send("k", throttle="1 year")
    assert created
    assert await q.try_send("k", throttle="1 year") == (first, False)
    assert (await q.try_send("other", throttle="1 year"))[1]
    await q.claim()
    await q.complete(first)
    assert await q.try_send("k", throttle="1 year") == (first, False)
    await ask("update notifyq.reserved set slot = slot - 1")
    assert (await q.try_send("k", throttle="1 year"))[1]


async def test_a_debounce_makes_one_more_job_in_the_next_slot_with_the_latest_data(line, ask):
    q = await line()
    first, created = await q.try_send("k", debounce="1 year", data="1")
    second, also = await q.try_send("k", debounce="1 year", data="2")
    assert (created, also) == (True, True)
    assert await q.try_send("k", debounce="1 year", data="3") == (second, False)
    assert await q.states(first, second) == ["ready", "scheduled"]
    [(data, aligned)] = await ask(
        "select data, extract(epoch from due_at)::numeric %% extract(epoch from interval '1 year')::numeric = 0"
        " from notifyq.jobs where id = %s",
        second,
    )
    assert (data, aligned) == (3, True)


async def test_slots_that_have_passed_are_forgotten_in_batches(line, ask):
    q = await line()
    for key in "abc":
        await q.try_send(key, throttle="1 hour")
    await ask("update notifyq.reserved set until = until - interval '1 day' where key <> '3600:c'")
    assert [await ask("select notifyq.purge(1)") for _ in range(3)] == [[(1,)], [(1,)], [(0,)]]
    assert await ask("select key from notifyq.reserved") == [("3600:c",)]


POLICIES_OF_ONE = pytest.mark.parametrize("policy", ["short", "stately", "exclusive"])


@POLICIES_OF_ONE
async def test_a_debounced_send_that_a_policy_refuses_gives_its_data_to_the_debounced_job_that_waits(line, ask, policy):
    q = await line(policy=policy)
    first, _ = await q.try_send("k", debounce="1 year", data="1")
    assert await q.try_send("k", debounce="1 year", data="2") == (first, False)
    assert (
        await q.send_many({"key": "k", "debounce": "1 year", "data": 3}, {"key": "k", "debounce": "1 year"})
        == [first] * 2
    )
    assert await ask("select id, state, data from notifyq.jobs") == [(first, "ready", None)]
    assert await q.try_send("k", debounce="1 year", data="4", id_key="i") == (first, False)
    await ask("update notifyq.reserved set until = until - interval '1 year'")
    await ask("select notifyq.purge()")  # it waits for longer than its slot is remembered
    assert await q.try_send("k", debounce="1 year", data="5") == (first, False)
    assert await ask("select id, state, data from notifyq.jobs") == [(first, "ready", 5)]
    assert await ask("select 1 from notifyq.id_key") == []
    assert await q.claim() == [first]


@POLICIES_OF_ONE
async def test_a_debounced_job_that_waits_for_its_slot_keeps_its_time_when_a_policy_refuses_the_next(line, ask, policy):
    q = await line(policy=policy)
    first, _ = await q.try_send("k", debounce="1 year", data="1")
    await q.complete(*await q.claim())
    second, created = await q.try_send("k", debounce="1 year", data="2")
    assert (second != first, created) == (True, True)
    [before] = await ask("select due_at from notifyq.jobs where id = %s", second)
    assert await q.try_send("k", debounce="1 year", data="3") == (second, False)
    assert await ask("select data, due_at from notifyq.jobs where id = %s", second) == [(3, *before)]


@POLICIES_OF_ONE
async def test_only_a_job_that_is_debounced_as_long_gets_the_data_of_a_send_that_a_policy_refuses(line, ask, policy):
    q = await line(policy=policy)
    [plain] = await q.send("plain", data="1")
    other, _ = await q.try_send("other", debounce="1 hour", data="1")
    for key, job in (("plain", plain), ("other", other)):
        assert await q.try_send(key, debounce="1 year", data="2") == (job, False)
    assert await q.try_send("other", data="3") == (other, False)
    assert await ask("select data from notifyq.jobs") == [(1,), (1,)]


async def test_an_active_exclusive_job_is_not_edited_by_a_debounced_send(line, ask):
    q = await line(policy="exclusive")
    first, _ = await q.try_send("k", debounce="1 year", data="1")
    assert await q.claim() == [first]
    assert await q.try_send("k", debounce="1 year", data="2") == (first, False)
    assert await ask("select state, data from notifyq.jobs") == [("active", 1)]


async def test_refused_sends_leave_nothing_behind(line, ask):
    q = await line(policy="exclusive")
    first, _ = await q.try_send("k")
    assert await q.try_send("k", id_key="i") == (first, False)
    assert await ask("select count(*) from notifyq.id_key") == [(0,)]
    await q.try_send("t", throttle="1 year")
    await q.claim()
    await ask("select notifyq.delete_all('q', 'active')")
    assert (await q.try_send("t", throttle="1 year"))[1] is False
    assert await ask("select kind::text, count(*) from notifyq.reserved group by kind") == [("t", 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "fifo"}, "'fifo' is not a policy"),
        ({"key_limit": 0}, "queue q: key_limit must be 1 or more, not 0"),
        ({"active_limit": -1}, "queue q: active_limit must be 1 or more, not -1"),
        ({"rate_limit": 0, "rate_period": 1}, " rate_limit must be 1 or more, not 0"),
        ({"key_rate_limit": -1, "key_rate_period": 1}, "key_rate_limit must be 1 or more, not -1"),
        ({"rate_limit": 5}, "go together"),
        ({"key_rate_period": 5}, "go together"),
        ({"rate_limit": 5, "rate_period": 0}, " rate_period must be from 10 milliseconds to 1 year, not 00:00:00"),
        ({"rate_limit": 5, "rate_period": -1}, " rate_period must be from 10 milliseconds to 1 year, not -00:00:01"),
        ({"key_rate_limit": 5, "key_rate_period": 1e9}, "key_rate_period must be from 10 milliseconds to 1 year"),
        ({"policy": "singleton", "key_limit": 2}, "is a key_limit of 1"),
        ({"fair": True, "ageing": 1}, "exclude each other"),
        ({"policy": "ordered", "fair": True}, "ordered goes neither with fair nor with"),
        ({"policy": "ordered", "ageing": 1, "key_rate_limit": 1, "key_rate_period": 1}, "ordered goes neither with"),
        ({"ageing": 0}, "ageing must be from 1 millisecond to 1 day, not 00:00:00"),
    ],
)
async def test_rules_that_cannot_be_are_refused_in_words(line, ask, options, message):
    with pytest.raises(psycopg.Error, match=message) as caught:
        await line(**options)
    assert caught.value.sqlstate == "NQ003"
    assert await ask("select count(*) from notifyq.queue") == [(0,)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("throttle => '0'", "from 1 millisecond to a year"),
        ("debounce => '-1 s'", "from 1 millisecond to a year"),
        ("throttle => '2 years'", "from 1 millisecond to a year"),
        ("throttle => '1 s', debounce => '1 s'", "exclude each other"),
        ("debounce => '1 s', delay => '1 s'", "exclude each other"),
        ("key => repeat('x', 1001)", "key of 1001 bytes"),
    ],
)
async def test_bad_arguments_of_a_send_are_refused_in_words(line, ask, arguments, message):
    await line()
    with pytest.raises(psycopg.Error, match=message) as caught:
        await ask(f"select notifyq.send('q', {arguments})")
    assert caught.value.sqlstate == "NQ003"


async def test_the_policy_cannot_be_changed_while_jobs_stand(line, ask):
    q = await line()
    [job] = await q.send("k")
    with pytest.raises(psycopg.Error, match="the policy is standard while it has"):
        await ask("select notifyq.update_queue('q', '{\"policy\": \"ordered\"}')")
    await q.claim()
    await q.complete(job)
    await ask("select notifyq.update_queue('q', '{\"policy\": \"ordered\"}')")


@pytest.mark.parametrize("thing", ["schedule('q', every => '1 hour')", "subscribe('e', 'q')"])
async def test_what_sends_jobs_without_a_key_does_not_go_with_ordered(line, ask, thing):
    await line()
    await ask(f"select notifyq.{thing}")
    with pytest.raises(psycopg.Error, match="it has schedules or subscriptions") as caught:
        await ask("select notifyq.update_queue('q', '{\"policy\": \"ordered\"}')")
    assert caught.value.sqlstate == "NQ003"
    await ask("select notifyq.unschedule('q'), notifyq.unsubscribe('e', 'q')")
    await ask("select notifyq.update_queue('q', '{\"policy\": \"ordered\"}')")
    with pytest.raises(psycopg.Error, match=r"q is ordered by key, and the jobs of an? .* have none") as caught:
        await ask(f"select notifyq.{thing}")
    assert caught.value.sqlstate == "NQ003"
    assert await ask("select 1 from notifyq.schedules") == await ask("select 1 from notifyq.subscriptions") == []


async def test_limits_changed_while_jobs_stand_hold_from_then_on(line, ask):
    q = await line()
    jobs = await q.send(*"aaaaaa")
    assert await q.claim(2) == jobs[:2]
    await ask("select notifyq.update_queue('q', '{\"key_limit\": 3}')")
    assert await q.claim() == [jobs[2]]
    await ask("select notifyq.update_queue('q', '{\"key_limit\": 5}')")
    assert await q.claim() == jobs[3:5]
    await ask("select notifyq.update_queue('q', '{\"key_limit\": 2}')")
    await q.complete(*jobs[:3])
    assert await q.claim() == []
    await ask("select notifyq.update_queue('q', '{\"key_limit\": null}')")
    assert await q.claim() == [jobs[5]]


async def test_a_lowered_limit_does_not_stall_when_it_is_reached_again(line, ask):
    q = await line(key_limit=3)
    jobs = await q.send(*"aaaaaaa")
    assert await q.claim() == jobs[:3]
    await ask("select notifyq.update_queue('q', '{\"key_limit\": 1}')")
    assert await q.claim() == []
    await q.complete(*jobs[:3])
    for job in jobs[3:]:
        assert await q.claim() == [job]
        await q.complete(job)


async def test_redrive_leaves_what_an_exclusive_key_refuses(line, ask):
    await ask("select notifyq.create_queue('dead')")
    q = await line(policy="exclusive", retry_limit=0, dead_letter="dead")
    first, _ = await q.try_send("k")
    await q.claim()
    await ask("select notifyq.fail(%s, 'x')", first)
    second, _ = await q.try_send("k")
    assert await ask("select * from notifyq.redrive('dead')") == []
    await ask("select notifyq.cancel(%s)", second)
    [(_, queue, new)] = await ask("select * from notifyq.redrive('dead')")
    assert queue == "q"
    assert await q.try_send("k") == (new, False)


LATE = "update notifyq.job set expires_at = now() - interval '1 s' where id = any(%s)"


async def test_a_job_that_a_claim_finds_expired_gives_its_exclusive_key_back(line, ask):
    q = await line(policy="exclusive")
    first, _ = await q.try_send("k", expire_in="1 hour")
    await ask(LATE, [first])
    assert await q.claim() == []
    assert (await q.try_send("k"))[1]


async def test_a_head_that_a_claim_finds_expired_frees_its_key(line, ask):
    q = await line(policy="stately")
    head, _ = await q.try_send("k", expire_in="1 hour")
    assert await q.claim() == [head]
    await ask("select notifyq.snooze(array[%s::bigint], array[interval '0'])", head)
    await ask(LATE, [head])
    assert await q.claim() == []
    assert await q.state(head) == "failed"
    [after] = await q.send("k")
    assert await q.claim() == [after]


async def test_expired_jobs_that_help_out_in_a_fair_queue_hold_no_slot(line, ask):
    q = await line(fair=True, key_limit=9, active_limit=9)
    jobs = await q.send_many(*[{"key": "k"} for _ in range(6)])
    assert await q.claim(1) == [jobs[0]]
    assert await q.states(*jobs[1:]) == ["ready"] + ["blocked"] * 4
    await ask(LATE, jobs[2:4])
    assert await q.claim() == [jobs[1], *jobs[4:]]
    assert await ask("select g.held, k.held from notifyq.gate g, notifyq.key k") == [(4, 4)]
    await q.complete(*jobs[:2], *jobs[4:])
    assert await ask("select g.held from notifyq.gate g") == [(0,)]
    assert await ask("select 1 from notifyq.key") == []


async def test_dead_letters_that_are_redriven_leave_their_places_to_the_next(line, ask):
    await ask("select notifyq.create_queue('dead', '{\"policy\": \"singleton\"}')")
    q = await line(dead_letter="dead", retry_limit=0)
    await q.send(None, None, None)
    for job in await q.claim():
        await ask("select notifyq.fail(%s, 'x')", job)
    [(running,)] = await ask("select id from notifyq.claim('dead', 9)")
    await ask("select notifyq.complete(%s)", running)
    assert len(await ask("select * from notifyq.redrive('dead')")) == 1
    assert len(await ask("select id from notifyq.claim('dead', 9)")) == 1


async def test_a_failed_head_does_not_outlive_the_ordered_policy(line, ask):
    q = await line(policy="ordered", retry_limit=0)
    [head] = await q.send("k")
    assert await q.claim() == [head]
    await ask("select notifyq.fail(%s, 'x')", head)
    await ask("select notifyq.update_queue('q', '{\"policy\": \"singleton\"}')")
    [after] = await q.send("k")
    assert await q.claim() == [after]


@pytest.mark.parametrize("rule", ["rate", "key_rate"])
async def test_a_change_of_another_rule_does_not_make_a_rate_forget_its_starts(line, ask, rule):
    q = await line(**{f"{rule}_limit": 2, f"{rule}_period": 60})
    jobs = await q.send(*"kkkk")
    assert await q.claim() == jobs[:2]
    await ask("select notifyq.update_queue('q', '{\"active_limit\": 9}')")
    assert await q.claim() == []


async def test_a_rate_that_is_taken_away_leaves_no_moment_to_wait_for(line, ask):
    q = await line(rate_limit=1, rate_period=60)
    await q.send(None, None)
    assert len(await q.claim()) == 1
    await ask("select notifyq.update_queue('q', '{\"rate_limit\": null, \"rate_period\": null}')")
    assert await ask("select notifyq.next_due(number) from notifyq.queue") == [(None,)]


async def test_a_change_of_limits_looks_again_at_no_more_blocked_jobs_than_could_start(line, ask):
    q = await line(key_limit=1)
    await q.send_many(*[{"key": "k"} for _ in range(100)])
    await q.claim()
    await ask("select notifyq.update_queue('q', '{\"key_limit\": 3}')")
    assert await ask("select count(*) from notifyq.ready") == [(3,)]
    assert len(await q.claim()) == 2


async def test_taking_away_what_is_blocked_moves_nothing_else(line, ask):
    q = await line(policy="singleton")
    jobs = await q.send_many(*[{"key": "k"} for _ in range(9)])
    assert await q.claim() == [jobs[0]]
    await ask("select notifyq.cancel(%s::bigint[])", jobs[1:5])
    assert await ask("select count(*) from notifyq.ready") == [(0,)]


async def test_the_others_of_a_key_do_not_wait_for_one_that_is_put_off(line, ask):
    q = await line(key_rate_limit=1, key_rate_period=60)
    jobs = await q.send(*"kkk")
    assert await q.claim() == [jobs[0]]
    assert await q.states(*jobs[1:]) == ["scheduled", "blocked"]
    await ask("select notifyq.update_job(%s, delay => '1 hour')", jobs[1])
    assert await q.claim() == []
    assert await q.states(*jobs[1:]) == ["scheduled", "scheduled"]
    [(due,)] = await ask("select extract(epoch from due_at - now()) from notifyq.jobs where id = %s", jobs[2])
    assert due < 62


async def test_the_others_of_a_key_do_not_wait_for_the_next_attempt_of_one(line, ask):
    q = await line(key_rate_limit=1, key_rate_period=60)
    a, b = await q.send(*"kk")
    assert await q.claim() == [a]
    await ask("update notifyq.key set starts = array[starts[1] - 101]")
    await ask("update notifyq.scheduled set due_at = now()")
    assert await q.claim() == [b]
    await ask("select notifyq.fail(%s, 'x', retry_in => '1 hour')", b)
    [c] = await q.send("k")
    assert await q.claim() == []
    assert await q.state(c) == "scheduled"


@pytest.mark.parametrize("policy", ["standard", "ordered", "fair"])
@pytest.mark.parametrize(
    ("change", "then"),
    [
        ({"key_rate_limit": 3}, 2),
        ({"key_rate_limit": 2}, 1),
        ({"key_rate_limit": None, "key_rate_period": None}, 3),
        ({"key_rate_limit": 2, "key_rate_period": 120}, 2),
        ({"key_rate_limit": 2, "key_rate_period": 60, "priority": 1}, 1),
        ({"priority": 1}, 0),
    ],
)
async def test_what_rests_until_its_keys_rate_lets_it_start_feels_a_change_of_it(line, ask, policy, change, then):
    q = await line(key_rate_limit=1, key_rate_period=60, **({"fair": True} if policy == "fair" else {"policy": policy}))
    jobs = await q.send(*"kkkk")
    assert await q.claim() == [jobs[0]]
    await q.complete(jobs[0])
    assert await q.claim() == []
    assert await q.states(*jobs[1:]) == ["scheduled", "blocked", "blocked"]
    await ask("select notifyq.update_queue('q', %s)", json.dumps(change))
    started = []
    for _ in range(4):
        claimed = await q.claim()
        started += claimed
        await q.complete(*claimed)
    assert len(started) == then  # a rate of another period begins anew
    left = [job for job in jobs[1:] if job not in started]
    assert sorted(await q.states(*left), reverse=True) == (["scheduled"] + ["blocked"] * 2)[: len(left)]
    if policy != "fair":
        assert started == jobs[1 : 1 + then]


async def test_what_waits_for_another_attempt_does_not_feel_a_change_of_its_keys_rate(line, ask):
    q = await line(key_rate_limit=1, key_rate_period=60)
    a, b = await q.send(*"kk")
    assert await q.claim() == [a]
    await ask("update notifyq.key set starts = array[starts[1] - 101]")
    await ask("update notifyq.scheduled set due_at = now()")
    assert await q.claim() == [b]
    await ask("select notifyq.fail(%s, 'x', retry_in => '1 minute')", b)
    assert await ask("select turn from notifyq.key") == [(b,)]
    await ask("select notifyq.update_queue('q', '{\"key_rate_limit\": 3}')")
    assert await q.claim() == []
    assert await q.state(b) == "scheduled"


async def test_a_key_whose_rate_has_come_to_rest_is_forgotten(line, ask):
    q = await line(key_rate_limit=2, key_rate_period=60)
    jobs = await q.send(*"ab")
    await q.complete(*await q.claim())
    assert await ask("select notifyq.purge()") == [(0,)]
    assert await ask("select count(*) from notifyq.key") == [(len(jobs),)]
    await ask("update notifyq.key set starts = array[starts[1] - 101] where key = 'a'")
    assert await ask("select notifyq.purge()") == [(1,)]
    assert await ask("select key from notifyq.key") == [("b",)]

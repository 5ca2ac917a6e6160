"""Keys, limits and flows in running runtimes, the poll set to an hour: what may start is woken by the bell or a due time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import trio

import notifyq
from notifyq import Job, Queue, events
from notifyq._bell import Bell


class Running:
    """Counts what runs at once."""

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.order: list[tuple[str, int]] = []
        self.starts: list[float] = []

    async def run(self, key: str, number: int, seconds: float = 0.002) -> None:
        self.starts.append(trio.current_time())
        self.order.append((key, number))
        for counted in (key, "all"):
            self.now[counted] += 1
            self.most[counted] = max(self.most[counted], self.now[counted])
        await trio.sleep(seconds)
        for counted in (key, "all"):
            self.now[counted] -= 1


def keyed(running: Running, key_limit_here: int | None = None, **options: Any) -> Queue[int, int]:
    queue = Queue("q", int, int, retention=3600, retry_delay=0, **options)

    @queue.worker(concurrency=20, poll_interval=3600, key_limit=key_limit_here)
    async def work(job: Job[int]) -> int:
        await running.run(job.key or "", job.data)
        return job.data

    return queue


@pytest.mark.parametrize("options", [{"policy": "singleton"}, {"key_limit": 3}, {"policy": "ordered"}])
async def test_keys_are_held_to_their_limit_by_two_runtimes_and_each_job_runs_once(start, nq, options):
    running = Running()
    first = await start(keyed(running, **options))
    second = await start(keyed(running, **options))
    jobs = [notifyq.NewJob(number, {"key": f"k{number % 5}"}) for number in range(300)]
    with trio.fail_after(60):
        for begin in range(0, 300, 50):
            sent = await nq.send_many(Queue("q", int, int), jobs[begin : begin + 50])
        for job in sent:
            await nq.result(job)
        while len(first.of(events.JobCompleted)) + len(second.of(events.JobCompleted)) < 300:
            await trio.sleep(0.01)
    limit = options.get("key_limit", 1)
    assert all(running.most[f"k{n}"] <= limit for n in range(5))
    assert sorted(number for _, number in running.order) == list(range(300))
    if options.get("policy") == "ordered":
        for n in range(5):
            assert [number for key, number in running.order if key == f"k{n}"] == list(range(n, 300, 5))


async def test_a_process_holds_a_key_to_its_own_limit_and_runs_the_others_meanwhile(start, nq):
    here, there = Running(), Running()
    for running in (here, there):
        await start(keyed(running, key_limit_here=2))
    queue = Queue("q", int, int)
    with trio.fail_after(30):
        sent = await nq.send_many(queue, [notifyq.NewJob(number, {"key": "a"}) for number in range(200)])
        sent += await nq.send_many(
            queue, [notifyq.NewJob(number, {"key": f"k{number % 50}"}) for number in range(200, 300)]
        )
        for job in sent:
            await nq.result(job)
    assert sorted(number for _, number in here.order + there.order) == list(range(300))
    for running in (here, there):
        assert max(running.most[key] for key in running.most if key != "all") == 2
    assert max(here.most["all"], there.most["all"]) > 2


async def test_a_job_beyond_a_process_limit_of_its_key_starts_when_one_of_them_ends(start, nq):
    queue = Queue("q", int, int, retry_limit=0)
    gates = [trio.Event() for _ in range(4)]
    begun: list[int] = []
    begins = Bell()

    @queue.worker(key_limit=1, poll_interval=3600)
    async def work(job: Job[int]) -> int:
        begun.append(job.data)
        begins.ring()
        await gates[job.data].wait()
        if job.data == 1:
            raise RuntimeError("one that fails makes room, too")
        return job.data

    async def wait_begun(*numbers: int) -> None:
        while begun != [*numbers]:
            begins.clear()
            await begins.wait()

    await start(queue, lease=3600)
    with trio.fail_after(10):
        jobs = [await nq.send(queue, number, key="a") for number in range(3)]
        await wait_begun(0)
        await nq.send(queue, 3, key="b")
        await wait_begun(0, 3)
        gates[0].set()
        await wait_begun(0, 3, 1)
        gates[1].set()
        await wait_begun(0, 3, 1, 2)
        for gate in gates:
            gate.set()
        await nq.result(jobs[2])


async def test_a_job_that_ends_while_a_claim_is_under_way_makes_room_that_the_claim_did_not_know_of(
    start, nq, connection, other
):
    queue = Queue("q", int, int)
    gates = [trio.Event() for _ in range(3)]
    begun = [trio.Event() for _ in range(3)]

    @queue.worker(key_limit=2, poll_interval=3600)
    async def work(job: Job[int]) -> int:
        if job.data >= 0:
            begun[job.data].set()
            await gates[job.data].wait()
        return job.data

    seen = await start(queue, lease=3600)
    with trio.fail_after(10):
        for _ in range(10):  # its looks become quick: then it makes only one for what it hears of
            await nq.result(await nq.send(queue, -1, key="b"))
        await nq.send(queue, 0, key="a")
        await begun[0].wait()
        async with connection.transaction():
            await connection.execute(b"select notifyq.lock_gate(number) from notifyq.queue where name = 'q'")
            await nq.send_many(queue, [notifyq.NewJob(number, {"key": "a"}) for number in (1, 2)])
            waits = b"select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
            while not await (await other.execute(waits)).fetchall():
                await trio.lowlevel.checkpoint()
            gates[0].set()
            await seen.wait(events.JobCompleted, 11)
        await begun[1].wait()
        await begun[2].wait()  # the claim was told of one of two, and brought one
    for gate in gates:
        gate.set()


async def test_a_queues_limit_holds_for_two_runtimes_together(start, nq):
    running = Running()
    for _ in range(2):
        await start(keyed(running, active_limit=3))
    with trio.fail_after(30):
        for job in await nq.send_many(Queue("q", int, int), range(200)):
            await nq.result(job)
    assert running.most["all"] == 3


async def test_a_freed_key_starts_its_next_job_at_once(start, nq):
    running = Running()
    await start(keyed(running, policy="singleton"))
    queue = Queue("q", int, int)
    with trio.fail_after(10):  # a poll is an hour away, a beat 5 s for each
        sent = [await nq.send(queue, number, key="k") for number in range(30)]
        for job in sent:
            await nq.result(job)
    assert [number for _, number in running.order] == list(range(30))


async def test_a_rate_holds_for_two_runtimes_together_and_its_next_start_is_a_due_time(start, nq):
    running = Running()
    for _ in range(2):
        await start(keyed(running, rate_limit=5, rate_period=0.5))
    with trio.fail_after(20):
        for job in await nq.send_many(Queue("q", int, int), range(20)):
            await nq.result(job)
    # 20 starts are four periods' worth; a handler starts a little after its claim
    assert 1.4 < running.starts[-1] - running.starts[0] < 4


async def test_a_rate_by_key_is_a_due_time_too(start, nq):
    running = Running()
    await start(keyed(running, key_rate_limit=2, key_rate_period=0.3), lease=3600)  # no beat tells of it
    queue = Queue("q", int, int)
    with trio.fail_after(20):
        slow = [await nq.send(queue, number, key="slow") for number in range(8)]
        other = await nq.send(queue, 100, key="other")
        await nq.result(other)
        assert len(running.order) <= 4
        for job in slow:
            await nq.result(job)
    assert [number for key, number in running.order if key == "slow"] == list(range(8))
    assert running.starts[-1] - running.starts[0] > 0.8


@pytest.mark.parametrize(
    ("rule", "others"),
    [
        ("key_limit", {}),
        ("active_limit", {}),
        ("rate_limit", {"rate_period": 3600}),
        ("key_rate_limit", {"key_rate_period": 3600}),
    ],
)
async def test_a_raised_limit_is_felt_at_once(start, nq, rule, others):
    queue = Queue("q", int, int, **{rule: 1}, **others)
    started = trio.Event()
    go = trio.Event()
    count = 0

    @queue.worker(poll_interval=3600)
    async def work(job: Job[int]) -> int:
        nonlocal count
        count += 1
        if count == 3:
            started.set()
        await go.wait()
        return job.data

    seen = await start(queue)
    await nq.send_many(queue, range(3))
    await seen.wait(events.JobClaimed)
    with trio.fail_after(3):
        await nq.update_queue(Queue("q", int, int, **{rule: 3}))
        await started.wait()
    go.set()


class Held:
    """A queue whose jobs run until they are let go, in a runtime that only the bell or a due time can wake."""

    def __init__(self, concurrency: int = 10, **options: Any) -> None:
        self.queue = Queue("q", int, int, retry_limit=0, **options)
        self.begun: list[int] = []
        self.fails: set[int] = set()
        self._begins = Bell()
        self._gates: dict[int, trio.Event] = {}

        @self.queue.worker(concurrency=concurrency, poll_interval=3600)
        async def work(job: Job[int]) -> int:
            self.begun.append(job.data)
            self._begins.ring()
            if job.data in self.fails:
                raise RuntimeError(f"{job.data} was to fail")
            await self._gates.setdefault(job.data, trio.Event()).wait()
            return job.data

    async def wait_begun(self, *numbers: int) -> None:
        with trio.fail_after(3):
            while self.begun != [*numbers]:
                self._begins.clear()
                await self._begins.wait()

    def let_go(self, *numbers: int) -> None:
        for number in numbers:
            self._gates.setdefault(number, trio.Event()).set()


async def test_of_a_short_key_one_waits_and_starts_when_a_slot_is_free_and_makes_room_for_another(start, nq):
    held = Held(concurrency=1, policy="short")
    await start(held.queue, lease=3600)
    await nq.send(held.queue, 1, key="k")
    await held.wait_begun(1)
    waits = await nq.send(held.queue, 2, key="k")
    refused = await nq.send(held.queue, 3, key="k")
    assert (waits.created, refused.created, refused.id) == (True, False, waits.id)
    held.let_go(1)
    await held.wait_begun(1, 2)
    assert (await nq.send(held.queue, 4, key="k")).created
    held.let_go(2, 4)
    await held.wait_begun(1, 2, 4)


async def test_of_a_stately_key_one_waits_for_the_one_that_runs_and_starts_at_its_end(start, nq):
    held = Held(policy="stately")
    await start(held.queue, lease=3600)
    await nq.send(held.queue, 1, key="k")
    await held.wait_begun(1)
    waits = await nq.send(held.queue, 2, key="k")
    refused = await nq.send(held.queue, 3, key="k")
    assert (waits.created, refused.created, refused.id) == (True, False, waits.id)
    await nq.send(held.queue, 4, key="other")
    await held.wait_begun(1, 4)
    assert (await nq.get(waits)).state == "blocked"
    held.let_go(1)
    await held.wait_begun(1, 4, 2)
    held.let_go(2, 4)


@pytest.mark.parametrize("goes", [True, False], ids=["deleted", "retried"])
async def test_what_is_behind_a_failed_head_starts_when_that_is_deleted_or_has_completed(start, nq, goes):
    held = Held(policy="ordered")
    seen = await start(held.queue, lease=3600)
    held.fails = {1}
    head = await nq.send(held.queue, 1, key="k")
    await nq.send(held.queue, 2, key="k")
    await nq.send(held.queue, 3, key="other")
    await seen.wait(events.JobFailed)
    await held.wait_begun(1, 3)
    held.fails = set()
    held.let_go(1, 2, 3)
    assert await (nq.delete if goes else nq.retry)(head) == [head.id]
    await held.wait_begun(*((1, 3, 2) if goes else (1, 3, 1, 2)))


async def test_a_throttled_job_starts_at_once_and_the_next_of_its_slot_names_it(start, nq):
    held = Held()
    await start(held.queue, lease=3600)
    held.let_go(1)
    year = 86_400 * 360
    first = await nq.send(held.queue, 1, key="k", throttle=year)
    with trio.fail_after(3):
        assert await nq.result(first) == 1
    again = await nq.send(held.queue, 2, key="k", throttle=year)
    assert (again.created, again.id) == (False, first.id)
    await nq.send(held.queue, 3, key="other", throttle=year)
    await held.wait_begun(1, 3)
    held.let_go(3)


async def test_a_child_that_waits_for_its_failed_parent_starts_when_that_is_retried(start, nq):
    held = Held()
    seen = await start(held.queue, lease=3600)
    held.fails = {1}
    flow = notifyq.Flow()
    parent = flow.add(held.queue, 1)
    flow.add(held.queue, 2, after=[parent], on_failure="wait")
    sent = await nq.send_flow(flow)
    await seen.wait(events.JobFailed)
    held.fails = set()
    held.let_go(1, 2)
    assert await nq.retry(sent[parent]) == [sent[parent].id]
    await held.wait_begun(1, 1, 2)


async def test_one_tenants_jobs_do_not_delay_anothers(start, nq):
    running = Running()
    queue = keyed(running, fair=True)
    await nq.create_queue(queue)
    await nq.send_many(queue, [notifyq.NewJob(n, {"key": "many"}) for n in range(2000)])
    one = await nq.send(queue, -1, key="one")
    await start(queue)
    with trio.fail_after(30):
        await nq.result(one)
    assert [number for _, number in running.order].index(-1) < 100


@pytest.mark.parametrize("at_first", [True, False], ids=["from the start", "from a change on"])
async def test_a_job_of_a_fair_queue_does_not_wait_for_what_its_process_has_claimed_of_another_key(start, nq, at_first):
    queue = Queue("q", int, int, fair=True)
    order: list[str] = []
    begun_before: dict[int, int] = {}

    @queue.worker(concurrency=2, poll_interval=3600)
    async def work(job: Job[int]) -> int:
        order.append(job.key or "")
        await trio.sleep(0.005)
        return job.data

    def note(event: events.JobClaimed) -> None:
        begun_before[event.job_id] = len(order)

    await nq.create_queue(Queue("q", int, int, fair=at_first))
    await nq.send_many(queue, [notifyq.NewJob(number, {"key": "many"}) for number in range(20_000)])
    seen = await start(queue, lease=3600)
    seen.runtime.subscribe(note, events.JobClaimed)
    while len(order) < 200:  # from then on it claims ahead
        await trio.sleep(0.005)
    if not at_first:
        await nq.update_queue(queue)
    in_turn = number = 0
    with trio.fail_after(20):
        while in_turn < 5:
            number += 1
            sent = await nq.send(queue, -1, key=f"one {number}")
            await nq.result(sent)
            # one of the other key's that has its turn, and what the slots had taken and not begun
            waited = order.index(f"one {number}") - begun_before[sent.id]
            in_turn = in_turn + 1 if waited <= 3 else 0
            assert in_turn or not at_first, waited


async def test_a_flow_runs_in_order_and_children_read_their_parents(start, nq):
    fetch = Queue("fetch", str, str)
    merge = Queue("merge", str, str)

    @fetch.worker(poll_interval=3600)
    async def do_fetch(job: Job[str]) -> str:
        return job.data.upper()

    @merge.worker(poll_interval=3600)
    async def do_merge(job: Job[str]) -> str:
        parents = await job.parents()
        return job.data + "".join(parents[name].output for name in sorted(parents))

    await start(fetch, merge)
    flow = notifyq.Flow()
    a, b = (flow.add(fetch, name, name=name) for name in "ab")
    last = flow.add(merge, "=", after=[a, b], name="last")
    with trio.fail_after(5):
        sent = await nq.send_flow(flow)
        assert await nq.result(sent[last]) == "=AB"
    assert sent.jobs["a"] == sent[a]
    assert [(job.name, job.state, job.after) for job in await nq.flow(sent[a])] == [
        ("a", "completed", []),
        ("b", "completed", []),
        ("last", "completed", [sent[a].id, sent[b].id]),
    ]


async def test_a_wide_flow_fans_out_and_in_and_ends_whatever_failed(start, nq):
    part = Queue("part", int, int, retry_limit=0)
    done = Queue("done", str, int)

    @part.worker(poll_interval=3600, concurrency=20)
    async def do_part(job: Job[int]) -> int:
        if job.data % 7 == 0:
            raise ValueError("seven")
        return job.data

    @done.worker(poll_interval=3600)
    async def do_done(job: Job[str]) -> int:
        return sum(parent.state == "failed" for parent in (await job.parents()).values())

    await start(part, done)
    flow = notifyq.Flow()
    first = flow.add(part, 1)
    parts = [flow.add(part, number, after=[first]) for number in range(200)]
    end = flow.add(done, "all", after=parts, on_failure="run")
    with trio.fail_after(20):
        sent = await nq.send_flow(flow)
        assert await nq.result(sent[end]) == len(range(0, 200, 7))


async def test_upsert_and_update_job_wake_a_worker(start, nq):
    running = Running()
    queue = keyed(running)
    await start(queue)
    with trio.fail_after(5):
        sent = await nq.upsert(queue, 1, key="k", delay=3600)
        again = await nq.upsert(queue, 2, key="k")
        assert (sent.created, again.created, again.id) == (True, False, sent.id)
        assert await nq.update_job(sent, data=3, delay=0) == sent.id
        assert await nq.result(sent) == 3
    assert await nq.update_job(sent, data=4) is None


async def test_data_can_be_edited_away_and_is_none_then_as_it_is_sent(nq):
    queue = Queue("q", Any)
    await nq.create_queue(queue)
    sent = [
        await nq.send(queue, None, key="a"),
        await nq.send(queue, 1, key="b"),
        await nq.upsert(queue, None, key="c"),
    ]
    assert await nq.update_job(sent[1], priority=1)
    assert (await nq.get(sent[1])).data == 1
    assert await nq.update_job(sent[1], data=None)
    async with nq.connection() as connection:
        cursor = await connection.execute("select count(*) from notifyq.job where data is null")
        assert await cursor.fetchone() == (3,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "fifo"}, "policy must be one of"),
        ({"policy": 1}, "policy must be one of"),
        ({"key_limit": 0}, "key_limit must be an int"),
        ({"active_limit": 1.5}, "active_limit must be an int"),
        ({"rate_limit": -1, "rate_period": 1}, "rate_limit must be an int"),
        ({"rate_limit": 1, "rate_period": 0}, "rate_period must be from 0.01 seconds to a year, not 0"),
        ({"key_rate_limit": 1, "key_rate_period": 1e9}, "key_rate_period must be from 0.01 seconds to a year"),
        ({"ageing": 0}, "ageing must be from 0.001 seconds to a day"),
        ({"fair": 1}, "fair must be True or False"),
        ({"policy": "ordered", "schedules": [notifyq.Schedule(every=1)]}, "the jobs of a schedule have none: give"),
    ],
)
async def test_rules_that_cannot_be_are_refused_where_the_queue_is_declared(options, message):
    with pytest.raises(notifyq.InvalidOption, match=message):
        Queue("q", **options)


async def test_rules_that_contradict_each_other_are_refused_when_the_queue_is_made(nq):
    with pytest.raises(notifyq.InvalidOption, match="key_limit of 1"):
        await nq.create_queue(Queue("q", policy="singleton", key_limit=2))
    with pytest.raises(notifyq.InvalidOption, match="go together"):
        await nq.create_queue(Queue("q", rate_limit=2))
    await nq.create_queue(Queue("q", policy="ordered"))
    with pytest.raises(notifyq.InvalidOption, match="ordered by key"):
        await nq.send(Queue("q"), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": 1}, "key must be text"),
        ({"key": "x" * 1001}, "at most 1000 bytes"),
        ({"throttle": 0}, "throttle must be from 0.001"),
        ({"debounce": -1}, "debounce must be from 0.001"),
        ({"throttle": 1, "debounce": 1}, "exclude each other"),
        ({"singleton_key": "k"}, "key, with the queue's policy"),
    ],
)
async def test_bad_options_of_a_keyed_send_are_refused(nq, options, message):
    with pytest.raises(notifyq.InvalidOption, match=message):
        await nq.send(Queue("q"), 1, **options)


async def test_a_flow_that_cannot_be_is_refused_where_it_is_built(nq):
    queue = Queue("q", int, int)
    flow = notifyq.Flow()
    step = flow.add(queue, 1, name="a")
    other = notifyq.Flow()
    for build, message in (
        (lambda: flow.add(queue, 1, name="a"), "a name of its own"),
        (lambda: flow.add(queue, 1, name=""), "a name of its own"),
        (lambda: other.add(queue, 1, after=[step]), "not in this flow"),
        (lambda: flow.add(queue, 1, after=["a"]), "must be an int"),  # type: ignore[list-item]
        (lambda: flow.add(queue, 1, on_failure="stop"), "cancel, run or wait"),  # type: ignore[arg-type]
        (lambda: flow.add("q", 1), "declaration"),  # type: ignore[arg-type]
        (lambda: flow.add(queue, 1, throttle=1), "can't have throttle"),
        (lambda: flow.add(queue, 1, prio=1), "no option 'prio'"),  # type: ignore[call-arg]
    ):
        with pytest.raises(notifyq.InvalidOption, match=message):
            build()
    assert len(flow) == 1
    with pytest.raises(notifyq.InvalidOption, match="one job or more"):
        await nq.send_flow(other)
    with pytest.raises(notifyq.InvalidOption, match=r"takes a notifyq\.Flow"):
        await nq.send_flow([step])


async def test_edits_that_cannot_be_are_refused(nq):
    queue = Queue("q", int, int)
    await nq.create_queue(queue)
    for arguments, options, message in (
        ((), {}, "by its id alone"),
        ((1,), {"key": "k", "queue": "q"}, "by its id alone"),
        ((1,), {"queue": "q"}, "by its id alone"),
        ((), {"key": "k"}, "by its id alone"),
        ((1,), {"priority": 1e9}, "priority must be an int"),
        (("one",), {"priority": 1}, "must be an int"),
        ((1,), {}, "give what is to be changed"),
        ((), {"queue": "q", "key": 1}, "key must be text"),
    ):
        with pytest.raises(notifyq.InvalidOption, match=message):
            await nq.update_job(*arguments, **options)
    sent = await nq.send(queue, 1)
    with pytest.raises(notifyq.InvalidData):
        await nq.update_job(sent, data="no number")
    with pytest.raises(notifyq.InvalidOption, match="key must be text"):
        await nq.upsert(queue, 1, key=None)  # type: ignore[arg-type]


async def test_a_debounced_job_starts_with_its_slot_and_has_the_latest_data(start, nq):
    running = Running()
    queue = keyed(running)
    await start(queue)
    with trio.fail_after(10):
        sent = [await nq.send(queue, number, key="k", debounce=1) for number in range(5)]
        for job in sent:
            await nq.result(job)
    # 1 or 2 slots' worth of jobs, by where in its second the first one fell
    assert len({job.id for job in sent}) == len(running.order) <= 3
    assert running.order[-1] == ("k", 4)


@pytest.mark.parametrize("options", [{"policy": "stately"}, {"policy": "exclusive"}, {"fair": True, "key_limit": 1}])
async def test_the_next_job_of_a_key_starts_without_a_poll_whatever_the_rule(start, nq, options):
    running = Running()
    queue = keyed(running, **options)
    await start(queue)
    with trio.fail_after(10):
        for number in range(20):
            sent = await nq.send(queue, number, key="k")
            await nq.result(sent)
    assert running.most["k"] == 1

"""Nobody is forgotten while the bell is quiet. Poll and lease are an hour: only the bell and looks can wake."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from notifyq import Job, Queue, _claimer, _fleet
from notifyq._answers import Claimed
from notifyq._fleet import Fleet
from notifyq._opening import open_connection
from notifyq._standing import Standing
from notifyq._store import Store
from notifyq._watch import MOST_RINGS, RINGS, Watch
from notifyq._worker import QueueWorker
from notifyq.events import JobCompleted, ListenerUp

if TYPE_CHECKING:
    from uuid import UUID

    from notifyq._connection import TrioConnection

HOUR = 3600.0


@pytest.fixture
def watches(monkeypatch):
    """What each claimer of this process and its senders know of each other."""
    made: list[Watch] = []

    def note(*arguments: Any) -> Watch:
        made.append(Watch(*arguments))
        return made[-1]

    monkeypatch.setattr(_claimer, "Watch", note)
    return made


async def until(condition: Any, seconds: float = 10) -> None:
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.001)


def echo(name: str = "q", **options: Any) -> Queue[int, int]:
    queue = Queue(name, int, int, **options)

    @queue.worker(poll_interval=HOUR)
    async def work(job: Job[int]) -> int:
        return job.data

    return queue


def held(gate: trio.Event, concurrency: int = 1) -> Queue[int, int]:
    """A queue whose jobs wait for a gate."""
    queue = Queue("q", int, int)

    @queue.worker(poll_interval=HOUR, concurrency=concurrency)
    async def work(job: Job[int]) -> int:
        await gate.wait()
        return job.data

    return queue


async def test_a_full_worker_is_not_rung_for_and_takes_up_what_was_sent_meanwhile(start, nq, watches):
    gate = trio.Event()
    queue = held(gate)
    seen = await start(queue, lease=HOUR)
    await until(lambda: watches[0].told)
    for number in range(3 * RINGS):
        await nq.send(queue, number)
    await until(lambda: watches[0].crowded)
    gate.set()
    await seen.wait(JobCompleted, 3 * RINGS)
    await until(lambda: watches[0].told)
    await nq.send(queue, 1)
    await seen.wait(JobCompleted, 3 * RINGS + 1, seconds=2)


async def test_what_is_sent_unheard_and_committed_after_the_worker_ran_dry_is_found(start, nq, connection, watches):
    gate = trio.Event()
    queue = held(gate)
    seen = await start(queue, lease=HOUR)
    await until(lambda: watches[0].told)
    for number in range(2 * RINGS):
        await nq.send(queue, number)
    await until(lambda: watches[0].crowded)
    async with connection.transaction():
        await connection.execute(b"select notifyq.send('q', '1')")
        gate.set()
        await seen.wait(JobCompleted, 2 * RINGS)
        await until(lambda: not watches[0].crowded)
        await trio.sleep(0.1)  # looks further and further apart
        assert not watches[0].told
    await seen.wait(JobCompleted, 2 * RINGS + 1, seconds=2)
    await until(lambda: watches[0].told)


@pytest.mark.parametrize("how", ["rolled back", "killed"])
async def test_a_ticket_that_another_held_and_let_go_of_without_a_word_is_found(
    start, nq, connection, other, watches, how
):
    gate = trio.Event()
    gate.set()
    queue = held(gate, concurrency=10)
    seen = await start(queue, lease=HOUR)
    await until(lambda: watches[0].told)
    await nq.pause(queue)
    await nq.send(queue, 1)
    await other.execute(b"begin")
    await other.execute(b"select from notifyq.ready for update")
    await nq.resume_queue(queue)
    await nq.send(queue, 2)
    await seen.wait(JobCompleted, 1)
    await until(lambda: watches[0].look_at < trio.current_time() + HOUR)
    if how == "killed":
        await connection.execute(b"select pg_terminate_backend(%s)", (other.info.backend_pid,))
    else:
        await other.execute(b"rollback")
    await seen.wait(JobCompleted, 2, seconds=2)


async def test_a_free_worker_that_is_killed_leaves_the_jobs_to_the_others(start, nq, dsn, watches, tmp_path):
    (tmp_path / "app.py").write_text(
        "import notifyq\nq = notifyq.Queue('q', int, int)\nq.worker(lambda job: job.data)\n"
        "runtime = notifyq.Runtime([q], lease=3600)\n"
    )
    gate = trio.Event()
    gate.set()
    queue = held(gate)
    await nq.create_queue(queue)
    command = [sys.executable, "-m", "notifyq", "--dsn", dsn, "run", "app:runtime"]
    process = await trio.lowlevel.open_process(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        with trio.fail_after(20):
            while await nq.runtimes() == []:
                await trio.sleep(0.01)
        seen = await start(queue, lease=HOUR)
        await until(lambda: watches[0].told)
    finally:
        process.kill()
        await process.wait()
    for number in range(20):
        await nq.send(queue, number)
    await seen.wait(JobCompleted, 15)  # what the other one had claimed is its own for an hour


async def test_two_idle_runtimes_run_every_job_once(start, nq, watches):
    gate = trio.Event()
    gate.set()
    queues = [held(gate, concurrency=5), held(gate, concurrency=5)]
    seen = [await start(queue, lease=HOUR) for queue in queues]
    await until(lambda: len(watches) == 2 and all(watch.told for watch in watches))
    for number in range(100):
        await nq.send(queues[0], number)
    await until(lambda: sum(len(each.of(JobCompleted)) for each in seen) == 100)
    assert len({event.job_id for each in seen for event in each.of(JobCompleted)}) == 100
    await until(lambda: all(watch.told or watch.crowded for watch in watches))


@pytest.fixture
def claimed_by(monkeypatch):
    """The runtimes that sent claims, one for each claim."""
    made: list[UUID] = []
    before_claim = QueueWorker._before_claim

    def counted(self: QueueWorker) -> int:
        made.append(self._runtime)
        return before_claim(self)

    monkeypatch.setattr(QueueWorker, "_before_claim", counted)
    return made


@pytest.fixture
def told_of(monkeypatch):
    """What runtimes heard others say that they took, once for each that heard it."""
    told: list[str] = []
    taken = _fleet.Fleet.taken

    def noted(self: _fleet.Fleet, numbers: str) -> None:
        told.append(numbers)
        taken(self, numbers)

    monkeypatch.setattr(_fleet.Fleet, "taken", noted)
    return told


async def start_fleet(start: Any, size: int, monkeypatch: Any) -> tuple[list[Any], list[_claimer.Claimer]]:
    """So many runtimes, each of which knows of all: what each one emits, and its claimer."""
    claimers: list[_claimer.Claimer] = []
    run = _claimer.Claimer.run

    async def noted(self: _claimer.Claimer, **options: Any) -> None:
        claimers.append(self)
        await run(self, **options)

    monkeypatch.setattr(_claimer.Claimer, "run", noted)
    gate = trio.Event()
    gate.set()
    seen = [await start(held(gate), lease=6) for _ in range(size)]
    await until(lambda: all(claimer.fleet.size == size and claimer._watch.told for claimer in claimers), 20)
    return seen, claimers


def rests(claimer: _claimer.Claimer) -> bool:
    """It is not on its way to another look."""
    at_rest = claimer._resting and not claimer.bell.rung and not claimer._asked_for
    return at_rest and claimer._watch.look_at == math.inf


async def test_one_job_costs_many_idle_runtimes_few_claims(
    start, nq, connection, watches, claimed_by, told_of, monkeypatch
):
    [(most,)] = await (await connection.execute(b"select current_setting('max_connections')::int")).fetchall()
    # However slow the machine, the others get to hear that it was taken before it is their turn.
    monkeypatch.setattr(_fleet, "PATIENCE", HOUR)
    monkeypatch.setattr(_claimer.Claimer, "poll", lambda self: None)
    seen, claimers = await start_fleet(start, 50 if most >= 200 else 30, monkeypatch)
    for number in range(5):
        await until(lambda: all(map(rests, claimers)))
        claimed_by.clear()
        told_of.clear()
        await nq.send(Queue("q", int), number)
        await until(lambda done=number + 1: sum(len(each.of(JobCompleted)) for each in seen) == done)
        await until(lambda: len(told_of) >= len(seen))
        assert 1 <= len(set(claimed_by)) <= _fleet.AT_ONCE


async def test_what_those_whose_turn_it_is_do_not_take_others_do(start, nq, watches, monkeypatch):
    seen, _ = await start_fleet(start, 8, monkeypatch)
    monkeypatch.setattr(_claimer.Claimer, "_ask", lambda self: True)  # those are gone
    await nq.send(Queue("q", int), 1)
    await until(lambda: sum(len(each.of(JobCompleted)) for each in seen) == 1)


async def test_a_look_from_the_floor_sees_to_what_was_put_off(start, nq, watches, monkeypatch):
    monkeypatch.setattr("notifyq._demand.CHEAP_LOOK", -1.0)
    monkeypatch.setattr("notifyq._demand.LOOK_EVERY", HOUR)
    seen, claimers = await start_fleet(start, 8, monkeypatch)
    for number in range(5):
        await nq.send(Queue("q", int), number)
        await until(lambda done=number + 1: sum(len(each.of(JobCompleted)) for each in seen) == done)
    await until(lambda: all(claimer.fleet.look_at == math.inf for claimer in claimers))


def claimed(number: int) -> Claimed:
    return Claimed(number, 1, number, 0, 0, 1.0, datetime.now(UTC), None, None, None, None)


def test_only_what_is_named_is_taken():
    fleet = Fleet(place=3, size=10)
    assert [number for number in range(10) if not fleet.puts_off(number, 0.0)] == [7, 8]
    fleet.taken("0,1,2,3,4,5")
    assert fleet.look_at == pytest.approx(0.03)
    fleet.taken("9")
    assert fleet.look_at == pytest.approx(0.03 + (9 - 2) * 0.02)
    fleet.taken("6")
    assert fleet.look_at == float("inf")
    with pytest.raises(ValueError, match="x"):
        fleet.taken("x")
    fleet.took([claimed(7), claimed(8)])
    fleet.took([claimed(12)])
    assert fleet.says() == "7,8,12"
    assert fleet.says() is None
    fleet.took([claimed(number) for number in range(101)])
    assert fleet.says() is None  # so many are worth a look by the others
    assert not Fleet(place=1, size=4).puts_off(1, 0.0)


async def send_at_random(dsn: str, level: str, jobs: int, chance: random.Random) -> None:
    """Some alone, some with others in a transaction, some rolled back, some late."""
    connection = await open_connection(dsn)
    sent = 0
    while sent < jobs:
        await connection.execute(f"begin isolation level {level}".encode())
        await connection.execute(b"select count(*) from notifyq.queue")
        many = chance.choice([1, 1, 1, 3])
        for _ in range(many):
            await _send_one(connection, chance)
        if chance.random() < 0.2:
            await trio.sleep(chance.random() * 0.02)
        if chance.random() < 0.1:
            await connection.execute(b"rollback")
        else:
            await connection.execute(b"commit")
            sent += many
        if chance.random() < 0.3:
            await trio.sleep(chance.random() * 0.03)
    await connection.close()


async def _send_one(connection: TrioConnection, chance: random.Random) -> None:
    await connection.execute(b"savepoint one")
    await connection.execute(b"select notifyq.send('q', '0')")
    if chance.random() < 0.1:
        await connection.execute(b"rollback to one")
        await connection.execute(b"select notifyq.send('q', '0')")


@pytest.mark.parametrize("dear", [False, True], ids=["from the beginning", "from the floors"])
@pytest.mark.parametrize("seed", range(3))
async def test_senders_of_every_kind_and_runtimes_that_fill_up_and_run_dry_forget_no_job(
    start, nq, connection, dsn, seed, dear, monkeypatch
):
    if dear:  # and what commits later than this is below the floor
        monkeypatch.setattr("notifyq._demand.CHEAP_LOOK", -1.0)
        monkeypatch.setattr("notifyq._demand.TRAIL_SECONDS", 0.0)
    chance = random.Random(seed)
    seen = []
    for concurrency in (1, 4):
        queue = Queue("q", int, int)

        @queue.worker(poll_interval=HOUR, concurrency=concurrency)
        async def work(job: Job[int]) -> int:
            await trio.sleep(chance.random() * 0.01)
            return job.data

        seen.append(await start(queue, lease=HOUR))
    async with trio.open_nursery() as nursery:
        for level in ("read committed", "repeatable read", "serializable") * 2:
            nursery.start_soon(send_at_random, dsn, level, 60, chance)
    left = b"select exists (select from notifyq.ready) or exists (select from notifyq.active)"
    with trio.fail_after(10):
        while await (await connection.execute(left)).fetchone() == (True,):
            await trio.sleep(0.01)
    assert await (await connection.execute(b"select count(*) >= 360 from notifyq.archive")).fetchone() == (True,)


UNTOLD = """
    select set_config('notifyq.rang_ready', jsonb_build_object(number, 32767, number || ':0', 0)::text, true)
    from notifyq.queue
"""
"""What is sent in this transaction rings for nobody."""


async def until_it_stands_far(connection, far: bool = True) -> None:
    standing = b"""
        select exists (
            select from pg_locks l
            where l.locktype = 'advisory' and l.mode = 'ShareLock'
            and l.classid::bigint = notifyq.lock_class('far')::bigint & 4294967295
        )
    """
    with trio.fail_after(10):
        while await (await connection.execute(standing)).fetchone() != (far,):
            await trio.sleep(0.01)


async def below_the_floor(start, nq, connection, monkeypatch, poll_interval: float = HOUR, transaction: str = UNTOLD):
    """A runtime for which looks are dear, and a ticket below its floor that nobody rang for."""
    monkeypatch.setattr("notifyq._demand.CHEAP_LOOK", -1.0)
    monkeypatch.setattr("notifyq._demand.TRAIL_SECONDS", 0.0)
    queue = Queue("q", int, int)

    @queue.worker(poll_interval=poll_interval)
    async def work(job: Job[int]) -> int:
        return job.data

    seen = await start(queue, lease=HOUR)
    await nq.send(queue, 1)
    await seen.wait(JobCompleted, 1)
    await until_it_stands_far(connection)
    async with connection.transaction():
        await connection.execute(transaction.encode())
        await nq.send(queue, 2, connection=connection)
        await nq.send(queue, 3)
        await seen.wait(JobCompleted, 2)
    return queue, seen


async def test_what_lies_below_the_floor_untold_of_is_found_with_the_next_look_from_the_beginning(
    start, nq, connection, monkeypatch
):
    queue, seen = await below_the_floor(start, nq, connection, monkeypatch)
    await nq.send(queue, 4)
    await seen.wait(JobCompleted, 4, seconds=5)


async def test_what_a_long_transaction_leaves_below_the_floor_is_told_of_though_nobody_stood_free(
    start, nq, connection, monkeypatch
):
    monkeypatch.setattr("notifyq._demand.LOOK_EVERY", HOUR)
    nobody_is_free = UNTOLD.replace(", number || ':0', 0", "")
    _, seen = await below_the_floor(start, nq, connection, monkeypatch, transaction=nobody_is_free)
    await seen.wait(JobCompleted, 3, seconds=5)


async def test_who_could_not_stand_far_tries_again_and_then_looks(start, nq, connection, other, monkeypatch):
    monkeypatch.setattr("notifyq._demand.CHEAP_LOOK", -1.0)
    monkeypatch.setattr("notifyq._demand.TRAIL_SECONDS", 0.0)
    monkeypatch.setattr("notifyq._demand.LOOK_EVERY", HOUR)
    queue = echo()
    await nq.create_queue(queue)
    async with connection.transaction():  # somebody tests it
        await connection.execute(
            b"select pg_advisory_xact_lock(notifyq.lock_class('far'), number % 64) from notifyq.queue"
        )
        seen = await start(queue, lease=HOUR)
        await nq.send(queue, 1)
        await seen.wait(JobCompleted, 1)
        async with other.transaction():
            await other.execute(UNTOLD.encode())
            await nq.send(queue, 2, connection=other)
            await nq.send(queue, 3)
            await seen.wait(JobCompleted, 2)
    await until_it_stands_far(connection)
    await seen.wait(JobCompleted, 3, seconds=5)


async def test_who_begins_to_stand_far_does_not_look_where_looks_are_not_dear(start, nq, connection, monkeypatch):
    monkeypatch.setattr("notifyq._demand.CHEAP_LOOK", -1.0)
    monkeypatch.setattr("notifyq._demand.DEAR", -1e9)  # neither cheap nor dear
    queues = echo("a"), echo("b")
    claims: list[str] = []
    before_claim = QueueWorker._before_claim

    def counted(self: QueueWorker) -> int:
        claims.append(self.queue.name)
        return before_claim(self)

    seen = await start(*queues, lease=HOUR)
    await nq.send(queues[0], 1)
    await seen.wait(JobCompleted)
    await until_it_stands_far(connection)
    await trio.testing.wait_all_tasks_blocked(0.2)
    monkeypatch.setattr(QueueWorker, "_before_claim", counted)
    await connection.execute(
        b"select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'notifyq listener'"
    )
    await seen.wait(ListenerUp, 2)
    await until_it_stands_far(connection)
    await nq.send(queues[1], 2)
    await seen.wait(JobCompleted, 2)
    assert set(claims) == {"b"}


async def test_who_stands_far_no_longer_by_the_time_that_it_does_lets_go(start, nq, connection, monkeypatch):
    monkeypatch.setattr("notifyq._demand.CHEAP_LOOK", -1.0)
    monkeypatch.setattr("notifyq._demand.LOOK_EVERY", HOUR)
    standings: list[tuple[Standing, int]] = []
    far, stand_far = Standing.far, Store.stand_far
    stood = trio.Event()

    def noted(self: Standing, number: int, stands: Any) -> None:
        standings.append((self, number))
        if not stood.is_set():  # after that looks are cheap
            far(self, number, stands)

    async def interrupted(self: Store, *args: Any) -> Any:
        answer = await stand_far(self, *args)
        if not stood.is_set():
            stood.set()
            far(*standings[-1], None)
        return answer

    monkeypatch.setattr(Standing, "far", noted)
    monkeypatch.setattr(Store, "stand_far", interrupted)
    queue = echo()
    seen = await start(queue, lease=HOUR)
    await nq.send(queue, 1)
    await seen.wait(JobCompleted)
    with trio.fail_after(10):
        await stood.wait()
    await until_it_stands_far(connection, far=False)


async def test_a_new_listening_connection_is_followed_by_a_look_from_the_beginning_though_that_is_dear(
    start, nq, connection, monkeypatch
):
    monkeypatch.setattr("notifyq._demand.LOOK_EVERY", HOUR)
    _, seen = await below_the_floor(start, nq, connection, monkeypatch)
    await connection.execute(
        b"select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'notifyq listener'"
    )
    await seen.wait(JobCompleted, 3, seconds=5)


async def test_who_is_told_to_look_looks_from_the_beginning_though_that_is_dear(start, nq, connection, monkeypatch):
    monkeypatch.setattr("notifyq._demand.LOOK_EVERY", HOUR)
    _, seen = await below_the_floor(start, nq, connection, monkeypatch)
    await connection.execute(b"select pg_notify(notifyq.channel(number), 'look') from notifyq.queue")
    await seen.wait(JobCompleted, 3, seconds=5)


async def test_a_poll_looks_from_the_beginning_once_an_interval_though_that_is_dear(start, nq, connection, monkeypatch):
    monkeypatch.setattr("notifyq._demand.LOOK_EVERY", HOUR)
    _, seen = await below_the_floor(start, nq, connection, monkeypatch, poll_interval=0.2)
    await seen.wait(JobCompleted, 3, seconds=5)
    claims: list[float] = []
    before_claim = QueueWorker._before_claim

    def counted(self: QueueWorker) -> int:
        claims.append(trio.current_time())
        return before_claim(self)

    monkeypatch.setattr(QueueWorker, "_before_claim", counted)
    await until(lambda: len(claims) >= 5)
    assert claims[4] - claims[0] >= 0.79


async def test_a_look_from_the_beginning_without_an_answer_is_not_made_again_and_again(start, nq, monkeypatch):
    monkeypatch.setattr("notifyq._demand.LOOK_EVERY", HOUR)
    monkeypatch.setattr("notifyq._claimer.ANSWER_TIMEOUT", 0.1)
    monkeypatch.setattr(QueueWorker, "_claim_at_once", lambda *_: False)
    claim = Store.claim

    async def claim_from_floors(self: Store, *args: Any, floors: Any, **options: Any) -> Any:
        if floors is None:
            await trio.sleep_forever()
        return await claim(self, *args, floors=floors, **options)

    monkeypatch.setattr(Store, "claim", claim_from_floors)
    queue = echo()
    seen = await start(queue, lease=HOUR)
    await nq.send(queue, 1)
    await seen.wait(JobCompleted, 1)


async def test_a_due_time_that_nobody_told_of_is_learned_with_a_beat_though_it_does_not_look(
    start, nq, connection, monkeypatch
):
    monkeypatch.setattr("notifyq._demand.CHEAP_LOOK", -1.0)
    monkeypatch.setattr("notifyq._demand.LOOK_EVERY", HOUR)
    queue = echo()
    seen = await start(queue, lease=1.0)
    await nq.send(queue, 1)
    await seen.wait(JobCompleted, 1)
    rang = "select set_config('notifyq.rang_scheduled', jsonb_build_object(number, 0)::text, true) from notifyq.queue"
    async with connection.transaction():
        await connection.execute(rang.encode())
        await nq.send(queue, 2, delay=0.5, connection=connection)
    await seen.wait(JobCompleted, 2, seconds=5)


@pytest.mark.parametrize("reconnected", [False, True])
async def test_what_an_end_puts_back_below_the_floor_is_claimed_though_nobody_stood_free(
    start, nq, connection, monkeypatch, reconnected
):
    monkeypatch.setattr("notifyq._demand.CHEAP_LOOK", -1.0)
    monkeypatch.setattr("notifyq._demand.TRAIL_SECONDS", 0.0)
    monkeypatch.setattr("notifyq._demand.LOOK_EVERY", HOUR)
    queue = echo(policy="singleton")
    await nq.create_queue(queue)
    held = await nq.send(queue, 1, key="k")
    await connection.execute(b"select notifyq.claim('q')")
    await nq.send(queue, 0, key="0")
    seen = await start(queue, lease=HOUR)
    await seen.wait(JobCompleted)  # which a look from the beginning brought
    await nq.send(queue, 2, key="k")
    blocked = b"select exists (select from notifyq.blocked)"
    with trio.fail_after(10):
        while await (await connection.execute(blocked)).fetchone() == (False,):
            await trio.sleep(0.01)
    if reconnected:
        await connection.execute(
            b"select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'notifyq listener'"
        )
        await seen.wait(ListenerUp, 2)
    for number in range(3, 6):
        await nq.send(queue, number, key=str(number))
        await seen.wait(JobCompleted, number - 1)
    async with connection.transaction():
        await connection.execute(UNTOLD.encode())
        await connection.execute(b"select notifyq.complete(%s)", (held.id,))
    await seen.wait(JobCompleted, 5, seconds=5)


def test_looking_by_itself_is_tried_sooner_when_it_pays_and_later_when_it_does_not():
    watch, now = Watch(), 0.0

    def rings_until_crowded() -> int:
        nonlocal now
        for rings in range(1, 2 * MOST_RINGS):
            now += 0.001
            if watch.rang(True, now):
                return rings
        raise AssertionError

    watch.stood(True, now)
    counts = []
    for brought in (0, 0, 50, 50, 50, 50, 50):
        counts.append(rings_until_crowded())
        for look in range(40):
            watch.dry(brought if look < 30 else 0, False, now)
            if not watch.crowded:
                break
        watch.stood(True, now)
    assert counts == [16, 32, 64, 32, 16, 8, 4]


def test_one_that_was_rung_for_too_often_before_it_stood_free_stands_free_no_longer():
    watch = Watch()
    while not watch.rang(False, 0.0):
        pass
    watch.stood(True, 0.0)  # what it had asked for before
    assert watch.crowded
    while watch.crowded:
        watch.dry(0, None, 0.0)
    assert not watch.told


def test_rings_that_come_seldom_never_make_it_look_by_itself():
    watch = Watch()
    watch.stood(True, 0.0)
    assert not any(watch.rang(True, 0.02 * number) for number in range(1000))


def test_looks_in_doubt_come_soon_and_then_less_and_less_often():
    watch, now, pauses = Watch(), 0.0, []
    while now < 20:
        watch.stood(False, now)
        pauses.append(round(watch.look_at - now, 6))
        now = watch.look_at
    assert pauses[:5] == [0.001, 0.002, 0.004, 0.005, 0.005]
    assert max(pauses) == pauses[-1] == 0.25
    assert pauses == sorted(pauses)
    watch.stood(True, now)
    assert watch.look_at == float("inf")

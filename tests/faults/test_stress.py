"""Sessions that do everything at once to the jobs of one queue: no deadlock, no slot lost or held twice, nothing left."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import trio

from notifyq._opening import open_connection

if TYPE_CHECKING:
    from notifyq._connection import TrioConnection

SESSIONS = 6
STEPS = 120
RULES: list[dict[str, Any]] = [
    {},
    {"policy": "short"},
    {"policy": "singleton"},
    {"policy": "stately"},
    {"policy": "exclusive"},
    {"policy": "ordered"},
    {"key_limit": 3},
    {"active_limit": 5},
    {"fair": True},
    {"fair": True, "key_limit": 2},
    {"key_rate_limit": 20, "key_rate_period": 0.2},
    {"rate_limit": 20, "rate_period": 0.05},
    {"ageing": 1},
]


class Session:
    """One session that sends, claims, settles, cancels, deletes and edits at random."""

    def __init__(self, connection: TrioConnection, seed: str) -> None:
        self._connection = connection
        self._random = random.Random(seed)
        self._mine: list[int] = []

    async def ask(self, statement: str, *parameters: object) -> list[Any]:
        cursor = await self._connection.execute(statement.encode(), parameters or None)
        return await cursor.fetchall() if cursor.description else []

    async def run(self) -> None:
        steps = (self._send, self._send, self._send_many, self._claim, self._claim, self._settle, self._settle)
        for _ in range(STEPS):
            await self._random.choice((*steps, self._interfere, self._revive, self._upsert))()

    def _key(self) -> str:
        return f"k{self._random.randrange(6)}"

    async def _send(self) -> None:
        delay = self._random.choice([None, None, None, "20 ms"])
        await self.ask("select notifyq.send('q', key => %s, delay => %s)", self._key(), delay)

    async def _send_many(self) -> None:
        jobs = [
            {"key": self._key(), "priority": self._random.randrange(2)} for _ in range(self._random.randrange(1, 8))
        ]
        await self.ask("select * from notifyq.send_many('q', %s)", json.dumps(jobs))

    async def _upsert(self) -> None:
        await self.ask("select * from notifyq.upsert('q', '1', %s)", self._key())

    async def _claim(self) -> None:
        how_many = self._random.randrange(1, 8)
        self._mine += [job for (job,) in await self.ask("select id from notifyq.claim('q', %s)", how_many)]

    async def _settle(self) -> None:
        number = self._random.randrange(len(self._mine) + 1)
        jobs, self._mine = sorted(self._mine[:number]), self._mine[number:]
        errors = json.dumps([{"type": "x"} for _ in jobs])
        await self._random.choice(
            [
                lambda: self.ask("select notifyq.complete(%s::bigint[])", jobs),
                lambda: self.ask("select notifyq.complete(%s::bigint[])", jobs),
                lambda: self.ask("select notifyq.fail(%s::bigint[], %s)", jobs, errors),
                lambda: self.ask("select notifyq.release(%s::bigint[])", jobs),
                lambda: self.ask("select notifyq.snooze(%s::bigint[], %s::interval[])", jobs, ["20 ms"] * len(jobs)),
            ]
        )()

    async def _interfere(self) -> None:
        jobs = [job for (job,) in await self.ask("select id from notifyq.job order by random() limit 1")]
        await self._random.choice(
            [
                lambda: self.ask("select notifyq.cancel(%s::bigint[])", jobs),
                lambda: self.ask("select notifyq.delete(%s::bigint[])", jobs),
                lambda: self.ask("select notifyq.update_job(%s, priority => 1, delay => '0')", *(jobs or [0])),
                lambda: self.ask("select notifyq.update_job(%s, delay => '20 ms')", *(jobs or [0])),
            ]
        )()

    async def _revive(self) -> None:
        finished = "select id from notifyq.archive where state <> 'completed' order by random() limit 2"
        jobs = [job for (job,) in await self.ask(finished)]
        await self.ask("select notifyq.retry(%s::bigint[]), notifyq.resume(%s::bigint[])", jobs, jobs)


async def complete_what_can_be(ask: Any) -> None:
    """Claim and complete until nothing comes for as long as the longest delay or rate lasts."""
    with trio.move_on_after(20):
        while await ask("select 1 from notifyq.jobs where state in ('ready', 'scheduled', 'blocked', 'active')"):
            jobs = sorted(job for (job,) in await ask("select id from notifyq.claim('q', 50)"))
            await ask("select notifyq.complete(%s::bigint[])", jobs)


@pytest.mark.parametrize("rules", RULES, ids=[json.dumps(rules) for rules in RULES])
async def test_whatever_is_done_at_once_ends_well(dsn, connection, rules):
    ask = Session(connection, "").ask
    options = json.dumps({"retry_limit": 1, "retry_delay": 0, "timeout": 3600, **rules})
    await ask("select notifyq.create_queue('q', %s)", options)
    others = [await open_connection(dsn) for _ in range(SESSIONS)]
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number, other in enumerate(others):
                nursery.start_soon(Session(other, f"{rules}{number}").run)
    for other in others:
        await other.close()

    held = "select key, count(*)::int from notifyq.active where key is not null group by key order by key"
    [(slots,)] = await ask("select slots from notifyq.queue")
    if slots is not None and rules.get("policy") not in ("ordered", "stately"):
        assert await ask("select key, held from notifyq.key where held > 0 order by key") == await ask(held)
        assert all(number <= slots for _, number in await ask(held))
    [(active,)] = await ask("select count(*) from notifyq.active")
    if "active_limit" in rules:
        assert await ask("select held from notifyq.gate") == [(active,)]
    if rules.get("policy") == "ordered":
        await ask("select notifyq.delete_all('q', 'failed')")
    claimed = sorted(job for (job,) in await ask("select job from notifyq.active"))
    await ask("select notifyq.complete(%s::bigint[])", claimed)
    await complete_what_can_be(ask)
    assert (
        await ask("select id, state from notifyq.jobs where state in ('ready', 'scheduled', 'blocked', 'active')") == []
    )
    for table in ("job", "ready", "blocked", "scheduled", "active", "reserved"):
        assert await ask(f"select count(*) from notifyq.{table}") == [(0,)], table
    assert await ask("select count(*) from notifyq.key where held > 0 or head is not null") == [(0,)]

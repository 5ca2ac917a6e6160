"""Writes outcomes: whatever ended while the previous write was in flight is written with the next one.

Those of queues with rules are written by themselves: they may have to wait for a gate that somebody else holds for long.
A write is repeated until the database takes it. One outcome that it refuses does not hold up the others. What the
fence refuses (the attempt was no longer ours) changes nothing and is reported.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import psycopg
import trio

from ._backoff import reconnect_delay
from ._batcher import Batcher
from ._connection import ANSWER_TIMEOUT, answered_within
from ._errors import NotifyqError
from ._models import Completed, Discarded, Failed, Released, Snoozed
from ._sql import reason
from .events import JobCancelled, JobCompleted, JobFailed, JobSnoozed, LeaseLost, ServerTrouble

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from ._connection import TrioConnection
    from ._models import Outcome
    from ._pool import Pool
    from ._store import Store
    from .events import Events

__all__ = ["Settler", "is_refused", "output_refused"]

BATCH_MAX = 1000
"""Outcomes in one write. Larger ones gain nothing and hold their jobs' slots longer."""

BACKLOG_MAX = 4 * BATCH_MAX
"""Unwritten outcomes at which slots wait: a slow database must slow the handlers down, not fill the memory."""

DATA_ERRORS = ("22", "54")
"""SQLSTATE classes that are the outcome's own fault: data exceptions and program limits. All others may pass."""

Entry = tuple["Outcome", str]


class Settler:
    """The outcomes of one runtime, all queues without rules together, and all with rules."""

    def __init__(self, pool: Pool, store: Store, runtime: UUID, events: Events) -> None:
        self._pool = pool
        self._store = store
        self._runtime = runtime
        self._events = events
        self._free: Batcher[Entry] = Batcher(self._flush, limit=BATCH_MAX)
        self._gated: Batcher[Entry] = Batcher(self._flush, limit=BATCH_MAX)
        self._behind_gates = {""}  # by no name: of a queue that is not known
        self.without_rules: set[str] = set()
        """The queues of the process that have none."""
        self._random = random.Random()

    def put(self, outcome: Outcome, queue: str) -> bool:
        """Take an outcome; never waits. False: too many are not written yet, ``wait_room()`` before the next."""
        batcher = self._batcher(queue)
        batcher.put((outcome, queue))
        return batcher.backlog < BACKLOG_MAX

    def is_gated(self, queue: str, gated: bool) -> None:
        """Whether a queue has rules; what was put before goes the way that it went."""
        if gated:
            self._behind_gates.add(queue)
            self.without_rules.discard(queue)
        else:
            self._behind_gates.discard(queue)
            self.without_rules.add(queue)

    def forget(self, queue: str) -> None:
        """A queue is served no longer, and all of it has been put."""
        self._behind_gates.discard(queue)
        self.without_rules.discard(queue)

    def _batcher(self, queue: str) -> Batcher[Entry]:
        return self._gated if queue in self._behind_gates else self._free

    def unsettled(self) -> set[tuple[int, int]]:
        """The attempts whose outcome is not written yet, as (job, attempt)."""
        return {(outcome.job_id, outcome.attempt) for outcome, _ in self._free.pending() + self._gated.pending()}

    async def wait_room(self, queue: str) -> None:
        """Wait while too many outcomes are not written yet of those that go with this queue's."""
        await self._batcher(queue).wait_backlog_below(BACKLOG_MAX)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write until cancelled; then call ``close()``."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._gated.run)
            nursery.start_soon(self._free.run)
            task_status.started()

    async def close(self) -> None:
        """Write what is left. Cancelled: the rest is not written, and those jobs run again."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._gated.close)
            nursery.start_soon(self._free.close)

    async def _flush(self, entries: list[Entry]) -> None:
        kinds: dict[type, list[Entry]] = {}
        for entry in entries:
            kinds.setdefault(type(entry[0]), []).append(entry)
        for kind in (Completed, Failed, Snoozed, Discarded, Released):
            left = sorted(kinds.get(kind, ()), key=lambda entry: entry[0].job_id)
            while left:
                # Two attempts of one job, the earlier one lost: in two writes, so that the answers can be told apart.
                once = {entry[0].job_id: entry for entry in reversed(left)}
                await self._write_until_taken(list(reversed(once.values())))
                left = [entry for entry in left if once[entry[0].job_id] is not entry]

    async def _write_until_taken(self, entries: list[Entry]) -> None:
        failures = 0
        while True:
            try:
                async with self._pool.connection() as connection:
                    with answered_within(ANSWER_TIMEOUT):
                        await self._write(connection, entries)
                    return
            except (NotifyqError, psycopg.Error) as error:
                if failures == 0:
                    self._events.emit(ServerTrouble("settle", reason(error)))
                failures += 1
                await trio.sleep(reconnect_delay(failures, self._random))

    async def _write(self, connection: TrioConnection, entries: list[Entry]) -> None:
        """Write outcomes of one kind. On an error of the data: one by one, to find the one at fault."""
        try:
            settled = await self._settle([outcome for outcome, _ in entries], connection)
        except psycopg.DatabaseError as error:
            if not is_refused(error):
                raise
            if len(entries) == 1:
                await self._refused(connection, entries[0], error)
                return
            for entry in entries:
                await self._write(connection, [entry])
            return
        self._report(entries, settled)

    async def _refused(self, connection: TrioConnection, entry: Entry, error: psycopg.DatabaseError) -> None:
        """The database does not take this outcome: its job fails alone, by name."""
        outcome, queue = entry
        failed = output_refused(outcome, error)
        settled = await self._settle([failed], connection)
        self._report([(failed, queue)], settled)

    async def _settle(self, outcomes: Sequence[Any], connection: TrioConnection) -> dict[int, str]:
        """One call for outcomes of one kind; returns where each job stands now, of those that were still ours."""
        ids = [outcome.job_id for outcome in outcomes]
        attempts = [outcome.attempt for outcome in outcomes]
        as_of = [outcome.as_of for outcome in outcomes]
        first = outcomes[0]
        if isinstance(first, Completed):
            outputs = f"[{','.join(outcome.output for outcome in outcomes)}]"
            done = await self._store.complete(connection, ids, outputs, attempts, self._runtime, as_of)
        elif isinstance(first, Failed):
            errors = json.dumps([{"type": o.type, "message": o.message, "traceback": o.traceback} for o in outcomes])
            return await self._store.fail(
                connection,
                ids,
                errors,
                attempts,
                self._runtime,
                [outcome.final for outcome in outcomes],
                [outcome.retry_in for outcome in outcomes],
                as_of,
            )
        elif isinstance(first, Snoozed):
            delays = [outcome.delay for outcome in outcomes]
            done = await self._store.snooze(connection, ids, delays, attempts, self._runtime, as_of)
        elif isinstance(first, Discarded):
            done = await self._store.discard(connection, ids, attempts, self._runtime, as_of)
        else:
            done = await self._store.release(connection, ids, attempts, self._runtime, as_of)
        return dict.fromkeys(done, "")

    def _report(self, entries: list[Entry], settled: dict[int, str]) -> None:
        emit = self._events.emit
        if len(settled) == len(entries) and not self._events.wants(_event_of(entries[0][0])):
            return
        for outcome, queue in entries:
            job, attempt = outcome.job_id, outcome.attempt
            if job not in settled:
                emit(LeaseLost(queue, job, attempt))
            elif isinstance(outcome, Completed):
                emit(JobCompleted(queue, job, attempt, outcome.seconds))
            elif isinstance(outcome, Failed):
                state = settled[job]
                if state == "cancelled":  # it had been asked for meanwhile
                    emit(JobCancelled(queue, job, attempt))
                else:
                    emit(JobFailed(queue, job, attempt, outcome.type, outcome.message, state))
            elif isinstance(outcome, Snoozed):
                emit(JobSnoozed(queue, job, attempt))
            elif isinstance(outcome, Discarded):
                emit(JobCancelled(queue, job, attempt))


def is_refused(error: psycopg.Error) -> bool:
    """Whether it is the outcome's own fault, so that it would be refused each time."""
    return (error.sqlstate or "")[:2] in DATA_ERRORS


def output_refused(outcome: Outcome, error: psycopg.Error) -> Failed:
    """The outcome instead of one that the database does not take."""
    text = str(error).split("\n")[0][:500].replace("\x00", "")
    return Failed(outcome.job_id, outcome.attempt, "output_invalid", text, final=True, as_of=outcome.as_of)


_EVENTS: dict[type, Any] = {
    Completed: JobCompleted,
    Failed: JobFailed,
    Snoozed: JobSnoozed,
    Discarded: JobCancelled,
    Released: LeaseLost,
}


def _event_of(outcome: Outcome) -> Any:
    """The event that tells of an outcome of this type."""
    return _EVENTS[type(outcome)]

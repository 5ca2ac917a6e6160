"""Completes a job in the transaction that its handler writes in: both commit together, or neither does.

The completion goes with the COMMIT, in one message: in between it would hold what others of a queue with rules wait for,
for as long as this process stands still. Where the attempt is no longer ours it fails, so that there is no COMMIT.

Whatever goes wrong before that rolls back, and the attempt ends as that of any other handler. Once it is sent the server
decides. If its answer is lost the attempt is failed like any other: where the COMMIT was done the job is no
longer active, and failing it changes nothing; where it may still be under way, failing it waits for its end.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import psycopg
import trio
from psycopg.pq import TransactionStatus

from ._errors import ConnectionLost, NotifyqError
from ._lock import QuickLock
from ._models import Completed, Failed, Released
from ._settler import is_refused, output_refused
from ._sql import NOT_HELD, is_connection_loss, raise_as_ours
from .events import JobCompleted, LeaseLost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from uuid import UUID

    from ._connection import Transaction, TrioConnection
    from ._models import Job, Outcome
    from ._pool import Pool
    from ._store import Store
    from .events import Events

__all__ = ["Atomic"]


PATIENCE = 10.0
"""Seconds a job waits for its turn before it is handed back: somebody else may have a connection free."""


class _RolledBack(Exception):
    """Ends the transaction; what is left to be settled is in ``outcome``."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


class Atomic:
    """Runs handlers in transactions of their own."""

    def __init__(self, pool: Pool, store: Store, runtime: UUID, events: Events) -> None:
        """``pool`` is the handlers'; each handler holds one of its connections while it runs.

        One connection is spared, so that handlers that hold all others can still report progress, and send.
        """
        self._pool = pool
        self.most = max(1, pool.statistics().size - 1)
        """How many can run at once."""
        self._turns = QuickLock(self.most)
        self._store = store
        self._runtime = runtime
        self._events = events

    async def run(
        self,
        job: Job[Any],
        call: Callable[[TrioConnection], Awaitable[Any]],
        judge: Callable[[Any], Outcome],
        committing: Callable[[], object],
    ) -> Outcome | None:
        """Call with a connection in a transaction, complete the job in it, commit, and tell of it.

        Returns what is left to be settled: None when the job is completed, or the attempt was no longer ours. ``judge``
        gives the outcome of what the call returned. ``committing`` is called once the end is the server's to decide:
        from then on this can't be cancelled. Before, cancelling rolls back. Raises what the call raised, rolled back.
        """
        async with contextlib.AsyncExitStack() as stack:
            try:
                with trio.move_on_after(PATIENCE) as patience:
                    await stack.enter_async_context(self._turns)
                if patience.cancelled_caught:
                    return Released(job.id, job.attempt, job._as_of)
                connection = await stack.enter_async_context(self._pool.connection())
            except NotifyqError:  # all are in use, or the server is away: it was not started, and is handed back
                return Released(job.id, job.attempt, job._as_of)
            try:
                async with self._transaction(connection) as transaction:
                    outcome = judge(await call(connection))
                    transaction.commit_with(await self._completion(connection, job, outcome), committing)
            except _RolledBack as rolled_back:
                return rolled_back.outcome
            except _Refused as refused:
                return self._refused(job, outcome, refused.error)
            except _NotBegun:  # the connection had broken while nobody used it
                return Released(job.id, job.attempt, job._as_of)
            except _InDoubt as doubt:
                reason = f"the connection broke while the handler's transaction was committed: {doubt}"
                return Failed(job.id, job.attempt, ConnectionLost.__name__, reason, as_of=job._as_of)
        assert isinstance(outcome, Completed)
        if self._events.wants(JobCompleted):
            self._events.emit(JobCompleted(job.queue, job.id, job.attempt, outcome.seconds))
        return None

    @contextlib.asynccontextmanager
    async def _transaction(self, connection: TrioConnection) -> AsyncIterator[Transaction]:
        """A transaction. Raises ``_NotBegun``, ``_Refused``, and ``_InDoubt`` if its COMMIT is not answered."""
        transaction = connection.transaction()
        try:
            begun = await transaction.__aenter__()
        except psycopg.Error as error:
            raise _NotBegun from error
        try:
            yield begun
        except BaseException as error:
            # Its own answer is not asked for: also psycopg's Rollback, which it would swallow, fails the attempt.
            await transaction.__aexit__(type(error), error, error.__traceback__)
            raise
        try:
            await transaction.__aexit__(None, None, None)
        except psycopg.Error as error:
            if is_connection_loss(error):
                raise _InDoubt(str(error).strip().split("\n")[0]) from error
            if connection.pgconn.transaction_status == TransactionStatus.INERROR:
                raise _Refused(error) from error
            raise  # the COMMIT itself: a deferred constraint, a serialization failure

    async def _completion(self, connection: TrioConnection, job: Job[Any], outcome: Outcome) -> bytes:
        """The statement that completes the job. Raises ``_RolledBack`` if it is not to be, and what ``fetch()`` raises."""
        if not isinstance(outcome, Completed):
            raise _RolledBack(outcome)
        if connection.pgconn.transaction_status == TransactionStatus.IDLE:
            raise RuntimeError("the handler ended the transaction that its job's completion belongs to")
        try:
            return await self._store.completion(
                connection, job.id, outcome.output, job.attempt, self._runtime, as_of=job._as_of
            )
        except psycopg.DatabaseError as error:
            if is_refused(error):  # characters that the database does not have
                raise _RolledBack(output_refused(outcome, error)) from error
            raise

    def _refused(self, job: Job[Any], outcome: Outcome, error: psycopg.Error) -> Outcome | None:
        """What is left to be settled where the server did not take the completion. Raises what is to fail the attempt."""
        if is_refused(error):
            return output_refused(outcome, error)
        if error.sqlstate != NOT_HELD:
            raise_as_ours(error)
        self._events.emit(LeaseLost(job.queue, job.id, job.attempt))
        return None


class _NotBegun(Exception):
    """There is no transaction: nothing was called."""


class _Refused(Exception):
    """The completion failed: there was no COMMIT."""

    def __init__(self, error: psycopg.Error) -> None:
        self.error = error


class _InDoubt(Exception):
    """Whether the COMMIT was done is unknown."""

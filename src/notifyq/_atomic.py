"""Completes a job in the transaction that its handler writes in: both commit together, or neither does.

Whatever goes wrong before the COMMIT rolls back, and the attempt ends as that of any other handler. Once the COMMIT is
sent the server decides. If its answer is lost the attempt is failed like any other: where the COMMIT was done the job is no
longer active, and failing it changes nothing; where it may still be under way, failing it waits for its end.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import psycopg
import trio
from psycopg.pq import TransactionStatus

from ._connection import ANSWER_TIMEOUT
from ._errors import ConnectionLost, NotifyqError
from ._lock import QuickLock
from ._models import Completed, Failed, Released
from ._settler import DATA_ERRORS, output_refused
from ._sql import is_connection_loss
from .events import JobCompleted, LeaseLost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from uuid import UUID

    from ._connection import TrioConnection
    from ._models import Job, Outcome
    from ._pool import Pool
    from ._store import Store
    from .events import Events

__all__ = ["Atomic"]


PATIENCE = 10.0
"""Seconds a job waits for its turn before it is handed back: somebody else may have a connection free."""


class _RolledBack(Exception):
    """Ends the transaction; what is left to be settled is in ``outcome``."""

    def __init__(self, outcome: Outcome | None) -> None:
        self.outcome = outcome


class Atomic:
    """Runs handlers in transactions of their own."""

    def __init__(self, pool: Pool, store: Store, runtime: UUID, events: Events) -> None:
        """``pool`` is the handlers'; each handler holds one of its connections while it runs.

        One connection is spared, so that handlers that hold all others can still report progress, and send.
        """
        self._pool = pool
        self._turns = QuickLock(max(1, pool.statistics().size - 1))
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
                async with self._transaction(connection):
                    outcome = judge(await call(connection))
                    await self._complete(connection, job, outcome)
                    committing()
            except _RolledBack as rolled_back:
                return rolled_back.outcome
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
    async def _transaction(self, connection: TrioConnection) -> AsyncIterator[None]:
        """A transaction whose COMMIT is shielded. Raises ``_NotBegun``, and ``_InDoubt`` if that is not answered."""
        transaction = connection.transaction()
        try:
            await transaction.__aenter__()
        except psycopg.Error as error:
            raise _NotBegun from error
        try:
            yield
        except BaseException as error:
            # Its own answer is not asked for: also psycopg's Rollback, which it would swallow, fails the attempt.
            await transaction.__aexit__(type(error), error, error.__traceback__)
            raise
        with trio.move_on_after(ANSWER_TIMEOUT, shield=True) as patience:
            try:
                await transaction.__aexit__(None, None, None)
            except psycopg.Error as error:
                if is_connection_loss(error):
                    raise _InDoubt(str(error).strip().split("\n")[0]) from error
                raise  # the server refused: a deferred constraint, a serialization failure
        if patience.cancelled_caught:
            connection.pgconn.finish()
            raise _InDoubt(f"no answer within {ANSWER_TIMEOUT:g} s")

    async def _complete(self, connection: TrioConnection, job: Job[Any], outcome: Outcome) -> None:
        """Complete the job in the transaction. Raises ``_RolledBack`` if it is not to be, and psycopg's errors."""
        if not isinstance(outcome, Completed):
            raise _RolledBack(outcome)
        if connection.pgconn.transaction_status == TransactionStatus.IDLE:
            raise RuntimeError("the handler ended the transaction that its job's completion belongs to")
        await trio.lowlevel.checkpoint_if_cancelled()  # before anything is sent: then there is nothing to drain
        output = f"[{outcome.output}]"
        try:
            # From here on it holds what others wait for, of a queue with rules: not for as long as this process is stopped.
            done = await self._store.complete(
                connection,
                [job.id],
                output,
                [job.attempt],
                self._runtime,
                [job._as_of],
                commit_within=ANSWER_TIMEOUT,
            )
        except psycopg.DatabaseError as error:
            if (error.sqlstate or "")[:2] in DATA_ERRORS:
                raise _RolledBack(output_refused(outcome, error)) from error
            raise
        if not done:
            self._events.emit(LeaseLost(job.queue, job.id, job.attempt))
            raise _RolledBack(None)


class _NotBegun(Exception):
    """There is no transaction: nothing was called."""


class _InDoubt(Exception):
    """Whether the COMMIT was done is unknown."""

"""A psycopg connection that runs under trio, and the only module that touches psycopg's internals.

psycopg 3 splits the protocol (generators that yield what to wait for) from the waiting. ``AsyncConnection``
does its waiting in ``wait()`` and its locking with ``lock``: giving it a ``wait()`` that parks in trio and a lock of
trio's is enough for cursors, transactions, pipelines and COPY. Opening and cancelling is left to psycopg's blocking
code, in a thread: see ``_opening``.

A query that is cancelled is cancelled on the server and its reply read to the end, so the connection is clean
afterwards; where that does not work within ``CANCEL_GRACE`` it is closed. Nobody gets it mid-query.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
import trio
from psycopg import generators, pq
from psycopg.adapt import Transformer
from psycopg.errors import error_from_result
from psycopg.pq import ConnStatus, ExecStatus, PipelineStatus, TransactionStatus
from psycopg.rows import dict_row, tuple_row

from ._errors import ConnectionLost
from ._lock import QuickLock
from ._steps import Step

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator

T = TypeVar("T")

__all__ = ["ANSWER_TIMEOUT", "CANCEL_GRACE", "Transaction", "TrioConnection", "answered_within"]

ANSWER_TIMEOUT = 10.0
"""Seconds a runtime's own statement may take: they are small, so longer means that the answer will not come."""

READ_ONLY = "25006"

CANCEL_GRACE = 2.0
"""Seconds the server gets to end a cancelled query before its connection is closed."""


class TrioConnection(psycopg.AsyncConnection[tuple[Any, ...]]):
    """psycopg's ``AsyncConnection``, driven by trio. Use from one task at a time, or let its lock queue them."""

    def __init__(self, opened: psycopg.Connection[Any]) -> None:
        """Drive the connection that ``opened`` (blocking, in autocommit) has opened."""
        super().__init__(opened.pgconn, row_factory=tuple_row)
        self.lock = QuickLock()  # type: ignore[assignment]
        self.opened = opened
        self._autocommit = True
        self.prepare_threshold = opened.prepare_threshold
        self.cancel_grace = CANCEL_GRACE
        self._statements: dict[str, _Statement] = {}
        self._numbers = itertools.count(1)
        self._sent: _Statement | None = None
        self._received: Any = None
        self._deciding = False

    async def wait(self, gen: Any, interval: float = 0, timeout: float | None = None) -> Any:
        """Run a protocol generator to its end. Cancelled: the query is cancelled and drained, or the connection closed."""
        step = Step(gen, self.pgconn.socket)
        self._deciding = False
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            return await step.finish()
        except trio.Cancelled:
            if self._deciding:
                return await self._outlast(step)
            if self.pgconn.status == ConnStatus.OK and self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                await self._end_query(step)
            elif self.pgconn.status != ConnStatus.OK or self.pgconn.pipeline_status != PipelineStatus.OFF:
                self.pgconn.finish()
                step.abandon()
            raise

    async def fetch(self, statement: str, parameters: list[bytes | None] | None = None) -> list[tuple[Any, ...]]:
        """Run a statement with ``$1``-style parameters, given as PostgreSQL's text in UTF-8, and return its rows.

        A cursor's work for every execution (placeholders, dumpers, the look-up of what is prepared) costs more than the
        round trip when the process was asleep. Here it is done once for a statement: from its second execution on it
        is prepared, unless ``prepare_threshold`` is None. Raises psycopg's errors; cancelled as any query is.
        """
        if self._pipeline is not None or not self._autocommit:  # the caller's: psycopg keeps the books
            cursor = psycopg.AsyncRawCursor(self)
            await cursor.execute(
                statement.encode(), [None if text is None else text.decode() for text in parameters or ()]
            )
            return await cursor.fetchall()
        async with self.lock:
            known = self._statements.get(statement)
            if known is None or known.name is None:
                known = await self._known(statement)
            if known.name is None:
                self.pgconn.send_query_params(statement.encode(), parameters)
            else:
                self.pgconn.send_query_prepared(known.name, parameters)
            try:
                return known.load(await self._result())
            except psycopg.errors.InvalidSqlStatementName:
                # Somebody has sent DEALLOCATE. In a transaction the error has undone that.
                self._statements.clear()
                if self.pgconn.transaction_status != TransactionStatus.IDLE:
                    raise
        return await self.fetch(statement, parameters)

    def _deallocate(self, name: bytes | None) -> Any:
        """What psycopg sends when it forgets prepared statements; without a name, DEALLOCATE ALL: ours go, too."""
        yield from super()._deallocate(name)
        if name is None:
            self._statements.clear()

    async def prepare(self, statement: str) -> None:
        """Prepare a statement for ``send``, and for ``fetch``."""
        async with self.lock:
            await self._known(statement)  # the first time it is only noted
            await self._known(statement)

    async def _known(self, statement: str) -> _Statement:
        known = self._statements.get(statement)
        if known is None:
            known = self._statements[statement] = _Statement(Transformer(self))
        elif known.name is None and self.prepare_threshold is not None:
            name = b"notifyq_%d" % next(self._numbers)
            self.pgconn.send_prepare(name, statement.encode())
            await self._result()
            known.name = name
        return known

    def send(self, statement: str, parameters: list[bytes | None] | None = None) -> bool:
        """Send a prepared statement without waiting for anything. False: it is not prepared, or the connection is not free.

        ``wait_input`` waits for the answer, among other things, and ``received`` takes it: until then nobody else can use
        the connection.
        """
        known = self._statements.get(statement)
        if known is None or known.name is None or not self.lock.acquire_nowait():  # type: ignore[attr-defined]
            return False
        try:
            self.pgconn.send_query_prepared(known.name, parameters)
        except psycopg.Error:  # it broke: who waits for input will be told
            self.lock.release()
            return False
        self._sent = known
        return True

    def received(self) -> list[tuple[Any, ...]] | None:
        """The rows of what was sent, once all are here; else None. Raises psycopg's errors."""
        if self._sent is None:
            return None
        while not self.pgconn.is_busy():
            result = self.pgconn.get_result()
            if result is not None:
                self._received = result
                continue
            sent, self._sent = self._sent, None
            answer, self._received = self._received, None
            self.lock.release()
            return sent.load(self._checked(answer))
        return None

    async def _result(self) -> pq.abc.PGresult:
        """The result of the one statement that was sent."""
        results = await self.wait(generators.execute(self.pgconn))
        # What fails at its commit, or is terminated there, has returned its rows before.
        failures = (result for result in results if result.status == ExecStatus.FATAL_ERROR)
        return self._checked(next(failures, results[-1]))

    def _checked(self, result: pq.abc.PGresult) -> pq.abc.PGresult:
        if result.status == ExecStatus.FATAL_ERROR:
            error = error_from_result(result, encoding="utf-8")
            if error.sqlstate == READ_ONLY:
                self.pgconn.finish()  # this server was demoted: a new connection may reach its successor
            raise error
        return result

    async def cancel_query(self) -> None:
        """Ask the server to cancel what runs; whoever waits for that gets the error. Raises psycopg's errors."""
        await trio.to_thread.run_sync(self.opened.cancel_safe, abandon_on_cancel=True)

    async def _outlast(self, step: Step) -> Any:
        """Cancelled when the server decides already: wait for what it says, but not for ever."""
        with trio.move_on_after(ANSWER_TIMEOUT, shield=True):
            return await step.finish()
        await self._end_query(step)
        raise psycopg.OperationalError(f"no answer within {ANSWER_TIMEOUT:g} s")

    async def _end_query(self, step: Step) -> None:
        if self.pgconn.pipeline_status == PipelineStatus.OFF:
            with trio.move_on_after(self.cancel_grace, shield=True), contextlib.suppress(psycopg.Error):
                await self.cancel_query()
                await step.finish()
        if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
            self.pgconn.finish()
            step.abandon()

    @contextlib.asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncIterator[Transaction]:
        """Run the block in a transaction, or a savepoint of the one under way. An exception, or cancelling, rolls back."""
        transaction = Transaction(self, savepoint_name, force_rollback)
        # psycopg counts the block before BEGIN or SAVEPOINT is through: cancelled there, the count would be wrong.
        with trio.move_on_after(self.cancel_grace, shield=True) as begin:
            await transaction.__aenter__()
        if begin.cancelled_caught:
            self.pgconn.finish()
            raise psycopg.OperationalError("the server did not begin a transaction in time")
        try:
            yield transaction
            await transaction.__aexit__(None, None, None)
        except BaseException as error:
            if _has_ended(transaction):
                raise  # COMMIT itself failed or was cancelled: there is nothing left to roll back
            with trio.move_on_after(self.cancel_grace, shield=True) as rollback:
                if await transaction.__aexit__(type(error), error, error.__traceback__):
                    return
            if rollback.cancelled_caught:
                self.pgconn.finish()
            raise

    @property
    def clean(self) -> bool:
        """Whether it is open with nothing under way: no transaction, no query, no pipeline."""
        return (
            self.pgconn.status == ConnStatus.OK
            and self.pgconn.transaction_status == TransactionStatus.IDLE
            and self.pgconn.pipeline_status == PipelineStatus.OFF
            and self._pipeline is None
        )

    async def settle(self) -> bool:
        """Make the connection fit for its next user by rolling back what is open, shielded. False: it is closed."""
        if self.pgconn.status == ConnStatus.OK and not self.clean:
            with trio.move_on_after(self.cancel_grace, shield=True), contextlib.suppress(psycopg.Error):
                await self.rollback()
        if self.clean:
            return True
        self.pgconn.finish()
        return False

    def on_notification(self, heard: Callable[[str, str], None]) -> None:
        """Call back with the channel and the payload of each notification, at once, instead of psycopg's handlers."""
        self.pgconn.notify_handler = lambda notification: heard(
            notification.relname.decode(), notification.extra.decode()
        )

    async def wait_input(self) -> None:
        """Park until the server says something unasked, then hand notifications to the handlers.

        Holds no lock: only the task that runs the connection's statements may call it. Raises
        ``psycopg.OperationalError`` when the connection broke.
        """
        # What came in one read with the last statement's reply is in libpq's buffer, not in the socket.
        if self._hand_out():
            await trio.lowlevel.checkpoint()
            return
        await trio.lowlevel.wait_readable(self.pgconn.socket)
        self.pgconn.consume_input()
        self._hand_out()

    def _hand_out(self) -> bool:
        found = False
        while (notification := self.pgconn.notifies()) is not None:
            found = True
            if self.pgconn.notify_handler:
                self.pgconn.notify_handler(notification)
        return found

    def dict_cursor(self) -> psycopg.AsyncCursor[dict[str, Any]]:
        """A cursor whose rows are dictionaries."""
        return self.cursor(row_factory=dict_row)


class _Statement:
    """What a connection remembers of a statement: the name it is prepared under, and how its columns are read."""

    def __init__(self, transformer: psycopg.abc.Transformer) -> None:
        self.name: bytes | None = None
        self._transformer = transformer
        self._fresh = True

    def load(self, result: pq.abc.PGresult) -> list[tuple[Any, ...]]:
        # Loaders are kept once it is prepared: the server refuses to run it when its columns have changed.
        self._transformer.set_pgresult(result, set_loaders=self._fresh)
        self._fresh = self.name is None
        rows = self._transformer.load_rows(0, result.ntuples, tuple)
        self._transformer.set_pgresult(None, set_loaders=False)  # a large result is not held until the next one
        return rows


class Transaction(psycopg.AsyncTransaction):
    """psycopg's, whose COMMIT may bring something along."""

    _last: tuple[bytes, Callable[[], object]] | None = None

    def commit_with(self, statement: bytes, committing: Callable[[], object]) -> None:
        """Have this statement sent with the COMMIT, in one message, of which the server gets all or nothing.

        If it fails there is no COMMIT. ``committing`` is called when it is sent: the server decides from then on, so who is
        cancelled waits for ``ANSWER_TIMEOUT`` yet, and then gets an ``OperationalError``.
        """
        self._last = statement, committing

    async def __aexit__(self, *exception: Any) -> bool:
        # psycopg's does nothing then, and raises nothing.
        if self._last is not None and exception[0] is None and self.pgconn.status != pq.ConnStatus.OK:
            raise psycopg.OperationalError("the connection had been lost before")
        return await super().__aexit__(*exception)

    def _commit_gen(self) -> Generator[Any, Any, None]:
        yield from super()._commit_gen()
        if self._last is None:
            return
        statement, committing = self._last
        connection: Any = self._conn
        connection._deciding = True
        committing()
        self.pgconn.send_query(statement + b"; COMMIT")
        results = yield from generators.execute(self.pgconn)
        connection._checked(results[-1])

    def _get_commit_commands(self) -> Iterator[bytes]:
        return iter(()) if self._last is not None else super()._get_commit_commands()


@contextlib.contextmanager
def answered_within(seconds: float) -> Iterator[None]:
    """Raise ``ConnectionLost`` if the block takes longer: whether what it asked for was done is then unknown."""
    with trio.move_on_after(seconds) as patience:
        yield
    if patience.cancelled_caught:
        raise ConnectionLost(f"the server did not answer within {seconds:g} s")


def _has_ended(transaction: psycopg.AsyncTransaction) -> bool:
    """Whether its COMMIT or ROLLBACK was begun."""
    if hasattr(transaction, "status"):
        return transaction.status is not transaction.Status.ACTIVE
    return bool(getattr(transaction, "_exited", False))  # psycopg before 3.3 says it nowhere else

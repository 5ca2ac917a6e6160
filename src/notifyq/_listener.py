"""The one listening connection: hears notifications, and runs the statements that belong on it.

One task owns the connection. Others hand it statements with ``call()``; between them it parks until the server
says something. Who hears a notification may ask back at once, with ``ask()``: the answer comes to the task that is
waiting for the server anyway, on the connection and the server process that have just been woken.
A listener that cannot listen says so once, and keeps trying: until then polling finds the jobs.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import attrs
import psycopg
import trio

from ._backoff import reconnect_delay
from ._errors import ConnectionLost, NotifyqError
from ._opening import open_connection
from ._sql import as_ours, reason, translated
from .events import ListenerDown, ListenerUp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from ._calls import Bound
    from ._connection import TrioConnection
    from ._store import Store
    from .events import Events

T = TypeVar("T")

__all__ = ["Listener"]

CALL_TIMEOUT = 3.0
"""Seconds a statement on the listening connection may take: they are all small, so longer means a dead peer."""


@attrs.define(eq=False)
class _Call:
    function: Callable[[TrioConnection], Awaitable[Any]]
    done: trio.Event = attrs.field(factory=trio.Event)
    result: Any = None
    error: Exception | None = None


Answered = Callable[[list[Any] | Exception], None]


class Listener:
    """Listens on channels and calls back with each payload."""

    def __init__(self, dsn: str, store: Store, events: Events) -> None:
        self._dsn = dsn
        self._store = store
        self._events = events
        self._channels: dict[str, Callable[[str], object]] = {}
        self._connected: list[Callable[[], object]] = []
        self._disconnected: list[Callable[[], object]] = []
        self._interests: Counter[int] = Counter()
        self._interests_held: set[int] = set()
        self._taking_interest = trio.Lock()
        self._calls: deque[_Call] = deque()
        self._questions: set[str] = set()
        self._listening: set[str] = set()
        self._answered: Answered | None = None
        self._waiting: trio.CancelScope | None = None
        self._random = random.Random()
        self._proof = ""
        self._proven = False
        self.up = False

    def on_connected(self, callback: Callable[[], object]) -> None:
        """Call back whenever listening has begun (again): what was notified before it was not heard."""
        self._connected.append(callback)

    def on_disconnected(self, callback: Callable[[], object]) -> None:
        """Call back whenever the connection broke, or was silent for too long."""
        self._disconnected.append(callback)

    def add_channel(self, channel: str, heard: Callable[[str], object]) -> None:
        """Hear a channel from the next connect on. ``heard`` gets each payload, in the event loop."""
        self._channels[channel] = heard

    async def listen(self, channel: str, heard: Callable[[str], object]) -> None:
        """Hear a channel from now on. Raises ``ConnectionLost`` while disconnected (it is heard after the next connect)."""
        self.add_channel(channel, heard)
        await self.hear()

    async def hear(self) -> None:
        """Hear from now on what was added since the connect. Raises ``ConnectionLost`` as ``listen`` does."""
        await self.call(self._hear_all)

    async def forget(self, channel: str) -> None:
        """Hear a channel no longer. Raises ``ConnectionLost`` while disconnected (then it is not heard anyway)."""
        self._channels.pop(channel, None)
        if channel in self._listening:
            self._listening.discard(channel)
            await self.call(lambda connection: self._store.unlisten(connection, channel))

    async def call(self, function: Callable[[TrioConnection], Awaitable[T]]) -> T:
        """Run statements on the listening connection. Raises ``ConnectionLost`` if there is none, or it breaks."""
        if not self.up:
            raise ConnectionLost("the listening connection is down")
        call = _Call(function)
        self._calls.append(call)
        if self._waiting is not None:
            self._waiting.cancel()
        await call.done.wait()
        if call.error is not None:
            raise call.error
        result: T = call.result
        return result

    def will_ask(self, question: Bound) -> None:
        """Prepare a statement, whatever its arguments, with the next ``hear()`` or connect, so that it can be asked."""
        self._questions.add(question.statement)

    def ask(self, question: Bound, answered: Answered) -> bool:
        """Send a statement at once, without waiting for anything; call from what hears a notification.

        ``answered`` gets the rows or the error, in the event loop. False: it cannot be done now, because another
        statement is under way or this one is not prepared; use a connection of the pool.
        """
        if self._waiting is None or self._calls or not self._connected_to.send(question.statement, question.arguments):
            return False
        self._answered = answered
        return True

    @property
    def asked(self) -> bool:
        """Whether an answer is outstanding."""
        return self._answered is not None

    @contextlib.asynccontextmanager
    async def interest(self, queue: int) -> AsyncIterator[None]:
        """Hold interest in the results of a queue: its settles announce finished jobs. Held again after a reconnect."""
        self._interests[queue] += 1
        try:
            async with self._taking_interest:  # a second waiter waits until the first one holds it
                if queue not in self._interests_held:
                    with contextlib.suppress(ConnectionLost):
                        await self.call(lambda connection: self._hold_interest(connection, queue))
            yield
        finally:
            self._interests[queue] -= 1
            if not self._interests[queue]:
                del self._interests[queue]
                with trio.CancelScope(shield=True), contextlib.suppress(ConnectionLost):
                    await self.call(lambda connection: self._drop_interest(connection, queue))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, listen, and reconnect for ever. Started when it listens, or when the first try has failed."""
        failures = 0
        started = False
        while True:
            try:
                async with self._connection() as connection:
                    await self._begin(connection)
                    failures = 0
                    self.up = True
                    self._events.emit(ListenerUp())
                    for callback in self._connected:
                        callback()
                    if not started:
                        started = True
                        task_status.started()
                    await self._serve(connection)
            except (psycopg.Error, NotifyqError, trio.TooSlowError) as error:
                if self.up or failures == 0:
                    slow = isinstance(error, trio.TooSlowError)
                    self._events.emit(ListenerDown(f"no answer within {CALL_TIMEOUT:g} s" if slow else reason(error)))
                if self.up:
                    for callback in self._disconnected:
                        callback()
            finally:
                self.up = False
                self._interests_held.clear()
                self._refuse_calls()
            if not started:
                started = True
                task_status.started()
            failures += 1
            await trio.sleep(reconnect_delay(failures, self._random))

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[TrioConnection]:
        with translated():
            connection = await open_connection(self._dsn, application_name="notifyq listener")
        connection.cancel_grace = 1.0
        try:
            yield connection
        finally:
            await connection.close()

    async def _begin(self, connection: TrioConnection) -> None:
        """LISTEN, then prove it: a transaction pooler accepts LISTEN and delivers nothing. Only then take locks."""
        control = await self._store.channel(connection, 0)
        connection.on_notification(self._heard)
        self._listening = {control}
        await self._store.listen(connection, control)
        await self._hear_all(connection)
        self._proof = f"proof:{uuid4()}"
        self._proven = False
        with trio.move_on_after(CALL_TIMEOUT) as patience:
            await self._send_proof(connection, control)
            while not self._proven:
                await connection.wait_input()
        if patience.cancelled_caught:
            raise ConnectionLost("LISTEN was accepted but notifications do not arrive: is this a transaction pooler?")
        # Waiters and channels may come while we are at it.
        while self._interests.keys() - self._interests_held or self._channels.keys() - self._listening:
            await self._hear_all(connection)
            for queue in self._interests.keys() - self._interests_held:
                await self._hold_interest(connection, queue)

    async def _send_proof(self, connection: TrioConnection, control: str) -> None:
        """Send it from another connection if there is a pooler, which gives process numbers of its own.

        Through the same one it would be part of an answer, and come through where nothing else that is notified does.
        """
        if await self._store.server_process(connection) == connection.info.backend_pid:
            await self._store.notify(connection, control, self._proof)
        else:
            async with self._connection() as another:
                await self._store.notify(another, control, self._proof)

    async def _hear_all(self, connection: TrioConnection) -> None:
        if added := self._channels.keys() - self._listening:
            await self._store.listen(connection, *added)
            self._listening |= added
        for statement in self._questions:
            await connection.prepare(statement)

    async def _hold_interest(self, connection: TrioConnection, queue: int) -> None:
        """Take the lock, once; a settle that is looking whether anybody holds it has it for a moment."""
        if queue in self._interests_held:  # by the call of a waiter that has gone meanwhile
            return
        while not await self._store.hold_interest(connection, queue):  # noqa: ASYNC110 - in another process
            await trio.sleep(0.001)
        self._interests_held.add(queue)

    async def _drop_interest(self, connection: TrioConnection, queue: int) -> None:
        if queue in self._interests_held and queue not in self._interests:
            self._interests_held.discard(queue)
            await self._store.drop_interest(connection, queue)

    def _heard(self, channel: str, payload: str) -> None:
        if payload.startswith("proof:"):
            self._proven |= payload == self._proof
        elif (heard := self._channels.get(channel)) is not None:
            heard(payload)

    async def _serve(self, connection: TrioConnection) -> None:
        self._connected_to = connection
        while True:
            while self._calls:
                await self._await_answer(connection)
                await self._run_call(connection, self._calls[0])
                self._calls.popleft()
            with trio.CancelScope() as self._waiting:
                try:
                    while not self._calls:
                        await connection.wait_input()
                        self._hear_answer(connection)
                finally:
                    self._waiting = None

    async def _await_answer(self, connection: TrioConnection) -> None:
        """Before a call: what was asked and is held up is cancelled on the server, so that it is not done later unheard."""
        with trio.fail_after(CALL_TIMEOUT):
            with trio.move_on_after(CALL_TIMEOUT / 2):
                await self._hear_out(connection)
            if self._answered is not None:
                await connection.cancel_query()
                await self._hear_out(connection)

    async def _hear_out(self, connection: TrioConnection) -> None:
        while self._answered is not None:
            await connection.wait_input()
            self._hear_answer(connection)

    def _hear_answer(self, connection: TrioConnection) -> None:
        if self._answered is None:
            return
        answer: list[Any] | Exception | None
        try:
            answer = connection.received()
        except psycopg.Error as error:
            answer = as_ours(error) or error
        if answer is not None:
            answered, self._answered = self._answered, None
            answered(answer)

    async def _run_call(self, connection: TrioConnection, call: _Call) -> None:
        try:
            with trio.fail_after(CALL_TIMEOUT):
                call.result = await call.function(connection)
        except (ConnectionLost, psycopg.OperationalError, trio.TooSlowError) as error:
            call.error = ConnectionLost(f"the listening connection broke: {reason(error)}")
            raise
        except Exception as error:  # the caller's mistake, not the connection's
            call.error = error
        except BaseException:
            call.error = ConnectionLost("the listening connection was closed")
            raise
        finally:
            call.done.set()

    def _refuse_calls(self) -> None:
        if self._answered is not None:
            answered, self._answered = self._answered, None
            answered(ConnectionLost("the listening connection broke: whether the statement was done is unknown"))
        while self._calls:
            call = self._calls.popleft()
            call.error = call.error or ConnectionLost("the listening connection is down")
            call.done.set()

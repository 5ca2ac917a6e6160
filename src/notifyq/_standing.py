"""Tells senders for which queues this process has somebody free, by advisory locks on the listening connection, and other
runtimes what it has taken.

The protocol is in ``sql/functions/20_bell.sql``.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import attrs
import psycopg
import trio

from ._backoff import reconnect_delay
from ._bell import Bell
from ._errors import ConnectionLost, NotifyqError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._answers import Stance
    from ._connection import TrioConnection
    from ._listener import Listener
    from ._store import Store

__all__ = ["Standing"]

AGAIN = 1.0
"""Seconds until it tries again to stand far where it could not: somebody tested just then whether somebody does."""


@attrs.define(eq=False)
class _Question:
    due_floor: float | None = None
    answer: Stance | None = None


class Standing:
    """Which queues stand free. What many claimers ask together is one statement."""

    def __init__(self, listener: Listener, store: Store) -> None:
        self._listener = listener
        self._store = store
        self._wanted: set[int] = set()
        self._held: set[int] = set()
        self._far: dict[int, Callable[[], object]] = {}
        self._far_held: set[int] = set()
        self._asked: dict[int, _Question] = {}
        self._taken: list[tuple[int, str]] = []
        self._bell = Bell()
        self._random = random.Random()
        listener.on_connected(self._connected)
        listener.on_disconnected(self._lost)

    async def free(self, queue: int, due_floor: float | None) -> Stance:
        """Stand free, and learn whether all who send from now on will ring. Raises ``ConnectionLost``."""
        self._wanted.add(queue)
        question = self._asked.setdefault(queue, _Question())
        question.due_floor = due_floor
        await self._listener.call(self._answer)
        if question.answer is None:
            raise ConnectionLost("the listening connection broke")
        return question.answer

    def busy(self, queue: int) -> None:
        """Stand free no longer, soon: until then senders ring in vain."""
        self._wanted.discard(queue)
        self._bell.ring()

    def far(self, queue: int, stands: Callable[[], object] | None) -> None:
        """Stand far, soon, since looks from the beginning are dear: ``stands`` is called when it does. None: no longer."""
        if stands is not None:
            self._far[queue] = stands
        else:
            self._far.pop(queue, None)
        if self._far.keys() != self._far_held:
            self._bell.ring()

    def say_taken(self, queue: int, numbers: str) -> None:
        """Tell the other runtimes, soon, that they need not look for these tickets."""
        self._taken.append((queue, numbers))
        self._bell.ring()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Let go of what is not wanted any longer, and say what is taken, until cancelled."""
        task_status.started()
        failures = 0
        while True:
            with trio.move_on_after(AGAIN if self._far.keys() != self._far_held else math.inf):
                await self._bell.wait()
            self._bell.clear()
            try:
                await self._listener.call(self._tell)
                failures = 0
            except ConnectionLost:
                self._taken.clear()  # they may have been let go of by the time that there is a connection
            except (NotifyqError, psycopg.Error):  # of a passing fault others tell, whom it keeps from more than this
                self._taken.clear()
                failures += 1
                await trio.sleep(reconnect_delay(failures, self._random))
                if self._held - self._wanted:
                    self._bell.ring()

    async def _answer(self, connection: TrioConnection) -> None:
        asked, self._asked = self._asked, {}
        if not asked:  # with somebody else's question
            return
        held = [queue in self._held for queue in asked]
        due_floors = [question.due_floor for question in asked.values()]
        stances = await self._store.stand_free(connection, list(asked), held, due_floors)
        for queue, stance in stances.items():
            asked[queue].answer = stance
            if stance.stands:
                self._held.add(queue)
        if self._held - self._wanted:
            self._bell.ring()

    async def _tell(self, connection: TrioConnection) -> None:
        taken, self._taken = self._taken, []
        for queue, numbers in taken:
            await self._store.say_taken(connection, queue, numbers)
        if gone := self._held - self._wanted:
            await self._store.stand_busy(connection, list(gone))
            self._held -= gone
        if changed := list(self._far.keys() ^ self._far_held):
            stands = await self._store.stand_far(connection, changed, [queue in self._far for queue in changed])
            self._far_held.difference_update(changed)
            for queue in changed:
                if stands[queue]:
                    self._far_held.add(queue)
                    if queue in self._far:
                        self._far[queue]()

    def _connected(self) -> None:
        self._lost()
        if self._far:
            self._bell.ring()

    def _lost(self) -> None:
        """Its locks have gone with the connection."""
        self._held.clear()
        self._far_held.clear()

"""What a client does about schedules and events: jobs that are sent by themselves, or to whoever subscribed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._codec import encode_untyped, to_json
from ._errors import InvalidOption, shown
from ._operator import ANY, Operator, declared, queue_name
from ._schedule import Schedule, check_name
from ._sql import plain_options, text

if TYPE_CHECKING:
    from ._connection import TrioConnection
    from ._models import In, Out
    from ._queue import Queue
    from ._schedule import ScheduleRecord

__all__ = ["Planner"]


class Planner(Operator):
    """The part of ``Client`` for schedules and events."""

    async def schedule(
        self, queue: Queue[In, Out], schedule: Schedule, *, connection: TrioConnection | None = None
    ) -> str:
        """Make or change a schedule of a queue, by its name; runtimes hear of it at once.

        Returns ``created``, ``changed`` or ``unchanged``. One that the queue's declaration has, too, is what is declared
        again when a runtime starts.

        Raises ``InvalidData`` (its data is not of the queue's type), ``InvalidOption`` and ``UnknownQueue``.
        """
        if not isinstance(schedule, Schedule):
            raise InvalidOption(f"give a Schedule, not {shown(schedule)}: notifyq.Schedule('0 3 * * *')")
        data = declared(queue).encode(schedule.data)
        async with self._on(connection) as on:
            return await self._store.schedules.put(on, queue.name, schedule, data)

    async def unschedule(
        self, queue: ANY | str, name: str = "default", *, connection: TrioConnection | None = None
    ) -> bool:
        """Remove a schedule; False if there was none. The jobs that it made stay. Raises ``UnknownQueue``."""
        text(name, "name")
        async with self._on(connection) as on:
            return await self._store.schedules.remove(on, queue_name(queue), name)

    async def schedules(self, *, queue: ANY | str | None = None, name: str | None = None) -> list[ScheduleRecord]:
        """All schedules, or those of a queue or a name; each can tell its ``next_firings``."""
        if name is not None:
            text(name, "name")
        async with self.connection() as connection:
            of = None if queue is None else queue_name(queue)
            return await self._store.schedules.records(connection, of, name)

    async def publish(
        self,
        event: str,
        data: Any = None,
        /,
        *,
        headers: dict[str, Any] | None = None,
        id_key: str | None = None,
        connection: TrioConnection | None = None,
    ) -> dict[str, int]:
        """Send a job to each queue that subscribed to an event, all or none; returns their ids by queue.

        Args:
            event: its name; 1 to 100 letters, digits and ``_ . - /``.
            data: JSON, or what cattrs turns into it; each queue's worker reads it as the type that it declares.
            headers: of each job, beside ``event``, its name.
            id_key: publish once: a queue that has a job with this key gets no second one, and its id is that job's.
            connection: publish in the transaction that is open on this connection; the jobs appear when it commits.

        Raises:
            InvalidOption: nobody has subscribed, or a bad name or value.
            InvalidData: not JSON, or too large for one of the queues.
        """
        check_name(event, "event name")
        document = encode_untyped(data)
        plain = plain_options({"headers": headers, "id_key": id_key})
        headers_text = None if headers is None else to_json(plain["headers"])
        async with self._on(connection) as on:
            rows = await self._store.schedules.publish(on, event, document, headers_text, id_key)
        return {queue: job for queue, job, _ in rows}

    async def subscribe(self, event: str, queue: ANY | str, *, connection: TrioConnection | None = None) -> bool:
        """Give a queue a job for each publish of an event from now on; False if it had subscribed already.

        Raises ``UnknownQueue`` and ``InvalidOption``.
        """
        check_name(event, "event name")
        async with self._on(connection) as on:
            return await self._store.schedules.subscribe(on, event, queue_name(queue))

    async def unsubscribe(self, event: str, queue: ANY | str, *, connection: TrioConnection | None = None) -> bool:
        """End that; False if it had not subscribed. Raises ``UnknownQueue`` and ``InvalidOption``."""
        check_name(event, "event name")
        async with self._on(connection) as on:
            return await self._store.schedules.unsubscribe(on, event, queue_name(queue))

    async def subscriptions(self) -> list[dict[str, Any]]:
        """The rows of ``notifyq.subscriptions``."""
        async with self.connection() as connection:
            return await self._store.view(connection, "subscriptions")

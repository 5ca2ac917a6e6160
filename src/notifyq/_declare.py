"""Makes the queues that were declared in Python, and their schedules, in the database."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ._codec import to_json
from ._errors import MissingPrivilege

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._connection import TrioConnection
    from ._queue import Queue
    from ._store import Store

__all__ = ["declare", "declare_at_start"]

log = logging.getLogger("notifyq")


async def declare(connection: TrioConnection, store: Store, queues: Iterable[Queue[Any, Any]]) -> dict[str, str]:
    """Make the queues that are not there yet, with their dead-letter queues, and their schedules what was declared.

    Returns, by queue, ``created``, ``exists`` or ``differs: …``, which changes nothing. Patterns declare nothing. Raises
    ``InvalidOption``, ``InvalidData``, ``UnknownQueue`` and ``MissingPrivilege``; then some may have been made.
    """
    declared = [queue for queue in dict.fromkeys(queues) if not queue.is_pattern]
    done = {}
    for queue in dict.fromkeys(needed for one in declared for needed in one.with_dead_letters()):
        done[queue.name] = await store.create_queue(connection, queue.name, to_json(queue.options))
    for queue in declared:
        schedules = [(schedule, queue.encode(schedule.data)) for schedule in queue.schedules]
        for name in await store.schedules.declare(connection, queue.name, schedules):
            log.warning(
                "schedule %s of queue %s is changed or removed, as declared here; a live runtime serves the queue "
                "and may have declared it otherwise",
                name,
                queue.name,
            )
    return done


async def declare_at_start(connection: TrioConnection, store: Store, queues: Iterable[Queue[Any, Any]]) -> None:
    """``declare`` for a runtime, which goes on with what there is if that is not as declared, or not for it to change."""
    try:
        done = await declare(connection, store, queues)
    except MissingPrivilege as error:  # a worker's role
        log.warning("queues and schedules stay as they are in the database, which this role may not change: %s", error)
        return
    for queue, what in done.items():
        if what.startswith("differs"):
            log.warning("queue %s: in the database %s (`notifyq queues set` or update_queue() changes it)", queue, what)

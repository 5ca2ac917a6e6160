"""What a runtime tells its subscribers. Logging and metrics listen here; the core never imports them.

| event | when |
|---|---|
| RuntimeStarted, RuntimeStopped | it is registered and listens; it has deregistered |
| ListenerUp, ListenerDown | notifications arrive; they don't (jobs are then found by polling) |
| JobClaimed | a job was claimed, before it starts |
| JobCompleted | its completion is committed |
| JobFailed | its failure is committed; ``state`` says whether it is tried again |
| JobSnoozed, JobCancelled | the worker put it off; it was cancelled or discarded |
| JobsRescued | jobs of another runtime, which died, are back in line |
| LeaseLost | an outcome was refused: the attempt was no longer ours |
| LeaseGivenUp | the runtime could not renew its lease in time: it has cancelled its handlers |
| ServerTrouble | a statement of the runtime's own failed, and is tried again; once for a row of failures |
| ScheduleFired | this runtime made the job of a schedule's firing |
| ScheduleMissed | firings that no runtime was there for were passed over |
| ScheduleBroken | a schedule cannot fire here, or its job was refused (once a minute while that lasts); others go on |
| HandlerStuck | a handler ignores cancellation, or blocks the event loop |
"""

from __future__ import annotations

import inspect
import logging
import traceback
from typing import TYPE_CHECKING

import attrs

from ._errors import InvalidOption, shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

__all__ = [
    "Event",
    "Events",
    "HandlerStuck",
    "JobCancelled",
    "JobClaimed",
    "JobCompleted",
    "JobFailed",
    "JobSnoozed",
    "JobsRescued",
    "LeaseGivenUp",
    "LeaseLost",
    "ListenerDown",
    "ListenerUp",
    "RuntimeStarted",
    "RuntimeStopped",
    "ScheduleBroken",
    "ScheduleFired",
    "ScheduleMissed",
    "ServerTrouble",
]

log = logging.getLogger("notifyq")


@attrs.frozen
class Event:
    """Base of all events."""


@attrs.frozen
class RuntimeStarted(Event):
    runtime: str
    queues: tuple[str, ...]


@attrs.frozen
class RuntimeStopped(Event):
    runtime: str


@attrs.frozen
class ListenerUp(Event):
    pass


@attrs.frozen
class ListenerDown(Event):
    reason: str


@attrs.frozen
class JobClaimed(Event):
    queue: str
    job_id: int
    attempt: int


@attrs.frozen
class JobCompleted(Event):
    queue: str
    job_id: int
    attempt: int
    seconds: float
    """From the start of the handler to its end."""


@attrs.frozen
class JobFailed(Event):
    queue: str
    job_id: int
    attempt: int
    type: str
    message: str
    state: str
    """``scheduled`` or ``ready``: it is tried again; ``failed``: it is not."""


@attrs.frozen
class JobSnoozed(Event):
    queue: str
    job_id: int
    attempt: int


@attrs.frozen
class JobCancelled(Event):
    queue: str
    job_id: int
    attempt: int


@attrs.frozen
class JobsRescued(Event):
    job_ids: tuple[int, ...]


@attrs.frozen
class LeaseLost(Event):
    queue: str
    job_id: int
    attempt: int


@attrs.frozen
class LeaseGivenUp(Event):
    runtime: str


@attrs.frozen
class ServerTrouble(Event):
    part: str
    """Of the runtime: ``claim``, ``settle``, ``maintenance``, ``schedules``, ``beat`` or ``queues``."""
    reason: str


@attrs.frozen
class HandlerStuck(Event):
    reason: str


@attrs.frozen
class ScheduleFired(Event):
    queue: str
    schedule: str
    job_id: int
    fired_for: datetime


@attrs.frozen
class ScheduleMissed(Event):
    queue: str
    schedule: str
    since: datetime
    """The first firing that was missed."""
    fired_for: datetime | None
    """The firing that a job made up for all of them for; None: there is no such job."""


@attrs.frozen
class ScheduleBroken(Event):
    queue: str
    schedule: str
    reason: str


class Events:
    """The subscribers of one runtime. They are called at once, in the event loop: they must not block."""

    def __init__(self) -> None:
        self._subscribers: list[tuple[Callable[[Event], object], tuple[type[Event], ...]]] = []
        self._wanted: dict[type[Event], bool] = {}

    def subscribe(self, subscriber: Callable[[Event], object], *kinds: type[Event]) -> None:
        """Call ``subscriber`` with every event of these kinds (none given: every event). Raises ``InvalidOption``."""
        if not callable(subscriber):
            raise InvalidOption(f"a subscriber must be a function that takes an event, not {shown(subscriber)}")
        if inspect.iscoroutinefunction(subscriber):
            raise InvalidOption("a subscriber is called in the event loop and can't be async: give it a plain function")
        for kind in kinds:
            if not (isinstance(kind, type) and issubclass(kind, Event)):
                raise InvalidOption(f"a kind of event must be a class of notifyq.events, not {shown(kind)}")
        self._subscribers.append((subscriber, kinds or (Event,)))
        self._wanted.clear()

    def wants(self, kind: type[Event]) -> bool:
        """Whether anybody listens to this kind: what nobody hears need not be made."""
        wanted = self._wanted.get(kind)
        if wanted is None:
            wanted = self._wanted[kind] = any(issubclass(kind, kinds) for _, kinds in self._subscribers)
        return wanted

    def emit(self, event: Event) -> None:
        """Tell everybody who subscribed to its kind. What a subscriber raises is logged and ends there."""
        for subscriber, kinds in self._subscribers:
            if isinstance(event, kinds):
                try:
                    subscriber(event)
                except Exception as error:
                    # Without its words: they may hold what the event does, and so what is in a job.
                    where = "".join(traceback.format_tb(error.__traceback__))
                    log.error("a subscriber failed on %s: %s\n%s", type(event).__name__, type(error).__name__, where)
                    log.debug("%r: %s", event, error)

"""The values that travel: what is sent, what a worker gets, what a job looks like from outside, how an attempt ended."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypedDict, TypeVar

import attrs

from ._errors import InvalidOption, shown

if TYPE_CHECKING:
    from datetime import timedelta
    from uuid import UUID

    from ._client import Client
    from ._queue import Queue

In = TypeVar("In")
Out = TypeVar("Out")
OutCo = TypeVar("OutCo", covariant=True)

State = Literal["scheduled", "blocked", "ready", "active", "completed", "failed", "cancelled"]

__all__ = [
    "Completed",
    "Discarded",
    "Failed",
    "FlowJob",
    "In",
    "Job",
    "JobHandle",
    "JobRecord",
    "NewJob",
    "Out",
    "Outcome",
    "Parent",
    "Released",
    "SendOptions",
    "Sent",
    "Snoozed",
    "State",
]


class SendOptions(TypedDict, total=False):
    """Options of one job; those left out are inherited from its queue."""

    priority: int
    """-32768 to 32767; higher runs sooner."""
    delay: float | timedelta | datetime
    """Run no sooner than in so many seconds, or at this aware moment."""
    retry_limit: int
    """Attempts after the first."""
    retry_delay: float | timedelta
    """Seconds before the second attempt; with backoff it doubles from there."""
    retry_delay_max: float | timedelta
    """Seconds that backoff does not exceed."""
    retry_backoff: bool
    """Exponential with jitter, or always ``retry_delay``."""
    timeout: float | timedelta
    """Seconds an attempt may take."""
    expire_in: float | timedelta
    """Seconds after which it fails as ``expired`` if it has not started."""
    headers: dict[str, Any]
    """Travels with the job and reaches the worker: trace context, tenant."""
    id_key: str
    """At most 1000 bytes; makes the send idempotent: a second job with this key is not made while the first is kept."""
    key: str
    """At most 1000 bytes; what the queue's policy, limits and turns go by: a customer, say. Without: one common key."""
    throttle: float | timedelta
    """Seconds, from 0.001 to a year: one job of this key in each slot of so many seconds (by the calendar: 60 is a minute by
    the clock); further sends make none and give that one."""
    debounce: float | timedelta
    """As ``throttle``, but a second send in a slot makes one more job, at the beginning of the next slot, and further ones
    replace its data."""


@attrs.frozen
class NewJob(Generic[In]):
    """A job for ``send_many`` with options of its own."""

    data: In
    options: SendOptions = attrs.field(factory=lambda: SendOptions())

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.options, dict):
            raise InvalidOption(f"the options of a NewJob must be a dict, not {shown(self.options)}")


@attrs.frozen
class Sent(Generic[OutCo]):
    """A job that was sent."""

    id: int
    created: bool
    """False: the ``id_key`` or, by the queue's policy, a throttle or a debounce, the ``key`` was taken; ``id`` is the job
    that has it."""
    queue: Queue[Any, OutCo] = attrs.field(repr=lambda queue: repr(queue.name), eq=False)
    schema: str | None = attrs.field(default=None, repr=False, kw_only=True)
    """Of the installation that it was sent to: in another one its id is another job's."""

    def id_in(self, schema: str) -> int:
        """Its id. Raises ``InvalidOption`` if that means another job, or none, in this schema."""
        if self.schema not in (None, schema):
            raise InvalidOption(
                f"job {self.id} was sent to schema {self.schema!r}, and this is schema {schema!r}, where its id is"
                " another's: use a client of its own"
            )
        return self.id


class JobHandle(Protocol):
    """What a job needs of the runtime that runs it."""

    client: Client

    async def progress(self, job: Job[Any], progress: Any) -> None: ...

    async def touch(self, job: Job[Any], extend: float | timedelta) -> None: ...


@attrs.define(eq=False)
class Job(Generic[In]):
    """A claimed job, as its worker sees it."""

    id: int
    queue: str
    attempt: int
    """1 for the first."""
    retry_limit: int
    """Attempts after the first; ``attempt > retry_limit`` means that this is the last one."""
    priority: int
    timeout: float
    """Seconds this attempt may take."""
    sent_at: datetime
    data: In
    headers: dict[str, Any]
    provenance: dict[str, Any] | None
    """Of a dead letter: ``queue``, ``id``, ``attempts``, ``error`` and ``sent_at`` of the job that failed."""
    key: str | None
    _as_of: float | None = attrs.field(repr=False)
    deadline: float = attrs.field(default=float("inf"), init=False)
    """When the attempt times out, on ``trio.current_time()``'s clock; infinite for a job fetched by hand. A cancel scope
    around the worker has it, from the moment on at which the worker first waits for something."""
    _handle: JobHandle | None = attrs.field(default=None, repr=False)

    @property
    def fired_for(self) -> datetime | None:
        """The moment, in UTC, that its schedule fired it for; None if no schedule made it."""
        return fired_for(self.headers)

    @property
    def client(self) -> Client:
        """The runtime's client, to send further jobs."""
        return self._running().client

    async def parents(self) -> dict[str, Parent]:
        """The jobs that this one came after in its flow, by name, with their outputs."""
        return {parent.name: parent for parent in await self.client.parents(self.id)}

    async def progress(self, progress: Any) -> None:
        """Store a JSON value that ``notifyq.jobs`` shows while the job runs. Raises ``LeaseLost`` if it is not ours now."""
        await self._running().progress(self, progress)

    async def touch(self, extend: float | timedelta, /) -> None:
        """Give this attempt so many seconds from now. Raises ``LeaseLost`` if it is no longer ours."""
        await self._running().touch(self, extend)

    def _running(self) -> JobHandle:
        if self._handle is None:
            raise RuntimeError(f"job {self.id} was not started by a runtime: use the client's methods")
        return self._handle


def fired_for(headers: Any) -> datetime | None:
    """What ``sql/functions/70_schedule.sql`` writes into a job's headers; None for what anybody else does."""
    try:
        moment = datetime.fromisoformat(headers["fired_for"])
    except (TypeError, KeyError, ValueError, IndexError):
        return None
    return moment if moment.tzinfo is not None else None


@attrs.frozen(kw_only=True)
class JobRecord:
    """A job as ``notifyq.jobs`` shows it, whatever its state."""

    id: int
    queue: str
    state: State
    retrying: bool
    """It waits for its next attempt after a failed one."""
    attempt: int
    """The attempt that runs, or how many were spent."""
    retry_limit: int
    priority: int
    data: Any
    output: Any
    error: dict[str, Any] | None
    """The last failed attempt: ``type``, ``message``, ``traceback``, ``attempt``, ``failed_at``."""
    progress: Any
    sent_at: datetime
    due_at: datetime | None
    claimed_at: datetime | None
    deadline: datetime | None
    cancel_requested_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None
    runtime: UUID | None
    timeout: timedelta
    key: str | None
    flow: int | None
    """The number of the flow that it belongs to."""
    id_key: str | None
    headers: dict[str, Any] | None
    provenance: dict[str, Any] | None


@attrs.frozen
class Parent:
    """A job that another one came after."""

    id: int
    name: str
    """Its name in the flow; if it was sent before the flow, its id."""
    queue: str | None
    """None: it is no longer kept."""
    state: str
    """``completed``, ``failed``, ``cancelled`` or ``deleted``; ``waiting``: it has not ended."""
    output: Any
    """What it returned, as JSON has it, while it is kept."""


@attrs.frozen
class FlowJob:
    """A job of a flow."""

    id: int
    name: str
    queue: str | None
    state: str
    """As ``JobRecord``'s, or ``forgotten``: it is no longer kept."""
    after: list[int]
    """The ids of the jobs it comes after."""


@attrs.define(eq=False)
class Completed:
    """The attempt returned; ``output`` is JSON text."""

    job_id: int
    attempt: int
    output: str
    seconds: float
    as_of: float | None = None
    """See ``Claimed``."""


@attrs.define(eq=False)
class Failed:
    """The attempt failed. ``final``: it is not tried again. ``retry_in``: seconds, instead of the backoff."""

    job_id: int
    attempt: int
    type: str
    message: str
    traceback: str | None = None
    final: bool = False
    retry_in: float | None = None
    as_of: float | None = None
    """See ``Claimed``."""


@attrs.define(eq=False)
class Snoozed:
    """Run again in ``delay`` seconds; no attempt is spent."""

    job_id: int
    attempt: int
    delay: float
    as_of: float | None = None
    """See ``Claimed``."""


@attrs.define(eq=False)
class Discarded:
    """The job ends as cancelled."""

    job_id: int
    attempt: int
    as_of: float | None = None
    """See ``Claimed``."""


@attrs.define(eq=False)
class Released:
    """The job was not started: back to its place in line; no attempt is spent."""

    job_id: int
    attempt: int
    as_of: float | None = None
    """See ``Claimed``."""


Outcome = Completed | Failed | Snoozed | Discarded | Released

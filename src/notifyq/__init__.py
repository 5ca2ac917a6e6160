"""A PostgreSQL job queue, driven by LISTEN/NOTIFY, on trio.

    reminders = notifyq.Queue("reminders", Reminder, Echo, retry_limit=3)

    @reminders.worker
    async def remind(job: notifyq.Job[Reminder]) -> Echo:
        return Echo(f"echo: {job.data.message}")

    runtime = notifyq.Runtime([reminders])     # notifyq run module:runtime

    async with notifyq.connect() as nq:        # DATABASE_URL
        sent = await nq.send(reminders, Reminder("hello"), delay=5)
        echo = await nq.result(sent)

The flow, and where it is: send (``_client``, ``sql/functions/10_send.sql``) → notify (``20_bell.sql``) → wake
(``_listener``) → claim (``_claimer``, ``30_claim.sql``) → run (``_executor``) → complete (``_settler``,
``40_complete.sql``).
"""

from . import events
from ._client import Client
from ._connect import connect
from ._connection import TrioConnection as Connection
from ._errors import (
    ClientClosed,
    ConnectionLost,
    InvalidData,
    InvalidOption,
    JobFailed,
    JobNotFound,
    LeaseLost,
    MissingPrivilege,
    NotifyqError,
    SchemaMismatch,
    ServerTrouble,
    UnknownQueue,
)
from ._flow import Flow, SentFlow, Step
from ._models import FlowJob, Job, JobRecord, NewJob, Parent, SendOptions, Sent
from ._queue import BatchResult, Queue
from ._runtime import Runtime, run
from ._schedule import Schedule, ScheduleRecord
from ._schema import VERSION as __version__
from ._signals import Discard, Fail, Retry, Snooze

__all__ = [
    "BatchResult",
    "Client",
    "ClientClosed",
    "Connection",
    "ConnectionLost",
    "Discard",
    "Fail",
    "Flow",
    "FlowJob",
    "InvalidData",
    "InvalidOption",
    "Job",
    "JobFailed",
    "JobNotFound",
    "JobRecord",
    "LeaseLost",
    "MissingPrivilege",
    "NewJob",
    "NotifyqError",
    "Parent",
    "Queue",
    "Retry",
    "Runtime",
    "Schedule",
    "ScheduleRecord",
    "SchemaMismatch",
    "SendOptions",
    "Sent",
    "SentFlow",
    "ServerTrouble",
    "Snooze",
    "Step",
    "UnknownQueue",
    "__version__",
    "connect",
    "events",
    "run",
]

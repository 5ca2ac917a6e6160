"""Logs a runtime's events to the logger ``notifyq``.

Data and outputs are never logged; what a handler's exception says may hold some, and is logged at DEBUG only.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from . import events

if TYPE_CHECKING:
    from .events import Event, Events

__all__ = ["subscribe"]

_LEVELS: dict[type[Event], int] = {
    events.RuntimeStarted: logging.INFO,
    events.RuntimeStopped: logging.INFO,
    events.ListenerUp: logging.INFO,
    events.ListenerDown: logging.WARNING,
    events.JobFailed: logging.WARNING,
    events.JobsRescued: logging.WARNING,
    events.LeaseLost: logging.WARNING,
    events.LeaseGivenUp: logging.WARNING,
    events.ServerTrouble: logging.WARNING,
    events.HandlerStuck: logging.WARNING,
    events.ScheduleBroken: logging.WARNING,
    events.ScheduleMissed: logging.WARNING,
    events.ScheduleFired: logging.DEBUG,
    events.JobCancelled: logging.INFO,
    events.JobSnoozed: logging.DEBUG,
    events.JobCompleted: logging.DEBUG,
}

log = logging.getLogger("notifyq")


def subscribe(bus: Events) -> None:
    """Log events from now on; job by job only if the logger's level asks for it."""
    kinds = tuple(kind for kind, level in _LEVELS.items() if log.isEnabledFor(level))
    if kinds:
        bus.subscribe(_log, *kinds)


def _log(event: Event) -> None:
    log.log(_LEVELS[type(event)], "%s", _text(event))
    if isinstance(event, events.JobFailed):
        log.debug("%s job %d attempt %d: %s: %s", event.queue, event.job_id, event.attempt, event.type, event.message)


def _text(event: Event) -> str:
    match event:
        case events.RuntimeStarted(runtime, queues):
            return f"runtime {runtime} serves {', '.join(queues)}"
        case events.RuntimeStopped(runtime):
            return f"runtime {runtime} stopped"
        case events.ListenerUp():
            return "listening"
        case events.ListenerDown(reason):
            return f"not listening, polling until it is back: {reason}"
        case events.JobFailed(queue, job_id, attempt, type_, _, state):
            return f"{queue} job {job_id} attempt {attempt} failed, now {state}: {type_}"
        case events.JobsRescued(job_ids):
            jobs = f"{len(job_ids)} job{'' if len(job_ids) == 1 else 's'}"
            return f"rescued {jobs} whose lease or time had run out: {', '.join(map(str, job_ids[:20]))}"
        case events.LeaseLost(queue, job_id, attempt):
            return f"{queue} job {job_id} attempt {attempt} was no longer ours: its outcome was not stored"
        case events.JobCancelled(queue, job_id, attempt):
            return f"{queue} job {job_id} attempt {attempt} cancelled"
        case events.JobSnoozed(queue, job_id, attempt):
            return f"{queue} job {job_id} attempt {attempt} snoozed"
        case events.JobCompleted(queue, job_id, attempt, seconds):
            return f"{queue} job {job_id} attempt {attempt} completed in {seconds:.3f} s"
        case events.LeaseGivenUp(runtime):
            return f"runtime {runtime} could not renew its lease: it has cancelled what it ran"
        case events.ServerTrouble(part, reason):
            return f"{part} failed, trying again: {reason}"
        case events.HandlerStuck(reason):
            return reason
        case events.ScheduleBroken(queue, schedule, reason):
            return f"schedule {schedule} of {queue} cannot fire: {reason}"
        case events.ScheduleMissed(queue, schedule, since, fired_for):
            made = (
                "none of them made a job"
                if fired_for is None
                else f"one job for {fired_for:%Y-%m-%d %H:%M:%S} UTC makes up for it"
            )
            return f"schedule {schedule} of {queue} has missed firings since {since:%Y-%m-%d %H:%M:%S} UTC: {made}"
        case events.ScheduleFired(queue, schedule, job_id, fired_for):
            return f"schedule {schedule} of {queue} fired for {fired_for.isoformat()}: job {job_id}"
        case _:
            return repr(event)

"""Logs a runtime's events to the logger ``notifyq``. Data and outputs are never logged."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from . import _events

if TYPE_CHECKING:
    from ._events import Event, Events

__all__ = ["subscribe"]

_LEVELS: dict[type[Event], int] = {
    _events.RuntimeStarted: logging.INFO,
    _events.RuntimeStopped: logging.INFO,
    _events.ListenerUp: logging.INFO,
    _events.ListenerDown: logging.WARNING,
    _events.JobFailed: logging.WARNING,
    _events.JobsRescued: logging.WARNING,
    _events.LeaseLost: logging.WARNING,
    _events.HandlerStuck: logging.WARNING,
    _events.JobCancelled: logging.INFO,
    _events.JobSnoozed: logging.DEBUG,
    _events.JobCompleted: logging.DEBUG,
}

log = logging.getLogger("notifyq")


def subscribe(events: Events) -> None:
    """Log events from now on; job by job only if the logger's level asks for it."""
    kinds = tuple(kind for kind, level in _LEVELS.items() if log.isEnabledFor(level))
    if kinds:
        events.subscribe(_log, *kinds)


def _log(event: Event) -> None:
    log.log(_LEVELS[type(event)], "%s", _text(event))


def _text(event: Event) -> str:
    match event:
        case _events.RuntimeStarted(runtime, queues):
            return f"runtime {runtime} serves {', '.join(queues)}"
        case _events.RuntimeStopped(runtime):
            return f"runtime {runtime} stopped"
        case _events.ListenerUp():
            return "listening"
        case _events.ListenerDown(reason):
            return f"not listening, polling until it is back: {reason}"
        case _events.JobFailed(queue, job_id, attempt, type_, message, state):
            return f"{queue} job {job_id} attempt {attempt} failed, now {state}: {type_}: {message}"
        case _events.JobsRescued(job_ids):
            return f"rescued {len(job_ids)} jobs of a runtime that died: {', '.join(map(str, job_ids[:20]))}"
        case _events.LeaseLost(queue, job_id, attempt):
            return f"{queue} job {job_id} attempt {attempt} was no longer ours: its outcome was not stored"
        case _events.JobCancelled(queue, job_id, attempt):
            return f"{queue} job {job_id} attempt {attempt} cancelled"
        case _events.JobSnoozed(queue, job_id, attempt):
            return f"{queue} job {job_id} attempt {attempt} snoozed"
        case _events.JobCompleted(queue, job_id, attempt, seconds):
            return f"{queue} job {job_id} attempt {attempt} completed in {seconds:.3f} s"
        case _events.HandlerStuck(reason):
            return reason
        case _:
            return repr(event)

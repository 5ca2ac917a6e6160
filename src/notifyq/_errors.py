"""Every error notifyq raises. Each says whose fault it is and holds what it is about."""

from __future__ import annotations

__all__ = [
    "ClientClosed",
    "ConnectionLost",
    "InvalidData",
    "InvalidOption",
    "JobFailed",
    "JobNotFound",
    "LeaseLost",
    "MissingPrivilege",
    "NotifyqError",
    "SchemaMismatch",
    "ServerTrouble",
    "UnknownQueue",
]


class NotifyqError(Exception):
    """Base of all errors that notifyq raises on purpose."""


class ClientClosed(NotifyqError):
    """You used a client after leaving its ``async with`` block."""


class ConnectionLost(NotifyqError):
    """The server could not be reached, or the connection broke; ``__cause__`` says how.

    Whether a statement under way took effect is then unknown. Send with an ``id_key`` to repeat it safely.
    """


class ServerTrouble(NotifyqError):
    """The server could not do it now: a deadlock, a lock or statement timeout, no disk space or memory.

    Nothing was changed; the same call may succeed later.
    """


class UnknownQueue(NotifyqError):
    """The queue does not exist in the database: create it, or start a runtime that declares it."""


class InvalidOption(NotifyqError, ValueError):
    """An option or argument does not exist, or its value is out of range. The message names both and the fix."""


class InvalidData(NotifyqError, ValueError):
    """Data does not fit its declared type, cannot be stored as JSON, or is too large.

    ``reasons`` holds lines of the form ``reason @ $.path``.
    """

    def __init__(self, message: str, reasons: tuple[str, ...] = ()) -> None:
        super().__init__(message if not reasons else f"{message}: {'; '.join(reasons)}")
        self.reasons = reasons


class SchemaMismatch(NotifyqError):
    """The installed schema is missing, older, or newer than this notifyq needs."""


class MissingPrivilege(NotifyqError):
    """The database role lacks a right; the server's message names the object."""


class LeaseLost(NotifyqError):
    """The attempt is no longer yours: it was rescued, cancelled, or the job was deleted. What you did was not stored."""

    def __init__(self, job_id: int, attempt: int) -> None:
        super().__init__(f"job {job_id}: attempt {attempt} is no longer held here")
        self.job_id = job_id
        self.attempt = attempt


class NoLease(NotifyqError):
    """The runtime's own lease lapsed: it registers anew before it claims again. Never leaves the runtime."""


class JobNotFound(NotifyqError, LookupError):
    """No such job: it never was, was deleted, or its queue did not keep it."""


class JobFailed(NotifyqError):
    """The job whose result you waited for ended as failed or cancelled.

    ``state`` is ``"failed"`` or ``"cancelled"``; ``type`` and ``message`` are its last error's.
    """

    def __init__(self, job_id: int, state: str, type: str | None, message: str | None) -> None:
        super().__init__(": ".join(filter(None, (f"job {job_id} {state}", type, message))))
        self.job_id = job_id
        self.state = state
        self.type = type
        self.message = message


def shown(value: object, at_most: int = 100) -> str:
    """A value as a message quotes it: cut short, in ASCII. It may be anything, and raise anything when it is looked at."""
    try:
        return ascii(value)[:at_most]
    except Exception as error:  # too many digits or levels for Python, or a broken __repr__
        return f"(a {type(value).__name__} that cannot be shown: {type(error).__name__})"

"""Python to SQL and back: a send as statement and parameters, and the server's errors as ours."""

from __future__ import annotations

import contextlib
import re
from datetime import datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

import psycopg
from psycopg import sql

from ._codec import to_json
from ._errors import (
    ConnectionLost,
    InvalidData,
    InvalidOption,
    MissingPrivilege,
    NoLease,
    NotifyqError,
    SchemaMismatch,
    ServerTrouble,
    UnknownQueue,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = [
    "NOT_HELD",
    "as_ours",
    "check_option",
    "check_options",
    "check_schema_name",
    "flag",
    "flow_entry",
    "is_connection_loss",
    "many_entry",
    "plain_options",
    "raise_as_ours",
    "reason",
    "seconds",
    "send_call",
    "send_parameters",
    "send_statement",
    "text",
    "translated",
    "whole",
]

_CASTS = {
    "queue": "text",
    "data": "jsonb",
    "priority": "int",
    "delay": "interval",
    "due_at": "timestamptz",
    "retry_limit": "int",
    "retry_delay": "interval",
    "retry_delay_max": "interval",
    "retry_backoff": "boolean",
    "timeout": "interval",
    "expire_in": "interval",
    "headers": "jsonb",
    "id_key": "text",
    "key": "text",
    "throttle": "interval",
    "debounce": "interval",
}

SEND_OPTIONS = tuple(name for name in _CASTS if name not in ("queue", "data", "due_at"))

_DURATIONS = ("retry_delay", "retry_delay_max", "timeout", "expire_in", "throttle", "debounce")

_ELSEWHERE = {
    "start_after": "delay takes seconds, a timedelta or an aware datetime",
    "run_at": "delay takes an aware datetime",
    "eta": "delay takes an aware datetime",
    "countdown": "delay takes seconds",
    "due_at": "delay takes an aware datetime",
    "max_attempts": "retry_limit is the number of attempts after the first",
    "max_retries": "retry_limit",
    "singleton_key": "key, with the queue's policy; id_key makes a send idempotent",
    "singleton_seconds": "throttle takes seconds",
    "concurrency_key": "key, with the queue's key_limit",
    "partition_key": "key",
    "queueing_lock": "key, on a queue with policy='short'",
    "lock": "key, on a queue with policy='ordered' or 'singleton'",
    "job_id": "id_key makes a send idempotent",
    "unique_key": "id_key makes a send idempotent",
    "expire_in_seconds": "timeout limits an attempt, expire_in the wait for one",
    "visibility_timeout": "a runtime's lease protects its jobs, and timeout limits an attempt",
    "lock_duration": "a runtime's lease protects its jobs, and timeout limits an attempt",
    "name": "a worker is known by its queue",
}
"""Options of other systems, and what does their job here."""


KEY_MAX = 1000
"""Bytes; what ``sql/functions/10_send.sql`` takes, well within what an index entry may have."""

YEAR = 360.0 * 86_400
"""Seconds: as PostgreSQL compares an interval of a year."""
LONGEST = 100 * YEAR
"""Seconds: the longest duration that ``sql/functions/10_send.sql`` takes."""


def check_options(given: Iterable[str], allowed: Iterable[str], of: str) -> None:
    """Refuse option names that do not exist, saying what to use instead. Raises ``InvalidOption``."""
    allowed = tuple(allowed)
    for name in given:
        if name not in allowed:
            hint = _ELSEWHERE.get(name)
            raise InvalidOption(
                f"{of} has no option {name!r}" + (f": {hint}" if hint else "") + f" (options: {', '.join(allowed)})"
            )


def check_schema_name(schema: str) -> str:
    """Return the name if it is a plain lower-case identifier, which needs no quotes anywhere. Raises ``InvalidOption``."""
    if not isinstance(schema, str) or not re.fullmatch(r"[a-z_][a-z0-9_]{0,40}", schema) or schema.startswith("pg_"):
        raise InvalidOption(
            f"schema {schema!r}: use 1 to 41 lower-case letters, digits and underscores, not beginning with a digit or pg_"
        )
    return schema


def seconds(value: float | timedelta, option: str, *, least: float = -LONGEST) -> float:
    """A duration in seconds. Raises ``InvalidOption`` unless it is a finite number or a timedelta, ``least`` or more."""
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= LONGEST:
        raise InvalidOption(
            f"{option} must be a number of seconds or a timedelta, at most 100 years, not {shown(value)}"
        )
    if number < least:
        raise InvalidOption(f"{option} must be {least:g} seconds or more, not {value!r}")
    return float(number)


def text(value: Any, option: str, *, at_most: int | None = None) -> str:
    """Text that PostgreSQL takes, ``at_most`` so many bytes. Raises ``InvalidOption``."""
    try:
        if isinstance(value, str) and "\x00" not in value and (at_most is None or len(value.encode()) <= at_most):
            value.encode()
            return value
    except UnicodeEncodeError:
        pass
    limit = "" if at_most is None else f" of at most {at_most} bytes"
    raise InvalidOption(f"{option} must be text{limit} without NUL and lone surrogates, not {shown(value)}")


def flag(value: Any, option: str) -> bool:
    """A boolean. Raises ``InvalidOption``."""
    if not isinstance(value, bool):
        raise InvalidOption(f"{option} must be True or False, not {shown(value)}")
    return value


def whole(value: Any, option: str, least: int, most: int) -> int:
    """An int within bounds. Raises ``InvalidOption``."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidOption(f"{option} must be an int from {least} to {most}, not {shown(value)}")
    return value


def check_option(name: str, value: Any) -> Any:
    """The plain value of an option that jobs and queues have in common. Raises ``InvalidOption``."""
    match name:
        case "priority":
            return whole(value, name, -32768, 32767)
        case "retry_limit":
            return whole(value, name, 0, 1000)
        case "retry_backoff":
            return flag(value, name)
        case "id_key" | "key":
            return text(value, name, at_most=KEY_MAX)
        case "throttle" | "debounce":
            slot = seconds(value, name)
            if not 0.001 <= slot <= YEAR:
                raise InvalidOption(f"{name} must be from 0.001 seconds to a year, not {value!r}")
            return slot
        case "delay":
            return seconds(value, name)
    duration = seconds(value, name)
    if duration < 0 or (duration == 0 and name in ("timeout", "expire_in")):
        raise InvalidOption(
            f"{name} must be {'above zero' if duration == 0 else 'zero or more'} seconds, not {value!r}"
        )
    return duration


def _headers(value: Any) -> Any:
    if not isinstance(value, dict):
        raise InvalidOption(f"headers must be a dict, not {shown(value)}")
    try:
        to_json(value)
    except InvalidData as error:
        raise InvalidData(f"headers: {error}") from error
    return value


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as plain numbers and texts: durations in seconds, the moment of a delay as ``due_at``."""
    check_options(options, SEND_OPTIONS, "send")
    plain: dict[str, Any] = {}
    for name, value in options.items():
        if value is None:
            continue
        if name == "delay" and isinstance(value, datetime):
            if value.tzinfo is None:
                raise InvalidOption(f"delay: {value!r} has no time zone; use an aware datetime, e.g. datetime.now(UTC)")
            plain["due_at"] = value.isoformat()
        elif name == "headers":
            plain[name] = _headers(value)
        else:
            plain[name] = check_option(name, value)
    if "throttle" in plain and "debounce" in plain:
        raise InvalidOption("throttle and debounce exclude each other: give one of them")
    return plain


def send_parameters(queue: str, data: str, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The parameters of ``send_call`` and ``send_statement``. ``data`` is JSON text. Raises ``InvalidOption``."""
    if not options:
        return (queue, None if data == "null" else data, *_NO_OPTIONS)
    plain = plain_options(options)
    for name in (*_DURATIONS, "delay"):
        if name in plain:
            plain[name] = f"{plain[name]} s"
    if "headers" in plain:
        plain["headers"] = to_json(plain["headers"])
    plain["queue"] = queue
    plain["data"] = None if data == "null" else data
    return tuple(plain.get(name) for name in _CASTS)


_NO_OPTIONS = (None,) * (len(_CASTS) - 2)


def many_entry(data: str, options: Mapping[str, Any]) -> str:
    """One element of the JSON array that ``send_many`` takes. ``data`` is JSON text. Raises ``InvalidOption``."""
    if not options:
        return f'{{"data":{data}}}'
    plain = plain_options(options)
    return f'{{"data":{data},{to_json(plain)[1:]}' if plain else f'{{"data":{data}}}'


def flow_entry(
    name: str, queue: str, data: str, after: list[str | int], on_failure: str, options: Mapping[str, Any]
) -> str:
    """One element of the JSON array that ``send_flow`` takes. ``data`` is JSON text. Raises ``InvalidOption``."""
    place = {"name": name, "queue": queue, "after": after, "on_failure": on_failure}
    return f'{{"data":{data},{to_json(place | plain_options(options))[1:]}'


def send_call(function: str, placeholder: str) -> str:
    """A call of ``send`` or ``try_send`` with all its parameters; ``{}`` in ``placeholder`` is a parameter's number."""
    casts = (f"{placeholder.format(number)}::{cast}" for number, cast in enumerate(_CASTS.values(), 1))
    return f"select * from {function}({', '.join(casts)})"  # noqa: S608 - names and casts of our own


@lru_cache(maxsize=64)
def send_statement(schema: str) -> str:
    """A call of ``send`` in a schema, its parameters in the style of psycopg's cursors."""
    return send_call(sql.Identifier(schema, "send").as_string(None), "%s")


NOT_HELD = "NQ007"
"""The SQLSTATE of an attempt that is no longer its runtime's. Its error of ours has to be told which one it is."""

_ERRORS: dict[str, type[NotifyqError]] = {
    "NQ001": UnknownQueue,
    "NQ002": InvalidOption,
    "NQ003": InvalidOption,
    "NQ004": InvalidData,
    "NQ005": NoLease,
    "NQ006": InvalidOption,
    "3F000": SchemaMismatch,  # invalid_schema_name
    "42P01": SchemaMismatch,  # undefined_table
    "42883": SchemaMismatch,  # undefined_function
    "42501": MissingPrivilege,  # insufficient_privilege
}
"""SQLSTATEs, and what they mean when one of our functions is called."""


_PASSING = ("40", "53", "55", "57", "58")
"""SQLSTATE classes of trouble that passes: rollbacks, resources, locks, interventions, system errors."""


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise psycopg's errors as ours where we have one; others pass unchanged."""
    try:
        yield
    except psycopg.Error as error:
        raise_as_ours(error)


def raise_as_ours(error: psycopg.Error) -> NoReturn:
    """Raise the error of ours that means the same as this one, or this one."""
    ours = as_ours(error)
    if ours is None:
        raise error
    raise ours from error


def as_ours(error: psycopg.Error) -> NotifyqError | None:
    """The error of ours that means the same as this one of psycopg's, or None."""
    kind = _ERRORS.get(error.sqlstate or "")
    if kind is not None:
        return kind(_message(error, kind))
    if is_connection_loss(error):
        return ConnectionLost(f"the connection to the server broke: {_first_line(error)}")
    if _is_passing(error):
        return ServerTrouble(f"the server could not do it now: {_first_line(error)}")
    return None


def reason(error: Exception) -> str:
    """What went wrong, fit for a log: the server's details and contexts, which may hold rows, are left out."""
    return _first_line(error) if isinstance(error, psycopg.Error) and error.sqlstate else str(error)


def _is_passing(error: psycopg.Error) -> bool:
    """Whether the same may succeed later. The NOTIFY queue is full: else a limit is the statement's own fault."""
    return (error.sqlstate or "")[:2] in _PASSING or (error.sqlstate == "54000" and error.diag.source_file == "async.c")


def is_connection_loss(error: psycopg.Error) -> bool:
    """Whether an error means that the server went away, not that it refused the statement."""
    state = error.sqlstate
    if state is None:
        return isinstance(error, psycopg.OperationalError)
    # connection exceptions; shutdown, crash, not yet accepting; too many connections; read-only after a failover
    return state[:2] == "08" or state in ("57P01", "57P02", "57P03", "57P05", "53300", "25006")


def _message(error: psycopg.Error, kind: type[NotifyqError]) -> str:
    message = _first_line(error)
    if kind is SchemaMismatch:
        return f"{message}: the schema is not installed, or not this version's: run `notifyq migrate`"
    hint = error.diag.message_hint
    return f"{message}. {hint}" if hint else message


def _first_line(error: psycopg.Error) -> str:
    return (error.diag.message_primary or str(error)).strip().split("\n")[0]

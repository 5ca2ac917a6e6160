"""What can be a worker's function, and how it is to be run: the checks of a registration."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import attrs

from ._errors import InvalidOption, shown
from ._middleware import Middleware, check_middleware
from ._models import In, Job, Out
from ._sql import flag, seconds, whole

if TYPE_CHECKING:
    from datetime import timedelta

    from ._connection import TrioConnection

__all__ = ["TransactionWorker", "Worker", "WorkerOptions", "describe", "worker_of"]

TransactionWorker = Callable[[Job[In], "TrioConnection"], Awaitable[Out]]
"""The function of a worker whose jobs complete in its own transaction."""

LOWEST, HIGHEST = -(2**15), 2**15 - 1
"""Priorities."""


class WorkerOptions(TypedDict, total=False):
    """Options of a worker, see ``Queue.worker``."""

    concurrency: int
    poll_interval: float | timedelta | None
    middleware: Sequence[Middleware]
    min_priority: int | None
    max_priority: int | None
    key_limit: int | None


@attrs.frozen
class Worker:
    """The function registered on a queue and how to run it."""

    function: Callable[..., Any]
    kind: str
    """``async``, ``sync`` (runs in a thread) or ``batch``."""
    concurrency: int
    """Most calls at once in one process."""
    batch_size: int
    """Jobs in one call; 1 unless ``kind`` is ``batch``."""
    poll_interval: float | None
    """Seconds between looks for jobs that no notification told of; None: with every beat."""
    middleware: tuple[Any, ...] = ()
    """Around every call, inside the runtime's own."""
    transaction: bool = False
    """It takes a connection, too, and its jobs complete in the transaction that is open on it."""
    priorities: tuple[int, int] | None = None
    """The lowest and the highest priority that it takes; None: all."""
    key_limit: int | None = None
    """Most jobs of one key at once in one process; None: any number."""


def worker_of(
    function: Callable[..., Any],
    where: str,
    batch_size: int | None,
    *,
    concurrency: int = 10,
    poll_interval: float | timedelta | None = None,
    middleware: Sequence[Middleware] = (),
    transaction: bool = False,
    min_priority: int | None = None,
    max_priority: int | None = None,
    key_limit: int | None = None,
) -> Worker:
    """A function and its options as a worker; ``batch_size`` None: one job a call. Raises ``InvalidOption``."""
    if not callable(function) or inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise InvalidOption(f"{where}: {shown(function)} must be an async def or a plain function that returns a value")
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object whose __call__ is an async def
    )
    kind = "batch" if batch_size is not None else "async" if is_async else "sync"
    if kind == "batch" and not is_async:
        raise InvalidOption(f"{where}: a batch worker must be an async def")
    if flag(transaction, f"{where}: transaction") and kind != "async":
        raise InvalidOption(
            f"{where}: transaction=True is for an async def that takes one job and a connection,"
            + (" not for a batch worker" if kind == "batch" else " not for a function that runs in a thread")
        )
    for option, value in (("concurrency", concurrency), ("batch_size", 1 if batch_size is None else batch_size)):
        whole(value, f"{where}: {option}", 1, 10_000)
    _check_takes(function, where, ("the job", "the connection") if transaction else ("the job",))
    poll = None if poll_interval is None else seconds(poll_interval, f"{where}: poll_interval")
    if poll is not None and poll <= 0:
        raise InvalidOption(f"{where}: poll_interval must be above zero seconds, not {poll_interval!r}")
    layers = check_middleware(middleware, where)
    priorities = _priorities(min_priority, max_priority, where)
    if key_limit is not None:
        whole(key_limit, f"{where}: key_limit", 1, 10_000)
    return Worker(function, kind, concurrency, batch_size or 1, poll, layers, transaction, priorities, key_limit)


def describe(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', repr(function))}"


def _check_takes(function: Callable[..., Any], where: str, arguments: tuple[str, ...]) -> None:
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError):  # the latter for what is written in C and says nothing of its arguments
        how_many = "one argument, the job" if len(arguments) == 1 else f"two arguments, {' and '.join(arguments)}"
        raise InvalidOption(f"{where}: {describe(function)} must take {how_many}") from None


def _priorities(least: int | None, most: int | None, where: str) -> tuple[int, int] | None:
    if least is None and most is None:
        return None
    low = LOWEST if least is None else whole(least, f"{where}: min_priority", LOWEST, HIGHEST)
    high = HIGHEST if most is None else whole(most, f"{where}: max_priority", LOWEST, HIGHEST)
    if low > high:
        raise InvalidOption(f"{where}: min_priority {low} is above max_priority {high}")
    return low, high

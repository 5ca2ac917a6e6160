"""A typed queue: the declaration that producer and worker share, and the function registered on it.

Knows nothing of clients, connections or runtimes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, Unpack, overload

from ._codec import check_type, encode, from_json, read_json
from ._errors import InvalidData, InvalidOption, shown
from ._handler import TransactionWorker, Worker, WorkerOptions, describe, worker_of
from ._models import In, Job, JobHandle, Out, SendOptions
from ._schedule import Schedule, check_name, distinct
from ._sql import (
    YEAR,
    check_option,
    check_options,
    check_schema_name,
    flag,
    seconds,
    send_parameters,
    send_statement,
    whole,
)

if TYPE_CHECKING:
    from ._answers import Claimed
    from ._middleware import Middleware

__all__ = ["BatchResult", "Queue", "job_of"]

F = TypeVar("F", bound=Callable[..., Any])

BatchResult = Sequence[Out | Exception] | Mapping[int, Out | Exception] | None
"""What a batch worker returns: outcomes in the order of its jobs, or by job id (a job that is not mentioned
fails), or None: all completed without output. An exception, or a signal, is that job's failure."""

_OPTIONS = (
    "retry_limit",
    "retry_delay",
    "retry_delay_max",
    "retry_backoff",
    "timeout",
    "priority",
    "retention",
    "expire_in",
    "dead_letter",
    "max_data_bytes",
    "bell",
    "policy",
    "key_limit",
    "active_limit",
    "rate_limit",
    "rate_period",
    "key_rate_limit",
    "key_rate_period",
    "fair",
    "ageing",
)
_POLICIES = ("standard", "short", "singleton", "stately", "exclusive", "ordered")
_WORKER_OPTIONS = (
    "concurrency",
    "poll_interval",
    "middleware",
    "transaction",
    "min_priority",
    "max_priority",
    "key_limit",
)
_PATTERN = re.compile(r"[A-Za-z0-9_./*-]{1,100}")


def _is_pattern(name: Any) -> bool:
    return isinstance(name, str) and "*" in name and _PATTERN.fullmatch(name) is not None


class Queue(Generic[In, Out]):
    """A named lane of jobs whose data is an ``In`` and whose output is an ``Out``.

    Types are attrs or dataclass classes, builtin types, or any other that cattrs knows. Options left out keep what the
    queue has in the database (for a new one: 2 retries after 1 s, exponential, timeout 15 minutes, kept 7 days).
    """

    @overload
    def __init__(self: Queue[Any, Any], name: str, /, **options: Any) -> None: ...
    @overload
    def __init__(self: Queue[In, Any], name: str, data: type[In], /, **options: Any) -> None: ...
    @overload
    def __init__(self: Queue[In, None], name: str, data: type[In], output: None, /, **options: Any) -> None: ...
    @overload
    def __init__(self, name: str, data: type[In], output: type[Out], /, **options: Any) -> None: ...
    def __init__(
        self, name: str, data: Any = Any, output: Any = Any, /, *, schedules: Iterable[Schedule] = (), **options: Any
    ) -> None:
        """Declare a queue; nothing is asked of a database yet.

        Args:
            name: 1 to 100 letters, digits and ``_ . - /``. With ``*``, which stands for any run of them or none, it is a
                pattern: a runtime serves all queues that match, also those made later, each as if it was declared
                alone. Not the dead-letter queues of others: those need their own names. A pattern takes no options.
            data: the type of its jobs' data.
            output: the type that its worker returns; ``None``, as in an annotation, if it returns nothing.
            schedules: when it gets jobs by itself. A starting runtime makes the database's those: the last one wins.
            options: retry_limit (attempts after the first), retry_delay and retry_delay_max (seconds or timedelta),
                retry_backoff (exponential, or fixed), timeout (seconds of one attempt), priority, retention (seconds a
                finished job is kept; 0: not, None: for ever), expire_in (seconds in which it must start), dead_letter
                (a queue, which is then created with this one, or the name of one that exists), max_data_bytes, bell
                (``"always"`` or ``"never"``: senders that use PREPARE TRANSACTION need ``"never"``).

                By the key of its jobs (no key is one common key): policy, ``"standard"``, ``"short"`` (one may wait),
                ``"singleton"`` (one may be active), ``"stately"`` (both; a retrying one keeps the key), ``"exclusive"``
                (one may wait or be active) or ``"ordered"`` (in the order sent; an active, retrying or failed one holds
                up its key); key_limit (how many may be active); key_rate_limit and key_rate_period (starts per
                seconds); fair (keys take turns). Of the whole queue, in all processes: active_limit (how many may be
                active), rate_limit and rate_period (starts per seconds), ageing (seconds of waiting that make up for
                one step of priority). A start is the claim of a job.

        Raises:
            InvalidOption: a bad name, or an option that does not exist.
            InvalidData: a type that cannot be turned into JSON and back.
        """
        self.is_pattern = _is_pattern(name)
        if not self.is_pattern:
            check_name(name, "queue name")
        check_options(options, _OPTIONS, f"queue {name!r}")
        self.schedules = distinct(schedules, name, options.get("policy"))
        if self.is_pattern and (options or self.schedules):
            given = ", ".join(options) or "schedules"
            raise InvalidOption(f"queue {name!r} is a pattern: give {given} to the queues when you create them")
        self.name, self.data_type, self.output_type = name, data, type(None) if output is None else output
        for type_ in (self.data_type, self.output_type):
            try:
                check_type(type_)
            except InvalidData as error:
                raise InvalidData(f"queue {name!r}: {error}") from error
        try:
            self.options = _plain(options)
        except InvalidOption as error:
            raise InvalidOption(f"queue {name!r}: {error}") from None
        dead_letter = options.get("dead_letter")
        self.dead_letter: Queue[Any, Any] | None = dead_letter if isinstance(dead_letter, Queue) else None
        for schedule in self.schedules:
            try:
                self.encode(schedule.data)
            except InvalidData as error:
                raise InvalidData(f"schedule {schedule.name!r}: {error}") from error
        self.worker_function: Worker | None = None

    def single(self) -> Queue[In, Out]:
        """This queue, which must be one and not a pattern. Raises ``InvalidOption``."""
        if self.is_pattern:
            raise InvalidOption(f"{self.name!r} is a pattern, which only a runtime can serve: name one queue")
        return self

    def serves(self, name: str) -> bool:
        """Whether this declaration is for a queue of this name."""
        if not self.is_pattern:
            return name == self.name
        return re.fullmatch(".*".join(map(re.escape, self.name.split("*"))), name) is not None

    def named(self, name: str) -> Queue[In, Out]:
        """The declaration of one queue that it serves: the same types and worker."""
        one = copy.copy(self)
        one.name, one.is_pattern = name, False
        return one

    def with_dead_letters(self) -> list[Queue[Any, Any]]:
        """This queue after those it needs: its dead-letter queue, and that one's."""
        if self.dead_letter is None:
            return [self]
        return [*self.dead_letter.with_dead_letters(), self]

    def __repr__(self) -> str:
        return f"Queue({self.name!r})"

    def encode(self, data: In) -> str:
        """Data as JSON text. Raises ``InvalidData``."""
        try:
            return encode(data, self.data_type)
        except InvalidData as error:
            raise InvalidData(f"data for queue {self.name!r}: {error}") from error

    def statement(
        self, data: In, *, schema: str = "notifyq", **options: Unpack[SendOptions]
    ) -> tuple[str, tuple[Any, ...]]:
        """Give the ``(sql, params)`` that sends one job, to execute on any psycopg connection, sync or asyncio.

        It returns one row with the job's id, and the job appears when the caller's transaction commits. Raises
        ``InvalidData`` and ``InvalidOption``.
        """
        return (
            send_statement(check_schema_name(schema)),
            send_parameters(self.single().name, self.encode(data), options),
        )

    @overload
    def worker(self, function: Callable[[Job[In]], Awaitable[Out]], /) -> Callable[[Job[In]], Awaitable[Out]]: ...
    @overload
    def worker(self, function: Callable[[Job[In]], Out], /) -> Callable[[Job[In]], Out]: ...
    @overload
    def worker(
        self, /, *, transaction: Literal[True], **options: Unpack[WorkerOptions]
    ) -> Callable[[TransactionWorker[In, Out]], TransactionWorker[In, Out]]: ...
    @overload
    def worker(
        self, /, *, transaction: Literal[False] = False, **options: Unpack[WorkerOptions]
    ) -> Callable[[Callable[[Job[In]], Awaitable[Out] | Out]], Callable[[Job[In]], Awaitable[Out] | Out]]: ...
    def worker(self, function: Any = None, /, **options: Any) -> Any:
        """Register the function that handles this queue's jobs, an ``async def`` or a plain function (run in a thread).

        Args:
            function: takes a ``Job`` and returns its output. Used as a decorator, with or without options.
            options: ``concurrency``, the most calls at once in one process (default 10); ``poll_interval``, seconds
                between looks for jobs that no notification told of (default: with every beat, about 5 s);
                ``middleware``, around every call, inside the runtime's own; ``min_priority`` and ``max_priority``, to
                take only jobs of these priorities and what lies between (default: all); ``key_limit``, the most jobs of
                one key at once in one process, where the queue's own counts all processes. What this process may not
                have stays ready for others, and each of its claims reads past it: with thousands of one key, the queue's
                own ``key_limit``, whose jobs wait aside, is cheaper.
            transaction: the function, an ``async def``, takes ``(job, connection)``. The connection has a transaction
                open: what is written there and the job's completion commit together. If it raises, times out, is
                cancelled, or the job was taken away meanwhile, nothing of it is kept. At most ``pool_size - 1`` of the
                runtime run at once; a job that gets no connection is handed back.

        Raises:
            InvalidOption: a second worker, an option that does not exist, or a function of the wrong kind.
        """
        self._check_worker_options(options, _WORKER_OPTIONS)
        if function is None:
            return lambda function: self._register(function, None, **options)
        return self._register(function, None, **options)

    def batch_worker(
        self,
        /,
        *,
        batch_size: int,
        concurrency: int = 1,
        poll_interval: float | timedelta | None = None,
        middleware: Sequence[Middleware] = (),
        min_priority: int | None = None,
        max_priority: int | None = None,
        key_limit: int | None = None,
        **unknown: Any,
    ) -> Callable[[Callable[[list[Job[In]]], Awaitable[BatchResult[Out]]]], Any]:
        """Register an ``async def`` that handles up to ``batch_size`` jobs in one call, see ``BatchResult``.

        It is called with what is there and does not wait for a full batch. If it raises, all its jobs fail.

        Raises:
            InvalidOption: as for ``worker``.
        """
        self._check_worker_options(unknown, ("batch_size", *_WORKER_OPTIONS))
        return lambda function: self._register(
            function,
            batch_size,
            concurrency=concurrency,
            poll_interval=poll_interval,
            middleware=middleware,
            min_priority=min_priority,
            max_priority=max_priority,
            key_limit=key_limit,
            **unknown,
        )

    def _check_worker_options(self, options: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
        if "batch_size" in options and "batch_size" not in allowed:
            raise InvalidOption(f"worker of queue {self.name!r}: use batch_worker(batch_size=...) for jobs in batches")
        check_options(options, allowed, f"the worker of queue {self.name!r}")

    def _register(self, function: F, batch_size: int | None, **options: Any) -> F:
        where = f"worker of queue {self.name!r}"
        for bound in ("min_priority", "max_priority"):
            if options.get(bound) is not None and self.options.get("ageing") is not None:
                raise InvalidOption(f"{where}: with ageing all priorities stand in one line, so there is no {bound}")
        if self.worker_function is not None:
            raise InvalidOption(f"{where}: {describe(self.worker_function.function)} is registered on it already")
        self.worker_function = worker_of(function, where, batch_size, **options)
        return function


def job_of(claimed: Claimed, queue: Queue[Any, Any], handle: JobHandle | None = None) -> Job[Any]:
    """A claimed job as its worker sees it. Raises ``InvalidData`` for data that is not of the queue's type."""
    return Job(
        claimed.id,
        queue.name,
        claimed.attempt,
        claimed.retry_limit,
        claimed.priority,
        claimed.timeout,
        datetime.fromtimestamp(claimed.sent_at, UTC),
        from_json(read_json(claimed.data), queue.data_type),
        {} if claimed.headers is None else read_json(claimed.headers),
        read_json(claimed.provenance),
        claimed.key,
        claimed.as_of,
        handle,
    )


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Queue options as the JSON document that create_queue() takes: seconds, names."""
    return {name: _plain_option(name, value) for name, value in options.items()}


def _plain_option(name: str, value: Any) -> Any:
    match name:
        case "dead_letter":
            if value is None or isinstance(value, Queue):
                return None if value is None else value.single().name
            return check_name(value, "dead_letter")
        case "retention" | "expire_in" if value is None:
            return None
        case "max_data_bytes":
            return whole(value, name, 1, 2**31 - 1)
        case "key_limit" | "active_limit" | "rate_limit" | "key_rate_limit":
            return None if value is None else whole(value, name, 1, 2**31 - 1)
        case "rate_period" | "key_rate_period" | "ageing":
            return None if value is None else _period(name, value)
        case "fair":
            return flag(value, name)
        case "policy":
            if not isinstance(value, str) or value not in _POLICIES:
                raise InvalidOption(f"policy must be one of {', '.join(_POLICIES)}, not {shown(value)}")
            return value
        case "bell":
            if not isinstance(value, str) or value not in ("quiet", "always", "never"):
                raise InvalidOption(f"bell must be 'quiet', 'always' or 'never', not {shown(value)}")
            return value
    return check_option(name, value)


def _period(name: str, value: Any) -> float:
    least, most, of = (0.001, 86_400.0, "day") if name == "ageing" else (0.01, YEAR, "year")
    number = seconds(value, name)
    if not least <= number <= most:
        raise InvalidOption(f"{name} must be from {least:g} seconds to a {of}, not {value!r}")
    return number

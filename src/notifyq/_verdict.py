"""What an attempt's end means: from what the worker returned or raised to the outcome that is written. Pure."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ._codec import encode
from ._errors import InvalidData, InvalidOption
from ._models import Completed, Discarded, Failed, Job, Outcome, Released, Snoozed
from ._signals import Discard, Fail, Retry, Snooze
from ._sql import seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._answers import Claimed

__all__ = ["data_invalid", "interrupted", "judge", "judge_batch", "timed_out"]

MESSAGE_LIMIT = 2_000
TRACEBACK_LIMIT = 16_000
"""Characters kept of an error's message and traceback; of the traceback the end, where the error is."""


def judge(
    job: Job[Any], result: Any, error: BaseException | None, *, type_: Any, limit: int, elapsed: float
) -> Outcome:
    """The outcome of one job: ``result`` is of ``type_``, at most ``limit`` bytes as JSON; ``elapsed`` seconds."""
    if error is not None:
        return _failure(job, error)
    if result is None:
        return Completed(job.id, job.attempt, "null", elapsed, job._as_of)
    try:
        output = encode(result, type_)
        if len(output) > limit or len(output.encode()) > limit:
            raise InvalidData(f"output is over the limit of {limit} bytes")
    except Exception as invalid:  # what it raises when it is looked at is the worker's, too
        return Failed(job.id, job.attempt, "output_invalid", _short(invalid), final=True, as_of=job._as_of)
    return Completed(job.id, job.attempt, output, elapsed, job._as_of)


def judge_batch(
    jobs: list[Job[Any]], result: Any, error: BaseException | None, *, type_: Any, limit: int, elapsed: float
) -> list[Outcome]:
    """What a batch worker returned or raised, as one outcome a job."""

    def one(job: Job[Any], value: Any) -> Outcome:
        raised = value if isinstance(value, BaseException) else None
        return judge(job, None if raised else value, raised, type_=type_, limit=limit, elapsed=elapsed)

    if error is not None or result is None:
        return [one(job, error) for job in jobs]
    try:
        return _matched(jobs, result, one)
    except Exception as raised:  # a mapping or sequence of the worker's own
        return [one(job, raised) for job in jobs]


def _matched(jobs: list[Job[Any]], result: Any, one: Callable[[Job[Any], Any], Outcome]) -> list[Outcome]:
    if isinstance(result, Mapping):
        return [
            one(job, result[job.id])
            if job.id in result
            else Failed(
                job.id,
                job.attempt,
                "not_settled",
                "the batch worker returned no outcome for this job",
                as_of=job._as_of,
            )
            for job in jobs
        ]
    if isinstance(result, Sequence) and not isinstance(result, str) and len(result) == len(jobs):
        return [one(job, value) for job, value in zip(jobs, result, strict=True)]
    wrong = InvalidData(
        f"a batch worker returns None, {len(jobs)} outcomes for {len(jobs)} jobs, or a mapping by job id,"
        f" not {_short(result, repr)[:200]}"
    )
    return [one(job, wrong) for job in jobs]


def interrupted(job: Job[Any], reason: str | None) -> Outcome | None:
    """The outcome of an attempt that was cancelled; None if it is no longer ours to say."""
    match reason:
        case "lost":
            return None
        case "cancel":
            return Discarded(job.id, job.attempt, job._as_of)
        case "unstarted":
            return Released(job.id, job.attempt, job._as_of)
        case "shutdown":
            # The last attempt is handed back unspent: stopping a process must not make dead letters.
            if job.attempt > job.retry_limit:
                return Released(job.id, job.attempt, job._as_of)
            return Failed(
                job.id, job.attempt, "shutdown", "its runtime stopped before it ended", retry_in=0, as_of=job._as_of
            )
        case _:
            return timed_out(job)


def timed_out(job: Job[Any]) -> Failed:
    """The attempt took longer than it may."""
    return Failed(job.id, job.attempt, "timeout", f"not done within {job.timeout:g} s", as_of=job._as_of)


def data_invalid(claimed: Claimed, error: Exception) -> Failed:
    """The data is not of the declared type: trying again can't help."""
    return Failed(claimed.id, claimed.attempt, "data_invalid", _short(error), final=True, as_of=claimed.as_of)


def failure_of(job: Job[Any], error: Exception | str) -> Failed:
    """How an attempt fails that was made by hand. Raises ``InvalidOption`` for what fails none."""
    if not isinstance(error, Exception):
        return Failed(job.id, job.attempt, "Error", _short(error))
    outcome = _failure(job, error)
    if not isinstance(outcome, Failed):
        raise InvalidOption(f"fail() takes an exception, Fail or Retry, or text, not {type(error).__name__}")
    return outcome


def _failure(job: Job[Any], error: BaseException) -> Outcome:
    whole = error
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:  # trio's nurseries make one of each
        error = error.exceptions[0]
    try:
        if isinstance(error, Snooze):
            return Snoozed(job.id, job.attempt, max(0.0, seconds(error.delay, "Snooze")), job._as_of)
        if isinstance(error, Discard):
            return Discarded(job.id, job.attempt, job._as_of)
        if isinstance(error, Retry):
            delay = None if error.delay is None else max(0.0, seconds(error.delay, "Retry"))
            return Failed(job.id, job.attempt, "Retry", _short(error.reason), retry_in=delay, as_of=job._as_of)
    except InvalidOption as invalid:
        error = whole = invalid
    raised = error
    try:
        text = "".join(traceback.format_exception(whole))
    except Exception as broken:  # an exception may do anything when it is looked at
        text = f"(its traceback could not be written: {type(broken).__name__})"
    return Failed(
        job.id,
        job.attempt,
        type(raised).__name__,
        _short(raised),
        _clean(text if len(text) <= TRACEBACK_LIMIT else "[…]\n" + text[-TRACEBACK_LIMIT:]),
        final=isinstance(raised, Fail),
        as_of=job._as_of,
    )


def _short(value: object, say: Callable[[Any], str] = str) -> str:
    """A value in words, within the limit. Saying it is the user's code, too."""
    try:
        text = say(value)
    except Exception as broken:
        text = f"(it could not be written: {type(broken).__name__})"
    return _clean(text if len(text) <= MESSAGE_LIMIT else text[:MESSAGE_LIMIT] + "[…]")


def _clean(text: str) -> str:
    """Text that jsonb takes: no NUL, no lone surrogates."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()

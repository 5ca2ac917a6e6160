"""What a handler raised: whether that ends its attempt, or more. Looks at what is being cancelled, and at nothing else."""

from __future__ import annotations

import math

import trio

__all__ = ["being_cancelled", "ends_all", "survived"]


def ends_all(error: BaseException) -> bool:
    """Whether there is something in it that no handler may raise: neither an ``Exception`` nor what trio cancels with."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(ends_all, error.exceptions))
    return not isinstance(error, Exception | trio.Cancelled)


def being_cancelled() -> bool:
    """Whether a scope around the caller has been cancelled."""
    return trio.current_effective_deadline() == -math.inf


def survived(error: BaseException) -> Exception:
    """What an attempt failed with. Raises what ends more than the attempt, or belongs to a scope around the caller.

    A ``Cancelled`` without such a scope was kept by the handler, and would take every nursery around it by surprise.
    """
    if isinstance(error, Exception):
        return error
    if being_cancelled() or ends_all(error):
        raise error
    stray = RuntimeError("it raised a trio.Cancelled though nothing cancels it: raise only what trio has just raised")
    stray.__cause__ = error
    return stray

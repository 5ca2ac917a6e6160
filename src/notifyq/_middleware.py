"""Middleware: layers around every call of a worker."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from ._errors import InvalidOption, shown

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

__all__ = ["Middleware", "check_middleware", "wrap"]

Middleware = Any
"""``async def middleware(job, call_next)``, which returns ``await call_next(job)``; or a function of the job that
returns an async context manager. Around a batch it gets the list of jobs."""


def check_middleware(layers: Iterable[Middleware], of: str) -> tuple[Middleware, ...]:
    """Refuse what can't be called as middleware. Raises ``InvalidOption``."""
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise InvalidOption(f"middleware of {of} must be a sequence of functions, not {shown(layers)}")
    layers = tuple(layers)
    for layer in layers:
        arguments = (object(), object()) if inspect.iscoroutinefunction(layer) else (object(),)
        try:
            inspect.signature(layer).bind(*arguments)
        except Exception:  # to say that it can't be called, it looks at it
            raise InvalidOption(
                f"middleware of {of}: {shown(layer)} must be an async def that takes (job, call_next),"
                " or a function of the job that returns an async context manager"
            ) from None
    return layers


def wrap(innermost: Callable[[Any], Awaitable[Any]], layers: Sequence[Middleware]) -> Callable[[Any], Awaitable[Any]]:
    """Put layers around a call, the first one outermost."""
    call = innermost
    for layer in reversed(layers):
        call = _around(layer, call)
    return call


def _around(layer: Middleware, call_next: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    if inspect.iscoroutinefunction(layer):

        async def wrapped(job: Any) -> Any:
            return await layer(job, call_next)

        return wrapped

    async def within(job: Any) -> Any:
        context = layer(job)
        if not isinstance(context, AbstractAsyncContextManager):
            raise InvalidOption(f"middleware {shown(layer)} must return an async context manager, not {shown(context)}")
        async with context:
            return await call_next(job)

    return within

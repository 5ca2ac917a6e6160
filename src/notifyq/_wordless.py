"""Exceptions without what they say."""

from __future__ import annotations

import traceback

__all__ = ["wordless"]


def wordless(error: BaseException) -> str:
    """Types and tracebacks of an exception, or of all that are in a group, without what they say: it may hold row data."""
    if isinstance(error, BaseExceptionGroup):
        return "\n".join(wordless(one) for one in error.exceptions)
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    stack = "".join(traceback.format_tb(error.__traceback__))
    return f"Traceback (most recent call last):\n{stack}{name}"

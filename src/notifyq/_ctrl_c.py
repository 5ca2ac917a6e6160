"""For commands that start servers and processes: whatever ends them, they stop and remove what they have started."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ctrl_c_alone", "every_end_is_ctrl_c"]


@contextlib.contextmanager
def ctrl_c_alone() -> Iterator[None]:
    """A ``KeyboardInterrupt`` that comes out of nurseries comes without their groups, for click to say it in a word."""
    try:
        yield
    except BaseExceptionGroup as group:
        if group.split(KeyboardInterrupt)[1] is None:
            raise KeyboardInterrupt from None
        raise


@contextlib.contextmanager
def every_end_is_ctrl_c() -> Iterator[None]:
    """SIGTERM, and SIGHUP unless it is ignored (``nohup``), act as Ctrl-C in this block: as ``KeyboardInterrupt``.

    Also in a shell's background, where SIGINT is ignored. Only in the main thread.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # for trio, too, which minds this one only
    for number in (signal.SIGTERM, signal.SIGHUP):
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with ctrl_c_alone():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

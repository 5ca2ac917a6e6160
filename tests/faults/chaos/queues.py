"""The queues that carry the load, as senders and workers know them."""

from __future__ import annotations

from notifyq import Queue

__all__ = ["ALL", "ALONE", "BULK", "DEAD", "LUCK", "STEP"]

BULK = Queue("bulk", int, int, retry_limit=100, retry_delay=0.05, timeout=60, retention=None)
"""Its data is how long the handler takes, in milliseconds; below zero it blocks the event loop.
It has attempts enough for whatever is done to its workers."""

DEAD = Queue("dead", int, int, retention=None)
"""The dead letters of ``luck``. Nobody works on them: each is counted."""

LUCK = Queue(
    "luck", int, int, retry_limit=3, retry_delay=0.05, timeout=60, dead_letter=DEAD, retention=None, priority=1
)
"""One attempt in four fails."""

ALONE = Queue("alone", int, policy="singleton", retry_limit=100, retry_delay=0.05, timeout=60, retention=None)
"""One job of a key at a time; each writes down its span in the transaction that completes it."""

STEP = Queue("step", int, int, retry_limit=100, retry_delay=0.05, timeout=60, retention=None)
"""Jobs of flows: the last one of a flow comes after the others."""

ALL = (BULK, LUCK, ALONE, STEP)

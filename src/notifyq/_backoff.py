"""How long to wait before trying the server again. Pure: the random numbers come from the caller.

The delay between a job's attempts is SQL's business: ``notifyq.backoff()`` in ``sql/functions/50_fail.sql``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

__all__ = ["reconnect_delay"]

BASE = 0.1
CAP = 10.0


def reconnect_delay(failures: int, random: Random) -> float:
    """Seconds to wait after the n-th failure in a row (from 1): evenly from ``[d/2, d]``, ``d = min(CAP, BASE * 2**(n-1))``.

    "Equal jitter" of the AWS Architecture Blog, *Exponential Backoff And Jitter* (2015): a fleet spreads out, and
    nobody hammers a server that is starting.
    """
    ceiling = min(CAP, BASE * 2.0 ** min(failures - 1, 60))
    return ceiling * random.uniform(0.5, 1.0)

"""What the functions of ``sql/functions`` answer a runtime."""

from __future__ import annotations

import attrs

__all__ = ["Beat", "Claimed", "Haul", "QueueInfo", "Served", "Stance"]


@attrs.frozen
class QueueInfo:
    """A queue as the runtime needs it."""

    number: int
    channel: str
    retry_limit: int
    kept: bool
    max_data_bytes: int


@attrs.frozen
class Served:
    """A queue that a runtime serves, as ``served()`` finds it."""

    name: str
    paused: bool
    fair: bool
    gated: bool
    """It has rules: whatever moves its tickets locks its gate, which somebody else may hold for long."""
    info: QueueInfo


@attrs.define(eq=False)
class Claimed:
    """A job as ``claim()`` returns it, its JSON not read yet. Field order is the function's column order."""

    id: int
    attempt: int
    number: int
    priority: int
    retry_limit: int
    timeout: float
    sent_at: float
    """In seconds of the epoch."""
    data: str | None
    headers: str | None
    provenance: str | None
    key: str | None
    as_of: float | None = attrs.field(default=None, init=False)
    """When its claim had been made, by the server's clock, in seconds of the epoch; the same attempt's next one is later."""
    claimed_at: float = attrs.field(default=float("-inf"), init=False)
    """When its claim was answered, on ``trio.current_time()``'s clock."""


@attrs.frozen
class Haul:
    """What a claim brought."""

    jobs: list[Claimed]
    left: bool | None = None
    """Whether there are more tickets; None: not known. See ``claim()`` in ``sql/functions/30_claim.sql``."""
    due_floor: float | None = None
    """No ticket that could be seen is due before it, in seconds of the epoch; None: not known."""

    def is_full(self, asked_for: int) -> bool:
        """Whether another claim may bring more at once."""
        return len(self.jobs) >= asked_for and self.left is not False


@attrs.frozen
class Stance:
    """What ``stand_free()`` told of one queue: see ``sql/functions/20_bell.sql``."""

    stands: bool
    passed: bool
    ready: bool
    due: float | None
    clock: float


@attrs.frozen
class Beat:
    """What ``beat()`` told: see ``sql/functions/60_lease.sql``."""

    renewed: bool
    cancels: list[int]
    ready: list[int] | None
    due_in: dict[str, float]
    lapse_in: float | None
    schedules: int
    clock: float
    serves: str | None
    fleet: int
    place: int

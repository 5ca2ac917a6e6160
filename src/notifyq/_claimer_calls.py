"""What a claimer asks of the database and of the rest of its process, bound to its queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._answers import Claimed, Haul, Stance

__all__ = ["ClaimerCalls"]


@attrs.frozen(kw_only=True, eq=False)
class ClaimerCalls:
    """What returns no awaitable never waits."""

    claim: Callable[[int, dict[int, int] | None, float | None], Awaitable[Haul]]
    """``claim(how_many, floors, due_floor)``: from these floors by priority and due on, or from the beginning."""
    claim_at_once: Callable[[int, Callable[[Haul | Exception], None]], bool]
    """``claim_at_once(how_many, answered)`` sends a claim from the beginning, if that can be done now; ``answered`` then
    gets what it brought or the error."""
    next_due: Callable[[float | None], Awaitable[tuple[float | None, float]]]
    """``next_due(due_floor)``: when the next ticket is due that is not due before that, and what time the server has."""
    stand_free: Callable[[float | None], Awaitable[Stance]]
    """``stand_free(due_floor)`` makes senders ring, and says whether all do, and whether there is anything to look for. It
    raises ``ConnectionLost`` if that can't be."""
    stand_busy: Callable[[], object]
    """After that senders do not ring."""
    stand_far: Callable[[Callable[[], object] | None], object]
    """Looks from the beginning are dear, so that it has to be told of what appears below the floors. What is given is called
    when others begin to tell. None: no longer."""
    say_taken: Callable[[str], object]
    """``say_taken(numbers)`` tells other runtimes what they need not look for."""
    release: Callable[[Claimed], object]
    """Hands back a job that did not start."""
    gone: Callable[[], object]
    """The queue was not there."""

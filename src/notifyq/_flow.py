"""A flow: jobs that wait for each other, put together before they are sent in one call.

Knows nothing of clients; ``Client.send_flow`` sends it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Generic, Literal, Unpack, get_args

import attrs

from ._errors import InvalidOption, shown
from ._models import In, Out, SendOptions, Sent
from ._queue import Queue
from ._sql import flow_entry, text, whole

__all__ = ["Flow", "OnFailure", "SentFlow", "Step"]

OnFailure = Literal["cancel", "run", "wait"]
"""What a job does when one it comes after fails or is cancelled: be cancelled (and with it what waits for it), run all the
same, or wait until that one is retried and completes."""


@attrs.frozen(eq=False)
class Step(Generic[Out]):
    """A job of a flow that has not been sent."""

    name: str
    queue: Queue[Any, Out] = attrs.field(repr=lambda queue: repr(queue.name))


class Flow:
    """Jobs and what each comes after::

    flow = notifyq.Flow()
    parts = [flow.add(fetch, url) for url in urls]
    flow.add(merge, Merge("all"), after=parts, on_failure="run")
    sent = await nq.send_flow(flow)
    """

    def __init__(self) -> None:
        self._entries: list[str] = []
        self._steps: dict[str, Step[Any]] = {}
        self._parents: list[tuple[str, Sent[Any]]] = []

    def add(
        self,
        queue: Queue[In, Out],
        data: In,
        /,
        *,
        name: str | None = None,
        after: Iterable[Step[Any] | Sent[Any] | int] = (),
        on_failure: OnFailure = "cancel",
        **options: Unpack[SendOptions],
    ) -> Step[Out]:
        """Add a job; it starts when all it comes after have completed.

        Args:
            queue: where it is sent; the queue must exist when the flow is sent.
            data: of the queue's declared type.
            name: its name in this flow, for ``Job.parents`` and to look at; default: the queue's name and a number.
            after: jobs of this flow, or jobs sent before, given as ``Sent`` or id.
            on_failure: see ``OnFailure``.
            options: see ``SendOptions``; a flow's job can't be throttled or debounced.

        Raises:
            InvalidData: it is not of that type, not JSON, or too large.
            InvalidOption: a name used twice, a step of another flow, a bad option.
        """
        if not isinstance(queue, Queue):
            raise InvalidOption(f"give the queue's declaration, not {shown(queue)}: notifyq.Queue(name)")
        queue = queue.single()
        name = self._unused(queue.name) if name is None else text(name, "name")
        where = f"job {name!r} of the flow"
        if not name or name in self._steps:
            raise InvalidOption(f"{where}: give each a name of its own")
        if on_failure not in get_args(OnFailure):
            raise InvalidOption(f"{where}: on_failure must be cancel, run or wait, not {shown(on_failure)}")
        for option in ("throttle", "debounce"):
            if options.get(option) is not None:
                raise InvalidOption(f"{where}: a job of a flow can't have {option}: send it by itself")
        if not isinstance(after, Iterable) or isinstance(after, str | bytes):
            raise InvalidOption(f"{where}: after must be a list of jobs, not {shown(after)}")
        after = list(after)
        parents = [self._parent(parent, where) for parent in after]
        self._entries.append(flow_entry(name, queue.name, queue.encode(data), parents, on_failure, options))
        self._steps[name] = step = Step(name, queue)
        self._parents += [(where, parent) for parent in after if isinstance(parent, Sent)]
        return step

    def _unused(self, queue: str) -> str:
        numbers = itertools.count(len(self._entries) + 1)
        return next(name for number in numbers if (name := f"{queue}-{number}") not in self._steps)

    def _parent(self, parent: Step[Any] | Sent[Any] | int, where: str) -> str | int:
        if isinstance(parent, Step):
            if self._steps.get(parent.name) is not parent:
                raise InvalidOption(f"{where}: it comes after {parent.name!r}, which is not in this flow")
            return parent.name
        return whole(
            parent.id if isinstance(parent, Sent) else parent, f"{where}: the id of a job before it", 1, 2**63 - 1
        )

    def __len__(self) -> int:
        return len(self._entries)

    def as_json(self, schema: str) -> str:
        """The array that ``notifyq.send_flow()`` takes. Raises ``InvalidOption`` for a job before it of another schema."""
        for where, parent in self._parents:
            try:
                parent.id_in(schema)
            except InvalidOption as error:
                raise InvalidOption(f"{where}: it comes after one that is not here: {error}") from None
        return f"[{','.join(self._entries)}]"

    def sent(self, ids: dict[str, int], schema: str) -> SentFlow:
        """What was sent, by the ids that the server gave."""
        return SentFlow({name: Sent(ids[name], True, step.queue, schema=schema) for name, step in self._steps.items()})


@attrs.frozen
class SentFlow:
    """The jobs of a flow that was sent: ``sent[step]``, or by name in ``jobs``."""

    jobs: dict[str, Sent[Any]]

    def __getitem__(self, step: Step[Out]) -> Sent[Out]:
        return self.jobs[step.name]

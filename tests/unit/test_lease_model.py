"""The lease's proof: a model of claims, settles, beats and rescues of one job, and every order in which the steps can be.

The steps are the functions of sql/functions: ``claim()`` (30), ``complete()`` (40), ``release()`` (50; a snooze is the
same), ``beat()``, ``register()``, ``held()`` and ``rescue()`` (60). Each is done at once but for a claim, which holds locks
until it commits. What a runtime sends is done by the server at any later time, even when it has given up on the answer, or
has died. An answer may be lost, and then what was asked is sent again, while the runtime goes on. A runtime may stand still
at any step, for as long as the others take; a lease may lapse at any time. Once a runtime dies, or the server crashes and
forgets a claim that was not flushed: the job is where it was, its runtime does not know, and what was on its way is gone.

The attempt in a settle adds nothing where ``as_of`` is said, too: it is for those who settle by hand.

In every state:

- the job was completed once at most;
- a runtime that runs an attempt and has kept its lease since it claimed that has the job: nobody else can take or settle it;
- an active job belongs to a registered runtime, so that its lease, or its end, brings the job back;
- the job can still come to its end, without another fault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

RETRY_LIMIT = 1


class Ticket(NamedTuple):
    """The job's row: in ``ready``, ``active`` or ``archive``."""

    place: str = "ready"
    spent: int = 0
    """Attempts, the one under way among them."""
    holder: int | None = None
    claim: int = 0
    """Which claim this is, of all; ``claimed_at``."""
    locked: bool = False


class Call(NamedTuple):
    """A settle on its way to the server."""

    kind: str
    runtime: int
    attempt: int
    claim: int
    """As of which claim: ``as_of``."""


class Runtime(NamedTuple):
    at: str = "idle"
    attempt: int = 0
    claim: int = 0
    lost: bool = False
    """Its lease was, since it made the claim."""
    lease: str = "live"
    """``live``, ``lapsed``, ``taken`` (a rescue has left the row, and taken other jobs), or ``none``: there is no row."""
    locked: bool = False
    outcome: Call | None = None
    """A settle that was not answered yet."""


class State(NamedTuple):
    ticket: Ticket = Ticket()
    runtimes: tuple[Runtime, ...] = (Runtime(), Runtime())
    calls: frozenset[Call] = frozenset()
    completions: int = 0
    broken: bool = False
    """A runtime has died, or the server has crashed."""


class Rules(NamedTuple):
    """What may be left out, to see that the model notices."""

    claim_needs_lease: bool = True
    claim_locks_runtime: bool = True
    fence_release: bool = True
    fence_complete: bool = True
    """By ``as_of``."""
    strays_are_released: bool = True
    taken_is_not_renewed: bool = True
    most_claims: int = 2
    server_crashes: bool = True


def put(state: State, number: int, runtime: Runtime) -> State:
    return state._replace(runtimes=(*state.runtimes[:number], runtime, *state.runtimes[number + 1 :]))


def runtime_steps(state: State, number: int, rules: Rules) -> Iterator[State]:
    me, ticket = state.runtimes[number], state.ticket
    match me.at:
        case "dead":
            return
        case "idle":
            if ticket.place == "ready" and not ticket.locked and ticket.claim < rules.most_claims:
                if me.lease == "live" or not rules.claim_needs_lease:  # claim(), until its commit
                    claiming = me._replace(at="claiming", locked=rules.claim_locks_runtime)
                    yield put(state, number, claiming)._replace(ticket=ticket._replace(locked=True))
            elif rules.strays_are_released and (ticket.place, ticket.holder, me.outcome) == ("active", number, None):
                stray = Call("release", number, ticket.spent, ticket.claim)  # held()
                yield put(state, number, me._replace(outcome=stray))
        case "claiming":
            undone = put(state, number, me._replace(at="idle", locked=False))
            yield undone._replace(ticket=ticket._replace(locked=False))
            claimed = Ticket("active", ticket.spent + 1, number, ticket.claim + 1)
            mine = me._replace(at="waits", attempt=claimed.spent, claim=claimed.claim, lost=False, locked=False)
            yield put(state, number, mine)._replace(ticket=claimed)
            unknown = me._replace(at="idle", locked=False)  # the answer is lost
            yield put(state, number, unknown)._replace(ticket=claimed)
        case "waits":
            yield put(state, number, me._replace(at="runs"))
            if me.outcome is None:
                release = Call("release", number, me.attempt, me.claim)
                yield put(state, number, me._replace(at="idle", outcome=release))
        case "runs":
            if me.outcome is None:
                complete = Call("complete", number, me.attempt, me.claim)
                yield put(state, number, me._replace(at="idle", outcome=complete))
    if me.outcome is not None:  # again and again, until it is answered
        yield state._replace(calls=state.calls | {me.outcome})
    if me.at != "claiming":
        if me.lease in ("live", "lapsed"):
            yield put(state, number, me._replace(lease="live"))  # beat()
        elif me.lease == "taken" and not rules.taken_is_not_renewed:
            yield put(state, number, me._replace(lease="live", lost=False))  # it believes that it has kept it
        else:  # beat() tells of it: handlers are cancelled, what waits is dropped; then register()
            yield put(state, number, me._replace(lease="live", at="idle"))


def server_steps(state: State, rules: Rules) -> Iterator[State]:
    ticket = state.ticket
    for call in state.calls:
        after = state._replace(calls=state.calls - {call})
        ours = (
            ticket.place == "active"
            and ticket.holder == call.runtime
            and ticket.spent == call.attempt
            and (
                ticket.claim <= call.claim
                or not (rules.fence_release if call.kind == "release" else rules.fence_complete)
            )
        )
        if ours and call.kind == "complete":
            after = after._replace(ticket=Ticket("archive", ticket.spent), completions=state.completions + 1)
        elif ours:
            after = after._replace(ticket=Ticket("ready", ticket.spent - 1, None, ticket.claim))
        yield after  # the answer is lost
        me = state.runtimes[call.runtime]
        if me.outcome == call and me.at != "dead":
            yield put(after, call.runtime, me._replace(outcome=None))
    for number, runtime in enumerate(state.runtimes):
        if runtime.at == "dead" and runtime.lease == "live":
            yield put(state, number, runtime._replace(lease="lapsed"))
        if runtime.lease in ("lapsed", "taken") and not runtime.locked:  # rescue() steps over rows that are in use
            left = put(state, number, runtime._replace(lease="taken", lost=True))  # and over gates: it takes other jobs
            gone = put(state, number, runtime._replace(lease="none", lost=True))
            yield left
            if ticket.place == "active" and ticket.holder == number:
                place = "ready" if ticket.spent <= RETRY_LIMIT else "archive"
                back = Ticket(place, ticket.spent, None, ticket.claim)
                yield left._replace(ticket=back)  # another job is left
                yield gone._replace(ticket=back)
            else:
                yield gone


def faults(state: State, rules: Rules) -> Iterator[State]:
    """A lease lapses though its runtime lives: it stands still, or is cut off. One dies. The server crashes."""
    if rules.server_crashes and not state.broken and state.ticket.place == "active":
        yield crash(state)
    for number, runtime in enumerate(state.runtimes):
        if runtime.at == "dead":
            continue
        if runtime.lease == "live":
            yield put(state, number, runtime._replace(lease="lapsed"))
        if not state.broken:
            dead = put(state, number, runtime._replace(at="dead", locked=False))._replace(broken=True)
            claiming = runtime.at == "claiming"
            yield dead._replace(ticket=state.ticket._replace(locked=False)) if claiming else dead


def crash(state: State) -> State:
    """The claim is forgotten, what is on its way is gone, and claims under way are undone."""
    ticket = state.ticket
    runtimes = tuple(
        one._replace(
            at="idle" if one.at == "claiming" else one.at, locked=False, lost=one.lost or number == ticket.holder
        )
        for number, one in enumerate(state.runtimes)
    )
    forgotten = Ticket("ready", ticket.spent - 1, None, ticket.claim)
    return state._replace(ticket=forgotten, runtimes=runtimes, calls=frozenset(), broken=True)


def steps(state: State, rules: Rules) -> Iterator[State]:
    for number in range(len(state.runtimes)):
        yield from runtime_steps(state, number, rules)
    yield from server_steps(state, rules)


def wrong(state: State) -> str | None:
    ticket = state.ticket
    if state.completions > 1:
        return "completed twice"
    if ticket.place == "active" and ticket.holder is not None and state.runtimes[ticket.holder].lease == "none":
        return "active, and nobody's"
    for number, runtime in enumerate(state.runtimes):
        if runtime.at == "runs" and not runtime.lost:
            mine = Ticket("active", runtime.attempt, number, runtime.claim)
            if ticket != mine:
                return "taken from who runs it and has kept its lease"
    return None


def explore(rules: Rules) -> tuple[int, str | None]:
    """How many states there are, and what is wrong in one of them."""
    start = State()
    before: dict[State, list[State]] = {start: []}
    to_do = [start]
    while to_do:
        state = to_do.pop()
        if (error := wrong(state)) is not None:
            return len(before), error
        for after in steps(state, rules):
            if after not in before:
                before[after] = []
                to_do.append(after)
            before[after].append(state)
        for after in faults(state, rules):
            if after not in before:
                before[after] = []
                to_do.append(after)
    # Backwards from the ends: what is not met can never come to one, unless something else breaks.
    ends = [state for state in before if state.ticket.place == "archive" or state.ticket.claim == rules.most_claims]
    met = set(ends)
    while ends:
        for state in before[ends.pop()]:
            if state not in met:
                met.add(state)
                ends.append(state)
    return len(before), "cannot come to its end" if before.keys() - met else None


@pytest.mark.parametrize(
    "rules", [Rules(), Rules(most_claims=3, server_crashes=False)], ids=["a crash", "three claims"]
)
def test_nothing_that_can_happen_settles_an_attempt_twice(rules):
    states, error = explore(rules)
    assert error is None
    assert states > 1000


@pytest.mark.parametrize(
    ("left_out", "what"),
    [
        ({"claim_needs_lease": False}, "active, and nobody's"),
        ({"claim_locks_runtime": False}, "active, and nobody's"),
        ({"fence_release": False}, "taken from who runs it"),
        ({"fence_complete": False}, "taken from who runs it"),
        ({"strays_are_released": False}, "cannot come to its end"),
        ({"taken_is_not_renewed": False}, "taken from who runs it"),
    ],
)
def test_each_rule_is_needed(left_out, what):
    _, error = explore(Rules(**left_out))
    assert error is not None
    assert what in error

"""The quiet bell's proof: a model of senders and claimers, step by step, and every order in which the steps can happen.

In no state in which nobody can take a step any more does a ticket stand that can be claimed while a claimer sleeps: only
the poll would wake that one. The steps are the functions of sql/functions/20_bell.sql and 30_claim.sql, and ``Watch``:

- a sender writes a ticket (``insert into ready``), takes *pending*, tests *free* (``somebody_may_come``), and commits: then
  its ticket is visible, after that its *pending* is gone, and then its notification arrives. Or it is rolled back.
- a claimer takes *free*, tests *pending* (``stand_free``), claims what it sees and nobody holds (``claim``), sees whether
  tickets are left (``look``), and sleeps if it was told and none are; else it looks again. A claim may be undone, and
  its claimer die, at each step; its locks go with it. One that has more to do than it can lets go of *free* for a while,
  also if rings made it so while the answer to its ``stand_free`` was on its way (``Watch.stood``).

A test of a lock takes it and gives it back: two steps, between which others fail to take it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


class Sender(NamedTuple):
    at: str = "write"
    """The step that comes next."""
    pending: bool = False
    rings: bool = False


class Claimer(NamedTuple):
    at: str = "free"
    free: bool = False
    passed: bool = False
    rung: bool = False
    holds: frozenset[int] = frozenset()
    """The tickets that its claim has locked."""
    left: bool = False


class State(NamedTuple):
    senders: tuple[Sender, ...]
    claimers: tuple[Claimer, ...]
    visible: frozenset[int] = frozenset()
    """The committed tickets in ready; a sender's has its number."""
    tests_free: int | None = None
    """The sender that holds *free* for a moment, to test it."""
    tests_pending: int | None = None
    """The claimer that holds *pending* for a moment, to test it."""
    deaths: int = 0


class Rules(NamedTuple):
    """What may be left out, to see that the model notices."""

    takes_pending: bool = True
    tests_pending: bool = True
    free_before_test: bool = True
    looks_after_test: bool = True
    rings_in_doubt: bool = True
    minds_what_is_left: bool = True
    minds_the_crowd: bool = True
    most_deaths: int = 1


def with_sender(state: State, number: int, sender: Sender) -> State:
    return state._replace(senders=(*state.senders[:number], sender, *state.senders[number + 1 :]))


def with_claimer(state: State, number: int, claimer: Claimer) -> State:
    return state._replace(claimers=(*state.claimers[:number], claimer, *state.claimers[number + 1 :]))


def sender_steps(state: State, number: int, rules: Rules) -> Iterator[State]:
    sender = state.senders[number]
    match sender.at:
        case "write":
            yield with_sender(state, number, sender._replace(at="pending"))
        case "pending":
            taken = rules.takes_pending and state.tests_pending is None
            doubt = rules.takes_pending and not taken and rules.rings_in_doubt
            yield with_sender(
                state, number, sender._replace(at="commit" if doubt else "test", pending=taken, rings=doubt)
            )
        case "test":
            if any(claimer.free for claimer in state.claimers):
                yield with_sender(state, number, sender._replace(at="commit", rings=True))
            elif state.tests_free is not None:
                yield with_sender(state, number, sender._replace(at="commit", rings=rules.rings_in_doubt))
            else:
                yield with_sender(state, number, sender._replace(at="tested"))._replace(tests_free=number)
        case "tested":
            yield with_sender(state, number, sender._replace(at="commit"))._replace(tests_free=None)
        case "commit":
            seen = with_sender(state, number, sender._replace(at="committed"))
            yield seen._replace(visible=state.visible | {number})
            yield with_sender(state, number, sender._replace(at="done", pending=False))  # rolled back
        case "committed":
            yield with_sender(state, number, sender._replace(at="ring" if sender.rings else "done", pending=False))
        case "ring":
            rung = tuple(claimer._replace(rung=claimer.at != "dead") for claimer in state.claimers)
            yield with_sender(state, number, sender._replace(at="done"))._replace(claimers=rung)


def claimer_steps(state: State, number: int, rules: Rules) -> Iterator[State]:
    claimer = state.claimers[number]
    to = claimer._replace
    match claimer.at:
        case "free":
            taken = claimer.free or state.tests_free is None
            if not rules.free_before_test:
                yield with_claimer(state, number, to(at="claim", free=taken, passed=claimer.passed and taken))
                return
            yield with_claimer(state, number, to(at="test" if taken else "claim", free=taken, passed=False))
        case "test":
            if not rules.tests_pending:
                yield with_claimer(state, number, to(at="claim", passed=True))
            elif any(sender.pending for sender in state.senders) or state.tests_pending is not None:
                yield with_claimer(state, number, to(at="claim", passed=False))
            else:
                yield with_claimer(state, number, to(at="tested"))._replace(tests_pending=number)
        case "tested":
            after = "claim" if rules.looks_after_test else "sleep"
            after = after if rules.free_before_test else "free"
            yield with_claimer(state, number, to(at=after, passed=True))._replace(tests_pending=None)
            if claimer.rung:  # so often that it has let go of free before it hears the answer
                at, passed = ("busy", False) if rules.minds_the_crowd else (after, True)
                yield with_claimer(state, number, to(at=at, free=False, passed=passed))._replace(tests_pending=None)
        case "claim":
            held = frozenset[int]().union(*(other.holds for other in state.claimers))
            yield with_claimer(state, number, to(at="claimed", rung=False, holds=state.visible - held))
        case "claimed":
            gone = with_claimer(state, number, to(at="left", holds=frozenset()))
            yield gone._replace(visible=state.visible - claimer.holds)
            yield with_claimer(state, number, to(at="claim", holds=frozenset()))  # undone; who claims knows it
        case "left":
            left = bool(state.visible) and rules.minds_what_is_left
            anew = "free" if rules.free_before_test else "test"
            at = "sleep" if claimer.passed and not left else "claim" if claimer.passed else anew
            yield with_claimer(state, number, to(at=at))
            # It has more to do than it can, and looks again when that is done.
            yield with_claimer(state, number, to(at="busy", free=False, passed=False))
        case "busy":
            yield with_claimer(state, number, to(at="claim"))
        case "sleep" if claimer.rung:
            yield with_claimer(state, number, to(at="claim"))
    if claimer.at != "dead" and state.deaths < rules.most_deaths:
        dead = with_claimer(state, number, Claimer(at="dead"))
        yield dead._replace(
            deaths=state.deaths + 1, tests_pending=None if state.tests_pending == number else state.tests_pending
        )


def steps(state: State, rules: Rules) -> Iterator[State]:
    for number in range(len(state.senders)):
        yield from sender_steps(state, number, rules)
    for number in range(len(state.claimers)):
        yield from claimer_steps(state, number, rules)


def is_stuck(state: State) -> bool:
    """A ticket stands, somebody sleeps, and nobody is at work: neither a sender nor a claimer."""
    return (
        bool(state.visible)
        and all(sender.at == "done" for sender in state.senders)
        and all(claimer.at == "dead" or (claimer.at == "sleep" and not claimer.rung) for claimer in state.claimers)
        and any(claimer.at == "sleep" for claimer in state.claimers)
    )


def explore(senders: int, claimers: int, rules: Rules) -> tuple[int, list[State]]:
    """How many states there are, and the way to one in which a job is forgotten, if there is one."""
    first = "free" if rules.free_before_test else "test"
    start = State((Sender(),) * senders, (Claimer(at=first),) * claimers)
    came_from: dict[State, State | None] = {start: None}
    to_do = [start]
    while to_do:
        state = to_do.pop()
        if is_stuck(state):
            way = [state]
            while (before := came_from[way[-1]]) is not None:
                way.append(before)
            return len(came_from), way[::-1]
        for after in steps(state, rules):
            if after not in came_from:
                came_from[after] = state
                to_do.append(after)
    return len(came_from), []


@pytest.mark.parametrize(("senders", "claimers"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
def test_no_order_of_steps_forgets_a_job(senders, claimers):
    states, way = explore(senders, claimers, Rules())
    assert way == []
    assert states > 100


@pytest.mark.parametrize(
    "left_out",
    [
        {"takes_pending": False},
        {"tests_pending": False},
        {"free_before_test": False},
        {"looks_after_test": False},
        {"rings_in_doubt": False},
        {"minds_what_is_left": False},
        {"minds_the_crowd": False},
    ],
)
def test_each_rule_is_needed(left_out):
    _, way = explore(2, 2, Rules(**left_out))
    assert way

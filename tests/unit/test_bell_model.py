"""The quiet bell's proof: a model of senders and claimers, step by step, and every order in which the steps can happen.

In no state in which nobody can take a step any more does a ticket stand that can be claimed while a claimer sleeps: only
the poll would wake that one. The steps are the functions of sql/functions/20_bell.sql and 30_claim.sql, and ``Watch``:

- a sender writes a ticket (``insert into ready``), takes *pending*, tests *free* (``somebody_may_come``), and commits: then
  its ticket is visible, after that its *pending* is gone, and then its notification arrives. Or it is rolled back: all of
  it, or to a savepoint, which takes ticket, *pending*, notification and what is remembered of it back, and it writes again.
- a claimer takes *free*, tests *pending* (``stand_free``), claims what it sees and nobody holds (``claim``), sees whether
  tickets are left (``look``), and sleeps if it was told and none are; else it looks again. A claim may be undone, and
  its claimer die, at each step; its locks go with it. One that has more to do than it can lets go of *free* for a while,
  also if rings made it so while the answer to its ``stand_free`` was on its way (``Watch.stood``).
- a claimer at rest may leave what it hears of to the others of many (``Fleet.puts_off``): until its time comes, or somebody
  says that the ticket was taken (``say_taken``), after the claim's commit. Such words may come late, or never.
- an editor locks a ticket that stands, and deletes it (``cancel``) or lets go of it (``update_job`` that is rolled back).

Floors are not in it: what lies below one waits for the next look from the beginning, which is a matter of time.

A test of a lock takes it and gives it back: two steps, between which others fail to take it.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


class Sender(NamedTuple):
    at: str = "write"
    """The step that comes next."""
    pending: bool = False
    rings: bool = False
    took_back: bool = False
    remembers: bool = False
    """That it has rung, though that was taken back: only where a rule is left out."""


class Claimer(NamedTuple):
    at: str = "free"
    free: bool = False
    passed: bool = False
    rung: bool = False
    holds: frozenset[int] = frozenset()
    """The tickets that its claim has locked."""
    put_off: frozenset[int] = frozenset()
    """Tickets that it has heard of, and leaves to others."""
    says: frozenset[int] = frozenset()
    """Tickets that it took and may yet tell others of."""


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
    editor: int | str = "done"
    """``lock``: it has yet to come; a number: the ticket that it holds."""


class Scene(NamedTuple):
    """Who is there, and what they do: all of it at once are more states than can be gone through."""

    senders: int
    claimers: int
    savepoints: bool = False
    many: bool = False
    """Claimers leave tickets to each other."""
    editor: bool = False


class Rules(NamedTuple):
    """What may be left out, to see that the model notices."""

    takes_pending: bool = True
    tests_pending: bool = True
    free_before_test: bool = True
    looks_after_test: bool = True
    rings_in_doubt: bool = True
    minds_what_is_left: bool = True
    minds_the_crowd: bool = True
    takes_back_what_is_remembered: bool = True
    loses_patience: bool = True
    says_taken_after_commit: bool = True
    most_deaths: int = 1


def with_sender(state: State, number: int, sender: Sender) -> State:
    return state._replace(senders=(*state.senders[:number], sender, *state.senders[number + 1 :]))


def with_claimer(state: State, number: int, claimer: Claimer) -> State:
    return state._replace(claimers=(*state.claimers[:number], claimer, *state.claimers[number + 1 :]))


def sender_steps(state: State, number: int, rules: Rules, scene: Scene) -> Iterator[State]:
    sender = state.senders[number]
    match sender.at:
        case "write":
            yield with_sender(state, number, sender._replace(at="commit" if sender.remembers else "pending"))
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
            if scene.savepoints and not sender.took_back:
                remembers = sender.rings and not rules.takes_back_what_is_remembered
                yield with_sender(state, number, Sender(took_back=True, remembers=remembers))
        case "committed":
            yield with_sender(state, number, sender._replace(at="ring" if sender.rings else "done", pending=False))
        case "ring":
            for heard in itertools.product(*(hears(claimer, number, scene) for claimer in state.claimers)):
                yield with_sender(state, number, sender._replace(at="done"))._replace(claimers=heard)


def held(state: State) -> frozenset[int]:
    """The tickets that somebody has locked."""
    editors = frozenset([state.editor]) if isinstance(state.editor, int) else frozenset[int]()
    return editors.union(*(claimer.holds for claimer in state.claimers))


def hears(claimer: Claimer, ticket: int, scene: Scene) -> Iterator[Claimer]:
    if claimer.at == "dead":
        yield claimer
        return
    yield claimer._replace(rung=True)
    if scene.many and claimer.at == "sleep" and not claimer.rung:
        yield claimer._replace(put_off=claimer.put_off | {ticket})


def claimer_steps(state: State, number: int, rules: Rules, scene: Scene) -> Iterator[State]:
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
            holds = state.visible - held(state)
            says = claimer.says if rules.says_taken_after_commit or not scene.many else holds
            yield with_claimer(state, number, to(at="claimed", rung=False, holds=holds, put_off=frozenset(), says=says))
        case "claimed":
            says = claimer.says | claimer.holds if scene.many else claimer.says
            gone = with_claimer(state, number, to(at="left", holds=frozenset(), says=says))
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
        case "sleep" if claimer.rung or (claimer.put_off and rules.loses_patience):
            yield with_claimer(state, number, to(at="claim"))
    if claimer.says:
        told = tuple(other._replace(put_off=other.put_off - claimer.says) for other in state.claimers)
        yield with_claimer(state._replace(claimers=told), number, told[number]._replace(says=frozenset()))
    if claimer.at != "dead" and state.deaths < rules.most_deaths:
        dead = with_claimer(state, number, Claimer(at="dead"))
        yield dead._replace(
            deaths=state.deaths + 1, tests_pending=None if state.tests_pending == number else state.tests_pending
        )


def editor_steps(state: State) -> Iterator[State]:
    if state.editor == "lock":
        for ticket in state.visible - held(state):
            yield state._replace(editor=ticket)
    elif isinstance(state.editor, int):
        yield state._replace(editor="done")
        yield state._replace(editor="done", visible=state.visible - {state.editor})


def steps(state: State, rules: Rules, scene: Scene) -> Iterator[State]:
    for number in range(len(state.senders)):
        yield from sender_steps(state, number, rules, scene)
    for number in range(len(state.claimers)):
        yield from claimer_steps(state, number, rules, scene)
    yield from editor_steps(state)


def is_stuck(state: State, rules: Rules) -> bool:
    """A ticket stands, somebody sleeps, and nobody is at work, or will be: no sender, no claimer, no editor."""
    return (
        bool(state.visible)
        and not isinstance(state.editor, int)
        and all(sender.at == "done" for sender in state.senders)
        and all(
            claimer.at == "dead"
            or (claimer.at == "sleep" and not claimer.rung and not (claimer.put_off and rules.loses_patience))
            for claimer in state.claimers
        )
        and any(claimer.at == "sleep" for claimer in state.claimers)
    )


def explore(scene: Scene, rules: Rules) -> tuple[int, list[State]]:
    """How many states there are, and the way to one in which a job is forgotten, if there is one."""
    first = "free" if rules.free_before_test else "test"
    editor = "lock" if scene.editor else "done"
    start = State((Sender(),) * scene.senders, (Claimer(at=first),) * scene.claimers, editor=editor)
    came_from: dict[State, State | None] = {start: None}
    to_do = [start]
    while to_do:
        state = to_do.pop()
        if is_stuck(state, rules):
            way = [state]
            while (before := came_from[way[-1]]) is not None:
                way.append(before)
            return len(came_from), way[::-1]
        for after in steps(state, rules, scene):
            if after not in came_from:
                came_from[after] = state
                to_do.append(after)
    return len(came_from), []


@pytest.mark.parametrize(
    "scene",
    [
        Scene(3, 1),
        Scene(2, 2),
        Scene(2, 1, savepoints=True, editor=True),
        Scene(1, 2, savepoints=True),
        Scene(1, 2, editor=True),
        Scene(1, 2, many=True, editor=True),
    ],
    ids=str,
)
def test_no_order_of_steps_forgets_a_job(scene):
    states, way = explore(scene, Rules())
    assert way == []
    assert states > 100


@pytest.mark.parametrize(
    ("left_out", "scene"),
    [
        ("takes_pending", Scene(2, 2)),
        ("tests_pending", Scene(2, 2)),
        ("free_before_test", Scene(2, 2)),
        ("looks_after_test", Scene(2, 2)),
        ("rings_in_doubt", Scene(2, 2)),
        ("minds_what_is_left", Scene(2, 2)),
        ("minds_the_crowd", Scene(2, 2)),
        ("takes_back_what_is_remembered", Scene(1, 1, savepoints=True)),
        ("loses_patience", Scene(1, 2, many=True)),
        ("says_taken_after_commit", Scene(1, 2, many=True)),
    ],
)
def test_each_rule_is_needed(left_out, scene):
    _, way = explore(scene, Rules(**{left_out: False}))
    assert way


def test_a_ticket_that_an_editor_lets_go_of_needs_a_look_at_what_is_left():
    rules = Rules(minds_what_is_left=False, most_deaths=0)
    assert explore(Scene(1, 1), rules)[1] == []
    assert explore(Scene(1, 1, editor=True), rules)[1]

"""Where tasks wait, and ending something there: what the tests of ``test_cancelled_everywhere.py`` are made with.

A place is one ``await`` (or ``async with``, ``async for``) of ``src/notifyq``.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import trio

import notifyq

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

__all__ = ["AtNewPlace", "Place", "awaited", "places", "places_below", "untried"]

SOURCE = Path(notifyq.__file__).parent

Place = tuple[str, int, int]
"""A module, a line, and an instruction: ``async with`` waits at its beginning and at its end."""


def places(task: trio.lowlevel.Task) -> list[Place]:
    """Where in notifyq a task waits, the outermost first."""
    if getattr(task.coro, "cr_frame", None) is None:  # it has ended
        return []
    return [
        (name, frame.f_lineno, frame.f_lasti)
        for frame, _ in task.iter_await_frames()
        if (name := _module(frame.f_code.co_filename)) and frame.f_lasti > 0
    ]


def places_below(task: trio.lowlevel.Task, filename: str) -> list[Place]:
    """Those that what was called from a file waits at."""
    found: list[Place] = []
    for frame, _ in task.iter_await_frames():
        if frame.f_code.co_filename == filename:
            found = []
        elif name := _module(frame.f_code.co_filename):
            found.append((name, frame.f_lineno, frame.f_lasti))
    return found


@functools.cache
def _module(filename: str) -> str:
    path = Path(filename)
    return path.stem if path.parent == SOURCE else ""


def untried(modules: Iterable[str], tried: set[Place], let_off: Collection[str]) -> list[str]:
    """What these modules await at none of the places that were tried, but for what is let off: ``module.function: line``."""
    lines = {(module, line) for module, line, _ in tried}
    return [
        said
        for module in modules
        for said, first, last in awaited(module)
        if said not in let_off and not any((module, line) in lines for line in range(first, last + 1))
    ]


def awaited(module: str) -> list[tuple[str, int, int]]:
    """All that a module awaits: ``module.function: line``, as it is written, and its first and last lines."""
    text = (SOURCE / f"{module}.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    return [
        (f"{function}: {lines[first - 1].partition('  #')[0].strip()}", first, last)
        for function, first, last in sorted(_awaits(ast.parse(text), module), key=lambda found: found[1:])
    ]


def _awaits(node: ast.AST, function: str) -> set[tuple[str, int, int]]:
    """What is awaited in a node, with the name of the function that it stands in, and of what that stands in."""
    found: set[tuple[str, int, int]] = set()
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        found |= _awaits(child, f"{function}.{child.name}" if named else function)
    expressions: list[ast.expr] = []
    match node:
        case ast.Await():
            expressions = [node]
        case ast.AsyncWith():
            expressions = [item.context_expr for item in node.items]
        case ast.AsyncFor():
            expressions = [node.iter]
    return found | {(function, each.lineno, each.end_lineno or each.lineno) for each in expressions}


class AtNewPlace(trio.abc.Instrument):
    """Ends something the first time that a task waits at a place where nothing was ended before."""

    def __init__(
        self,
        tried: set[Place],
        where: Callable[[trio.lowlevel.Task], list[Place]],
        end: Callable[[trio.lowlevel.Task], object],
        *,
        skip: int = 0,
        answered: bool = False,
    ) -> None:
        """``where(task)`` says at which places, of those that count, a task waits. Adds to ``tried`` where it ended.

        ``skip``: so many such moments are passed over. ``answered``: it is ended when what it waits for has come, and it
        is about to go on.
        """
        self.ended_at: list[Place] = []
        self._tried = tried
        self._passed = set(tried)
        self._where = where
        self._end = end
        self._skip = skip
        self._answered = answered
        self._spared: set[trio.lowlevel.Task] = set()

    def spare(self) -> None:
        """This task is not part of what is ended."""
        self._spared.add(trio.lowlevel.current_task())

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._answered:
            self._look(task)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if not self._answered:
            self._look(task)

    def _look(self, task: trio.lowlevel.Task) -> None:
        if self.ended_at or task in self._spared or self._passed.issuperset(here := self._where(task)):
            return
        if self._skip:
            self._skip -= 1
            self._passed.update(here)
        else:
            self.ended_at = here
            self._tried.update(here)
            self._end(task)

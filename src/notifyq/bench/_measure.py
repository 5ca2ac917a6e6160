"""Runs workloads in a database of their own, in turn, and reports what they found."""

from __future__ import annotations

import platform
from contextlib import ExitStack
from typing import Any

import attrs
import click
import psycopg
import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from notifyq import Queue, __version__, connect, testing
from notifyq._connect import resolve_dsn

from ._databases import own_database
from ._options import ALL
from ._parts import CannotMeasure, Found, Settings
from ._report import medians
from ._rules import RULES
from ._sql import MAX_CONNECTIONS, OTHERS, SETTINGS
from ._steady import STEADY

__all__ = ["measure"]

SPARE = 20
"""Connections that a run takes besides those of its senders, and that a server keeps for superusers."""

KEPT = 86_400
"""Seconds of retention of the queues whose outputs are read afterwards."""


@attrs.frozen
class Plan:
    """How one workload is run."""

    name: str
    repeat: int
    warm_up: int
    settings: Settings


def measure(
    names: list[str],
    dsn: str | None,
    repeat: int | None = None,
    *,
    warm_up: int | None = 0,
    seconds: float | None = None,
    queues: int | None = None,
    doubts: list[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run workloads in a fresh database, interleaved, and report medians with the runs they come from.

    ``doubts`` are said on stderr, with others at work on a given server, once nothing is refused; None: nothing is said.
    ``None`` elsewhere: as each workload has it. It touches no database that it has not created, and drops those.
    """
    with ExitStack() as stack:
        server = resolve_dsn(dsn) if dsn else stack.enter_context(testing.embedded_server())
        _check_connections(server, names, options.get("senders", 0))
        if doubts is not None:
            _say(doubts, server, given=bool(dsn))
        own = stack.enter_context(own_database(server))
        plans = []
        for name in names:
            kind = ALL[name]
            settings = Settings(
                own,
                seconds=kind.seconds if seconds is None else seconds,
                queues=kind.queues if queues is None else queues,
                own_server=not dsn,
                **options,
            )
            plans.append(
                Plan(
                    name,
                    kind.repeat if repeat is None else repeat,
                    kind.warm_up if warm_up is None else warm_up,
                    settings,
                )
            )
        trio.run(_make_queues, own, options["kept"])
        found = _run(plans)
        with psycopg.connect(own) as connection:
            server_settings: dict[str, str] = dict(connection.execute(SETTINGS).fetchall())
    return {
        "schema": 1,
        "notifyq": __version__,
        "python": platform.python_version(),
        "psycopg": f"{psycopg.__version__} {psycopg.pq.__impl__}",
        "machine": f"{platform.system()} {platform.machine()}",
        "server_version": server_settings.pop("server_version"),
        "server_settings": server_settings,
        "settings": {
            **options,
            "repeat": max(plan.repeat for plan in plans),
            "each": {plan.name: _said(plan) for plan in plans},
        },
        "workloads": {name: medians(runs) for name, runs in found.items()},
    }


def _say(doubts: list[str], server: str, *, given: bool) -> None:
    """What makes figures doubtful, a line each: also that others are at work on a server that was given."""
    with psycopg.connect(server, autocommit=True) as connection:
        others = int((connection.execute(OTHERS).fetchone() or (0,))[0])
    if given and others:
        doubts = [*doubts, f"{others} other sessions on this server: what they do is in the figures"]
    for doubt in doubts:
        click.echo(f"bench: {doubt}", err=True)


def _check_connections(server: str, names: list[str], senders: int) -> None:
    if "senders" not in names:
        return
    with psycopg.connect(server, autocommit=True) as connection:
        most = int((connection.execute(MAX_CONNECTIONS).fetchone() or (0,))[0])
    if senders + SPARE > most:
        raise CannotMeasure(
            f"--senders {senders}: the server has max_connections of {most}, and {SPARE} are for everything else"
        )


def _said(plan: Plan) -> dict[str, Any]:
    """What of a plan differs by workload, as far as the workload reads it."""
    uses = ALL[plan.name].uses
    said = {"repeat": plan.repeat, "warm_up": plan.warm_up}
    return said | {name: getattr(plan.settings, name) for name in ("seconds", "queues") if name in uses}


def _run(plans: list[Plan]) -> dict[str, list[Found]]:
    """The first run of each workload, then the second of each, and so on, with a bar for each that moves within a run."""
    found: dict[str, list[Found]] = {plan.name: [] for plan in plans}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[run]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks = {
            plan.name: progress.add_task(plan.name, total=plan.warm_up + plan.repeat, start=False, run="")
            for plan in plans
        }
        for number in range(max(plan.warm_up + plan.repeat for plan in plans)):
            for plan in plans:
                if number >= plan.warm_up + plan.repeat:
                    continue
                task = tasks[plan.name]
                counts = number >= plan.warm_up
                progress.start_task(task)
                progress.update(task, run=f"run {number + 1 - plan.warm_up}" if counts else "warm-up")

                def tell(part: float, task: Any = task, number: int = number) -> None:
                    progress.update(task, completed=number + part)

                run = ALL[plan.name].run(plan.settings, tell)
                tell(1.0)
                if counts:
                    found[plan.name].append(run)
    return found


async def _make_queues(dsn: str, kept: bool) -> None:
    async with connect(dsn) as nq:
        await nq.create_queue(Queue("bench.drain", retention=KEPT if kept else 0))
        await nq.create_queue(Queue("bench.latency", retention=KEPT))
        await nq.create_queue(Queue("bench.chain", policy="singleton", retention=KEPT))
        await nq.create_queue(Queue("bench.scaling", retention=KEPT))
        await nq.create_queue(Queue("bench.send_default", retention=KEPT))
        await nq.create_queue(Queue("bench.send_no_notify", retention=KEPT, bell="never"))
        await nq.create_queue(Queue("bench.send_always", retention=KEPT, bell="always"))
        for queue in (*RULES.values(), *STEADY):
            await nq.create_queue(queue)

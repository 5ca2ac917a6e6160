"""The command line of schedules and events."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import attrs
import click

from ._cli import Target, as_json, cli, json_after_it
from ._cli_jobs import parsed
from ._cli_table import show
from ._client import Client
from ._errors import InvalidOption
from ._queue import Queue
from ._schedule import Schedule

if TYPE_CHECKING:
    from datetime import datetime

    from ._schedule import ScheduleRecord

__all__ = ["cli"]

_rule_options = (
    click.option("--cron", help="Minute, hour, day, month, weekday; or six fields, the second first."),
    click.option("--every", type=float, help="Seconds between firings, instead of --cron."),
    click.option("--timezone", default="UTC", show_default=True, help="Such as Europe/Berlin."),
)


def _with_rule(command: Any) -> Any:
    for option in reversed(_rule_options):
        command = option(command)
    return command


def _check_rule(cron: str | None, every: float | None) -> None:
    if (cron is None) == (every is None):
        raise click.UsageError("give --cron or --every")


@cli.group(invoke_without_command=True)
@as_json
@click.pass_context
def schedules(context: click.Context, as_json: bool) -> None:
    """What sends jobs by itself, and when it does so next."""
    if context.invoked_subcommand is not None:
        json_after_it(context, as_json)
        return
    target: Target = context.obj
    rows = []
    for record in target.ask(Client.schedules):
        row = attrs.asdict(record)
        row["next_firings"], error = _firings(record, 3)
        row["error"] = row["error"] or error
        if not as_json:
            rule = record.cron if record.every is None else f"every {record.every}"
            columns = ("queue", "name", "timezone", "missed", "data", "error")
            row = {**{key: row[key] for key in columns}, "rule": rule, "next": _listed(row["next_firings"])}
            row = {key: row[key] for key in ("queue", "name", "rule", "timezone", "missed", "data", "next", "error")}
        rows.append(row)
    show(rows, as_json, "schedules")


def _firings(record: ScheduleRecord, count: int) -> tuple[list[datetime], str | None]:
    """One that cannot be read here does not keep the others from being listed."""
    try:
        return record.next_firings(count), None
    except InvalidOption as error:
        return [], str(error)


@schedules.command()
@click.argument("queue")
@_with_rule
@click.option("--name", default="default", show_default=True, help="Tells the schedules of one queue apart.")
@click.option("--data", default="null", help="JSON, of each job (- reads it from stdin).")
@click.option(
    "--missed",
    default="once",
    show_default=True,
    type=click.Choice(["once", "skip"]),
    help="One job for all firings that no runtime was there for, or none.",
)
@as_json
@click.pass_obj
def add(target: Target, /, queue: str, data: str, as_json: bool, **options: Any) -> None:
    """Make or change a schedule of QUEUE."""
    _check_rule(options["cron"], options["every"])
    schedule = Schedule(data=parsed(data), **options)
    done = target.ask(lambda nq: nq.schedule(Queue(queue), schedule))
    firings = schedule.next_firings(3)
    text = f"schedule {schedule.name} of {queue} {done}; next: {_listed(firings)}"
    show([{"queue": queue, "name": schedule.name, "done": done, "next_firings": firings}], as_json, text, single=True)


@schedules.command()
@click.argument("queue")
@click.option("--name", default="default", show_default=True)
@as_json
@click.pass_obj
def remove(target: Target, queue: str, name: str, as_json: bool) -> None:
    """Remove a schedule of QUEUE. Exit code 1 if there was none."""
    removed = target.ask(lambda nq: nq.unschedule(queue, name))
    text = f"schedule {name} of {queue} {'removed' if removed else 'does not exist'}"
    show([{"removed": removed}], as_json, text, single=True)
    if not removed:
        sys.exit(1)


@schedules.command()
@click.argument("queue", required=False)
@_with_rule
@click.option("--name", default="default", show_default=True)
@click.option("--count", default=10, show_default=True, type=click.IntRange(1, 10_000))
@as_json
@click.pass_obj
def preview(
    target: Target,
    queue: str | None,
    cron: str | None,
    every: float | None,
    timezone: str,
    name: str,
    count: int,
    as_json: bool,
) -> None:
    """When a schedule of QUEUE, or a rule given by --cron or --every, fires next."""
    if queue is None:
        _check_rule(cron, every)
        firings = Schedule(cron, every=every, timezone=timezone).next_firings(count)
    elif cron is not None or every is not None:
        raise click.UsageError("give QUEUE, or a rule, not both")
    else:
        found = target.ask(lambda nq: nq.schedules(queue=queue, name=name))
        if not found:
            raise InvalidOption(f"there is no schedule {name!r} of queue {queue!r}: notifyq schedules lists them")
        firings = found[0].next_firings(count)
    show([{"fires": firing if as_json else firing.isoformat()} for firing in firings], as_json, "next firings")


def _listed(firings: list[datetime]) -> str:
    return ", ".join(firing.isoformat() for firing in firings)


@cli.command()
@click.argument("event")
@click.argument("data", metavar="JSON", required=False, default="null")
@click.option("--id-key", help="Publish once: a queue that has a job with this key gets no second one.")
@as_json
@click.pass_obj
def publish(target: Target, event: str, data: str, id_key: str | None, as_json: bool) -> None:
    """Send a job with JSON data (- reads it from stdin) to each queue that subscribed to EVENT."""
    value = parsed(data)
    jobs = target.ask(lambda nq: nq.publish(event, value, id_key=id_key))
    text = "; ".join(f"{queue}: job {job}" for queue, job in jobs.items())
    show([{"event": event, "jobs": jobs}], as_json, text, single=True)


@cli.command()
@click.argument("event")
@click.argument("queue")
@click.pass_obj
def subscribe(target: Target, event: str, queue: str) -> None:
    """Give QUEUE a job for each publish of EVENT."""
    done = target.ask(lambda nq: nq.subscribe(event, queue))
    print(f"{queue} {'gets' if done else 'got'} a job for each {event}")


@cli.command()
@click.argument("event")
@click.argument("queue")
@click.pass_obj
def unsubscribe(target: Target, event: str, queue: str) -> None:
    """Give QUEUE no more jobs for EVENT. Exit code 1 if QUEUE had not subscribed."""
    done = target.ask(lambda nq: nq.unsubscribe(event, queue))
    print(f"{queue} {'gets no more jobs' if done else 'had no subscription'} for {event}")
    if not done:
        sys.exit(1)


@cli.command()
@as_json
@click.pass_obj
def subscriptions(target: Target, as_json: bool) -> None:
    """Which queues get a job for which event."""
    show(target.ask(Client.subscriptions), as_json, "subscriptions")

"""The commands about queues: their counts, their options, whether their jobs may start."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs
import click

from ._cli import as_json, cli, json_after_it, load_runtime
from ._cli_table import show
from ._client import Client
from ._queue import Queue

if TYPE_CHECKING:
    from ._cli import Target

__all__ = ["queues"]


@cli.group(invoke_without_command=True)
@as_json
@click.pass_context
def queues(context: click.Context, as_json: bool) -> None:
    """Counts of every queue; or change one."""
    if context.invoked_subcommand is not None:
        json_after_it(context, as_json)
        return
    show(context.obj.ask(Client.queue_stats), as_json, "queues")


@queues.command()
@click.argument("app", metavar="MODULE:RUNTIME")
@as_json
@click.pass_obj
def declare(target: Target, app: str, as_json: bool) -> None:
    """Make the queues and schedules that a runtime declares, so that it may run as a role that cannot.

    The database is the one of --dsn, else DATABASE_URL's, whatever the runtime's is. A queue that stands with other
    options stays as it is: queues set changes it.
    """
    runtime = load_runtime(app)
    target = attrs.evolve(target, given_schema=target.given_schema or runtime.schema)
    done = target.ask(lambda nq: nq.declare(runtime.queues))
    show([{"queue": queue, "done": what} for queue, what in done.items()], as_json, "queues")


@queues.command()
@click.argument("queue")
@as_json
@click.pass_obj
def pause(target: Target, queue: str, as_json: bool) -> None:
    """Let no job of QUEUE start. What runs goes on, and so do sends."""
    changed = target.ask(lambda nq: nq.pause(queue))
    text = f"{queue} is paused" if changed else f"{queue} was paused already"
    show([{"queue": queue, "paused": True, "changed": changed}], as_json, text, single=True)


@queues.command()
@click.argument("queue")
@as_json
@click.pass_obj
def resume(target: Target, queue: str, as_json: bool) -> None:
    """Let the jobs of a paused QUEUE start again."""
    changed = target.ask(lambda nq: nq.resume_queue(queue))
    text = f"{queue} is resumed" if changed else f"{queue} was not paused"
    show([{"queue": queue, "paused": False, "changed": changed}], as_json, text, single=True)


@queues.command("keys")
@as_json
@click.pass_obj
def held_keys(target: Target, as_json: bool) -> None:
    """The keys that hold jobs back, and the jobs that hold them."""
    show(target.ask(Client.blocked_keys), as_json, "keys that hold jobs back")


@queues.command("set")
@click.argument("queue")
@click.argument("options", metavar="OPTION=VALUE...", nargs=-1, required=True)
@as_json
@click.pass_obj
def set_options(target: Target, queue: str, options: tuple[str, ...], as_json: bool) -> None:
    """Change options of QUEUE: retry_limit=5 timeout=60 retention=null dead_letter=failed.

    Durations are seconds; null is none. Jobs sent from then on have them.
    """
    changed = dict(_option(option) for option in options)
    if "schedules" in changed:
        raise click.UsageError("schedules are no option of a queue: use notifyq schedules add")
    target.ask(lambda nq: nq.update_queue(Queue(queue, **changed)))
    text = f"{queue}: {', '.join(options)}"
    show([{"queue": queue, "options": changed}], as_json, text, single=True)


def _option(text: str) -> tuple[str, Any]:
    """A name and a value in JSON, or as it stands. Raises ``click.UsageError``."""
    name, given, value = text.partition("=")
    if not given or not name:
        raise click.UsageError(f"{text!r} is not OPTION=VALUE, such as retry_limit=5")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value

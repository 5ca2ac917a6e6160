"""The commands about jobs: send, look, operate."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import attrs
import click
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from ._cli import as_json, cli
from ._cli_table import show, show_record
from ._client import Client
from ._errors import InvalidData, JobNotFound, UnknownQueue
from ._operator import UNCHANGED
from ._queue import Queue

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._cli import Target
    from ._models import FlowJob, JobRecord, SendOptions

__all__ = ["flow_tree", "parsed"]


def parsed(data: str) -> Any:
    """A value given as JSON, or on stdin if it is ``-``. Raises ``InvalidData``."""
    given = sys.stdin.read() if data == "-" else data
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        what = f"{given!r:.80}" + (" from stdin" if data == "-" else "")
        raise InvalidData(f"{what} is not JSON: {error}") from None


@cli.command()
@click.argument("queue")
@click.argument("data", metavar="JSON", required=False, default="null")
@click.option("--delay", type=float, help="Seconds.")
@click.option("--priority", type=int)
@click.option("--retry-limit", type=int)
@click.option("--id-key", help="A second job with this key is not made.")
@click.option("--key", help="What the queue's policy and limits go by.")
@click.option("--throttle", type=float, help="Seconds: one job of the key in each slot of so many.")
@click.option(
    "--debounce", type=float, help="Seconds: one more at the beginning of the next slot, with the latest data."
)
@as_json
@click.pass_obj
def send(target: Target, /, queue: str, data: str, as_json: bool, **options: Any) -> None:
    """Send a job with JSON data (- reads it from stdin)."""
    value = parsed(data)
    given: SendOptions = {key: value for key, value in options.items() if value is not None}  # type: ignore[assignment]
    sent = target.ask(lambda nq: nq.send(Queue(queue), value, **given))
    show(
        [{"id": sent.id, "created": sent.created}],
        as_json,
        f"job {sent.id} {'sent' if sent.created else 'exists'}",
        single=True,
    )


@cli.command()
@as_json
@click.pass_obj
def runtimes(target: Target, as_json: bool) -> None:
    """The processes that run jobs."""
    rows = target.ask(Client.runtimes)
    if not as_json:
        columns = ("id", "hostname", "pid", "version", "queues", "beat_at", "state", "active")
        rows = [{name: row[name] for name in columns} for row in rows]
    show(rows, as_json, "runtimes")


@cli.command()
@click.option("--queue")
@click.option(
    "--state", type=click.Choice(["scheduled", "blocked", "ready", "active", "completed", "failed", "cancelled"])
)
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1))
@as_json
@click.pass_obj
def jobs(target: Target, queue: str | None, state: str | None, limit: int, as_json: bool) -> None:
    """The newest jobs."""

    async def ask(nq: Client) -> list[JobRecord]:
        if queue is not None and queue not in {row["queue"] for row in await nq.queue_stats()}:
            raise UnknownQueue(f"there is no queue named {queue!r}: see notifyq queues")
        return await nq.jobs(queue=queue, state=state, limit=limit)

    found = target.ask(ask)
    rows = [attrs.asdict(record) for record in found]
    if not as_json:
        columns = ("id", "queue", "state", "retrying", "attempt", "priority", "data", "output", "sent_at", "due_at")
        rows = [{**{key: row[key] for key in columns}, "error": (row["error"] or {}).get("message")} for row in rows]
    show(rows, as_json, "jobs")


@cli.command("show")
@click.argument("job", type=int)
@as_json
@click.pass_obj
def show_job(target: Target, job: int, as_json: bool) -> None:
    """All that is known of a job."""

    async def ask(nq: Client) -> tuple[dict[str, Any], list[FlowJob]]:
        return attrs.asdict(await nq.get(job)), await nq.flow(job)

    row, flow = target.ask(ask)
    if as_json:
        show([row | {"flow_jobs": [attrs.asdict(each) for each in flow]}], True, "", single=True)
        return
    if error := row["error"]:
        row |= {"error": f"{error['type']}: {error['message']}", "traceback": error["traceback"]}
    show_record(row, f"job {job}")
    if flow:
        Console().print(flow_tree(flow, job))


def flow_tree(flow: Iterable[FlowJob], shown: int) -> Tree:
    """A flow as a tree: below each job what comes after it. One that comes after several is told in full below the last."""
    flow = list(flow)
    tree = Tree(f"flow of {len(flow)} jobs")
    places: dict[int, Tree] = {}
    for each in flow:  # by id, so parents come first
        label = Text(f"{each.name}  {each.state}  {each.id}", style="bold" if each.id == shown else "")
        known = [parent for parent in each.after if parent in places]
        for parent in known[:-1]:
            places[parent].add(Text(f"{each.name}  (see below)", style="dim"))
        places[each.id] = (places[known[-1]] if known else tree).add(label)
    return tree


@cli.command()
@click.argument("job", type=int)
@click.option("--data", metavar="JSON")
@click.option("--priority", type=int)
@click.option("--delay", type=float, help="Seconds; 0 starts a delayed job now.")
@as_json
@click.pass_obj
def edit(target: Target, job: int, data: str | None, priority: int | None, delay: float | None, as_json: bool) -> None:
    """Edit a job that waits. Exit code 1 if it does not wait."""
    if data is None and priority is None and delay is None:
        raise click.UsageError("give --data, --priority or --delay")
    value = UNCHANGED if data is None else parsed(data)
    edited = target.ask(lambda nq: nq.update_job(job, data=value, priority=priority, delay=delay))
    show([{"id": job, "edited": edited is not None}], as_json, "edited" if edited else "it does not wait", single=True)
    if edited is None:
        sys.exit(1)


def _operation(name: str, verb: str, text: str) -> None:
    @cli.command(name, help=text)
    @click.argument("jobs", type=int, nargs=-1, required=True)
    @as_json
    @click.pass_obj
    def command(target: Target, jobs: tuple[int, ...], as_json: bool) -> None:
        async def ask(nq: Client) -> tuple[list[int], dict[int, str]]:
            affected = await getattr(nq, name)(*jobs)
            return affected, {job: await _state(nq, job) for job in jobs if job not in affected}

        affected, untouched = target.ask(ask)
        text = f"{verb}: {_listed(affected)}"
        if untouched:
            text += f"; not: {_listed(f'{job} ({state})' for job, state in untouched.items())}"
        show([{"affected": affected, "untouched": list(untouched)}], as_json, text, single=True)
        if untouched:
            sys.exit(1)


_operation("retry", "retrying", "Give failed jobs one more attempt. Exit code 1 if one was not failed.")
_operation("resume", "resumed", "Put cancelled jobs back in line. Exit code 1 if one was not cancelled.")
_operation("cancel", "cancelled", "Cancel jobs, also running ones. Exit code 1 if one had ended.")
_operation("delete", "deleted", "Delete jobs in any state. Exit code 1 if there was none.")


@cli.command()
@click.argument("queue")
@click.option("--source", help="Only jobs that came from this queue.")
@click.option("--error-type", help="Only jobs whose last error was of this type.")
@click.option("--limit", type=click.IntRange(1))
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@as_json
@click.pass_obj
def redrive(
    target: Target,
    queue: str,
    source: str | None,
    error_type: str | None,
    limit: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Send the dead letters in QUEUE back to where they came from."""
    moved = target.ask(
        lambda nq: nq.redrive(queue, source=source, error_type=error_type, how_many=limit, preview=dry_run)
    )
    title = "dead letters" if dry_run or not moved else "redriven"
    show([{"id": old, "queue": to, "new_id": new} for old, to, new in moved], as_json, title)


async def _state(nq: Client, job: int) -> str:
    try:
        return (await nq.get(job)).state
    except JobNotFound:
        return "no such job"


def _listed(jobs: Iterable[object]) -> str:
    return ", ".join(map(str, jobs)) or "none"

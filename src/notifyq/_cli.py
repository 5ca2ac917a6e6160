"""The command line: tables for people, ``--json`` for programs."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import attrs
import click
import trio

from . import _schema
from ._connect import connect, resolve_dsn, resolve_listen_dsn
from ._ctrl_c import ctrl_c_alone
from ._errors import InvalidOption, NotifyqError
from ._opening import open_connection
from ._runtime import Runtime, run_until_signal
from ._sql import check_schema_name, translated
from ._wordless import wordless

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._client import Client


T = TypeVar("T")

IMPORTERS = (__file__, importlib.__file__, "<frozen importlib")
"""Beginnings of the names of files that stand between a command and what it imports."""


def json_after_it(context: click.Context, as_json: bool) -> None:
    """``--json`` of a group is of what it prints itself. Raises ``click.UsageError``."""
    if as_json:
        raise click.UsageError(f"give --json after {context.invoked_subcommand}")


@attrs.frozen
class Target:
    """Which installation the command is about."""

    dsn: str | None = attrs.field(repr=False)
    given_schema: str | None

    @property
    def schema(self) -> str:
        """Its schema."""
        return self.given_schema or "notifyq"

    def ask(self, question: Callable[[Client], Awaitable[T]]) -> T:
        """Run something with a client of an installed schema."""

        async def main() -> T:
            async with connect(self.dsn, schema=self.schema, migrate=False) as nq:
                return await question(nq)

        with ctrl_c_alone():
            return trio.run(main)


def _choose(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    target: Target = context.obj or Target(os.environ.get("NOTIFYQ_DSN"), None)  # how a supervisor tells its workers
    if value is not None and parameter.name == "dsn":
        target = attrs.evolve(target, dsn=value)
    elif value is not None:
        target = attrs.evolve(target, given_schema=check_schema_name(value))
    context.obj = target


def _target_options() -> list[click.Parameter]:
    dsn = "The database, as a URI or key=value pairs.  [default: the environment's DATABASE_URL]"
    schema = "The schema of the installation.  [default: notifyq]"
    return [
        click.Option(["--dsn"], help=dsn, expose_value=False, callback=_choose),
        click.Option(["--schema"], help=schema, expose_value=False, callback=_choose),
    ]


class Command(click.Command):
    """A command about an installation. Which one can be said before and after the command's name."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.params += _target_options()


class Group(click.Group):
    """Such commands."""

    command_class = Command
    group_class = type

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.params += _target_options()


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, with all columns.")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_schema.VERSION)
def cli() -> None:
    """A PostgreSQL job queue."""


@cli.command()
@click.argument("app", metavar="MODULE:RUNTIME")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1, 256), help="Worker processes.")
@click.option(
    "--listen-dsn",
    envvar="NOTIFYQ_LISTEN_DSN",
    metavar="DSN",
    help="The same database without a pooler in between, to listen on.  [default: the database's]",
)
@click.option("-v", "--verbose", is_flag=True, help="Log every job.")
@click.option("--supervised", is_flag=True, hidden=True, help="Stop when stdin is closed.")
@click.pass_obj
def run(target: Target, app: str, processes: int, listen_dsn: str | None, verbose: bool, supervised: bool) -> None:
    """Run the workers of a runtime until SIGTERM or SIGINT, then end with 0; a second signal stops at once.

    The database is the one of --dsn, else the one that MODULE's Runtime names, else DATABASE_URL's.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    on_signals(leave)
    runtime = load_runtime(app)
    asked: list[int] = []
    on_signals(lambda number, _: asked.append(number))
    if listen_dsn is not None or target.dsn is not None:
        runtime.listen_dsn = listen_dsn
    runtime.dsn = resolve_dsn(runtime.dsn if target.dsn is None else target.dsn)
    listen_dsn = resolve_listen_dsn(runtime.listen_dsn, runtime.dsn)
    runtime.schema = target.given_schema or runtime.schema
    try:
        if processes == 1:
            try:
                trio.run(partial(run_until_signal, runtime, asked, supervised=supervised))
            except BaseExceptionGroup as ended:  # what a handler raised, say: its words may hold what is in its job
                if verbose:
                    raise
                print(wordless(ended), file=sys.stderr)
                print("notifyq: the runtime has ended; -v says more, which may hold what is in jobs", file=sys.stderr)
                sys.exit(1)
        else:
            from ._supervisor import supervise

            options = ["-v"] if verbose else []
            # In the environment, since others can read a command line.
            arguments = ["--schema", runtime.schema, "run", app, "--supervised", *options]
            environment = {**os.environ, "NOTIFYQ_DSN": runtime.dsn, "NOTIFYQ_LISTEN_DSN": listen_dsn}
            sys.exit(trio.run(supervise, arguments, processes, environment, asked))
    finally:
        on_signals(signal.SIG_IGN)  # it has ended already


def on_signals(act: Any) -> None:
    """What SIGTERM and SIGINT do while it is not trio that receives them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, act)


def leave(*_: object) -> None:
    """End the process at once: nothing runs yet."""
    on_signals(signal.SIG_IGN)
    sys.exit(0)


def load_runtime(app: str) -> Runtime:
    """Import ``module:name``, the current folder first. Raises ``click.UsageError`` and ``InvalidOption``."""
    module_name, _, name = app.partition(":")
    if not module_name or not name:
        raise click.UsageError(f"{app!r} is not MODULE:RUNTIME, such as reminders.wiring:runtime")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise_from_its_lines(error)
        raise InvalidOption(f"there is no module {module_name!r} here or on the Python path") from error
    except NotifyqError:
        raise
    except Exception as error:
        raise_from_its_lines(error)
    runtime = getattr(module, name, None)
    if not isinstance(runtime, Runtime):
        found = [key for key, value in vars(module).items() if isinstance(value, Runtime)]
        hint = f"; it has {', '.join(found)}" if found else "; make one: runtime = notifyq.Runtime([queue])"
        raise InvalidOption(f"module {module_name!r} has no Runtime named {name!r}{hint}")
    return runtime


def raise_from_its_lines(error: Exception) -> NoReturn:
    """Say what a module raised while it was imported, from its own lines on: who imported it is nobody's concern."""
    traced = error.__traceback__
    while traced is not None and traced.tb_frame.f_code.co_filename.startswith(IMPORTERS):
        traced = traced.tb_next
    traceback.print_exception(error.with_traceback(traced))
    sys.exit(1)


@cli.command()
@click.option("--plan", is_flag=True, help="Print the SQL instead of running it.")
@click.option("--roles", is_flag=True, help="Also make the roles SCHEMA_producer, SCHEMA_worker and SCHEMA_operator.")
@click.option("--producer-role", metavar="NAME", help="Make this role one that sends and publishes.")
@click.option("--worker-role", metavar="NAME", help="Make this role one that runtimes run as.")
@click.option("--operator-role", metavar="NAME", help="Make this role one that the other commands run as.")
@click.pass_obj
def migrate(target: Target, /, plan: bool, roles: bool, **named: str | None) -> None:
    """Install or upgrade the schema, and say which roles may do what with it; these get their rights anew with each upgrade.

    A role that does not exist is created, without LOGIN.
    """
    granted = {kind: f"{target.schema}_{kind}" for kind in _schema.KINDS} if roles else {}
    granted |= {kind: name for kind in _schema.KINDS if (name := named[f"{kind}_role"]) is not None}

    async def main() -> str:
        with translated():
            connection = await open_connection(resolve_dsn(target.dsn))
        try:
            if plan:
                return await _schema.printed_plan(connection, target.schema, granted) or "-- nothing to do"
            done = await _schema.apply(connection, target.schema)
            await _schema.grant_roles(connection, target.schema, granted)
        finally:
            await connection.close()
        lines = [f"schema {target.schema}: {len(done)} files applied"] if done else []
        lines += [f"{kind}: {role}" for kind, role in granted.items()]
        return "\n".join(lines or ["nothing to do"])

    print(trio.run(main))


@cli.command()
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.pass_obj
def uninstall(target: Target, yes: bool) -> None:
    """Drop the schema with all its queues and jobs."""
    dsn = resolve_dsn(target.dsn)
    if not yes:
        click.confirm(f"Drop schema {target.schema} with all its queues and jobs?", abort=True)

    async def main() -> None:
        with translated():
            connection = await open_connection(dsn)
        try:
            await _schema.uninstall(connection, target.schema)
        finally:
            await connection.close()

    trio.run(main)
    print(f"schema {target.schema} dropped")


@cli.command(cls=click.Command)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def new(folder: Path) -> None:
    """Write a small runnable project into DIR."""
    from ._new import write_project

    for file in write_project(folder):
        print(file)


@cli.command(cls=click.Command)
def demo() -> None:
    """Run the example project on an embedded server (or DATABASE_URL) and show what happens to its jobs."""
    from ._demo import main

    main()


@cli.command(cls=click.Command, context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Measure; the same as python -m notifyq.bench."""
    from .bench.__main__ import main

    main.main(list(arguments), prog_name="notifyq bench")

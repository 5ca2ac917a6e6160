"""A command that says in one line what is wrong."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]


def run(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command as a process: an error is one line on stderr, without click's usage above it."""
    try:
        sys.exit(command.main(arguments, prog_name=name, standalone_mode=False))
    except click.ClickException as error:
        click.echo(f"{name.rpartition('.')[2]}: {' '.join(error.format_message().split())}", err=True)
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("Aborted!", err=True)
        sys.exit(1)

"""``python -m notifyq`` and the ``notifyq`` command."""

from __future__ import annotations

import sys

import psycopg

from . import _cli_jobs, _cli_queues, _cli_schedules  # noqa: F401 - their commands are added to the others
from ._cli import cli
from ._errors import NotifyqError


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed with one readable line, 2 wrong usage."""
    try:
        cli(prog_name="notifyq")
    except (NotifyqError, psycopg.Error) as error:
        print(f"notifyq: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

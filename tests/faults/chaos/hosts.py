"""What befalls the hosts: a failover to a standby, a full disk, a pooler in between."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING

import psycopg
import trio

from .faults import Fault
from .servers import Server, as_user, binaries, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from .cell import Scene

__all__ = ["DiskFull", "Failover", "Pooler", "SendersPooler", "said"]

STREAMING = "select count(*) from pg_stat_replication where state = 'streaming'"
SYNCHRONOUS = "select count(*) from pg_stat_replication where sync_state in ('sync', 'quorum')"


def run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its output is kept."""
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


def said(error: Exception) -> str:
    """What a command said last when it failed."""
    return str(getattr(error, "stderr", None) or error).strip().splitlines()[-1].rstrip(".")


class Failover(Fault):
    """All processes of the primary are killed with `kill -9` and its standby, which it replicated to synchronously, is
    promoted; then it gets a standby again. The DSN names both hosts, with `target_session_attrs=read-write`."""

    name = "failover"
    pause = 4.0
    goal = 5.0

    def missing(self) -> str | None:
        return None if (binaries() / "pg_basebackup").exists() else "the server comes without pg_basebackup"

    @contextlib.asynccontextmanager
    async def stage(self, scene: Scene) -> AsyncIterator[None]:
        folder = scene.folder / "fault"
        folder.mkdir()
        if as_user():
            shutil.chown(folder, **as_user())
        self._standby = Server(folder / "1", scene.server.settings)
        self._count = 1
        ports = f"{scene.server.port},{self._standby.port}"
        scene.worker_dsn = scene.sender_dsn = scene.direct_dsn = (
            f"host=127.0.0.1,127.0.0.1 port={ports} user=postgres dbname=postgres target_session_attrs=read-write"
        )
        try:
            await self._follow(scene)
            yield
        finally:
            self._standby.kill()

    async def _follow(self, scene: Scene) -> None:
        """Make the standby one of the primary, and have the primary's commits wait for it."""
        command = [
            str(binaries() / "pg_basebackup"),
            "-d",
            scene.server.dsn,
            "-D",
            str(self._standby.data),
            "-R",
            "-c",
            "fast",
        ]
        await trio.to_thread.run_sync(lambda: subprocess.run(command, check=True, capture_output=True, **as_user()))  # type: ignore[call-overload]
        await self._standby.start()
        await scene.until(STREAMING, 1, 30)
        await scene.query("alter system set synchronous_standby_names = '*'")
        await scene.query("select pg_reload_conf()")
        if await scene.until(SYNCHRONOUS, 1, 30) != 1:
            raise RuntimeError("the standby is not replicated to synchronously")

    async def inflict(self, scene: Scene) -> None:
        with scene.incident(self.name, waits_for="next"):
            old = scene.server
            old.kill()
            for statement in (
                "alter system set synchronous_standby_names = ''",
                "select pg_reload_conf()",
                "select pg_promote()",
            ):
                await self._say(statement)
            scene.server = self._standby
            await scene.until("select pg_is_in_recovery()::int", 0, 30)
        self._count += 1
        self._standby = Server(scene.folder / "fault" / str(self._count), old.settings)
        self._standby.take_port(old.port)
        await self._follow(scene)

    async def _say(self, statement: str) -> None:
        """Have the standby do it; what it replays may be in the way."""
        with trio.fail_after(30):
            while True:
                with contextlib.suppress(psycopg.errors.SerializationFailure):
                    await trio.to_thread.run_sync(self._standby.query, statement)
                    return


class DiskFull(Fault):
    """The server's volume, a small tmpfs, is filled to the last byte for three seconds; a server that stops is started again
    when there is room."""

    name = "disk-full"
    pause = 5.0
    rate = 3000
    settings = {"max_wal_size": "96MB", "min_wal_size": "80MB"}  # noqa: RUF012

    def missing(self) -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.place_at(folder)
            except (subprocess.CalledProcessError, FileNotFoundError) as error:
                return f"no tmpfs can be mounted here: {said(error)}"
            run("umount", folder, check=True)
        return None

    @staticmethod
    def place_at(folder: str) -> None:
        run("mount", "-t", "tmpfs", "-o", "size=1500m,mode=711", "tmpfs", folder, check=True)

    def place(self, folder: Path) -> Path:
        (folder / "fault").mkdir()
        self.place_at(str(folder / "fault"))
        return folder / "fault" / "data"

    def leave(self, folder: Path) -> None:
        run("umount", str(folder / "fault"), check=True)

    async def inflict(self, scene: Scene) -> None:
        ballast = scene.folder / "fault" / "ballast"
        with scene.incident(self.name, waits_for="next"):
            try:
                until = trio.current_time() + 3
                while trio.current_time() < until:
                    # If the server has filled the disk meanwhile, the file cannot even be made.
                    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
                        while True:
                            file.write(bytes(65536))
                    await trio.sleep(0.02)
            finally:
                ballast.unlink(missing_ok=True)
            await scene.server.accepting()

    def expected(self, scene: Scene) -> Iterable[str]:
        log = (scene.folder / "fault" / "data.log").read_text(encoding="utf-8", errors="replace")
        if "No space left on device" not in log:
            yield "the server did not find its disk full"


class SendersPooler(Fault):
    """PgBouncer in transaction mode between the senders and the server; it is killed and started again. Workers, which
    listen, reach the server directly."""

    name = "pgbouncer-senders"
    pause = 3.0

    def missing(self) -> str | None:
        self._program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        return None if self._program else "PgBouncer is not installed (Debian: apt-get install pgbouncer)"

    @contextlib.asynccontextmanager
    async def stage(self, scene: Scene) -> AsyncIterator[None]:
        folder = scene.folder / "fault"
        folder.mkdir()
        if as_user():
            shutil.chown(folder, **as_user())
        self._port = free_port()
        self._settings = folder / "pgbouncer.ini"
        lines = [
            "[databases]",
            f"* = host=127.0.0.1 port={scene.server.port} user=postgres",
            "[pgbouncer]",
            f"listen_addr = 127.0.0.1\nlisten_port = {self._port}\nunix_socket_dir =",
            f"auth_type = any\npool_mode = transaction\nlogfile = {folder / 'log'}\npidfile = {folder / 'pid'}",
            "default_pool_size = 20\nmax_client_conn = 200",
        ]
        self._settings.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.dsn = f"host=127.0.0.1 port={self._port} user=postgres dbname=postgres"
        self._start()
        try:
            await self._accepting()
            self.stand_between(scene)
            yield
        finally:
            self._process.kill()
            self._process.wait()

    def stand_between(self, scene: Scene) -> None:
        """Who reaches the server through it."""
        scene.sender_dsn = self.dsn

    def _start(self) -> None:
        assert self._program is not None
        self._process = subprocess.Popen(
            [self._program, "-q", str(self._settings)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **as_user(),  # type: ignore[call-overload]
        )

    async def _accepting(self) -> None:
        with trio.fail_after(20):
            while True:
                with contextlib.suppress(psycopg.OperationalError):
                    connection = await trio.to_thread.run_sync(lambda: psycopg.connect(self.dsn, connect_timeout=2))
                    connection.close()
                    return
                await trio.sleep(0.02)

    async def inflict(self, scene: Scene) -> None:
        with scene.incident(self.name, waits_for="next"):
            self._process.kill()
            self._process.wait()
            (self._settings.parent / "pid").unlink(missing_ok=True)
            self._start()
            await self._accepting()


class Pooler(SendersPooler):
    """The same for everybody: what listens is told nothing, says so once, and polls."""

    name = "pgbouncer-all"

    def stand_between(self, scene: Scene) -> None:
        scene.sender_dsn = scene.worker_dsn = self.dsn

    def expected(self, scene: Scene) -> Iterable[str]:
        for process in {process for process, _, _ in scene.ledger.told}:
            downs = sum(what == "ListenerDown" for by, what, _ in scene.ledger.told if by == process)
            ups = sum(what == "ListenerUp" for by, what, _ in scene.ledger.told if by == process)
            if (downs, ups) != (1, 0):
                yield f"worker {process} said {downs} times that it does not listen, and {ups} times that it does"

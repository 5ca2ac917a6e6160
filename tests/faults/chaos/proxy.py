"""A TCP proxy between notifyq and the server: it cuts connections, lets nothing through, delays, or drops notifications."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import psycopg
import trio

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Link", "Proxy"]


class Link:
    """One connection through the proxy. Frozen: it stays open, and nothing comes through."""

    def __init__(self, *, frozen: bool) -> None:
        self.scope = trio.CancelScope()
        self.busy = False
        """The server has not answered yet what was asked."""
        self._flows = trio.Event()
        if not frozen:
            self._flows.set()

    def freeze(self) -> None:
        if self._flows.is_set():  # else somebody waits for this one
            self._flows = trio.Event()

    def thaw(self) -> None:
        self._flows.set()

    async def flowing(self) -> None:
        while not self._flows.is_set():
            await self._flows.wait()


class Proxy:
    """A TCP port on the loopback that leads to the server, wherever that listens."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._links: set[Link] = set()
        self._new_frozen = False
        self.accepted = 0
        self.deaf = False
        """Notifications are dropped."""
        self.pooling = False
        """As a transaction pooler: process numbers are its own, and only those notifications come through that are part of
        an answer, since between two transactions nobody is there for them. LISTEN is accepted all the same."""
        self.dropped = 0
        self.delay: Callable[[], float] | None = None
        """Seconds by which what has been received goes on later, asked each time."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        self.dsn = psycopg.conninfo.make_conninfo(
            self._dsn, host="127.0.0.1", hostaddr="", port=port, sslmode="disable", gssencmode="disable"
        )
        task_status.started()
        await trio.serve_listeners(self._serve, [listener])

    def cut(self) -> None:
        """Close every connection; new ones come through."""
        for link in self._links:
            link.scope.cancel()

    def freeze(self, *, new: bool = False) -> list[Link]:
        """Let nothing through on the connections that are open, nor on ``new`` ones. Gives those that it froze."""
        self._new_frozen = new
        for link in self._links:
            link.freeze()
        return list(self._links)

    def thaw(self) -> None:
        """Let everything through, and what has been held up."""
        self._new_frozen = False
        for link in self._links:
            link.thaw()

    async def _serve(self, client: trio.SocketStream) -> None:
        self.accepted += 1
        link = Link(frozen=self._new_frozen)
        self._links.add(link)
        try:
            with link.scope:
                async with client:
                    with contextlib.suppress(OSError):  # the server is down: so is this connection
                        server = await self._open()
                        async with server, trio.open_nursery() as nursery:
                            nursery.start_soon(self._pump, link, client, server)
                            nursery.start_soon(self._pump, link, server, client, True)
        finally:
            self._links.discard(link)

    async def _open(self) -> trio.SocketStream:
        known = psycopg.conninfo.conninfo_to_dict(self._dsn)
        host, port = str(known["host"]), int(known.get("port") or 5432)
        if host.startswith("/"):
            return await trio.open_unix_socket(f"{host}/.s.PGSQL.{port}")
        return await trio.open_tcp_stream(host, port)

    async def _pump(
        self, link: Link, source: trio.SocketStream, sink: trio.SocketStream, from_server: bool = False
    ) -> None:
        rest = b""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for received in source:
                await link.flowing()
                data = bytes(received)
                if self.delay is not None:
                    await trio.sleep(self.delay())
                if from_server:
                    data, rest = self._altered(link, rest + data)
                else:
                    link.busy = True
                await sink.send_all(data)
        await link.flowing()
        link.scope.cancel()

    def _altered(self, link: Link, data: bytes) -> tuple[bytes, bytes]:
        """What is passed on of the whole messages in ``data``; and what is left."""
        passed = []
        while len(data) >= 5 and len(data) > (size := int.from_bytes(data[1:5], "big")):
            message, data = data[: size + 1], data[size + 1 :]
            match message[:1]:
                case b"A" if self.deaf or (self.pooling and not link.busy):
                    self.dropped += 1
                    continue
                case b"K" if self.pooling:
                    message = message[:5] + (1).to_bytes(4, "big") + message[9:]
                case b"Z":
                    link.busy = False
            passed.append(message)
        return b"".join(passed), data

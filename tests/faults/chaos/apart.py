"""Workers on a host of their own, and what befalls the packets on the way: they are lost, some of them or all."""

from __future__ import annotations

import contextlib
import functools
import random
import subprocess
import time
from typing import TYPE_CHECKING

import trio

from .faults import Fault
from .hosts import said
from .wire import HERE, THERE, Wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from .cell import Scene

__all__ = ["Apart", "HalfOpenHost", "LossyNetwork"]


GHOSTS = 30.0
"""Seconds in which the last session of a silent host has to be gone: one that waits for another one's lock answers first,
and that nobody acknowledges it is noticed 11 s later."""


class Apart(Fault):
    """The workers are in a network namespace of their own."""

    rate = 1500
    settings = {"listen_addresses": f"127.0.0.1,{HERE}"}  # noqa: RUF012
    seconds = (0.0, 0.0)
    """A packet takes as long, at least and at most."""
    loss = 0.0
    """The share of packets that are lost."""

    def missing(self) -> str | None:
        try:
            Wire().take_up()
        except (OSError, subprocess.CalledProcessError) as error:
            return f"no network namespace with TUN devices can be made here: {said(error)}"
        return None

    def place(self, folder: Path) -> Path:
        self._wire = Wire()  # the server is to listen on it
        return super().place(folder)

    def leave(self, folder: Path) -> None:
        self._wire.take_up()

    @contextlib.asynccontextmanager
    async def stage(self, scene: Scene) -> AsyncIterator[None]:
        with (scene.server.data / "pg_hba.conf").open("a", encoding="utf-8") as rules:
            rules.write(f"host all all {THERE}/32 trust\n")
        await scene.query("select pg_reload_conf()")
        scene.wrapped = self._wire.inside
        scene.worker_dsn = scene.direct_dsn.replace("127.0.0.1", HERE)
        least, most = self.seconds
        async with trio.open_nursery() as nursery:
            own = random.Random(scene.dice.random())  # how often it is asked is not the seed's
            nursery.start_soon(functools.partial(self._wire.carry, own, least=least, most=most, loss=self.loss))
            yield
            nursery.cancel_scope.cancel()


class LossyNetwork(Apart):
    """The workers are in a network namespace of their own; its packets take 20 to 40 ms, overtake each other, and one in 50
    is lost."""

    name = "lossy-network"
    seconds = (0.02, 0.04)
    loss = 0.02

    @contextlib.asynccontextmanager
    async def stage(self, scene: Scene) -> AsyncIterator[None]:
        async with super().stage(scene):
            with scene.incident(self.name):
                yield

    def expected(self, scene: Scene) -> Iterable[str]:
        if not self._wire.lost:
            yield f"none of {self._wire.carried} packets was lost"


class HalfOpenHost(Apart):
    """The workers are in a network namespace of their own, and from one moment on all packets of the connections that they
    have are lost; new ones come through. The kernels of both sides have to notice it. Leases of 12 s."""

    name = "half-open-host"
    lease = 12.0
    goal = 15.0
    pause = 3.0

    def __init__(self) -> None:
        self._noticed: list[float] = []

    async def inflict(self, scene: Scene) -> None:
        since = time.monotonic()
        with scene.incident(self.name, waits_for="sent"):
            ports = ", ".join(map(str, self._wire.silence()))
            await scene.recovered(since)
        await scene.until(f"select count(*) from pg_stat_activity where client_port in ({ports})", 0, 60)
        self._noticed.append(time.monotonic() - since)

    def expected(self, scene: Scene) -> Iterable[str]:
        if not self._wire.lost:
            yield f"none of {self._wire.carried} packets was lost"
        if self._noticed and (longest := max(self._noticed)) > GHOSTS:
            yield f"the server had sessions of a silent host for {longest:.1f} s"

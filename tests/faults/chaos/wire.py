"""A wire to a network namespace that loses and delays packets: two TUN devices, and this process between them.

So that it needs no more of the kernel than namespaces and /dev/net/tun (netem is a module that many kernels come without).
The protocol is that of the kernel's documentation, networking/tuntap: one packet for each read and write.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    import random

__all__ = ["HERE", "THERE", "Wire"]

NAMESPACE, DEVICES = "chaos", ("chaos0", "chaos1")
HERE, THERE = "10.213.7.1", "10.213.7.2"

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
TCP, SYN, ACK = 6, 0x02, 0x10
LONGEST_PACKET = 65_536
"""Bytes."""


class Wire:
    """From this host, which is ``HERE`` on it, to a namespace of its own."""

    def __init__(self) -> None:
        """Lay it. Raises ``OSError`` or ``CalledProcessError`` where that can't be done."""
        self.carried = self.lost = 0
        self._ports: set[int] = set()
        self._silent: set[int] = set()
        self._ends: list[int] = []
        try:
            for device in DEVICES:
                self._ends.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
                fcntl.ioctl(self._ends[-1], TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
            for command in (
                f"netns add {NAMESPACE}",
                f"link set {DEVICES[1]} netns {NAMESPACE}",
                f"addr add {HERE} peer {THERE} dev {DEVICES[0]}",
                f"link set {DEVICES[0]} up",
                f"-n {NAMESPACE} addr add {THERE} peer {HERE} dev {DEVICES[1]}",
                f"-n {NAMESPACE} link set {DEVICES[1]} up",
                f"-n {NAMESPACE} link set lo up",
            ):
                subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)
        except BaseException:
            self.take_up()
            raise

    def take_up(self) -> None:
        """Take it away: the devices go with their last descriptor."""
        for end in self._ends:
            os.close(end)
        self._ends.clear()
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["ip", "netns", "del", NAMESPACE], check=False, capture_output=True)

    def silence(self) -> list[int]:
        """Lose all packets of the TCP connections that there are, and carry those of new ones. Gives their ports there."""
        self._silent = self._silent | self._ports
        return sorted(self._silent)

    def _is_silent(self, packet: bytes, *, from_there: bool) -> bool:
        """Whether it is of such a connection: by the port at the namespace's end, until that begins another one."""
        if packet[0] >> 4 != 4 or packet[9] != TCP:
            return False
        segment = packet[(packet[0] & 15) * 4 :]
        port = int.from_bytes(segment[:2] if from_there else segment[2:4], "big")
        self._ports.add(port)
        if from_there and segment[13] & (SYN | ACK) == SYN:
            self._silent.discard(port)
        return port in self._silent

    async def carry(self, dice: random.Random, *, least: float, most: float, loss: float) -> None:
        """Carry packets until cancelled: each takes ``least`` to ``most`` seconds; a share of ``loss`` is lost."""

        async def deliver(packet: bytes, to: int, seconds: float) -> None:
            await trio.sleep(seconds)
            with contextlib.suppress(OSError):  # a full device loses it, as any does
                os.write(to, packet)

        async def forward(source: int, to: int, from_there: bool) -> None:
            while True:
                await trio.lowlevel.wait_readable(source)
                with contextlib.suppress(BlockingIOError):
                    while packet := os.read(source, LONGEST_PACKET):
                        if self._is_silent(packet, from_there=from_there) or dice.random() < loss:
                            self.lost += 1
                            continue
                        self.carried += 1
                        nursery.start_soon(deliver, packet, to, dice.uniform(least, most))

        here, there = self._ends
        async with trio.open_nursery() as nursery:
            nursery.start_soon(forward, here, there, False)
            nursery.start_soon(forward, there, here, True)

    @property
    def inside(self) -> tuple[str, ...]:
        """What to put before a command that is to be run at the other end."""
        return ("ip", "netns", "exec", NAMESPACE)

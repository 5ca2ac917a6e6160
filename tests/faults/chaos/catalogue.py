"""All faults, in the order in which they are tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import apart, faults, hosts, mixed, sessions

if TYPE_CHECKING:
    from .faults import Fault

__all__ = ["FAULTS"]

FAULTS: list[Fault] = [
    faults.Nothing(),
    faults.Kill(),
    faults.KillDefault(),
    faults.Terminate(),
    faults.Stop(),
    faults.Backends(),
    faults.Restart(),
    faults.RestartImmediate(),
    faults.Crash(),
    sessions.HalfOpen(),
    sessions.Network(),
    sessions.NoConnections(),
    sessions.AlienLocks(),
    sessions.LongTransaction(),
    sessions.NotifyQueue(),
    sessions.Clock(),
    hosts.Failover(),
    hosts.DiskFull(),
    hosts.SendersPooler(),
    hosts.Pooler(),
    apart.LossyNetwork(),
    apart.HalfOpenHost(),
    mixed.Mixed(),
]

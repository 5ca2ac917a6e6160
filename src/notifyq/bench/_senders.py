"""The workload of many senders of single rows: what the bell costs them."""

from __future__ import annotations

import json
from contextlib import ExitStack

import psycopg

from ._parts import Found, Role, Settings, Tell, clear
from ._sending import STATEMENTS
from ._sql import SEND_TO

__all__ = ["senders"]

PROCESSES = 2
"""That send: one for each core of a small machine; with more they only take it from the server."""

TURNS = 3
"""Of each kind in a run, in turn, since the speed of a shared machine changes from second to second."""

BUSY = 200
"""Jobs that wait from the start, for each slot of the workers: they are busy before the first send, and stay so."""


def senders(settings: Settings, tell: Tell) -> Found:
    """Sends/s of single rows, one a transaction, while workers are busy; without bell; always ringing; bare inserts.

    Two processes share the connections and drive libpq by hand, see ``_sending``. Every job takes the workers 20 ms,
    and more wait than they can run, in all queues, at every turn: what they take from the senders is the same for all.
    """
    kinds = list(STATEMENTS) * TURNS
    processes = min(PROCESSES, settings.senders)
    each = [settings.senders // processes + (number < settings.senders % processes) for number in range(processes)]
    sent = dict.fromkeys(STATEMENTS, 0.0)
    cpu = 0.0
    with ExitStack() as stack:
        with psycopg.connect(settings.dsn, autocommit=True) as connection:
            waiting = json.dumps([{"data": 0}] * (BUSY * settings.concurrency * settings.processes))
            for kind in ("default", "no_notify", "always"):
                connection.execute(SEND_TO, (f"bench.send_{kind}", waiting))
        for _ in range(settings.processes):
            stack.enter_context(Role("slow", settings.dsn, settings.concurrency))
        roles = [stack.enter_context(Role("send-singles", settings.dsn, share)) for share in each]
        for number, kind in enumerate(kinds):
            for role in roles:
                role.go(f"{kind} {settings.seconds / len(kinds)}")
            for role in roles:
                heard = role.hear()
                sent[kind] += heard["sent"] / heard["seconds"] / TURNS
                cpu += heard["cpu"] / heard["seconds"] / len(kinds)
            tell((number + 1) / len(kinds))
    clear(settings.dsn)
    return {
        "sends_per_second": sent["default"],
        "no_notify_sends_per_second": sent["no_notify"],
        "fraction_of_no_notify": sent["default"] / sent["no_notify"],
        "always_sends_per_second": sent["always"],
        "over_always": sent["default"] / sent["always"],
        "limit_sends_per_second": sent["limit"],
        "fraction_of_limit": sent["default"] / sent["limit"],
        "senders": settings.senders,
        "client_cores": cpu,
    }

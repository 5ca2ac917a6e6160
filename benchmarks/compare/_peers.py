"""Who is compared: packages, settings and why, how to see what is outstanding, what each leaves out."""

from __future__ import annotations

from typing import Any, Literal

import attrs

__all__ = ["PEERS", "Peer", "Row"]


@attrs.frozen
class Row:
    """Settings of a peer, and what it does under them."""

    settings: dict[str, Any]
    """Handed to the adapter, and printed."""
    keeps: Literal["output", "outcome", "nothing"]
    """Of a job that succeeded: that it did, and what its handler returned; only that it did; its row is deleted."""
    per_call: int = 1
    """Most jobs that one call of the handler is given."""


@attrs.frozen
class Peer:
    """A job queue, and how to run it."""

    name: str
    kind: Literal["own", "bare", "python", "npm"]
    adapter: str
    packages: dict[str, str]
    """What to install into its environment, each with the least version; versions of all are recorded."""
    rows: dict[str, Row]
    """By the name of the row in the table."""
    outstanding: str
    """A query: how many of its jobs wait, run, or have an end that is not committed."""
    pages: dict[str, str]
    """Where its documentation says what the tuned settings follow."""
    notes: str
    """What it does less, or differently, and where the settings come from."""


# Ten tasks send at once in `sends`: a tuned producer has a pool of ten connections or more.
_NOTIFYQ = Peer(
    "notifyq",
    "own",
    "on_notifyq.py",
    {"notifyq": "", "psycopg": "", "trio": ""},
    {
        "default": Row({}, "output"),
        "not kept": Row({"queue": {"retention": 0}}, "nothing"),
    },
    "select (select count(*) from notifyq.ready) + (select count(*) from notifyq.active)"
    " + (select count(*) from notifyq.scheduled)",
    {},
    "sends of concurrent tasks go together in a statement; claims are committed without waiting for their flush, so that"
    " after a crash of the server jobs may run again (sends and outcomes wait for theirs); it notifies only while somebody"
    " is free, so in `sends`, without a worker, it does not; 25 or 100 slots instead of the default 10 were no faster here",
)

_BARE = Peer(
    "limit",
    "bare",
    "",
    {"psycopg": ""},
    {"by hand": Row({}, "nothing")},
    "",
    {},
    "no queue: INSERT, a trigger with NOTIFY, LISTEN and a DELETE in plain psycopg; only pickup",
)

_PGQUEUER = Peer(
    "pgqueuer",
    "python",
    "on_pgqueuer.py",
    {"pgqueuer": "1.6", "asyncpg": "0.31", "uvloop": "0.22"},
    {
        "default": Row({"autovac": False, "run": {}, "loop": "uvloop"}, "outcome"),
        "tuned": Row(
            {"autovac": True, "run": {"batch_size": 1000}, "producer_pool": 10, "loop": "uvloop"},
            "outcome",
        ),
    },
    "select count(*) from pgqueuer",
    {"Performance Tuning": "https://pgqueuer.readthedocs.io/en/latest/guides/performance-tuning/"},
    "keeps a log of outcomes, no outputs; its autovacuum settings, large batches, a pool for the producer and one connection"
    " for the worker are its page's; uvloop is what `pgq run` takes; its durability is left at `durable`",
)

_PROCRASTINATE = Peer(
    "procrastinate",
    "python",
    "on_procrastinate.py",
    {"procrastinate": "3.10", "psycopg[binary,pool]": "3.2"},
    {
        "default": Row({"pool": {}, "worker": {}}, "outcome"),
        "tuned": Row(
            {
                "pool": {"min_size": 10, "max_size": 22},
                "worker": {"concurrency": 20, "delete_jobs": "successful"},
            },
            "nothing",
        ),
    },
    "select count(*) from procrastinate_jobs where status in ('todo', 'doing')",
    {
        "Launch a worker": "https://procrastinate.readthedocs.io/en/stable/howto/basics/worker.html",
        "Delete finished jobs": "https://procrastinate.readthedocs.io/en/stable/howto/production/delete_finished_jobs.html",
    },
    "claims and settles one job per statement, and checks each connection it takes from its pool with one more; concurrency"
    " of 10 or 50 was no faster here",
)

_CHANCY = Peer(
    "chancy",
    "python",
    "on_chancy.py",
    {"chancy": "0.26", "psycopg[binary,pool]": "3.2"},
    {
        "default": Row({"queue": {}, "pool": {}}, "outcome"),
        # many at once, since it fetches no more than it may run; what waits for the next round of outcomes is outstanding
        "tuned": Row(
            {
                "queue": {
                    "concurrency": 1000,
                    "executor": "chancy.executors.asyncex.AsyncExecutor",
                    "polling_interval": 1,
                    "eager_polling": True,
                },
                "pool": {"min_connection_pool_size": 10, "max_connection_pool_size": 20},
                "send_outgoing_interval": 0.05,
                "quiet": True,
            },
            "outcome",
        ),
    },
    "select count(*) from chancy_jobs where state in ('pending', 'running', 'retrying')",
    {"its documentation of Queue, Worker and the executors": "https://tkte.ch/chancy/"},
    "default: jobs run in a pool of processes, as many as cores, asked for every 5 s while none is sent; outcomes are"
    " written once a second (tuned: every 50 ms)",
)

_AWA = Peer(
    "awa",
    "python",
    "on_awa.py",
    {"awa-pg": "0.6.9"},
    {
        # its workers per queue have no default in Python: 50 is the engine's
        "default": Row({"client": {}, "queue": {"max_workers": 50}}, "outcome"),
        "tuned": Row({"client": {"max_connections": 30}, "queue": {"max_workers": 500}}, "outcome"),
    },
    # its view awa.jobs takes minutes for 50,000 completed jobs: what was ever sent, less what has ended
    "select (select coalesce(sum(pg_sequence_last_value(format('awa.%I', seq_name)::regclass)), 0)"
    " from awa.queue_enqueue_heads) - (select coalesce(sum(completed_count), 0) from awa.receipt_completion_batches)"
    " - (select count(*) from awa.done_entries) - (select coalesce(sum(pruned_completed_count), 0)"
    " from awa.queue_terminal_rollups)",
    {"Configuration": "https://github.com/hardbyte/awa/blob/main/docs/configuration.md"},
    "an engine in Rust; idle with ten queues has 20 connections, since start() hangs with the default of 10; 2 or 4"
    " claimers, which its start() has for hot queues, and larger batches were slower here",
)

_PG_BOSS_TUNED: dict[str, Any] = {
    "boss": {"useListenNotify": True, "max": 20},
    "queue": {"notify": True},
    "work": {"batchSize": 2000, "burstWhenBatchFull": True, "pollingIntervalSeconds": 0.5},
}

_PG_BOSS = Peer(
    "pg-boss",
    "npm",
    "on_pg_boss.mjs",
    {"pg-boss": "12.38", "pg": ""},
    {
        "default": Row({}, "output"),
        "tuned, per job": Row(
            _PG_BOSS_TUNED | {"work": _PG_BOSS_TUNED["work"] | {"perJobResults": True}}, "output", per_call=2000
        ),
        "tuned, per batch": Row(_PG_BOSS_TUNED, "outcome", per_call=2000),
    },
    "select count(*) from pgboss.job where state in ('created', 'retry', 'active')",
    {
        "Workers": "https://timgit.github.io/pg-boss/#/./api/workers",
        "Queues": "https://timgit.github.io/pg-boss/#/./api/queues",
    },
    "default: one job every 2 s, no notification; tuned: notifications, and batches without a pause between full ones; per"
    " batch: the jobs of a call succeed or fail together, and their outputs are not kept",
)

_GRAPHILE_WORKER = Peer(
    "graphile-worker",
    "npm",
    "on_graphile_worker.mjs",
    {"graphile-worker": "0.18", "pg": ""},
    {
        "default": Row({}, "nothing"),
        "tuned": Row(
            {
                "utils": {"maxPoolSize": 20},
                "worker": {
                    "concurrentJobs": 24,
                    "maxPoolSize": 25,
                    "localQueue": {"size": 2000},
                    "completeJobBatchDelay": 0,
                    "failJobBatchDelay": 0,
                },
            },
            "nothing",
        ),
    },
    "select count(*) from graphile_worker._private_jobs",
    {"Performance": "https://worker.graphile.org/docs/performance"},
    "deletes a finished job; the settings are its page's, but for a local queue of 2,000, which was faster here than 500",
)

PEERS = {
    peer.name: peer for peer in (_NOTIFYQ, _BARE, _PGQUEUER, _PROCRASTINATE, _CHANCY, _AWA, _PG_BOSS, _GRAPHILE_WORKER)
}

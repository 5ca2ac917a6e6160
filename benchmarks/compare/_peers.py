"""Who is compared: packages, settings and why, how to see what is outstanding, what each leaves out."""

from __future__ import annotations

from typing import Any, Literal

import attrs

__all__ = ["PEERS", "Peer"]


@attrs.frozen
class Peer:
    """A job queue, and how to run it."""

    name: str
    kind: Literal["own", "bare", "python", "npm"]
    adapter: str
    packages: dict[str, str]
    """What to install into its environment, each with the least version; versions of all are recorded."""
    rows: dict[str, dict[str, Any]]
    """Settings by the name of the row in the table: handed to the adapter, and printed."""
    outstanding: str
    """A query: how many of its jobs wait, run, or have an end that is not committed."""
    notes: str
    """What it does less, or differently, than run each job by itself and keep its outcome and output."""


# Ten tasks send at once in `sends`: a tuned producer has a pool of ten connections or more.
_ALL = (
    Peer(
        "notifyq",
        "own",
        "on_notifyq.py",
        {"notifyq": "", "psycopg": "", "trio": ""},
        {
            "default, kept": {},
            # more at once keeps fetching and flushing in larger batches
            "tuned, kept": {"worker": {"concurrency": 100}},
            "tuned, not kept": {"worker": {"concurrency": 100}, "queue": {"retention": 0}},
        },
        "select (select count(*) from notifyq.ready) + (select count(*) from notifyq.active)"
        " + (select count(*) from notifyq.scheduled)",
        "kept: every finished job with its output",
    ),
    Peer(
        "bare-limit",
        "bare",
        "",
        {"psycopg": ""},
        {"by hand": {}},
        "",
        "no queue: INSERT and NOTIFY, LISTEN and one claim by hand in plain psycopg",
    ),
    Peer(
        "pgqueuer",
        "python",
        "on_pgqueuer.py",
        {"pgqueuer": "1.6", "asyncpg": "0.31", "uvloop": "0.22"},
        {
            "default": {"autovac": False, "run": {}},
            # its guide to performance: large batches, `pgq autovac`, a pool for producers, one connection for the worker,
            # and uvloop, which its own benchmark uses
            "tuned": {"autovac": True, "run": {"batch_size": 1000}, "producer_pool": 10, "loop": "uvloop"},
        },
        "select count(*) from pgqueuer",
        "deletes the job's row and keeps a log of outcomes, no outputs",
    ),
    Peer(
        "procrastinate",
        "python",
        "on_procrastinate.py",
        {"procrastinate": "3.10", "psycopg[binary,pool]": "3.2"},
        {
            "default": {"pool": {}, "worker": {}},
            # concurrency for async jobs, as its guide says, with a connection for each and one to listen; `listen_notify` is
            # on by default; deleted rows keep its table small
            "tuned": {
                "pool": {"min_size": 10, "max_size": 22},
                "worker": {"concurrency": 20, "delete_jobs": "successful"},
            },
        },
        "select count(*) from procrastinate_jobs where status in ('todo', 'doing')",
        "claims and settles one job per statement; keeps outcomes, no outputs; tuned: keeps no finished jobs",
    ),
    Peer(
        "chancy",
        "python",
        "on_chancy.py",
        {"chancy": "0.26", "psycopg[binary,pool]": "3.2"},
        {
            "default": {"queue": {}, "pool": {}},
            # the executor for async jobs; many at once, since it fetches no more than it may run; polls at once when a job
            # ends, and every second (its least) besides; outcomes every 50 ms, for what it holds until then is outstanding
            "tuned": {
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
        },
        "select count(*) from chancy_jobs where state in ('pending', 'running', 'retrying')",
        "keeps outcomes, no outputs; default: jobs run in a pool of processes; outcomes are written once a second"
        " (tuned: every 50 ms), and a worker that is killed forgets those not written",
    ),
    Peer(
        "awa",
        "python",
        "on_awa.py",
        {"awa-pg": "0.6.9"},
        {
            # its workers per queue have no default in Python: 50 is the engine's
            "default": {"client": {}, "queue": {"max_workers": 50}},
            # more workers, and several claimers, as its docstring of start() recommends to try for hot queues
            "tuned": {"client": {"max_connections": 30}, "queue": {"max_workers": 500, "claimers": 4}},
        },
        # its view awa.jobs takes minutes for 50,000 completed jobs: what was ever sent, less what has ended
        "select (select coalesce(sum(pg_sequence_last_value(format('awa.%I', seq_name)::regclass)), 0)"
        " from awa.queue_enqueue_heads) - (select coalesce(sum(completed_count), 0) from awa.receipt_completion_batches)"
        " - (select count(*) from awa.done_entries) - (select coalesce(sum(pruned_completed_count), 0)"
        " from awa.queue_terminal_rollups)",
        "keeps outcomes, no outputs; an engine in Rust; can't serve ten queues with its default of 10 connections: idle has"
        " more",
    ),
    Peer(
        "pg-boss",
        "npm",
        "on_pg_boss.mjs",
        {"pg-boss": "12.38", "pg": ""},
        {
            "default": {},
            # notifications, which are off by default; batches without a pause between full ones
            "tuned, per job": {
                "boss": {"useListenNotify": True, "max": 20},
                "queue": {"notify": True},
                "work": {
                    "batchSize": 2000,
                    "burstWhenBatchFull": True,
                    "pollingIntervalSeconds": 0.5,
                    "perJobResults": True,
                },
            },
            "tuned, per batch": {
                "boss": {"useListenNotify": True, "max": 20},
                "queue": {"notify": True},
                "work": {"batchSize": 2000, "burstWhenBatchFull": True, "pollingIntervalSeconds": 0.5},
            },
        },
        "select count(*) from pgboss.job where state in ('created', 'retry', 'active')",
        "default: one job every 2 s, no notification; tuned: one call of the handler takes up to 2,000 jobs; per job: each"
        " has its own outcome and output; per batch: they succeed or fail together, and keep no outputs",
    ),
    Peer(
        "graphile-worker",
        "npm",
        "on_graphile_worker.mjs",
        {"graphile-worker": "0.18", "pg": ""},
        {
            "default": {},
            # its page on performance: concurrency, a local queue (2,000 here), batched completion
            "tuned": {
                "utils": {"maxPoolSize": 20},
                "worker": {
                    "concurrentJobs": 24,
                    "maxPoolSize": 25,
                    "localQueue": {"size": 2000},
                    "completeJobBatchDelay": 0,
                    "failJobBatchDelay": 0,
                },
            },
        },
        "select count(*) from graphile_worker._private_jobs",
        "deletes a finished job: keeps neither outcomes nor outputs",
    ),
)

PEERS = {peer.name: peer for peer in _ALL}

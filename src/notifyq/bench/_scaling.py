"""The workload of many processes: what more of them bring."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import psycopg

from ._parts import Found, ProcessEnded, Role, Settings, Tell, clear
from ._sql import SCALING_SPAN, SEND_NUMBERS, UNFINISHED

__all__ = ["scaling"]

APP = "notifyq.bench._computing:runtime"

JOBS_EACH = 3000
"""Jobs for each process: some seconds, so that the moments at which they start do not count for much."""

PATIENCE = 30.0
"""Seconds that the processes get to end."""


def scaling(settings: Settings, tell: Tell) -> Found:
    """Jobs/s of ``notifyq run`` as one process and with ``--processes``, of jobs that each compute for a millisecond.

    From the first claim to the last completion. The limit: as many processes that compute as much, without a queue.
    """
    many = max(2, settings.processes)
    rates, limits = [], []
    for done, processes in enumerate((1, many), 1):
        rates.append(_run(settings, processes))
        limits.append(_compute(settings, processes))
        tell(done / 2)
    return {
        "jobs_per_second": rates[1],
        "one_process_jobs_per_second": rates[0],
        "over_one_process": rates[1] / rates[0],
        "processes": many,
        "limit_jobs_per_second": limits[1],
        "limit_over_one_process": limits[1] / limits[0],
        "fraction_of_limit": rates[1] / limits[1],
    }


def _run(settings: Settings, processes: int) -> float:
    jobs = JOBS_EACH * processes
    command = [sys.executable, "-m", "notifyq", "run", APP, f"--processes={processes}"]
    with psycopg.connect(settings.dsn, autocommit=True) as connection:
        connection.execute(SEND_NUMBERS, ("bench.scaling", jobs))
        with subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command,
            env={**os.environ, "DATABASE_URL": settings.dsn},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as running:
            try:
                while connection.execute(UNFINISHED).fetchone() == (True,):
                    if running.poll() is not None:
                        raise ProcessEnded(f"notifyq run ended with {running.returncode} before the jobs did")
                    time.sleep(0.05)
                running.send_signal(signal.SIGTERM)
                running.wait(PATIENCE)
            finally:
                running.kill()
        [(completed, seconds)] = connection.execute(SCALING_SPAN, ("bench.scaling",)).fetchall()
    clear(settings.dsn)
    rate: float = completed / seconds
    return rate


def _compute(settings: Settings, processes: int) -> float:
    with ExitStack() as stack:
        roles = [stack.enter_context(Role("compute", settings.dsn, JOBS_EACH)) for _ in range(processes)]
        started = time.perf_counter()
        for role in roles:
            role.go()
        for role in roles:
            role.hear()
        return JOBS_EACH * processes / (time.perf_counter() - started)

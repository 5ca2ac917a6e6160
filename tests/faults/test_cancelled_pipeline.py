"""A pipeline that is cancelled while its connection breaks."""

from __future__ import annotations

import contextlib
import gc
import sys

import psycopg
import pytest
import trio

from notifyq._opening import open_connection
from tests.faults.test_cancelled import CancelAtStep


@pytest.mark.parametrize("killed", [True, False])
async def test_a_pipeline_cancelled_at_any_step_of_its_end_leaves_nothing_to_the_garbage_collector(
    dsn, connection, monkeypatch, killed
):
    left: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: left.append((step, str(unraisable.exc_value))))
    for step in range(1, 14):
        other = await open_connection(dsn)
        with trio.CancelScope() as scope:
            instrument = CancelAtStep(scope, step)
            with contextlib.suppress(psycopg.Error):
                async with other.transaction(), other.pipeline():
                    await other.fetch("select 1")
                    if killed:
                        await connection.execute("select pg_terminate_backend(%s, 1000)", (other.info.backend_pid,))
                    trio.lowlevel.add_instrument(instrument)
        trio.lowlevel.remove_instrument(instrument)
        await other.close()
        del other
    gc.collect()
    assert left == []

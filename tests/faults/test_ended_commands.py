"""Commands that start a server of their own, ended in the middle: they leave no process and no folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import trio


@pytest.fixture
def folder():
    """Where the command puts its server: open to all, since that does not run as root."""
    made = Path(tempfile.mkdtemp(prefix="nq"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


def processes() -> list[tuple[int, str]]:
    """Of each its parent's number and its command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int((process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            found.append((parent, (process / "cmdline").read_text(encoding="utf-8").replace("\0", " ")))
    return found


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("command", [("notifyq", "demo"), ("notifyq.bench", "latency", "--repeat", "1")])
async def test_what_a_command_started_ends_with_it(folder, command, ended_by):
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    process = subprocess.Popen(  # noqa: ASYNC220 - our own interpreter; starting it takes a millisecond
        [sys.executable, "-m", *command],
        env={**environment, "TMPDIR": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell starts it in the background
    )
    try:
        with trio.fail_after(60):
            while not any(parent == process.pid and "-m notifyq" in line for parent, line in processes()):
                assert process.poll() is None
                await trio.sleep(0.01)
            process.send_signal(ended_by)
            log = (await trio.to_thread.run_sync(process.communicate))[1].decode()
    finally:
        process.kill()
    assert process.returncode == 1, log
    assert [line for _, line in processes() if f"{folder}/" in line] == []
    assert list(folder.glob("notifyq-*")) == []
    assert "Traceback" not in log

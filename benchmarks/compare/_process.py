"""A process of a peer, as its parent sees it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from typing import Any

__all__ = ["CellFailed", "Role"]


class CellFailed(Exception):
    """This cell has no figures; the others go on."""


class Role:
    """A process that carries out commands; see ``peers/role.py`` for what it understands."""

    def __init__(self, command: list[str], variables: dict[str, str], spec: dict[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="compare-")  # what it leaves behind goes with it
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [*command, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**variables, "TMPDIR": self._folder.name},
            start_new_session=True,
        )
        self._buffer = b""

    def __enter__(self) -> Role:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # its own processes with it; what it would do while it stops is not measured
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()
        self._folder.cleanup()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def tell(self, verb: str, **options: Any) -> None:
        """Give a command."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": verb, **options}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise CellFailed(f"its process ended early: {self._last_words()}") from None

    def hear(self, limit: float = 60) -> dict[str, Any]:
        """Wait for the answer, at most so many seconds."""
        assert self._process.stdout is not None
        until = time.monotonic() + limit
        while b"\n" not in self._buffer:
            if not select.select([self._process.stdout], [], [], max(0, until - time.monotonic()))[0]:
                raise CellFailed(f"no answer within {limit:.0f} s: {self._last_words()}")
            more = os.read(self._process.stdout.fileno(), 65536)
            if not more:
                raise CellFailed(f"its process ended early: {self._last_words()}")
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CellFailed(answer["error"].partition("\n")[0])
        return answer

    def ask(self, verb: str, limit: float = 60, **options: Any) -> dict[str, Any]:
        """Give a command and wait for the answer."""
        self.tell(verb, **options)
        return self.hear(limit)

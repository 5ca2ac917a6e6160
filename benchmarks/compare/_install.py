"""Environments: one per peer, made once, in a folder that git ignores."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._peers import Peer

__all__ = ["NotInstalled", "command", "commit", "install", "versions"]

ROOT = Path(__file__).parent / ".peers"
ADAPTERS = Path(__file__).parent / "peers"
PROJECT = Path(__file__).parents[2]

NODE = "node@>=22.18 <23"
"""The newest versions of the Node peers need this one, which npm brings into their environments."""

NOT_HANDED_ON = ("PG", "DATABASE_URL", "NOTIFYQ", "PYTHON")
"""Beginnings of environment variables that would change what a peer connects to or does."""

VERSIONS = """
import importlib.metadata, json, platform, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]} | {"python": platform.python_version()}))
"""


class NotInstalled(Exception):
    """This peer can't be had here; the others go on."""


def install(peer: Peer) -> None:
    """Make its environment, unless it is there with these packages.

    Raises:
        NotInstalled: what it needs is not there, or its installer failed.
    """
    if peer.kind not in ("python", "npm"):
        return
    if peer.kind == "npm" and not all(map(shutil.which, ("node", "npm"))):
        raise NotInstalled(f"{peer.name} needs node and npm on the PATH")
    folder, wanted = ROOT / peer.name, json.dumps(peer.packages)
    stamp = folder / "installed.json"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    click.echo(f"installing {peer.name}", err=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if peer.kind == "python":
        _run(peer, [sys.executable, "-m", "venv", str(folder)])
        names = [f"{name}>={least}" for name, least in peer.packages.items()]
        _run(peer, [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *names])
    else:
        _npm(peer, folder)
    stamp.write_text(wanted, encoding="utf-8")


def _npm(peer: Peer, folder: Path) -> None:
    (folder / "package.json").write_text('{"private": true}\n', encoding="utf-8")
    install = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", f"--prefix={folder}"]
    _run(peer, [*install, NODE])
    # then by the new Node: npm looks at the Node that runs it to choose a version
    path = f"{folder / 'node_modules' / 'node' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    names = [f"{name}@>={least}" for name, least in peer.packages.items() if least]
    _run(peer, [*install, *names], {**os.environ, "PATH": path})


def _run(peer: Peer, command: list[str], variables: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).strip().splitlines() if "WARNING" not in line]
        raise NotInstalled(f"{peer.name} can't be installed: {lines[-1] if lines else done.returncode}")


def command(peer: Peer) -> tuple[list[str], dict[str, str]]:
    """How to run its adapter, and the environment variables of that process."""
    folder, adapter = ROOT / peer.name, str(ADAPTERS / peer.adapter)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(NOT_HANDED_ON)}
    match peer.kind:
        case "python":
            return [str(folder / "bin" / "python"), adapter], variables
        case "npm":
            node = str(folder / "node_modules" / "node" / "bin" / "node")
            return [node, adapter], {**variables, "COMPARE_ENVIRONMENT": str(folder)}
        case _:
            return [sys.executable, adapter], variables


def versions(peer: Peer) -> dict[str, str]:
    """The versions of its packages, of what runs them, and of its adapter; of notifyq, which is worked on, its source's."""
    if peer.kind == "npm":
        modules = ROOT / peer.name / "node_modules"
        found = {
            name: json.loads((modules / name / "package.json").read_text(encoding="utf-8"))["version"]
            for name in (*peer.packages, "node")
        }
    else:
        names = [name.partition("[")[0] for name in peer.packages]
        found = json.loads(subprocess.check_output([command(peer)[0][0], "-c", VERSIONS, *names], text=True))
    if peer.kind == "own":
        source = PROJECT / "src" / "notifyq"
        files = sorted(path for path in source.rglob("*.py") if "bench" not in path.parts)
        found["source"] = digest([*files, *sorted((PROJECT / "sql").rglob("*.sql"))])
    if peer.adapter:
        found["adapter"] = digest([ADAPTERS / peer.adapter, ADAPTERS / f"role{Path(peer.adapter).suffix}"])
    return found


def commit() -> str | None:
    """The commit that is checked out here, marked if something in it was changed; None without git."""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=7", "--match="]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def digest(files: Iterable[Path]) -> str:
    """A short name of what is in them."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(file.read_bytes())
    return whole.hexdigest()[:12]

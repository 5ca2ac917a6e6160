"""Environments: one per peer, made once, in a folder that git ignores."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ._peers import Peer

__all__ = ["check", "command", "install", "versions"]

ROOT = Path(__file__).parent / ".peers"
ADAPTERS = Path(__file__).parent / "peers"

NODE = "node@>=22.18 <23"
"""The newest versions of the Node peers need this one, which npm brings into their environments."""

VERSIONS = """
import importlib.metadata, json, platform, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]} | {"python": platform.python_version()}))
"""


def check(peer: Peer) -> None:
    """Refuse a peer that can't be installed here."""
    if peer.kind == "npm":
        for tool in ("node", "npm"):
            if shutil.which(tool) is None:
                raise click.UsageError(f"{peer.name} needs {tool}, which is not on the PATH: leave it out with --peers")


def install(peer: Peer) -> None:
    """Make its environment, unless it is there with these packages."""
    if peer.kind not in ("python", "npm"):
        return
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
        raise click.ClickException(f"{peer.name} can't be installed: {lines[-1] if lines else done.returncode}")


def command(peer: Peer) -> tuple[list[str], dict[str, str]]:
    """How to run its adapter, and the environment variables of that process."""
    folder, adapter = ROOT / peer.name, str(ADAPTERS / peer.adapter)
    match peer.kind:
        case "python":
            return [str(folder / "bin" / "python"), adapter], dict(os.environ)
        case "npm":
            node = str(folder / "node_modules" / "node" / "bin" / "node")
            return [node, adapter], {**os.environ, "COMPARE_ENVIRONMENT": str(folder)}
        case _:
            return [sys.executable, adapter], dict(os.environ)


def versions(peer: Peer) -> dict[str, str]:
    """The versions of its packages, and of what runs them."""
    if peer.kind == "npm":
        modules = ROOT / peer.name / "node_modules"
        return {
            name: json.loads((modules / name / "package.json").read_text(encoding="utf-8"))["version"]
            for name in (*peer.packages, "node")
        }
    names = [name.partition("[")[0] for name in peer.packages]
    found: dict[str, str] = json.loads(
        subprocess.check_output([command(peer)[0][0], "-c", VERSIONS, *names], text=True)
    )
    return found

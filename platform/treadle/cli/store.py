"""Verbs about the store: a real S3 server on this machine for trying things out."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import click

from treadle.cli.options import answer, json_option, say

__all__ = ["store_group"]


@click.group("store")
def store_group() -> None:
    """Start a local S3 server for trying things out."""


@store_group.command()
@click.option("--port", type=click.IntRange(1, 65535), help="S3 port. [default: a free one]")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path.home() / ".treadle" / "s3",
    help="Where its data stay. [default: ~/.treadle/s3]",
)
@json_option
def dev(port: int | None, folder: Path, as_json: bool) -> None:
    """Run a real S3 server (SeaweedFS) on loopback until Ctrl-C.

    Its first lines are the environment that other terminals need. Anyone with an account on this
    machine can reach its inner ports: it is for trying things out, not for keeping things.
    """
    from treadle.store.dev import dev_server

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with dev_server(folder, port=port) as server:
        environment = server.environment()
        lines = "\n".join(f"export {name}={value}" for name, value in environment.items())
        answer(as_json, {"environment": environment, "endpoint": server.endpoint, "pid": server.pid}, lines)
        sys.stdout.flush()
        say(f"S3 server at {server.endpoint}, data in {folder}; Ctrl-C stops it")
        with suppress(KeyboardInterrupt):
            stop.wait()
        say("stopping")

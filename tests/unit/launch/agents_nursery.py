"""Agents in a tenth of a second: `python agents_nursery.py SOCKET` warms up once, and each agent is a fork of it.

A request is JSON with what becomes the child's standard input beside it; the answer is the child's pid.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from treadle.launch.agent import _ONE_THREAD, Orders


@dataclass
class Agent:
    """An agent's process, a grandchild of this one; otherwise like `subprocess.Popen`."""

    pid: int
    stdin: BinaryIO

    def __post_init__(self) -> None:
        try:
            self._handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self._handle = -1

    def is_alive(self, seconds: float = 0.0) -> bool:
        """Whether it lives, even after so long."""
        return self._handle >= 0 and not select.select([self._handle], [], [], seconds)[0]

    def close(self) -> None:
        """Close its standard input, and end it where that does not."""
        self.stdin.close()
        if self.is_alive(15):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            self.is_alive(15)
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class Nursery:
    """Where agents come from."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-P", __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment | _ONE_THREAD)
        theirs.close()
        assert self._socket.recv(1), "the nursery did not start"

    def start(self, orders: Orders, *, before: str = "", environment: dict[str, str] | None = None) -> Agent:
        """A new agent.

        Args:
            before: Python that it runs first: faults that only a rank itself can have.
        """
        read, write = os.pipe()
        request = json.dumps({"before": before, "environment": environment or {}}).encode()
        socket.send_fds(self._socket, [request], [read])
        os.close(read)
        stdin = os.fdopen(write, "wb", buffering=0)
        pid = int(self._socket.recv(100))
        with contextlib.suppress(BrokenPipeError):
            stdin.write(orders.to_json())
        return Agent(pid, stdin)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


def _serve(link: socket.socket) -> None:
    from treadle.launch.warm import warm_up

    warm_up()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for agents: they vanish as they end
    link.send(b"!")
    while True:
        request, (stdin, *_), _, _ = socket.recv_fds(link, 1 << 16, 1)
        pid = os.fork()
        if not pid:
            _live(link, stdin, json.loads(request))
        os.close(stdin)
        link.send(str(pid).encode())


def _live(link: socket.socket, stdin: int, request: dict[str, Any]) -> None:
    """The whole life of an agent."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        link.close()
        os.dup2(stdin, 0)
        os.close(stdin)
        os.environ.update(request["environment"])
        exec(request["before"], {})
        from treadle.launch.agent import main

        code = main()
    except BaseException:  # it ends below, whatever it was
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        _serve(socket.socket(fileno=int(sys.argv[1])))
    except ValueError:  # no request: the other end is closed
        sys.exit(0)

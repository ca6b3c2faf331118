"""Messages between the processes of a run: JSON objects, a line each, over a socket."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

__all__ = ["Lines"]

_MOST_BYTES = 64 << 20  # a summary with a confusion matrix of thousands of labels is far below
_SILENT_S = 20
"""How long the machine at the other end may be out of reach. One that lost its power says no goodbye."""


class Lines:
    """One end of a connection. Not shared between threads, but for `send`, which is one system call for small messages.

    Args:
        sock: connected; it is closed with this object.
        most_bytes: longest message taken; the connection counts as closed at one above it.
    """

    def __init__(self, sock: socket.socket, *, most_bytes: int = _MOST_BYTES) -> None:
        self._socket = sock
        self._parts: list[bytes] = []  # of a message whose end has not come yet
        self._num_bytes = 0
        self._most_bytes = most_bytes
        self.is_open = True
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            _notice_silence(sock)

    @classmethod
    def pair(cls) -> tuple[Lines, Lines]:
        """Two connected ends, for a process and its child."""
        first, second = socket.socketpair()
        return cls(first), cls(second)

    def fileno(self) -> int:
        return self._socket.fileno()

    def trust(self) -> None:
        """Take messages of any size that one of ours may have."""
        self._most_bytes = _MOST_BYTES

    def send(self, kind: str, **facts: Any) -> bool:
        """Whether the message was handed over; False where the other end is gone."""
        data = json.dumps({"kind": kind, **facts}, separators=(",", ":")).encode() + b"\n"
        try:
            self._socket.sendall(data)
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come; waits for some bytes. `is_open` is False once the other end is gone."""
        try:
            data = self._socket.recv(1 << 16)
        except OSError:
            data = b""
        self._num_bytes += len(data)
        if not data or self._num_bytes > self._most_bytes:
            self.is_open = False
            return []
        self._parts.append(data)
        if b"\n" not in data:
            return []
        *lines, rest = b"".join(self._parts).split(b"\n")
        self._parts, self._num_bytes = [rest], len(rest)
        return [message for line in lines if (message := _message(line)) is not None]

    def close(self) -> None:
        self.is_open = False
        self._socket.close()


def _message(line: bytes) -> dict[str, Any] | None:
    """None for what is not from one of ours; whether it is, the token decides, not the form."""
    with contextlib.suppress(ValueError, RecursionError):
        message = json.loads(line)
        if isinstance(message, dict) and isinstance(message.get("kind"), str):
            return message
    return None


def _notice_silence(sock: socket.socket) -> None:
    """Have the kernel close the connection where nothing comes back for `_SILENT_S`, asked or not."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": _SILENT_S // 5 - 1}
    for name, value in (wanted | {"TCP_USER_TIMEOUT": 1000 * _SILENT_S}).items():
        if (option := getattr(socket, name, None)) is not None:  # not every system has all of them
            sock.setsockopt(socket.IPPROTO_TCP, option, value)

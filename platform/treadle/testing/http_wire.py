"""HTTP/1.1 messages as they travel: their bytes unchanged, so that what was signed stays signed."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import BinaryIO

__all__ = ["Message", "MessageError", "read_message"]

_MAX_HEAD = 1 << 20


class MessageError(Exception):
    """What came is no HTTP/1.1 message, or ended in the middle of one."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """A request or a reply.

    Args:
        head: from the first line to the empty line, which it includes.
        body: as it travels: chunked bodies with their frames.
    """

    head: bytes
    body: bytes = b""

    @property
    def first_line(self) -> list[str]:
        """Method, path and version; or version, status and reason."""
        return self.head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)

    @property
    def status(self) -> int:
        """The status of a reply."""
        return int(self.first_line[1])

    def field(self, name: str) -> str:
        """The value of a header field, or ""."""
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.decode("latin-1").partition(":")
            if key.strip().lower() == name:
                return value.strip()
        return ""

    @property
    def is_last(self) -> bool:
        """Whether the connection ends with it."""
        return self.field("connection").lower() == "close" or self.first_line[-1] == "HTTP/1.0"


def read_message(stream: BinaryIO, *, to: Message | None = None, sender: socket.socket | None = None) -> Message | None:
    """The next message, or None where the other side has hung up between two.

    Args:
        stream: what to read.
        to: the request that a reply answers: a reply to HEAD has a length and no body.
        sender: whom to tell "100 Continue" before the body of a request that waits for it.

    Raises:
        MessageError: it is broken off or malformed.
    """
    head = _read_head(stream)
    if not head:
        return None
    message = Message(head=head)
    if to is None:
        if sender is not None and message.field("expect").lower() == "100-continue":
            sender.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        has_body = True
    else:
        has_body = to.first_line[0] != "HEAD" and message.status >= 200 and message.status not in (204, 304)
    return Message(head=head, body=_read_body(stream, message, is_reply=to is not None) if has_body else b"")


def _read_head(stream: BinaryIO) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline(_MAX_HEAD)
        if not line:
            if head:
                raise MessageError("it ended within its head")
            return b""
        head += line
        if len(head) > _MAX_HEAD:
            raise MessageError("its head does not end")
        if head == b"\r\n":
            head = b""
    return head


def _read_body(stream: BinaryIO, message: Message, *, is_reply: bool) -> bytes:
    if "chunked" in message.field("transfer-encoding").lower():
        return _read_chunks(stream)
    if length := message.field("content-length"):
        return _exactly(stream, int(length))
    return stream.read() if is_reply else b""


def _read_chunks(stream: BinaryIO) -> bytes:
    found = []
    while True:
        line = stream.readline(_MAX_HEAD)
        if not line:
            raise MessageError("it ended between two chunks")
        found.append(line)
        size = int(line.split(b";")[0], 16)
        if size == 0:
            break
        found.append(_exactly(stream, size + 2))
    while True:  # trailers
        line = stream.readline(_MAX_HEAD)
        found.append(line)
        if line in (b"\r\n", b""):
            return b"".join(found)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise MessageError(f"got {len(data)} bytes of its body, expected {size}")
    return data

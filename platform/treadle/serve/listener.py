"""One HTTP port that several processes of this machine answer on, and may be restarted on.

Each replica listens on the endpoint's port itself, with SO_REUSEPORT: the kernel deals connections
out among those that listen. So a request makes one hop, and a replica that replaces a killed one
gets the same port at once. Ray Serve's own listeners do neither on a fixed port: its proxy costs
an extra process and 5 ms of CPU a request; its direct ingress binds without SO_REUSEADDR, so a
port that answered in the last minute is taken, for a replacement and for the next start alike.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
import time
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from treadle import wire
from treadle.errors import ConfigError, InternalError

__all__ = ["Listener", "reserve_port"]

_MAX_CONNECTIONS = 2048
_MAX_HEAD_BYTES = 64 << 10
_HEAD_TIMEOUT_S = 30.0


def reserve_port(host: str, port: int) -> socket.socket:
    """A socket that keeps `port` (0: a free one) of `host` for this user's listeners while it is open.

    Raises:
        ConfigError: the port is taken, or may not be used, or the host is not this machine's.
    """
    # SO_REUSEADDR alone fails beside any listener, and beside the reservation of another endpoint that
    # is still starting; SO_REUSEPORT would share the port with them.
    with _bound(host, port, socket.SO_REUSEADDR) as probe:
        port = probe.getsockname()[1]
    try:
        return _bound(host, port, socket.SO_REUSEPORT)
    except ConfigError:  # a closed connection of another program lingers there, which SO_REUSEADDR passes over
        return _bound(host, port, socket.SO_REUSEPORT, socket.SO_REUSEADDR)


def _bound(host: str, port: int, *options: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        for option in options:
            sock.setsockopt(socket.SOL_SOCKET, option, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"serve.port: got {port}, which is taken, expected a free one",
                hint="treadle serve ... --port 0 takes a free one",
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ConfigError(
                f"serve.port: got {port}, expected one from 1024 up", hint="treadle serve ... --port 0 takes a free one"
            ) from None
        raise ConfigError(
            f"serve.host: got {host!r} ({error.strerror or error}), expected an address of this machine",
            hint="serve.host=127.0.0.1",
        ) from None
    return sock


class Listener:
    """Serves an ASGI app on a shared port, in a thread with an event loop of its own.

    Args:
        app: what answers.
        host, port: where; port 0 takes a free one.
        drain_s: time that requests under way have when it closes.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, *, drain_s: float = 5.0) -> None:
        self._socket = _bound(host, port, socket.SO_REUSEADDR, socket.SO_REUSEPORT)
        self.port: int = self._socket.getsockname()[1]
        # Ray and the command line set up logging; uvicorn's own would print over it.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=_GuardedProtocol,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_graceful_shutdown=max(1, round(drain_s)),
            )
        )
        self._drain_s = drain_s
        self._thread = threading.Thread(target=self._serve, name="treadle-http", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether it takes connections."""
        return self._server.started and self._thread.is_alive()

    def start(self, *, timeout_s: float = 30.0) -> None:
        """Take connections; returns once it does.

        Raises:
            InternalError: it did not start.
        """
        self._thread.start()
        until = time.monotonic() + timeout_s
        while not self.is_alive:
            if time.monotonic() > until or not self._thread.is_alive():
                raise InternalError(f"port {self.port}: the HTTP server did not start")
            time.sleep(0.005)

    def close(self) -> None:
        """Stop listening, answer what is under way, end the thread."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(2 * self._drain_s + 1)
        self._socket.close()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])


class _GuardedProtocol(HttpToolsProtocol):
    """Bounds how much a client may send, and how long it may take, before its request is one.

    uvicorn has no limit of its own for either: headers without end would fill the memory, and
    connections that send nothing would stay for ever.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_timer is None or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > _MAX_HEAD_BYTES:
            self._refuse(431, "Request Header Fields Too Large", f"headers: got more than {_MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        del msg
        self._refuse(400, "Bad Request", "request: got something else, expected HTTP/1.1")

    def _start_timer(self) -> None:
        if self._head_timer is None:
            self._head_bytes = 0
            self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_S, self._expire)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _expire(self) -> None:
        self._refuse(408, "Request Timeout", f"headers: got not all of them in {_HEAD_TIMEOUT_S:g} s")

    def _refuse(self, status: int, reason: str, message: str) -> None:
        if self.transport.is_closing():
            return
        body = wire.canonical({"error": "RequestError", "message": message, "hint": ""})
        head = (
            f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

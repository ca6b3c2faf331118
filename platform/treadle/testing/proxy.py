"""A network between a client and a server that goes wrong where a test tells it to.

What passes is passed on byte by byte, the Host header too: S3 signs it, and a server that checks
the signature takes the host from there. Bodies are held whole, so that a fault can act on a part
of them that is known to exist; "Expect: 100-continue" is answered here.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import random
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from treadle.testing.http_wire import Message, MessageError, read_message

__all__ = ["Fault", "FaultProxy", "Rule"]

_REFUSAL = b"<?xml version='1.0'?><Error><Code>%b</Code><Message>injected</Message></Error>"
_CODES = {503: (b"Service Unavailable", b"SlowDown"), 409: (b"Conflict", b"ConditionalRequestConflict")}
_PIECES_PER_S = 20
_UPSTREAM_TIMEOUT_S = 60.0


class Fault(enum.Enum):
    """What happens to a request.

    The server sees nothing of the first four. `cut_reply` breaks off in the middle of a body, `flip_reply` and
    `flip_request` invert one bit of one, `lose_reply` hangs up after the server has done what was asked.
    """

    refuse = "503"
    conflict = "409"
    reset = "reset"
    hang = "hang"
    cut_reply = "truncated reply"
    flip_reply = "flipped bit in a reply"
    flip_request = "flipped bit in a request"
    slow = "slow"
    lose_reply = "lost reply"


_NEEDS_REPLY_BODY = frozenset({Fault.cut_reply, Fault.flip_reply})


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which requests a fault befalls: those that fit every condition.

    Args:
        fault: what happens.
        methods: HTTP methods; empty: any.
        path: a regular expression searched in path and query.
        header: the start of a header's name, lower case: "if-" finds conditional writes.
        share: probability of a request that fits, 0 to 1.
        first: number of the first request that fits and is meant, from 1.
        most: how often the fault happens at all; None: without end.
        bytes_per_s: speed of `slow`, both ways.
    """

    fault: Fault
    methods: frozenset[str] = frozenset()
    path: str = ""
    header: str = ""
    share: float = 1.0
    first: int = 1
    most: int | None = None
    bytes_per_s: int = 100_000

    def fits(self, request: Message) -> bool:
        method, path, _ = request.first_line
        names = (line.lower() for line in request.head.decode("latin-1").split("\r\n")[1:])
        return (
            (not self.methods or method in self.methods)
            and bool(re.search(self.path, path))
            and (not self.header or any(name.startswith(self.header) for name in names))
            and (self.fault is not Fault.flip_request or bool(request.body))
        )


class FaultProxy:
    """Listens on a free port of the loopback interface and passes requests on to `upstream`; a context manager.

    Args:
        upstream: "http://host:port" of the server; "" where every request hangs or is refused.
        rules: the first that strikes decides; they can be exchanged at any time (`rules`).
        seed: of what happens by chance.

    `url` is what a client is told, `done` counts the faults by kind, `num_passed` the replies handed on.
    """

    def __init__(self, upstream: str, *rules: Rule, seed: int = 0) -> None:
        parts = urllib.parse.urlsplit(upstream)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self._rng = random.Random(seed)  # noqa: S311
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.rules = rules
        self.done: Counter[Fault] = Counter()
        self.num_passed = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What goes wrong from now on. Setting them starts the counts of `first` and `most` again."""
        return self._rules

    @rules.setter
    def rules(self, rules: tuple[Rule, ...]) -> None:
        with self._lock:
            self._rules = tuple(rules)
            self._num_fits = [0] * len(rules)
            self._num_struck = [0] * len(rules)

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # closing alone does not wake who waits in accept()
        self._listener.close()
        with self._lock:
            left = list(self._open)
        for connection in left:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(10)

    # Inside

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True, name="fault proxy")
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def _accept(self) -> None:
        while not self._is_closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(self._serve, client)

    @contextlib.contextmanager
    def _kept(self, connection: socket.socket) -> Iterator[None]:
        with self._lock:
            self._open.add(connection)
        try:
            with connection:
                yield
        finally:
            with self._lock:
                self._open.discard(connection)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, MessageError, ValueError), self._kept(client), client.makefile("rb") as asked:
            while (request := read_message(asked, sender=client)) is not None:
                if not self._answer(client, request) or request.is_last:
                    return

    def _answer(self, client: socket.socket, request: Message) -> bool:
        """Whether the connection goes on."""
        rule = self._choose(request)
        fault = rule.fault if rule else None
        if fault in (Fault.refuse, Fault.conflict):
            status = 503 if fault is Fault.refuse else 409
            reason, code = _CODES[status]
            body = b"" if request.first_line[0] == "HEAD" else _REFUSAL % code
            client.sendall(b"HTTP/1.1 %d %b\r\nContent-Length: %d\r\n\r\n%b" % (status, reason, len(body), body))
            return True
        if fault is Fault.reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if fault is Fault.hang:
            self._wait_for_end(client)
            return False
        if fault is Fault.flip_request:
            request = Message(head=request.head, body=self._flipped(request.body))
        reply = self._ask(request, rule.bytes_per_s if rule and fault is Fault.slow else 0)
        return reply is not None and self._hand_over(client, request, reply, rule)

    def _choose(self, request: Message) -> Rule | None:
        with self._lock:
            for i, rule in enumerate(self._rules):
                if not rule.fits(request):
                    continue
                self._num_fits[i] += 1
                is_due = self._num_fits[i] >= rule.first and (rule.most is None or self._num_struck[i] < rule.most)
                if is_due and self._rng.random() < rule.share:
                    if rule.fault not in _NEEDS_REPLY_BODY:  # else only where the reply has a body
                        self._strike(rule)
                    return rule
        return None

    def _strike(self, rule: Rule) -> None:
        with contextlib.suppress(ValueError):  # a rule that was exchanged meanwhile
            self._num_struck[self._rules.index(rule)] += 1
        self.done[rule.fault] += 1

    def _ask(self, request: Message, bytes_per_s: int) -> Message | None:
        """The reply of the server; a connection of its own for each request keeps the two sides apart."""
        connection = socket.create_connection(self._upstream, timeout=_UPSTREAM_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._kept(connection), connection.makefile("rb") as answered:
            self._send(connection, request.head + request.body, bytes_per_s)
            while (reply := read_message(answered, to=request)) is not None and reply.status < 200:
                pass  # "100 Continue", which the client has had from here
            return reply

    def _hand_over(self, client: socket.socket, request: Message, reply: Message, rule: Rule | None) -> bool:
        fault = rule.fault if rule else None
        if fault is Fault.lose_reply:
            return False
        if rule and fault in _NEEDS_REPLY_BODY and reply.body and reply.status < 300:
            with self._lock:
                self._strike(rule)
            if fault is Fault.cut_reply:
                client.sendall(reply.head + reply.body[: len(reply.body) // 2])
                return False
            reply = Message(head=reply.head, body=self._flipped(reply.body))
        with self._lock:  # before the client can have it and look
            self.num_passed += 1
        self._send(client, reply.head + reply.body, rule.bytes_per_s if rule and fault is Fault.slow else 0)
        return not reply.is_last and bool(reply.field("content-length") or reply.field("transfer-encoding"))

    def _flipped(self, body: bytes) -> bytes:
        """`body` with one bit inverted; of a chunked one the middle, which lies in the longest chunk as a rule."""
        changed = bytearray(body)
        with self._lock:
            at = self._rng.randrange(len(body)) if not body.endswith(b"0\r\n\r\n") else len(body) // 2
            changed[at] ^= 1 << self._rng.randrange(8)
        return bytes(changed)

    def _send(self, target: socket.socket, data: bytes, bytes_per_s: int) -> None:
        if not bytes_per_s:
            target.sendall(data)
            return
        piece = max(1, bytes_per_s // _PIECES_PER_S)
        start = time.monotonic()
        for number, offset in zip(itertools.count(1), range(0, len(data), piece), strict=False):
            target.sendall(data[offset : offset + piece])
            if self._is_closed.wait(max(0.0, start + number / _PIECES_PER_S - time.monotonic())):
                return

    def _wait_for_end(self, client: socket.socket) -> None:
        """Until the client hangs up or the proxy is closed."""
        client.settimeout(0.1)
        while not self._is_closed.is_set():
            try:
                if not client.recv(1 << 16):
                    return
            except TimeoutError:
                continue

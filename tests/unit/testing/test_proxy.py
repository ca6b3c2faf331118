"""Every fault of the proxy reaches the client, as often as it was asked for, and nothing else does."""

from __future__ import annotations

import http.client
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from treadle.testing import Fault, FaultProxy, Rule

BODY = bytes(range(256)) * 40


class Upstream:
    """Keeps what it was sent; answers GET with BODY and the rest with what came."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bytes]] = []
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

            def do_GET(self) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    while size := int(self.rfile.readline(), 16):
                        data += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                upstream.seen.append((self.command, self.headers["Host"], data))
                answer = BODY if self.command in ("GET", "HEAD") else data
                self.send_response(200)
                if self.path.endswith("/chunked"):
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    for start in range(0, len(answer), 1000):
                        piece = answer[start : start + 1000]
                        self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    self.wfile.write(b"0\r\n\r\n")
                    return
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer)

            do_PUT = do_POST = do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    found = Upstream()
    yield found
    found.close()


@pytest.fixture
def proxied(upstream: Upstream) -> Iterator[Callable[..., FaultProxy]]:
    opened: list[FaultProxy] = []

    def connect(*rules: Rule, seed: int = 0) -> FaultProxy:
        opened.append(FaultProxy(upstream.url, *rules, seed=seed).__enter__())
        return opened[-1]

    yield connect
    for proxy in opened:
        proxy.__exit__(None, None, None)
    assert not [t.name for t in threading.enumerate() if t.name == "fault proxy"]


def host_of(proxy: FaultProxy) -> str:
    return urllib.parse.urlsplit(proxy.url).netloc


def ask(proxy: FaultProxy, method: str = "GET", path: str = "/a", body: bytes | None = None, **headers: str) -> Any:
    """(status, body) of one request."""
    connection = http.client.HTTPConnection(host_of(proxy), timeout=5)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_without_a_rule_everything_passes_unchanged(upstream: Upstream, proxied: Callable[..., FaultProxy]) -> None:
    proxy = proxied()
    assert ask(proxy) == (200, BODY)
    assert ask(proxy, path="/x/chunked") == (200, BODY)
    assert ask(proxy, "HEAD") == (200, b"")
    assert ask(proxy, "PUT", body=BODY) == (200, BODY)
    assert upstream.seen[-1] == ("PUT", host_of(proxy), BODY)  # the host that the client signed
    assert (proxy.done.total(), proxy.num_passed) == (0, 4)


def test_a_connection_serves_many_requests(proxied: Callable[..., FaultProxy]) -> None:
    proxy = proxied(Rule(fault=Fault.refuse, first=3, most=1))
    connection = http.client.HTTPConnection(host_of(proxy), timeout=5)
    statuses = []
    for _ in range(5):
        connection.request("GET", "/a")
        statuses.append((answer := connection.getresponse()).status)
        answer.read()
    connection.close()
    assert statuses == [200, 200, 503, 200, 200]
    assert proxy.done == {Fault.refuse: 1}


def test_a_body_that_waits_for_100_and_a_chunked_one_arrive(upstream: Upstream, proxied: Any) -> None:
    proxy = proxied()
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), timeout=5) as client:
        client.sendall(b"PUT /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"abc")
        assert client.recv(10_000).startswith(b"HTTP/1.0 200") or upstream.seen
        client.sendall(b"PUT /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.sendall(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
        deadline = time.monotonic() + 5
        while len(upstream.seen) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert upstream.seen == [("PUT", "h", b"abc"), ("PUT", "h", b"abcde")]


def test_a_refusal_does_not_reach_the_server(upstream: Upstream, proxied: Callable[..., FaultProxy]) -> None:
    proxy = proxied(Rule(fault=Fault.refuse, methods=frozenset({"PUT"})), Rule(fault=Fault.conflict, path="b$"))
    assert ask(proxy, "PUT")[0] == 503
    status, body = ask(proxy, "GET", "/b")
    assert (status, b"ConditionalRequestConflict" in body) == (409, True)
    assert ask(proxy, "GET", "/b2")[0] == 200
    assert len(upstream.seen) == 1
    assert proxy.done == {Fault.refuse: 1, Fault.conflict: 1}


def test_a_rule_may_ask_for_a_header(proxied: Callable[..., FaultProxy]) -> None:
    proxy = proxied(Rule(fault=Fault.refuse, header="if-"))
    assert ask(proxy, "PUT")[0] == 200
    assert ask(proxy, "PUT", If_None_Match="*")[0] == 503


def test_a_share_is_a_share_and_its_seed_decides(proxied: Callable[..., FaultProxy]) -> None:
    def statuses(seed: int) -> list[int]:
        proxy = proxied(Rule(fault=Fault.refuse, share=0.3), seed=seed)
        found = [ask(proxy)[0] for _ in range(100)]
        assert proxy.done[Fault.refuse] == found.count(503)
        return found

    first = statuses(1)
    assert 15 <= first.count(503) <= 45
    assert statuses(1) == first
    assert statuses(2) != first


def test_a_reset_and_a_lost_reply_end_the_connection(upstream: Upstream, proxied: Callable[..., FaultProxy]) -> None:
    proxy = proxied(Rule(fault=Fault.reset))
    with pytest.raises(ConnectionResetError):
        ask(proxy, "PUT", body=BODY)
    assert upstream.seen == []
    proxy.rules = (Rule(fault=Fault.lose_reply),)
    with pytest.raises(http.client.RemoteDisconnected):
        ask(proxy, "PUT", body=b"done")
    assert [data for _, _, data in upstream.seen] == [b"done"]
    assert proxy.done == {Fault.reset: 1, Fault.lose_reply: 1}


def test_a_reply_is_cut_or_one_bit_of_it_flipped(proxied: Callable[..., FaultProxy]) -> None:
    proxy = proxied(Rule(fault=Fault.cut_reply))
    with pytest.raises(http.client.IncompleteRead) as cut:
        ask(proxy)
    assert cut.value.partial == BODY[: len(BODY) // 2]
    assert ask(proxy, "HEAD")[0] == 200  # nothing to cut: not counted
    assert proxy.done == {Fault.cut_reply: 1}
    proxy.rules = (Rule(fault=Fault.flip_reply, most=1),)
    _, seen = ask(proxy)
    assert num_flipped(seen, BODY) == 1
    assert ask(proxy) == (200, BODY)
    proxy.rules = (Rule(fault=Fault.flip_reply, most=1),)
    assert num_flipped(ask(proxy, path="/x/chunked")[1], BODY) == 1


def num_flipped(seen: bytes, sent: bytes) -> int:
    assert len(seen) == len(sent)
    return sum((a ^ b).bit_count() for a, b in zip(seen, sent, strict=True))


def test_one_bit_of_a_request_is_flipped(upstream: Upstream, proxied: Callable[..., FaultProxy]) -> None:
    proxy = proxied(Rule(fault=Fault.flip_request))
    ask(proxy, "GET")  # no body
    ask(proxy, "PUT", body=BODY)
    assert num_flipped(upstream.seen[-1][2], BODY) == 1
    assert proxy.done == {Fault.flip_request: 1}


def test_a_request_hangs_until_the_client_leaves(proxied: Callable[..., FaultProxy]) -> None:
    proxy = proxied(Rule(fault=Fault.hang, most=1))
    connection = http.client.HTTPConnection(host_of(proxy), timeout=0.3)
    connection.request("GET", "/a")
    with pytest.raises(TimeoutError):
        connection.getresponse()
    connection.close()
    assert ask(proxy)[0] == 200
    assert proxy.done == {Fault.hang: 1}


def test_a_proxy_that_is_closed_ends_what_hangs(proxied: Callable[..., FaultProxy]) -> None:
    proxy = proxied(Rule(fault=Fault.hang))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, proxy)
        while not proxy.done:
            time.sleep(0.01)
        proxy.__exit__(None, None, None)
        with pytest.raises(OSError, match=r"[Rr]eset|without response|closed"):
            waiting.result(5)


def test_slow_is_slow_by_the_bytes(proxied: Callable[..., FaultProxy]) -> None:
    proxy = proxied(Rule(fault=Fault.slow, bytes_per_s=20_000))
    start = time.monotonic()
    assert ask(proxy) == (200, BODY)
    assert time.monotonic() - start >= len(BODY) / 20_000 * 0.9  # 10 kB both ways: half a second
    assert proxy.done == {Fault.slow: 1}


def test_an_upstream_that_is_gone_is_a_hang_up(proxied: Callable[..., FaultProxy], upstream: Upstream) -> None:
    proxy = proxied()
    proxy._upstream = ("127.0.0.1", 9)
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        ask(proxy)
    assert upstream.seen == []

"""A port that is shared on purpose, taken by nobody else, and free again at once."""

from __future__ import annotations

import http.client
import socket
import threading

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from treadle.errors import ConfigError
from treadle.serve.listener import Listener, reserve_port


def naming(name: str) -> Starlette:
    async def page(request):
        return PlainTextResponse(name)

    return Starlette(routes=[Route("/", page)])


def get(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/", headers={"Connection": "close"})  # so that the server closes first
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def test_a_restart_gets_its_port_at_once():
    listener = Listener(naming("first"), "127.0.0.1", 0)
    listener.start()
    port = listener.port
    assert [get(port) for _ in range(5)] == ["first"] * 5
    listener.close()
    assert not listener.is_alive
    with reserve_port("127.0.0.1", port):
        again = Listener(naming("second"), "127.0.0.1", port)
        again.start()
        assert get(port) == "second"
        again.close()


def test_replicas_share_the_port_that_is_reserved_for_them():
    with reserve_port("127.0.0.1", 0) as reserved:
        port = reserved.getsockname()[1]
        listeners = [Listener(naming(name), "127.0.0.1", port) for name in ("a", "b")]
        for listener in listeners:
            listener.start()
        assert {get(port) for _ in range(60)} == {"a", "b"}
        listeners[0].close()
        assert {get(port) for _ in range(20)} == {"b"}
        listeners[1].close()
        with pytest.raises(OSError, match="refused"):
            get(port)


def test_a_second_endpoint_does_not_slip_in():
    with reserve_port("127.0.0.1", 0) as reserved:
        port = reserved.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"serve.port: got {port}, which is taken") as caught:
            reserve_port("127.0.0.1", port)
        assert "--port 0" in caught.value.hint
        listener = Listener(naming("a"), "127.0.0.1", port)
        listener.start()
        with pytest.raises(ConfigError, match="which is taken"):
            reserve_port("127.0.0.1", port)
        listener.close()
    reserve_port("127.0.0.1", port).close()


@pytest.mark.parametrize("options", [(), (socket.SO_REUSEADDR,), (socket.SO_REUSEADDR, socket.SO_REUSEPORT)])
def test_a_port_of_another_program_is_taken(options):
    with socket.socket() as other:
        for option in options:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="which is taken"):
            reserve_port("127.0.0.1", other.getsockname()[1])


def test_a_host_of_another_machine():
    with pytest.raises(ConfigError, match=r"serve.host: got '203.0.113.9' \("):
        reserve_port("203.0.113.9", 0)


def test_closing_lets_requests_finish():
    running, gate = threading.Event(), threading.Event()

    def slow():
        running.set()
        assert gate.wait(10)
        return "done"

    async def page(request):
        from starlette.concurrency import run_in_threadpool

        return PlainTextResponse(await run_in_threadpool(slow))

    listener = Listener(Starlette(routes=[Route("/", page)]), "127.0.0.1", 0)
    listener.start()
    found: list[str] = []
    client = threading.Thread(target=lambda: found.append(get(listener.port)))
    client.start()
    assert running.wait(10)
    closing = threading.Thread(target=listener.close)
    closing.start()
    gate.set()
    closing.join(10)
    client.join(10)
    assert found == ["done"]

"""The client gives back the endpoint's own errors, and says so where there is no endpoint."""

from __future__ import annotations

import http.server
import socket
import threading

import pytest
from served_models import load, serving

from treadle.errors import ConfigError, InternalError, OverloadError, RequestError, TransientError
from treadle.serve import ask
from treadle.serve.engine import Engine
from treadle.testing import MemoryBlobs


@pytest.fixture(scope="module")
def predictor():
    return load(MemoryBlobs(), "g2p")


@pytest.fixture(scope="module")
def url(predictor):
    with serving(Engine(predictor)) as address:
        yield address


@pytest.fixture
def other(request):
    """A server that is not ours; answers every POST with the status and body it is given."""
    status, body, headers = request.param

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["", "/", "/predict", "/v1/models/g2p:predict"])
def test_an_answer(url, path):
    answer = ask(url + path, ["cat", ["d", "o"]])
    assert (answer["model"], answer["version"], len(answer["outputs"])) == ("g2p", 1, 2)


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(url, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert ask(url, ["cat"])["version"] == 1


def test_a_refusal_comes_back_as_it_was_raised(url):
    with pytest.raises(RequestError) as caught:
        ask(url, ["Cat"])
    assert caught.value.message.startswith("inputs[0][0]: got symbol 'C'")
    assert caught.value.hint.startswith("it knows a b c")
    assert caught.value.status == 422
    with pytest.raises(RequestError) as caught:
        ask(f"{url}/v1/models/dog:predict", ["cat"])
    assert caught.value.status == 404


@pytest.mark.parametrize("inputs", [[float("nan")], [float("inf")], [{1, 2}], [b"cat"]])
def test_what_is_not_json_is_not_sent(inputs):
    with pytest.raises(RequestError, match="inputs: got what is not JSON"):
        ask("http://127.0.0.1:9", inputs)


@pytest.mark.parametrize(
    "bad", ["", "127.0.0.1:8000", "ftp://x/", "file:///etc/passwd", "http://", "http://x:99999", "http://[::1"]
)
def test_what_is_no_url(bad):
    with pytest.raises(ConfigError, match="url: got"):
        ask(bad, ["cat"])


def test_no_endpoint_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(TransientError, match="got no endpoint there") as caught:
            ask(url, ["cat"])
    assert caught.value.hint == "treadle serve MODEL@ALIAS"


def test_no_answer_in_time():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(TransientError, match=r"got no answer in 0\.2 s"):
            ask(f"http://127.0.0.1:{silent.getsockname()[1]}", ["cat"], timeout_s=0.2)


@pytest.mark.parametrize(
    "other",
    [
        (200, b'{"outputs": []}', {}),
        (200, b"<html>", {"X-Treadle-Version": "g2p@1"}),
        (200, b"[]", {"X-Treadle-Version": "g2p@1"}),
        (404, b"no such page", {}),
        (500, b"{}", {}),
        (502, b'"bad gateway"', {}),
    ],
    indirect=True,
)
def test_another_server(other):
    with pytest.raises(TransientError, match=r"another server|no endpoint there"):
        ask(other, ["cat"])


OVERLOAD = b'{"error": "OverloadError", "message": "queue: full", "hint": "later"}'
BROKEN = b'{"error": "InternalError", "message": "model: failed", "hint": ""}'


@pytest.mark.parametrize(
    ("other", "wait_s"),
    [((503, OVERLOAD, {"Retry-After": "7"}), 7), ((503, OVERLOAD, {}), 1), ((503, OVERLOAD, {"Retry-After": "x"}), 1)],
    indirect=["other"],
)
def test_overload_says_when_to_come_back(other, wait_s):
    with pytest.raises(OverloadError) as caught:
        ask(other, ["cat"])
    assert caught.value.context == {"retry_after_s": wait_s}
    assert (caught.value.message, caught.value.hint) == ("queue: full", "later")


@pytest.mark.parametrize("other", [(500, BROKEN, {})], indirect=True)
def test_a_failure_of_the_model(other):
    with pytest.raises(InternalError, match="model: failed"):
        ask(other, ["cat"])

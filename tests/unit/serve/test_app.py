"""The HTTP face under a real server: answers, and every refusal in one form with the server alive after it."""

from __future__ import annotations

import concurrent.futures
import gzip
import http.client
import json
import random
import socket
import string
import threading
import time
import urllib.parse

import pytest
from served_models import MAX_LENGTH, load, serving

from treadle.serve.client import ask
from treadle.serve.engine import Engine
from treadle.testing import MemoryBlobs

LIMIT = 4096
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def predictor():
    return load(MemoryBlobs(), "g2p", max_rows=8, max_body=str(LIMIT))


@pytest.fixture(scope="module")
def url(predictor):
    with serving(Engine(predictor), body_timeout_s=1.0) as address:
        yield address


@pytest.fixture(scope="module")
def motion_url():
    with serving(Engine(load(MemoryBlobs(), "motion", max_body=str(LIMIT)))) as address:
        yield address


def send(url, method, path, body=None, headers=JSON):
    """(status, headers, JSON or text) of one request on a connection of its own."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=20)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        data = response.read()
        is_json = response.headers.get("Content-Type") == "application/json" and data
        return response.status, response.headers, json.loads(data) if is_json else data.decode()
    finally:
        connection.close()


def post(url, body, path="/predict", headers=JSON):
    return send(url, "POST", path, body, headers)


def check_refused(url, found, status):
    """Our own form, our own words, and the next request is answered."""
    seen, headers, content = found
    assert (seen, list(content)) == (status, ["error", "message", "hint"]), found
    assert content["message"]
    assert headers["X-Treadle-Version"] == ask_healthy(url)
    return content


def ask_healthy(url):
    status, _, content = send(url, "GET", "/healthz")
    assert (status, content["status"]) == (200, "ok")
    return content["model"]


# Answers


@pytest.mark.parametrize("path", ["/predict", "/v1/models/g2p:predict"])
def test_an_answer(url, predictor, path):
    status, headers, content = post(url, b'{"inputs": ["cat", ["d", "o", "g"]]}', path)
    assert status == 200
    assert headers["X-Treadle-Version"] == "g2p@1"
    outputs = predictor.predict(predictor.validate(["cat", "dog"]))
    assert content == {"model": "g2p", "version": 1, "outputs": [output.to_json() for output in outputs]}


def test_frames_of_numbers(motion_url):
    content = post(motion_url, b'{"inputs": [[[1, -0.0, 5e-324], [2.5, 3, -1e-3]]]}')[2]
    (output,) = content["outputs"]
    assert output["labels"] == [output["label"]]
    assert 0 <= output["confidence"] <= 1


def test_the_page_says_how_to_call_and_its_own_example_works(url, motion_url):
    for at in (url, motion_url):
        status, _, page = send(at, "GET", "/")
        assert status == 200
        assert f"curl {at}/predict -H 'Content-Type: application/json'" in page
        assert post(at, page.partition("-d '")[2].partition("'\n")[0])[0] == 200


def test_the_models_card(url):
    status, _, card = send(url, "GET", "/v1/models/g2p")
    assert status == 200
    assert card["signature"]["max_length"] == MAX_LENGTH
    assert card["metrics"] == {"accuracy": 0.75}
    assert card["limits"]["max_rows"] == 8
    assert send(url, "HEAD", "/v1/models/g2p")[0] == 200


def test_sixty_four_clients_get_their_own_answers(url, predictor):
    rng = random.Random(3)
    words = [
        ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, MAX_LENGTH))) for _ in range(3)]
        for _ in range(64)
    ]
    before = send(url, "GET", "/stats")[2]
    with concurrent.futures.ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(lambda inputs: ask(url, inputs), words))
    for inputs, answer in zip(words, answers, strict=True):
        expected = predictor.predict(predictor.validate(inputs))
        assert [output["labels"] for output in answer["outputs"]] == [list(output.labels) for output in expected]
        assert [output["confidence"] for output in answer["outputs"]] == pytest.approx(
            [output.confidence for output in expected], abs=1e-5
        )
    after = send(url, "GET", "/stats")[2]
    assert after["rows"] - before["rows"] == 192
    assert after["waiting_rows"] == after["waiting_slots"] == 0


# Refused bodies

BODIES = [
    (b"", 400),
    (b"not json", 400),
    (b"{", 400),
    (b'{"inputs": ["cat"]', 400),
    (b'{"inputs": ["cat"]} x', 400),
    (b'\xef\xbb\xbf{"inputs": ["cat"]}', 400),
    ('{"inputs": ["cat"]}'.encode("utf-16"), 400),
    (b'{"inputs": ["c\xff"]}', 400),
    (b'{"inputs": [NaN]}', 400),
    (b'{"inputs": [Infinity]}', 400),
    (b'{"inputs": ["cat"], "inputs": ["dog"]}', 400),
    (b'{"inputs": [' + b"9" * 4000 + b"]}", 422),
    (b'{"inputs": [{"a": 1, "a": 2}]}', 400),
    (b"[" * 4000, 400),
    (b'{"inputs": [1e999]}', 400),
    (b'{"inputs": [' + b"9" * 2000 + b"e999]}", 400),
    (b'{"inputs": ["\\ud800"]}', 422),
    (b'{"inputs": ["c\\u0000t"]}', 422),
    (b"null", 422),
    (b"[]", 422),
    (b'"cat"', 422),
    (b"{}", 422),
    (b'{"input": ["cat"]}', 422),
    (b'{"inputs": ["cat"], "extra": 1}', 422),
    (b'{"inputs": null}', 422),
    (b'{"inputs": []}', 422),
    (b'{"inputs": [[]]}', 422),
    (b'{"inputs": [""]}', 422),
    (b'{"inputs": [true]}', 422),
    (b'{"inputs": ["cat", 1]}', 422),
    (b'{"inputs": [["c", true]]}', 422),
    (json.dumps({"inputs": ["a" * (MAX_LENGTH + 1)]}).encode(), 422),
    (json.dumps({"inputs": ["a"] * 9}).encode(), 422),
    (b'{"inputs": [' + b"[0]," * 1022 + b"[0]]}", 413),
]


@pytest.mark.parametrize(
    ("body", "status"), BODIES, ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else None
)
def test_bodies_that_are_refused(url, body, status):
    content = check_refused(url, post(url, body), status)
    assert content["error"] == "RequestError"
    assert len(json.dumps(content)) < 700


FRAMES = ["[]", "[1, 2, 3]", "[[1, 2]]", "[[1, 2, 3], [1]]", '[["1", "2", "3"]]', "[[true, 2, 3]]", "[[null, 2, 3]]"]
FRAMES += ["[[1e39, 2, 3]]", f"[[{'9' * 400}, 2, 3]]", "[[[1], 2, 3]]", '"abc"', "{}"]
FRAMES += [json.dumps([[0, 0, 0]] * (MAX_LENGTH + 1))]


@pytest.mark.parametrize("frames", FRAMES)
def test_frames_that_are_refused(motion_url, frames):
    check_refused(motion_url, post(motion_url, f'{{"inputs": [{frames}]}}'), 422)


def test_a_number_too_long_to_be_read(motion_url):
    body = f'{{"inputs": [[[{"9" * 5000}, 2, 3]]]}}'
    with serving(Engine(load(MemoryBlobs(), "motion"))) as roomy:
        check_refused(roomy, post(roomy, body), 400)
    check_refused(motion_url, post(motion_url, body), 413)


def test_the_sizes_at_the_limit(url):
    word = json.dumps({"inputs": ["cat"]})
    assert post(url, word.ljust(LIMIT))[0] == 200
    check_refused(url, post(url, word.ljust(LIMIT + 1)), 413)
    assert post(url, json.dumps({"inputs": ["a", "b" * MAX_LENGTH] * 4}))[0] == 200


def test_nothing_of_the_body_comes_back(url):
    secret = "hunter2-very-secret"
    for body in (
        f'{{"{secret}": 1}}',
        f'{{"inputs": ["{secret.upper()}"]}}',
        f'{{"inputs": {{"{secret}": 1}}}}',
        f"{secret}",
    ):
        content = json.dumps(post(url, body)[2])
        assert secret not in content
        assert secret.upper() not in content


# Refused transport


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({**JSON, "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
        ({**JSON, "Content-Encoding": "identity"}, 200),
    ],
)
def test_media_types(url, headers, status):
    body = b'{"inputs": ["cat"]}'
    body = gzip.compress(body) if headers.get("Content-Encoding") == "gzip" else body
    found = post(url, body, headers=headers)
    assert found[0] == 200 if status == 200 else check_refused(url, found, status)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/predict", "POST"),
        ("HEAD", "/predict", "POST"),
        ("PUT", "/predict", "POST"),
        ("DELETE", "/v1/models/g2p", "GET, HEAD, POST"),
        ("GET", "/v1/models/g2p:predict", "POST"),
        ("POST", "/v1/models/g2p", "GET"),
        ("POST", "/healthz", "GET"),
        ("BREW", "/stats", "GET"),
    ],
)
def test_methods_that_a_path_does_not_have(url, method, path, allow):
    found = send(url, method, path)
    if found[2] or method != "HEAD":
        assert method == "BREW" or check_refused(url, found, 405)["error"] == "RequestError"
    if method == "BREW":  # the server knows no such method at all
        assert found[0] == 400
    else:
        assert found[0] == 405
        assert set(allow.split(", ")) <= set(found[1]["Allow"].split(", "))


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("GET", "/nowhere", "path: got an unknown one, expected one of /, /predict"),
        ("POST", "/predict/", "path: got an unknown one"),
        ("GET", "/v1/models/g2p:explain", "path: got an unknown one"),
        ("GET", "/v1/models/g2q", "model: got 'g2q', expected 'g2p' - did you mean 'g2p'?"),
        ("POST", "/v1/models/motion:predict", "model: got 'motion', expected 'g2p'"),
        ("GET", "/v1/models/%2e%2e%2fsecrets", "path: got an unknown one"),
        ("GET", "/v1/models/" + "x" * 3000, "model: got "),
        ("GET", "/%00", "path: got an unknown one"),
    ],
)
def test_paths_that_are_not_there(url, method, path, message):
    content = check_refused(url, send(url, method, path), 404)
    assert content["error"] == "NotFoundError"
    assert content["message"].startswith(message)
    assert len(content["message"]) < 200


def raw(url, *parts, pause_s=0.0, wait_s=10.0):
    """What comes back for bytes sent as they are, until the server closes or answers."""
    parsed = urllib.parse.urlsplit(url)
    with socket.create_connection((parsed.hostname, parsed.port), timeout=wait_s) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:  # refused while it was still sent
                break
            time.sleep(pause_s)
        received = b""
        try:
            while chunk := connection.recv(65536):
                received += chunk
        except OSError:
            pass
        return received


HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_a_declared_body_that_is_too_large_is_refused_before_it_comes(url):
    answer = raw(url, HEAD + b"Content-Length: 60000000\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 413")
    answer = raw(url, HEAD + b"Content-Length: 5000\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408"), "what never comes is not waited for longer than allowed"
    check_refused(url, post(url, b"[0]," * 10_000), 413)
    check_refused(url, post(url, b"x" * (20 * LIMIT)), 413)


def test_a_chunked_body_is_counted(url):
    word = b'{"inputs": ["cat"]}'
    chunk = b"%x\r\n%s\r\n" % (len(word), word)
    chunked = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert raw(url, chunked + chunk + b"0\r\n\r\n").startswith(b"HTTP/1.1 200")
    endless = raw(url, chunked, *([b"1000\r\n" + b" " * 4096 + b"\r\n"] * 40))
    assert endless.startswith(b"HTTP/1.1 413") or endless == b""
    assert raw(url, chunked + chunk).startswith(b"HTTP/1.1 408")
    ask_healthy(url)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n{}",
        HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
        HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
        HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused_in_the_same_form(url, data):
    answer = raw(url, data)
    assert answer.startswith(b"HTTP/1.1 400")
    assert list(json.loads(answer.partition(b"\r\n\r\n")[2])) == ["error", "hint", "message"]
    ask_healthy(url)


@pytest.mark.parametrize("flood", [[b"X-A: " + b"a" * 1000 + b"\r\n"] * 400, [b"X-A: "] + [b"a" * 4000] * 100])
def test_headers_without_end(url, flood):
    answer = raw(url, HEAD, *flood)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    ask_healthy(url)


def test_slow_clients_hold_nobody_up(url):
    parsed = urllib.parse.urlsplit(url)
    slow = [socket.create_connection((parsed.hostname, parsed.port)) for _ in range(50)]
    try:
        for connection in slow[:25]:
            connection.sendall(HEAD[:20])
        for connection in slow[25:]:
            connection.sendall(HEAD + b"Content-Length: 19\r\n\r\n{")
        began_s = time.monotonic()
        assert ask(url, ["cat"])["version"] == 1
        assert time.monotonic() - began_s < 5
        for connection in slow[25:]:
            connection.settimeout(10)
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
    finally:
        for connection in slow:
            connection.close()
    ask_healthy(url)


def test_two_requests_on_one_connection(url):
    body = b'{"inputs": ["cat"]}'
    one = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    answer = raw(url, one + one.replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n"))
    assert answer.count(b"HTTP/1.1 200 OK") == 2


# Load and departures


class Held:
    """A model that waits until it is let go."""

    def __init__(self, predictor):
        self.predictor = predictor
        self.gate = threading.Event()
        self.running = threading.Event()

    def predict(self, rows):
        self.running.set()
        self.gate.wait(20)
        return self.predictor.predict(rows)


@pytest.fixture
def held():
    predictor = load(MemoryBlobs(), "g2p", max_queue_slots=50)
    model = Held(predictor)
    engine = Engine(predictor, model=model)
    with serving(engine) as url:
        yield url, model
        model.gate.set()


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stats(url):
    return send(url, "GET", "/stats")[2]


def test_overload_is_503_at_once_and_passes(held):
    url, model = held
    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        first = clients.submit(ask, url, ["abc"])
        assert model.running.wait(10)
        second = clients.submit(ask, url, ["a" * 24, "b" * 24])
        until(lambda: stats(url)["waiting_slots"] == 48)
        began_s = time.monotonic()
        status, headers, content = post(url, b'{"inputs": ["cat"]}')
        assert time.monotonic() - began_s < 2
        assert (status, content["error"]) == (503, "OverloadError")
        assert int(headers["Retry-After"]) >= 1
        model.gate.set()
        assert len(first.result(20)["outputs"]) == 1
        assert len(second.result(20)["outputs"]) == 2
    assert post(url, b'{"inputs": ["cat"]}')[0] == 200
    assert stats(url)["errors"] == {"503": 1}


def test_a_client_that_leaves_takes_its_rows_along(held):
    url, model = held
    parsed = urllib.parse.urlsplit(url)
    body = b'{"inputs": ["abcd", "abcde"]}'
    connections = []
    for _ in range(3):
        connection = socket.create_connection((parsed.hostname, parsed.port))
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        connections.append(connection)
        assert model.running.wait(10)
    until(lambda: stats(url)["waiting_rows"] >= 4)
    for connection in connections:
        connection.close()
    until(lambda: stats(url)["waiting_rows"] == 0)
    model.gate.set()
    assert len(ask(url, ["cat"])["outputs"]) == 1
    found = stats(url)
    assert found["waiting_slots"] == 0
    assert found["errors"] == {"499": 3}


def test_a_failing_model_is_500_without_its_reasons(predictor, caplog):
    class Broken:
        def predict(self, rows):
            raise ZeroDivisionError("planted")

    with serving(Engine(predictor, model=Broken())) as url:
        content = check_refused(url, post(url, b'{"inputs": ["cat"]}'), 500)
    assert content["error"] == "InternalError"
    assert "planted" not in json.dumps(content)
    assert "planted" in caplog.text


def test_a_stopped_engine_is_not_healthy(predictor):
    engine = Engine(predictor)
    with serving(engine) as url:
        engine.close()
        status, headers, content = send(url, "GET", "/healthz")
        assert (status, content["error"]) == (503, "OverloadError")
        assert headers["Retry-After"] == "1"
        assert post(url, b'{"inputs": ["cat"]}')[0] == 503
